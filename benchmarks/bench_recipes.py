"""Recipes for one model on the same text, compared: `python -m benchmarks.bench_recipes`.

Each arm trains `--config` on `--tokens` of its shards. The first four state all settings, so that they stay the same
when a rule changes; the last is what the rules give. PREDICTED was written before any arm ran. The command prints the
losses next to the predictions and draws all runs on one page. A run that was stopped resumes; a complete one is not
repeated.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench_ladder import run_llm
from llm.errors import UserError, exit_code

_OLD = "optimizer.kind=adamw schedule.kind=cosine schedule.min_lr_ratio=0.1 model.qk_norm=false"
_ONE_RATE = "optimizer.lr={0} optimizer.embed_lr={0} optimizer.head_lr={0} optimizer.norm_lr={0}"
_TUNED = "optimizer.kind=adamw optimizer.weight_decay=0.35 schedule.kind=linear schedule.min_lr_ratio=0"
_BATCH = "train.global_batch_tokens=524288 optimizer.beta2=0.95 schedule.warmup_tokens=50_000_000"
ARMS = {
    "a-adamw-2020": f"{_OLD} {_ONE_RATE.format('6e-4')} optimizer.weight_decay=0.1 {_BATCH}",
    "b-adamw-tuned": f"{_TUNED} {_ONE_RATE.format('2.4e-3')} model.qk_norm=false {_BATCH}",
    "c-qk-norm": f"{_TUNED} {_ONE_RATE.format('2.4e-3')} model.qk_norm=true {_BATCH}",
    "d-muon": (
        "optimizer.kind=muon optimizer.muon_lr=4.5e-3 optimizer.weight_decay=0.28 schedule.kind=linear "
        f"schedule.min_lr_ratio=0 {_ONE_RATE.format('3e-3')} model.qk_norm=true {_BATCH}"
    ),
    "e-rules": "",
}
PREDICTED = {
    "a-adamw-2020": (3.80, 4.10),
    "b-adamw-tuned": (-0.15, -0.05),
    "c-qk-norm": (-0.02, -0.01),
    "d-muon": (-0.07, -0.04),
    "e-rules": (-0.06, 0.0),
}
"""Validation loss in nats a token: of the first arm, and of each other one its difference from the one before it.

configs/125m.json on 500 million tokens of FineWeb-Edu, a vocabulary of 32,000. The first is Hoffmann et al.'s law
(1.69 + 406.4 / N^0.34 + 410.7 / D^0.28 = 3.9); the others are what each change was worth to those who measured it.
"""


def run_arms(config: str, tokens: int, folder: Path, overrides: Sequence[str]) -> None:
    """Trains each arm in FOLDER/ARM, then prints and draws all. Raises UserError where a run fails or is stopped."""
    losses: dict[str, float] = {}
    for arm, settings in ARMS.items():
        command = ["train", "--json", "--config", config, f"checkpoint.dir={folder / arm}"]
        command += [f"train.total_tokens={tokens}", *settings.split(), *overrides]
        result = json.loads(run_llm(*command).splitlines()[-1])
        if result["stopped"]:
            raise UserError(f"{arm}: {result['stopped']}, at {result['tokens']:,} tokens; the same command goes on")
        losses[arm] = result["val_loss"]
    run_llm("report", *(folder / arm for arm in ARMS), "--out_dir", folder / "report")
    before: float | None = None
    for arm, loss in losses.items():
        low, high = PREDICTED[arm]
        found = loss if before is None else loss - before
        verdict = "as predicted" if low <= found <= high else "not as predicted"
        print(f"{arm:<16}{loss:.4f}  {found:+.4f} against {low:+.2f} to {high:+.2f}: {verdict}")
        before = loss
    print(f"curves: {folder / 'report'}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="configs/125m.json")
    parser.add_argument("--tokens", type=int, default=500_000_000, help="of each arm (default %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("artifacts/recipes"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all arms, such as data.path=...")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run_arms(options.config, options.tokens, options.folder, options.overrides))


if __name__ == "__main__":
    sys.exit(main())
