"""The learning ladder: `python -m benchmarks.bench_ladder --text FILES`.

Trains models of growing size by the rules of llm/training/rules.py, and by rates at half and at twice the rules', with
AdamW and with Muon; then single changes at one size. Each run is scored in bits per byte on documents that no run has
seen. The results show whether the rules hold at every size, and what each setting is worth.

The text. One document in --held_out is held out, by its SHA-256; the tokenizer is trained on the others alone.
`python -m benchmarks.ladder_text` makes such a text from what every machine can get.

The runs. A size is named by its parameters without the embedding and the LM head, and trains on 20 tokens for each of
them, in fp32. With --precision bf16 the runs are in bf16 and have names of their own: a CPU with instructions for bf16
needs a third of the time. A run that ended is a line of OUTPUT/ladder.jsonl and is not repeated; one that was stopped
resumes from its last checkpoint. --minutes ends a call after a time, so that the ladder can be climbed in parts.
"""

import argparse
import hashlib
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm.atomic import atomic_file, atomic_text
from llm.config import Config, DataConfig, TrainConfig
from llm.config_file import parse_config
from llm.data.document_reader import read_documents
from llm.data.mixture import Mixture
from llm.data.object_store import read_data
from llm.data.tokenizer import load_tokenizer, train_tokenizer
from llm.errors import STOPPED, UserError, exit_code
from llm.model.transformer import parameter_count
from llm.tools.charts import Chart, Line, png
from llm.training.expected_loss import sample_text
from llm.training.resolve import epoch_tokens, resolve
from llm.training.rules import TOKENS_A_PARAMETER, matrix_parameters

VOCAB_SIZE, SEQ_LEN = 4096, 256
PRECISIONS = ("fp32", "bf16")
HEAD = """The runs of `python -m benchmarks.bench_ladder --text FILES --held_out N`; those whose name ends
with bf16 with `--precision bf16`. A line of `ladder.jsonl` has the settings of a run, what its text is like, its commit
and its versions (without them: those of `constraints.txt` at that commit). `LOG.md` has the text and the machines.

"""
SHORT_TEXT = 15_000_000
"""Bytes of the training documents; a shorter text holds out more for validation."""
LENGTH = "tokens a parameter"
"""The key in Rung.stated of another length than the rule's."""
SEEDS = (1, 2, 3)
"""Of the single changes, beside the default."""
SIZES: dict[str, dict[str, int]] = {
    "0.2M": {"n_layers": 4, "d_model": 64, "n_heads": 2, "n_kv_heads": 2, "d_ff": 176},
    "0.4M": {"n_layers": 4, "d_model": 96, "n_heads": 3, "n_kv_heads": 3, "d_ff": 256},
    "1.2M": {"n_layers": 6, "d_model": 128, "n_heads": 4, "n_kv_heads": 4, "d_ff": 352},
    "2.7M": {"n_layers": 6, "d_model": 192, "n_heads": 6, "n_kv_heads": 6, "d_ff": 512},
}


@dataclass(frozen=True)
class Rung:
    """A run: a size, an optimizer, a factor on the rules' rates, and settings that it states itself."""

    name: str
    size: str
    optimizer: str = "muon"
    factor: float = 1.0
    stated: dict[str, Any] = field(default_factory=dict)
    """section.key -> value; and "batch" and "decay", factors on the rule's, "tokens a parameter" and "epochs"."""
    precision: str = "fp32"

    @property
    def title(self) -> str:
        """The name of the run's line: that of a run in bf16 says so."""
        return self.name if self.precision == "fp32" else f"{self.name}, {self.precision}"


