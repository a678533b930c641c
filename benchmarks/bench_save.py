"""Measures how long a checkpoint stops training, compared with the time to write it: see --help.

The model is the one of the config; the data are random. A save copies all tensors to the host, and a thread writes them
while training continues. `synchronous` is the time of a save that training waits for, `stall` the time of the call, and
`second` the time of a call that has to wait for the previous save. On a GPU the call does not wait for the copies, but
the update of the next step may: `next_step` is the time of that step.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llm.atomic import atomic_text
from llm.config import Config
from llm.config_file import load_config
from llm.data.tokenizer import load_tokenizer, train_tokenizer
from llm.errors import UserError
from llm.model.checkpoint import DataState, TrainState
from llm.model.transformer import Transformer, initial_value
from llm.training.engine import Engine, start, stop
from llm.training.saving import Saver
from llm.world import World

ROOT = Path(__file__).resolve().parent.parent
SEQ_LEN = 128


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(config: Config, world: World, saves: int) -> dict[str, Any]:
    """Trains on random sequences between saves; each save replaces the previous one."""

    def build() -> Transformer:
        return Transformer(config.model, compute_dtype=world.dtype)

    engine = Engine(build, config, world, micro_batch=1, accumulation=1)
    for name in engine.parameters:
        engine.write_parameter(name, initial_value(config.model, name, 1))
    ids = torch.randint(config.model.vocab_size or 0, (1, SEQ_LEN), device=world.device)
    inputs = {"input_ids": ids, "labels": ids, "doc_start": torch.zeros_like(ids, dtype=torch.int32)}

    def step() -> None:
        engine.backward(inputs, SEQ_LEN)
        engine.update(1e-4)

    folder = Path(config.checkpoint.dir)
    train_tokenizer([str(ROOT / "README.md")], str(folder / "spm"), 400)
    saver = Saver(config, load_tokenizer(folder / "spm.model"), lambda line: None, world)
    steps = 0

    def save() -> None:
        nonlocal steps
        steps += 1
        saver.save(engine, TrainState(steps, 0, DataState("", SEQ_LEN, 0, "", 0)))

    def save_and_wait() -> None:
        save()
        saver.finish(world)

    step()
    save_and_wait()
    alone = statistics.median(seconds(step) for _ in range(5))
    synchronous = [seconds(save_and_wait) for _ in range(saves)]
    stalls, after, beside, second = [], [], [], []
    for _ in range(saves):
        stalls.append(seconds(save))
        after.append(seconds(step))
        while saver.is_writing:
            beside.append(seconds(step))
        saver.finish(world)
        save()
        second.append(seconds(save))
        saver.finish(world)
    size = sum(file.stat().st_size for file in (folder / "latest").iterdir())
    return {
        "bytes": size,
        "synchronous_seconds": statistics.median(synchronous),
        "stall_seconds": statistics.median(stalls),
        "stall_fraction": statistics.median(stalls) / statistics.median(synchronous),
        "second_save_seconds": statistics.median(second),
        "step_seconds": alone,
        "next_step_seconds": statistics.median(after),
        "step_seconds_while_writing": statistics.median(beside) if beside else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python -m benchmarks.bench_save --saves 3")
    parser.add_argument("--config", default="configs/125m.json")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on the disk for checkpoints, not on a RAM disk
        fixed = ["model.vocab_size=32000", f"checkpoint.dir={folder}", "checkpoint.keep_last=1"]
        config = load_config(options.config, [*fixed, *options.overrides])
        world = start(config)
        figures = measure(config, world, options.saves)
        stop()
    figures = {"config": options.config, "overrides": options.overrides, "torch": torch.__version__, **figures}
    figures["threads"] = torch.get_num_threads()
    print(json.dumps(figures, indent=2))
    if options.out:
        atomic_text(options.out, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
