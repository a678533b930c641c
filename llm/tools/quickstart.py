"""`make quickstart`, or `python -m llm.tools.quickstart`: trains a model on text that every machine has.

It prints and runs the commands that a user would type. It uses results of an earlier call again: text and tokenizer if
they are newer than their sources; shards and training continue by themselves.
"""

import argparse
import json
import lzma
import os
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llm.atomic import atomic_file
from llm.config_file import load_config
from llm.data.bigram import Bigram
from llm.data.document_reader import read_documents
from llm.data.manifest import read_manifest
from llm.data.packing import held_out
from llm.data.shards import Loader
from llm.data.tokenizer import load_tokenizer
from llm.errors import STOPPED, UserError, exit_code, visible
from llm.inference.evaluate import evaluate_model
from llm.metrics import percent, read_metrics
from llm.model.checkpoint import read_state
from llm.model.checkpoint_path import locate
from llm.model.transformer import Transformer
from llm.tools.report import loss_curve

CONFIG = "configs/tiny.json"
VOCAB_SIZE = 4096
HELD_OUT_FRACTION = 0.05
TRAIN_TOKENS = 3_200_000
"""Nearly one epoch: four to seven minutes of two cores. The rules of llm.training.rules would take longer."""
DEEPSPEED_PORT = 29500  # the default port of deepspeed's launcher
PROMPT = "def read(self, path):"
TRAINED = "the trained model"

# soft_wrap, because rich must not break commands that a user copies.
_screen = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Paths:
    """The files and folders of a quickstart."""

    data: Path
    artifacts: Path

    @property
    def corpus(self) -> Path:
        return self.data / "corpus.jsonl"

    @property
    def train_text(self) -> Path:
        return self.data / "train.jsonl"

    @property
    def held_out(self) -> Path:
        return self.data / "held_out.jsonl"

    @property
    def shards(self) -> Path:
        return self.data / "shards"

    @property
    def tokenizer(self) -> Path:
        return self.artifacts / f"tokenizer-{VOCAB_SIZE}.model"

    @property
    def run(self) -> Path:
        return self.artifacts / "run"

    @property
    def loss_curve(self) -> Path:
        return self.artifacts / "loss.png"


def stale(output: Path, source: Path) -> bool:
    """Whether a file must be made (again), as in make: it is missing or older than its source."""
    if output.exists() and output.stat().st_mtime_ns >= source.stat().st_mtime_ns:
        _screen.print(f"[dim]there already: {_escaped(str(output))}[/dim]")
        return False
    return True


def call(command: Sequence[str], *, capture: bool = False) -> str:
    """Prints and runs a command of this environment; returns its stdout if captured. Raises UserError if it fails."""
    _screen.print(f"\n[bold]$ {_escaped(shlex.join(command))}[/bold]")
    folder = Path(sys.executable).parent
    # As modules: the system cannot start the script `deepspeed` if the path of the environment contains a blank.
    module = {"llm": "llm", "deepspeed": "deepspeed.launcher.runner"}[command[0]]
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    begin = time.perf_counter()
    # Ctrl-C also reaches the command, which says what it does, and may need a while to save.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        result = subprocess.run(
            [sys.executable, "-m", module, *command[1:]],
            env=environment,
            text=True,
            stdout=subprocess.PIPE if capture else None,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    if result.returncode == STOPPED:
        raise UserError("the training was stopped; make quickstart again goes on from there")
    if result.returncode:
        raise UserError(f"{shlex.join(command[:2])} failed with exit code {result.returncode}: see above")
    _screen.print(f"[dim]{time.perf_counter() - begin:.0f} s[/dim]")
    return result.stdout or ""