def rungs() -> Iterator[Rung]:
    """Yields all runs, cheap ones first."""
    for size in ("0.2M", "0.4M"):
        yield from _rates(size)
    # For the law of llm/training/expected_loss.py: other numbers of tokens.
    for size, ratios in {"0.2M": (1, 2, 5, 10, 40), "0.4M": (1, 2, 5), "1.2M": (1, 2)}.items():
        for ratio in ratios:
            yield Rung(f"{size} muon {ratio} tokens a parameter", size, stated={LENGTH: ratio})
    # Whether a short run wants more or fewer steps than the rule gives it.
    for factor in (0.25, 0.5, 2):
        stated = {LENGTH: 1, "batch": factor}
        yield Rung(f"0.4M 1 token a parameter, batch x{factor:g}", "0.4M", stated=stated)
    size = "0.4M"
    changes: dict[str, dict[str, Any]] = {
        "wsd": {"schedule.kind": "wsd"},
        "cosine to a tenth": {"schedule.kind": "cosine", "schedule.min_lr_ratio": 0.1},
        "no QK-norm": {"model.qk_norm": False},
        "z_loss 1e-4": {"train.z_loss": 1e-4},
        "weight decay 0.1": {"optimizer.weight_decay": 0.1},
        "tied embeddings": {"model.tie_embeddings": True},
        "beta2 0.95": {"optimizer.beta2": 0.95},
    }
    for factor in (0.5, 2.0):
        changes[f"batch x{factor:g}"] = {"batch": factor}
    for change, stated in changes.items():
        yield Rung(f"{size} {change}", size, stated=stated)
    # One seed says nothing about half a percent.
    for seed in SEEDS:
        yield Rung(f"{size} seed {seed}", size, stated={"train.seed": seed})
        for change, stated in changes.items():
            yield Rung(f"{size} {change}, seed {seed}", size, stated={**stated, "train.seed": seed})
    yield from _rates("1.2M")
    yield Rung("2.7M muon", "2.7M")


def short_rungs() -> Iterator[Rung]:
    """Yields the runs for a short text, which is read several times: how large a model, how often, which decay."""
    for size in ("0.2M", "0.4M", "1.2M"):
        for epochs in (2, 4, 8, 16, 32):
            yield Rung(f"{size} {epochs} epochs", size, stated={"epochs": epochs})
    for factor in (0.25, 4.0):
        yield Rung(f"0.4M 8 epochs decay x{factor:g}", "0.4M", stated={"epochs": 8, "decay": factor})


def _rates(size: str) -> Iterator[Rung]:
    for optimizer in ("muon", "adamw"):
        for factor in (1.0, 0.5, 2.0):
            rates = "" if factor == 1 else f" rates x{factor:g}"
            yield Rung(f"{size} {optimizer}{rates}", size, optimizer, factor)


def prepare(texts: Sequence[Path], folder: Path, held_out_of: int, seq_len: int = SEQ_LEN) -> None:
    """Makes FOLDER/train.jsonl, held_out.jsonl, tokenizer.model and shards, unless they are there.

    One document in `held_out_of` is held out.
    """
    train, held_out, tok = folder / "train.jsonl", folder / "held_out.jsonl", folder / "tokenizer.model"
    if not held_out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(train) as kept, atomic_file(held_out) as aside:
            chunks: list[str] = []
            for chunk in read_documents(texts):
                chunks.append(chunk.text)
                if chunk.last:
                    document, chunks = "".join(chunks), []
                    digest = int(hashlib.sha256(document.encode()).hexdigest()[-8:], 16)
                    line = json.dumps({"text": document}, ensure_ascii=False).encode() + b"\n"
                    (aside if digest % held_out_of == 0 else kept).write(line)
            if aside.tell() == 0 or kept.tell() == 0:
                names = ", ".join(map(str, texts))
                raise UserError(f"{names}: too few documents to hold out one in {held_out_of}; lower --held_out")
    if not tok.exists():
        train_tokenizer([train], tok.with_suffix(""), VOCAB_SIZE)
    # Of a short text more, or the validation split would not have a sequence.
    val_fraction = 0.003 if train.stat().st_size > SHORT_TEXT else 0.05
    run_llm("prepare_data", "--input", train, "--tok", tok, "--seq_len", seq_len, "--shard_tokens", 20_000_000,
         "--val_fraction", val_fraction, "--out_dir", folder / "shards")  # fmt: skip


def config_of(rung: Rung, folder: Path) -> Config:
    """Returns the config of a run, with every setting that follows filled in."""
    stated = dict(rung.stated)
    batch_factor, decay_factor = stated.pop("batch", 1.0), stated.pop("decay", 1.0)
    ratio, epochs = stated.pop(LENGTH, TOKENS_A_PARAMETER), stated.pop("epochs", None)
    tree: dict[str, Any] = {
        "model": {**SIZES[rung.size], "max_seq_len": SEQ_LEN},
        "data": {"path": str(folder / "shards")},
        "optimizer": {"kind": rung.optimizer},
        "schedule": {},
        "train": {"precision": rung.precision, "device": "cpu", "log_every_steps": 50, "eval_every_steps": 10**9},
        "checkpoint": {"dir": str(folder / "runs" / rung.title.replace(" ", "-")), "every_steps": 500, "keep_last": 1},
        "deepspeed": {"zero_stage": 0},
    }
    for key, value in stated.items():
        section, name = key.split(".")
        tree[section][name] = value
    data = prepared(folder)
    # The number of parameters needs the vocabulary, and the number of tokens the parameters.
    filled, _ = resolve(parse_config(tree, rung.title), data)
    read = epochs and epochs * epoch_tokens(data, SEQ_LEN)
    tree["train"]["total_tokens"] = read or ratio * matrix_parameters(filled)
    filled, _ = resolve(parse_config(tree, rung.title), data)
    if batch_factor != 1:
        tree["train"]["global_batch_tokens"] = int(batch_factor * filled.train.batch)
        filled, _ = resolve(parse_config(tree, rung.title), data)
    if decay_factor != 1:
        assert filled.optimizer.weight_decay is not None
        tree["optimizer"]["weight_decay"] = decay_factor * filled.optimizer.weight_decay
        filled, _ = resolve(parse_config(tree, rung.title), data)
    if rung.factor != 1:
        for key in ("lr", "muon_lr"):
            rate = getattr(filled.optimizer, key)
            if rate is not None:
                tree["optimizer"][key] = rung.factor * rate
        filled, _ = resolve(parse_config(tree, rung.title), data)
    return filled


