"""Compares the memory that a step is predicted to need with what real steps of `llm train` take: see --help.

Every case is a short run of `llm train` on random text, in forked processes. On a CPU its memory is what the resident
set of a rank grows by, from the moment before it makes the engine (after a run of a tiny model, so that libraries are
loaded) to its peak in the steps. There every freed tensor goes back to the system, so that the resident set is what is
in use; --kept leaves the allocator as a run has it, which keeps freed memory. On a GPU it is the peak of torch's
allocator.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch

from llm.atomic import atomic_text
from llm.config import ActivationCheckpointing, Config
from llm.config_file import parse_config
from llm.data.prepare import prepare_data
from llm.data.tokenizer import train_tokenizer
from llm.training import engine, setup, train
from llm.training.engine import Engine
from llm.training.memory import activation_bytes, state_bytes
from llm.world import DTYPES

SHAPES: dict[str, dict[str, Any]] = {
    "cpu": {"n_layers": 8, "d_model": 256, "n_heads": 4, "n_kv_heads": 2, "d_ff": 704, "max_seq_len": 256},
    "cuda": {"n_layers": 8, "d_model": 512, "n_heads": 4, "n_kv_heads": 2, "d_ff": 1408, "max_seq_len": 1024},
}
TINY = {"n_layers": 2, "d_model": 64, "n_heads": 2, "n_kv_heads": 2, "d_ff": 128, "max_seq_len": 256}
VOCABULARY = 2000
SEQUENCES, STEPS, ACCUMULATION = 2, 2, 2
SECONDS = 300


@dataclass(frozen=True)
class Case:
    processes: int
    precision: str
    stage: int
    offload: str
    checkpointing: ActivationCheckpointing
    optimizer: str = "adamw"

    def __str__(self) -> str:
        offload = " offload" if self.offload == "cpu" else ""
        return f"{self.processes} x {self.precision} ZeRO {self.stage}{offload} {self.checkpointing} {self.optimizer}"


def cases(processes: int, precision: str, optimizer: str) -> Iterator[Case]:
    """Yields every choice that training takes."""
    for stage, offload, checkpointing in product(range(4), ("none", "cpu"), get_args(ActivationCheckpointing)):
        refused = (stage == 0 and (offload == "cpu" or precision == "fp16")) or (
            stage == 3 and (checkpointing == "selective" or optimizer == "muon")
        )
        if not refused:
            yield Case(processes, precision, stage, offload, checkpointing, optimizer)


def config_of(case: Case, shape: dict[str, Any], device: str, folder: Path, run: Path) -> Config:
    micro_batch_tokens = SEQUENCES * shape["max_seq_len"]
    batch = ACCUMULATION * micro_batch_tokens * case.processes
    tree = {
        "model": {**shape, "vocab_size": VOCABULARY},
        "data": {"path": str(folder / "shards"), "seq_len": shape["max_seq_len"]},
        "optimizer": {"kind": case.optimizer, "lr": 1e-4},
        "train": {
            "precision": case.precision,
            "device": device,
            "micro_batch": SEQUENCES,
            "global_batch_tokens": batch,
            "total_tokens": STEPS * batch,
            "activation_checkpointing": case.checkpointing,
            "eval_every_steps": 10**6,
            "eval_tokens": shape["max_seq_len"],
            "force": True,
        },
        "checkpoint": {"dir": str(run), "every_steps": 10**6},
        "deepspeed": {"zero_stage": case.stage, "offload": case.offload},
    }
    return parse_config(tree, str(case))


M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 2**16  # malloc.h; from this size on memory is mapped, and unmapped when freed


def give_freed_memory_back() -> None:
    """Undoes llm.training.cpu_memory in this process."""
    engine.keep_freed_memory = lambda: None
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


class Meter:
    """The memory of this process since `begin`, in bytes."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.before, self.peak = 0, 0

    def begin(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        # What earlier runs of this process have freed must not be there to be taken again; 5 forgets the peak so far.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._status("VmRSS")

    def read(self) -> None:
        now = torch.cuda.max_memory_allocated() if self.device == "cuda" else self._status("VmHWM")
        self.peak = now - self.before

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measured(case: Case, device: str, folder: Path, run: Path) -> int:
    """Trains, and returns the peak before the first checkpoint."""
    meter, build, update = Meter(device), setup.build_engine, Engine.update
    train.train(config_of(case, TINY, device, folder, run / "tiny"))

    def build_metered(*arguments: Any) -> Engine:
        meter.begin()
        return build(*arguments)

    def update_metered(self: Engine, lr: float) -> Any:
        done = update(self, lr)
        meter.read()
        return done

    train.build_engine, Engine.update = build_metered, update_metered  # type: ignore[method-assign]
    train.train(config_of(case, SHAPES[device], device, folder, run / "run"))
    return meter.peak


def rank(number: int, case: Case, device: str, folder: Path, run: Path, port: int, peaks: Any, kept: bool) -> None:
    log = os.open(run / f"log-{number}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"LOCAL_RANK": str(number)}
    if case.processes > 1:
        os.environ |= {"RANK": str(number), "WORLD_SIZE": str(case.processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if device == "cpu" and not kept:
        give_freed_memory_back()
    try:
        peaks[number] = measured(case, device, folder, run)
        if number == 0:
            # Not in the parent, which could not fork any more after autograd has started its threads.
            peaks[case.processes] = predicted(case, device)
    except BaseException:
        traceback.print_exc()
        raise


def run_case(case: Case, device: str, folder: Path, kept: bool) -> list[int]:
    """Returns the peak of each rank, and the predicted one."""
    # Forked, because imports take longer than the runs. Nothing has started a thread or a GPU here.
    context = multiprocessing.get_context("fork")
    peaks = context.Array("q", case.processes + 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = Path(tempfile.mkdtemp(dir=folder))
    ranks = [
        context.Process(target=rank, args=(number, case, device, folder, run, port, peaks, kept))
        for number in range(case.processes)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
        if process.exitcode != 0:
            for other in ranks:
                other.kill()
            tail = (run / "log-0.txt").read_text(errors="replace")[-3000:]
            raise SystemExit(f"error: {case} ended with {process.exitcode}:\n{tail}")
    shutil.rmtree(run)
    return list(peaks)


def predicted(case: Case, device: str) -> int:
    """Returns the peak of a rank by `llm plan`."""
    config = config_of(case, SHAPES[device], device, Path("none"), Path("none"))
    dtype, where = DTYPES[case.precision], "cuda" if device == "cuda" else "cpu"
    state = state_bytes(config, case.stage, case.processes, dtype, where)
    activations = activation_bytes(config, case.processes, SEQUENCES, config.model.max_seq_len, dtype, where)
    return state.peak(activations)


def row(case: Case, peaks: list[int], expected: int) -> dict[str, Any]:
    """Makes an entry of the results, and prints it."""
    error = expected / max(peaks) - 1
    shown = " ".join(f"{peak / 1e6:9.2f}" for peak in peaks)
    print(f"{case!s:<44} {expected / 1e6:9.2f} {shown} {error:+7.1%}", flush=True)
    return {**asdict(case), "predicted": expected, "measured": peaks, "error": error}


def make_data(folder: Path) -> None:
    words = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    known = ["".join(words.choices(letters, k=words.randint(2, 9))) for _ in range(3000)]
    text = "\n".join(" ".join(words.choices(known, k=300)) for _ in range(300))
    (folder / "text.txt").write_text(text)
    train_tokenizer([str(folder / "text.txt")], str(folder / "spm"), VOCABULARY)
    options: dict[str, Any] = {"seq_len": 256, "shard_tokens": 10**6, "val_fraction": 0.05, "workers": 1}
    prepare_data([str(folder / "text.txt")], str(folder / "spm.model"), str(folder / "shards"), **options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python -m benchmarks.bench_memory --processes 2 --out memory.json"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=list(DTYPES))
    parser.add_argument("--optimizer", nargs="+", default=["adamw"], choices=["adamw", "muon"])
    parser.add_argument("--only", default="", help="the cases whose names contain this")
    parser.add_argument("--kept", action="store_true", help="leave the CPU's allocator as a run has it")
    parser.add_argument("--again", action="store_true", help="only predict, again, for the cases that --out has")
    parser.add_argument("--out", help="write the figures to this JSON file; cases that it has already stay")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"torch": torch.__version__, "device": options.device, "allocator_keeps": options.kept}
    figures |= {"shape": SHAPES[options.device], "vocabulary": VOCABULARY, "micro_batch": SEQUENCES, "cases": []}
    print(f"{'MB':<44} predicted  measured on each rank")
    done: dict[Case, dict[str, Any]] = {}

    def write() -> None:
        figures["cases"] = list(done.values())
        if options.out:
            atomic_text(options.out, json.dumps(figures, indent=1) + "\n")

    if options.out and Path(options.out).exists():
        for old in json.loads(Path(options.out).read_text())["cases"]:
            case = Case(**{field.name: old[field.name] for field in fields(Case)})
            # Predicted again, with the code of today.
            done[case] = row(case, old["measured"], predicted(case, options.device)) if options.again else old
    if not options.again:
        with tempfile.TemporaryDirectory() as name:
            make_data(Path(name))
            for combination in product(options.processes, options.precision, options.optimizer):
                for case in cases(*combination):
                    if options.only in str(case) and case not in done:
                        *peaks, expected = run_case(case, options.device, Path(name), options.kept)
                        done[case] = row(case, peaks, expected)
                        write()  # after each case, because all take a while
    write()
    worst = max(figures["cases"], key=lambda one: abs(one["error"]))
    print(f"{len(figures['cases'])} cases, the worst {worst['error']:+.1%}", file=sys.stderr)


if __name__ == "__main__":
    main()