def quickstart(root: Path, overrides: Sequence[str]) -> None:
    """root: the folder for data/quickstart and artifacts/quickstart; overrides: for `llm train`."""
    begin = time.perf_counter()
    paths = Paths(root / "data" / "quickstart", root / "artifacts" / "quickstart")
    # The user's overrides come last, so that they have priority.
    fixed = [f"data.path={paths.shards}", f"checkpoint.dir={paths.run}", f"train.total_tokens={TRAIN_TOKENS}"]
    run_overrides = [*fixed, *overrides]
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        run_overrides.append("train.device=cpu")  # deepspeed's launcher makes hidden GPUs visible again
    config = load_config(CONFIG, run_overrides)
    if not paths.corpus.exists():
        call(["llm", "corpus", "--source", "stdlib", "--output", str(paths.corpus)])
    # Before the tokenizer is trained, because the held-out text must be new to the vocabulary too.
    if stale(paths.train_text, paths.corpus):
        split(paths)
    if stale(paths.tokenizer, paths.train_text):
        prefix = str(paths.tokenizer.with_suffix(""))
        command = f"llm train_tokenizer --input {paths.train_text} --model_prefix {prefix} --vocab_size {VOCAB_SIZE}"
        call(command.split())
    call(
        f"llm prepare_data --input {paths.train_text} --tok {paths.tokenizer} --seq_len {config.model.max_seq_len} "
        f"--shard_tokens 1_000_000 --val_fraction 0.01 --out_dir {paths.shards}".split()
    )
    forget_other_data(paths)
    launcher = ["deepspeed", *one_device(), *another_port_if_taken(), "--module"]
    call([*launcher, "llm", "train", "--config", CONFIG, *run_overrides])
    model = ["--ckpt", str(paths.run), "--device", config.train.device]
    evaluated = call(["llm", "eval", *model, "--input", str(paths.held_out), "--json"], capture=True)
    trained = json.loads(evaluated.splitlines()[-1])
    call(["llm", "generate", *model, "--prompt", PROMPT, "--max_new_tokens", "80"])
    _screen.print("\nmeasuring the baselines on the held-out text")
    bits = {TRAINED: trained["bits_per_byte"], **baselines(paths)}
    loss_curve(paths.run / "metrics.jsonl", paths.loss_curve)
    show(paths, bits, trained, time.perf_counter() - begin)


def one_device() -> list[str]:
    """Returns the launcher's arguments for one process on the first visible GPU. By default it takes GPU 0."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    # Not decimal: unset, or the UUID of a GPU.
    return ["--include", f"localhost:{visible}"] if visible.isdecimal() else ["--num_gpus", "1"]


def another_port_if_taken() -> list[str]:
    """Returns the launcher's arguments for a free port, if another training run uses its default port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignores connections of a finished run
        try:
            probe.bind(("127.0.0.1", DEEPSPEED_PORT))
        except OSError:
            # Port 0: the system chooses a free one.
            probe.bind(("127.0.0.1", 0))
            return ["--master_port", str(probe.getsockname()[1])]
    return []


def split(paths: Paths) -> None:
    """Splits the corpus by a hash of each document, so that equal documents are in the same part.

    Tokenizer and training do not see the held-out part.
    """
    # held_out is closed before train_text, so it exists if train_text does; stale() checks only train_text.
    with atomic_file(paths.train_text) as train_file, atomic_file(paths.held_out) as held_out_file:
        for line in paths.corpus.open("rb"):
            # The hash of prepare_data: validation has the lowest values, so the held-out part has the highest.
            train = held_out(json.loads(line)["text"].encode(), 1 - HELD_OUT_FRACTION)
            (train_file if train else held_out_file).write(line)


def forget_other_data(paths: Paths) -> None:
    """Removes a run that was trained on other shards, because it cannot be resumed or compared."""
    try:
        state, _ = read_state(locate(paths.run))
    except UserError:
        return
    if state.data.dataset_hash != read_manifest(paths.shards).dataset_hash:
        _screen.print(f"the shards are new: {_escaped(str(paths.run))} starts again from the beginning")
        shutil.rmtree(paths.run)