def prepared(folder: Path) -> Mixture:
    """Returns the data that `prepare` has made."""
    return read_data(DataConfig(path=str(folder / "shards")))


def held_out_tokens(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of the held-out documents and the ones that follow them, as the model is scored on them."""
    tokenizer, ids, labels = load_tokenizer(folder / "tokenizer.model"), list[int](), list[int]()
    for line in (folder / "held_out.jsonl").read_text("utf-8").splitlines():
        document = tokenizer.encode(json.loads(line)["text"])
        ids += [tokenizer.bos_id, *document]
        labels += [*document, tokenizer.eos_id]
    return np.array(ids), np.array(labels)


def text_of(folder: Path) -> dict[str, Any]:
    """Returns the name of the folder's text and what a sample of the held-out documents tells of it."""
    return {"name": folder.name, **asdict(sample_text(prepared(folder), SEQ_LEN, held_out_tokens(folder)))}


def check_text(text: dict[str, Any], lines: Sequence[dict[str, Any]], output: Path) -> None:
    """Raises UserError if a line is from another text of the same name: their bits per byte do not compare.

    Another version of a package is enough for that.
    """
    for line in lines:
        known = line["text"]
        if known["name"] == text["name"] and not math.isclose(known["xz"], text["xz"], rel_tol=1e-6):
            raise UserError(
                f"{output / 'ladder.jsonl'}: '{line['name']}' ran on another text named {text['name']}: `xz -9` needs "
                f"{known['xz']:.4f} bits/byte of what was held out there and {text['xz']:.4f} here. Make the text of "
                "the same packages, or give --folder another name"
            )


def climb(rung: Rung, folder: Path, text: dict[str, Any], minutes: float | None) -> dict[str, Any] | None:
    """Runs a rung to its end. Returns its line, or None where the time was over before it."""
    config = config_of(rung, folder)
    tree = config.model_dump()
    tree["train"]["max_minutes"] = minutes
    path = folder / f"{rung.title.replace(' ', '-')}.json"
    atomic_text(path, json.dumps(tree, indent=2) + "\n")
    result = json.loads(run_llm("train", "--config", path, "--json").splitlines()[-1])
    if result["tokens"] < config.train.horizon:
        return None
    held_out = folder / "held_out.jsonl"
    evaluated = run_llm("eval", "--ckpt", config.checkpoint.dir, "--input", held_out, "--device", "cpu", "--json")
    scored = json.loads(evaluated.splitlines()[-1])
    optimizer = config.optimizer
    described = json.loads((Path(config.checkpoint.dir) / "run.json").read_text("utf-8"))
    return {
        "name": rung.title,
        "size": rung.size,
        "optimizer": optimizer.kind,
        "precision": config.train.precision,
        "bits_per_byte": scored["bits_per_byte"],
        "matrices": matrix_parameters(config),
        "parameters": parameter_count(config.model),
        "tokens": result["tokens"],
        "batch": config.train.batch,
        "lr": optimizer.lr,
        "muon_lr": optimizer.muon_lr,
        "weight_decay": optimizer.weight_decay,
        "factor": rung.factor,
        "stated": rung.stated,
        "seed": config.train.seed,
        "epoch": epoch_tokens(prepared(folder), SEQ_LEN),
        "text": text,
        "tokens_per_second": result["tokens_per_second"],
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": described["commit"],
        "versions": described["versions"],
    }


def run_llm(*arguments: object) -> str:
    """Runs a command of this project in a process of its own; returns its stdout. Raises UserError if it fails."""
    command = [sys.executable, "-m", "llm", *map(str, arguments)]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE)
    if done.returncode not in (0, STOPPED):
        raise UserError(f"llm {arguments[0]} failed with exit code {done.returncode}: see above")
    return done.stdout


