"""Measures how fast a recipe learns: `python -m benchmarks.bench_learning --text FILE`.

It trains with the program's own loop for a number of minutes, or of tokens, and reports bits per byte of held-out text
over time.

The text. The first 90 % of the file's bytes train the tokenizer and the model; the last 10 % are only for validation.
The cut moves back to the start of a character. The shards put their last sequence into a validation split, so it trains
nothing.

The score. The validation text is one document. Its tokens are predicted in windows of the sequence length, a quarter of
it apart, so that each token has at least three quarters of a sequence before it, except at the start of the text. The
score is the bits of all its tokens (without EOS) divided by its bytes. The last score is computed by `llm eval` with
the saved checkpoint.

The clock starts with the first step, compilation included, and stops while the model is scored. Tokenizer, shards and
set-up of the model come before, the checkpoint after. With --minutes the schedule follows the clock: before each step,
train.total_tokens becomes the number of tokens that the rate so far gives for the whole time, but no more than the
config states or the rule gives: more epochs would make the model worse.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm.atomic import atomic_file, atomic_text
from llm.config_file import load_config
from llm.data.prepare import prepare_data
from llm.data.shards import Batch
from llm.data.tokenizer import load_tokenizer, train_tokenizer
from llm.errors import UserError, exit_code
from llm.inference.evaluate import evaluate, evaluate_model
from llm.model.transformer import Transformer
from llm.tools.charts import Chart, Line, png
from llm.training.engine import start, stop
from llm.training.failure_detector import FailureDetector
from llm.training.resolve import check_data
from llm.training.setup import RunSetup, find_setup
from llm.training.train import Run
from llm.world import World

SCORED_AT = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""The model is scored after these fractions of the time (or tokens), before the first step, and at the end."""
NEVER = 10**12


class TimedRun(Run):
    """A training run on one process that is scored while it runs, and that ends by the clock if it has a time."""

    def __init__(
        self,
        setup: RunSetup,
        world: World,
        detector: FailureDetector,
        seconds: float | None,
        score: Callable[[Transformer], float],
    ) -> None:
        super().__init__(setup, world, detector)
        self.budget = seconds
        self.score = score
        self.most = self.config.train.horizon  # `_aim` changes that of the config
        self.curve: list[dict[str, float]] = []
        self._to_score = list(SCORED_AT)
        self._begun: float | None = None
        self._scoring = 0.0

    @property
    def seconds(self) -> float:
        """Seconds on the clock so far."""
        return 0.0 if self._begun is None else time.perf_counter() - self._begun - self._scoring

    @property
    def progress(self) -> float:
        """Fraction of the time or of the tokens, whichever is over first."""
        return max(self.state.tokens / self.most, 0.0 if self.budget is None else self.seconds / self.budget)

    def step(self, batches: Iterator[Batch]) -> None:
        if self._begun is None:
            self._begun = time.perf_counter()
        elif self.budget is not None:
            promised = round(self.state.tokens * self.budget / self.seconds)
            self._aim(min(max(promised, self.state.tokens + self.plan.tokens_per_step + 1), self.most))
        super().step(batches)
        if self.budget is not None and self.seconds >= self.budget:
            self._aim(self.state.tokens)
        elif self._to_score and self.progress >= self._to_score[0]:
            self.validate()

    def _aim(self, total_tokens: int) -> None:
        shorter = self.config.train.model_copy(update={"total_tokens": total_tokens})
        self.config = self.config.model_copy(update={"train": shorter})

    def validate(self) -> None:
        """Scores the validation text instead of the validation split of the shards."""
        begun, seconds = time.perf_counter(), self.seconds
        self._to_score = [share for share in self._to_score if share > self.progress]
        module = self.engine.module
        assert isinstance(module, Transformer)
        module.eval()
        # Windows and training sequences have different shapes.
        with self.meter.outside("validation"), torch.compiler.set_stance("force_eager"):
            bits = self.score(module)
        module.train()
        self.curve.append({"seconds": round(seconds, 2), "tokens": self.state.tokens, "bits_per_byte": bits})
        self.display.line(f"{seconds:>8.1f} s  {self.state.tokens:>12,} tokens  {bits:.4f} bits/byte")
        if self._begun is not None:
            self._scoring += time.perf_counter() - begun


def split(text: Path, folder: Path) -> tuple[Path, Path]:
    """Writes the two parts of a text. Raises UserError if there is no such file."""
    try:
        raw = text.read_bytes()
    except OSError as error:
        raise UserError(f"--text {text}: {error.strerror}") from None
    cut = len(raw) * 9 // 10
    while 0 < cut < len(raw) and raw[cut] & 0xC0 == 0x80:  # inside a character
        cut -= 1
    parts = folder / "train.txt", folder / "validation.txt"
    for path, part in zip(parts, (raw[:cut], raw[cut:]), strict=True):
        path.write_bytes(part)
    return parts