def baselines(paths: Paths) -> dict[str, float]:
    """Returns bits per byte of the held-out text for the baselines: the untrained model, a bigram model, xz."""
    manifest = read_manifest(paths.shards)
    tokenizer = load_tokenizer(paths.tokenizer)
    texts = [document.text for document in read_documents([str(paths.held_out)])]
    state, trained = read_state(locate(paths.run))
    untrained = Transformer(trained.model)
    # The run's seed gives the weights that its training started from.
    untrained.init_weights(trained.train.seed)
    scored = evaluate_model(untrained.eval(), tokenizer, [str(paths.held_out)], context=state.data.seq_len)
    sequences = min(
        state.data.position, manifest.sequences("train", state.data.seq_len)
    )  # a second epoch adds no new tokens
    with Loader(
        manifest,
        "train",
        seq_len=state.data.seq_len,
        seed=state.data.seed,
        global_batch=32,
        micro_batch=32,
        end=sequences,
    ) as loader:
        bigram = Bigram(((batch.input_ids.numpy(), batch.labels.numpy()) for batch in loader), manifest.vocab_size)
    # One stream, so that xz can refer back across documents.
    raw = "".join(texts).encode()
    return {
        "the same model before training": scored["bits_per_byte"],
        "a bigram model of the same tokens": bigram.score(tokenizer, texts).bits_per_byte,
        "the compressor xz -9": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
    }


def show(paths: Paths, bits: dict[str, float], trained: dict[str, Any], seconds: float) -> None:
    """Prints the results, the paths of all files, and the next steps."""
    lines = [line for line in read_metrics(paths.run / "metrics.jsonl") if "loss" in line]
    speed = statistics.median(line["tokens_per_second"] for line in lines)
    matmul = statistics.median(line["matmul_fraction"] for line in lines)

    table = Table(box=None, title_justify="left", title_style="bold", pad_edge=False)
    table.title = f"\n{trained['documents']} documents, {trained['bytes']:,} bytes, unseen by tokenizer and training"
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    for name, value in sorted(bits.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{value:.3f}", style="bold" if name == TRAINED else None)
    _screen.print(table)
    # As wide as a terminal at least is.
    _screen.print(
        "Lower is better: the bits that a model needs to predict a byte of the text.\n"
        "Before training it guesses; a bigram model looks at one token only; xz finds\n"
        "repeated text. What is below all three has learned more than that."
    )
    _screen.print(
        f"\ntrained on {lines[-1]['tokens']:,} tokens at {speed:,.0f} tokens/s ({percent(matmul)} of this machine's "
        f"matmul rate, MFU {percent(lines[-1]['mfu'])}); all took {seconds / 60:.1f} minutes"
    )

    _screen.print("\n[bold]Where everything lies[/bold]")
    for what, path in (
        ("model", f"{paths.run / 'latest'} (a Hugging Face folder)"),
        ("loss curve", paths.loss_curve),
        ("metrics", paths.run / "metrics.jsonl"),
        ("tokenizer", paths.tokenizer),
        ("shards", paths.shards),
        ("text", f"{paths.train_text}, {paths.held_out}"),
    ):
        _screen.print(f"  {what:<12}{_escaped(str(path))}")

    _screen.print("\n[bold]Its curves, on a page for a browser[/bold]")
    _screen.print(f"  {_escaped(shlex.join(['llm', 'report', str(paths.run)]))}")

    _screen.print("\n[bold]Your own text[/bold] (UTF-8, as one file my.txt)")
    for command in (
        "source .venv/bin/activate",
        "llm train_tokenizer --input my.txt --model_prefix artifacts/my/spm --vocab_size 4096",
        "llm prepare_data --input my.txt --tok artifacts/my/spm.model --seq_len 512 --val_fraction 0.05 "
        "--out_dir data/my",
        f"llm train --config {CONFIG} data.path=data/my checkpoint.dir=artifacts/my/run",
        'llm generate --ckpt artifacts/my/run --prompt "Once upon a time"',
    ):
        _screen.print(f"  {_escaped(command)}")


def _escaped(text: str) -> str:
    """Escapes brackets, which rich would read as markup, and control characters."""
    return escape(visible(text))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llm.tools.quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(), help="where data/ and artifacts/ lie (default: here)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for the training run")
    options = parser.parse_args(arguments)
    return exit_code(lambda: quickstart(options.root, options.overrides))


if __name__ == "__main__":
    sys.exit(main())