def read_lines(output: Path) -> list[dict[str, Any]]:
    """Returns the lines of the runs that have ended."""
    path = output / "ladder.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def table(lines: Sequence[dict[str, Any]]) -> str:
    """A Markdown table. The last column compares with the run by the rules that is otherwise the same (`_group`).

    A run at the rules' settings with another seed is compared with that of the first seed.
    """
    ruled = {_group(line): line["bits_per_byte"] for line in lines if _by_rule(line) or _only_seed(line)}
    rows = [
        "| run | tokens | batch | lr | Muon's lr | bits/byte | against the rules |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        first = (line["size"], line["optimizer"], line["precision"], TrainConfig().seed, None)
        base = ruled.get(first if _only_seed(line) else _group(line))
        difference = "" if base is None or _by_rule(line) else f"{100 * (line['bits_per_byte'] / base - 1):+.2f} %"
        muon = "" if line["muon_lr"] is None else f"{line['muon_lr']:.3g}"
        rows.append(
            f"| {line['name']} | {line['tokens']:,} | {line['batch']:,} | {line['lr']:.3g} | {muon} "
            f"| {line['bits_per_byte']:.4f} | {difference} |"
        )
    return "\n".join(rows) + "\n"


def _by_rule(line: dict[str, Any]) -> bool:
    return line["factor"] == 1 and line["stated"].keys() <= {LENGTH}


def _only_seed(line: dict[str, Any]) -> bool:
    """Whether a run differs from the rules' in nothing but its seed."""
    return line["factor"] == 1 and line["stated"].keys() == {"train.seed"}


def _group(line: dict[str, Any]) -> tuple[str, str, str, int, float | None]:
    return line["size"], line["optimizer"], line["precision"], line["seed"], line["stated"].get(LENGTH)


def picture(lines: Sequence[dict[str, Any]]) -> Chart:
    """Bits per byte over the size, a line for each optimizer and precision at the rules' settings."""
    drawn: list[Line] = []
    for optimizer, precision in product(("adamw", "muon"), PRECISIONS):
        points = sorted(
            (line["matrices"] / 1e6, line["bits_per_byte"])
            for line in lines
            if (line["optimizer"], line["precision"]) == (optimizer, precision)
            and _by_rule(line)
            and not line["stated"]
        )
        if points:
            xs, ys = zip(*points, strict=True)
            drawn.append(Line(xs, ys, f"{optimizer}, {precision}", color=len(drawn), style="dots"))
    note = f"{TOKENS_A_PARAMETER} tokens a parameter"
    return Chart("ladder", "the ladder", "million parameters without embeddings", "bits per byte", tuple(drawn), note)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_ladder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files that `llm prepare_data` reads")
    parser.add_argument("--held_out", type=int, default=200, metavar="N", help="hold out one document in N")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="runs by name, as '0.2M muon*'")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--short", action="store_true", help="the runs for a short text, instead of the ladder")
    parser.add_argument("--minutes", type=float, help="stop after so long; the next call goes on")
    parser.add_argument("--folder", type=Path, default=Path("artifacts/ladder"), help="of shards and checkpoints")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="of ladder.jsonl, .md and .png")
    options = parser.parse_args(arguments)

    def run() -> None:
        begin = time.monotonic()
        prepare(options.text, options.folder, options.held_out)
        text = text_of(options.folder)
        check_text(text, read_lines(options.output), options.output)
        for rung in short_rungs() if options.short else rungs():
            if options.only and not any(fnmatchcase(rung.name, pattern) for pattern in options.only):
                continue
            rung = replace(rung, precision=options.precision)
            if rung.title in [line["name"] for line in read_lines(options.output)]:
                continue
            left = None if options.minutes is None else options.minutes - (time.monotonic() - begin) / 60
            line = None if left is not None and left <= 0 else climb(rung, options.folder, text, left)
            if line is None:
                print(f"the time is over before the end of {rung.title}; the same command goes on")
                break
            options.output.mkdir(parents=True, exist_ok=True)
            with open(options.output / "ladder.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        lines = read_lines(options.output)
        atomic_text(options.output / "ladder.md", HEAD + table(lines))
        with atomic_file(options.output / "ladder.png") as picture_file:
            picture_file.write(png(picture(lines)))
        print(table(lines))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