def measure(
    text: Path,
    config_path: str,
    overrides: Sequence[str],
    *,
    vocab_size: int,
    seconds: float | None,
    tokens: int | None,
    folder: Path,
) -> dict[str, Any]:
    """Trains and scores for `seconds` or `tokens`; all files go to `folder`. Returns the result."""
    run_dir = folder / "run"
    fixed = [f"data.path={folder / 'shards'}", f"checkpoint.dir={run_dir}", f"checkpoint.every_steps={NEVER}"]
    # force: with a clock the tokens may be fewer than train.total_tokens.
    fixed += ["train.force=true", f"train.eval_every_steps={NEVER}"] + (
        [] if tokens is None else [f"train.total_tokens={tokens}"]
    )
    config = load_config(config_path, [*overrides, *fixed])
    seq_len = config.data.seq_len or config.model.max_seq_len
    train_text, validation_text = split(text, folder)
    tok = folder / "tokenizer.model"
    train_tokenizer([train_text], tok.with_suffix(""), vocab_size, documents="file")
    shards = prepare_data(
        [train_text],
        tok,
        folder / "shards",
        seq_len=seq_len,
        shard_tokens=200_000_000,
        val_fraction=1e-9,
        documents="file",
    )
    tokenizer, stride = load_tokenizer(tok), max(1, seq_len // 4)

    def score(model: Transformer) -> float:
        done = evaluate_model(model, tokenizer, [validation_text], context=seq_len, stride=stride, documents="file")
        return float(done["bits_per_byte"])

    world = start(config)
    if world.size > 1:
        raise UserError("this benchmark is for one process; start it without a launcher")
    run = TimedRun(
        find_setup(config, check_data(config, "never"), "never"),
        world,
        FailureDetector(world, config.train.hang_minutes, Path(run_dir)),
        seconds,
        score,
    )
    trained = run.loop()
    stop()
    final = evaluate(run_dir, [validation_text], stride=stride, documents="file", device=config.train.device)
    spent = run.curve[-1]["seconds"]
    run.curve[-1]["bits_per_byte"] = final["bits_per_byte"]
    return {
        "text": text.name,
        "train_bytes": train_text.stat().st_size,
        "validation_bytes": final["bytes"],
        "validation_bits_per_byte": final["bits_per_byte"],
        "seconds": spent,
        "steps": trained["step"],
        "tokens": trained["tokens"],
        "tokens_per_second": trained["tokens"] / spent,
        "epochs": trained["tokens"] / shards["train_tokens"],
        "bytes_per_token": shards["bytes_per_token"],
        "parameters": run.plan.parameters,
        "window": {"tokens": seq_len, "stride": stride},
        "curve": run.curve,
        "threads": torch.get_num_threads(),
        **_without_paths(json.loads((run_dir / "run.json").read_text("utf-8"))),
    }


def _without_paths(description: dict[str, Any]) -> dict[str, Any]:
    """Returns run.json without paths of temporary files."""
    config = description["config"]
    config["data"]["path"] = config["checkpoint"]["dir"] = None
    return description


def table(result: dict[str, Any]) -> str:
    """Formats the result as text."""
    lines = [
        f"{result['text']}: {result['train_bytes']:,} bytes to train on, {result['validation_bytes']:,} held out; "
        f"a vocabulary of {result['config']['model']['vocab_size']:,}, {result['bytes_per_token']:.2f} bytes a token",
        f"{result['parameters']:,} parameters, {result['device']} with {result['threads']} threads, "
        f"{result['precision']}; {result['steps']:,} steps, {result['tokens_per_second']:,.0f} tokens/s, "
        f"{result['epochs']:.2f} epochs",
        "",
        " seconds        tokens  bits/byte",
    ]
    for point in result["curve"]:
        lines.append(f"{point['seconds']:>8.1f}  {point['tokens']:>12,}  {point['bits_per_byte']:>9.4f}")
    return "\n".join(lines)


def picture(result: dict[str, Any]) -> Chart:
    points = result["curve"]
    line = Line([point["seconds"] for point in points], [point["bits_per_byte"] for point in points], style="dots")
    note = f"{result['parameters']:,} parameters, {result['threads']} threads, {result['precision']}"
    return Chart("learning", f"{result['text']}, validation", "seconds of training", "bits per byte", (line,), note)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=3.0, help="training time (default %(default)g)")
    length.add_argument("--tokens", type=partial(int, base=10), help="number of tokens to train on, instead of a time")
    parser.add_argument("--config", default="configs/shakespeare.json")
    parser.add_argument("--vocab_size", type=int, default=2048, help="of the tokenizer (default %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("artifacts/learning"), help="folder of learning-TEXT.json and .png"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    options = parser.parse_args(arguments)

    def run() -> None:
        if options.minutes <= 0:
            raise UserError(f"--minutes {options.minutes:g}: must be above 0")
        with tempfile.TemporaryDirectory(prefix="bench-learning-") as folder:
            result = measure(
                options.text,
                options.config,
                options.overrides,
                vocab_size=options.vocab_size,
                seconds=60 * options.minutes if options.tokens is None else None,
                tokens=options.tokens,
                folder=Path(folder),
            )
        limit = ["--minutes", f"{options.minutes:g}"] if options.tokens is None else ["--tokens", str(options.tokens)]
        recipe = ["--config", options.config, "--vocab_size", str(options.vocab_size), *options.overrides]
        command = ["python", "-m", "benchmarks.bench_learning", "--text", options.text.name, *limit, *recipe]
        result = {"command": shlex.join(command), **result}
        options.output.mkdir(parents=True, exist_ok=True)
        name = options.output / f"learning-{options.text.stem}"
        atomic_text(name.with_suffix(".json"), json.dumps(result, indent=2) + "\n")
        with atomic_file(name.with_suffix(".png")) as file:
            file.write(png(picture(result)))
        print(table(result))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
