"""What a training step on a GPU should take: `python -m benchmarks.model --config configs/125m.json --device H200`.

A static model, to be proved wrong by the first measurement. The work of each operation is exact (`model_work`: every
input read once, every output written once, and the products). Its time is the larger of bytes over a rate of copying
and FLOPs over a rate of products. The rates are those below: measured ones of the device, times the share that each
kernel is assumed to reach. Nothing overlaps, and the host is never too slow: both are seen only on a GPU.

Each change that is planned replaces one share or removes bytes, alone and with those before it.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kernels.work import Work
from llm import metrics
from llm.atomic import atomic_text
from llm.config import Config
from llm.config_file import load_config
from llm.errors import exit_code
from llm.hardware import named
from llm.model.flops import flops_per_token, model_work
from llm.model.transformer import parameter_shapes
from llm.tools.profile_step import adamw_work
from llm.training.optim import is_block_matrix
from llm.training.resolve import ASSUMED_VOCAB_SIZE, resolve

ITEM = 2
"""Bytes of an activation: bf16."""

RATES = {"H200": (790e12, 4.3e12), "H100": (798e12, 3.0e12)}
"""{device: (FLOP/s of a bf16 product of 8,192 cubed, bytes/s of a copy, read and written)}, measured on one of each."""

SHARES = {
    # Of the rate of products. Three products of a layer have the same FLOPs; that for the weight's gradient sums over
    # all tokens, and reaches less.
    ("forward", "matmul"): 0.776,
    ("backward", "matmul"): 0.668,
    ("forward", "linear_cross_entropy"): 0.784,
    ("backward", "linear_cross_entropy"): 0.784,
    ("forward", "attention"): 0.48,
    # Seven products in two kernels where five would do; the FLOPs count five.
    ("backward", "attention"): 0.29,
}
COPY_SHARE = 0.93
"""Of the rate of copying, for all other operations: RMSNorm, RoPE, SwiGLU, embedding, rounding and the optimizer."""

ROUNDING_BYTES = 6
"""For each parameter and step: the fp32 weight is read, and its bf16 copy written."""

CHUNK_BYTES = 6
"""For each logit: the loss reads it and overwrites it by its gradient, and the product before has written it (bf16)."""


@dataclass(frozen=True)
class Assumed:
    """What a change alters."""

    attention_backward: float = SHARES["backward", "attention"]
    swiglu_bytes: float = 1.0  # of those of SwiGLU's forward and backward


CHANGES: dict[str, dict[str, float]] = {
    # The epilogue keeps gate and up, which backward reads, and writes the result: the two reads go.
    "SwiGLU in its product's epilogue": {"swiglu_bytes": 0.75},
    "attention backward with five products in one kernel": {"attention_backward": 0.43},
}
"""{change, in the order of the work: what it alters}. 0.43: FlashAttention 3's share on an H100 at a head of 64."""


@dataclass(frozen=True)
class Line:
    """An operation of a micro-batch, or the optimizer's share of it."""

    phase: str
    op: str
    work: Work
    seconds: float
    bound: str


def lines(config: Config, device: str, micro_batch: int, assumed: Assumed) -> list[Line]:
    """Returns the operations of one micro-batch of the config at its full length, one document a sequence."""
    products, copy = rates(device)
    model, seq_len = config.model, config.data.seq_len
    assert seq_len is not None
    tokens = micro_batch * seq_len
    pairs = micro_batch * seq_len * (seq_len + 1) / 2
    works = model_work(model, tokens, pairs, ITEM)
    parameters = sum(shape.numel() for shape in parameter_shapes(model).values())
    assert model.vocab_size is not None
    works["forward", "loss"] = Work(CHUNK_BYTES * tokens * model.vocab_size)
    for phase, op, share in (
        ("forward", "swiglu", assumed.swiglu_bytes),
        ("backward", "swiglu", assumed.swiglu_bytes),
    ):
        works[phase, op] = works[phase, op] * share
    steps = config.train.batch / tokens
    for op, work in (optimizer_work(config) | {"rounding": Work(ROUNDING_BYTES * parameters)}).items():
        works["optimizer", op] = work * (1 / steps)
    shares = {**SHARES, ("backward", "attention"): assumed.attention_backward, ("optimizer", "Muon"): 0.6}
    found = []
    for (phase, op), work in works.items():
        share = shares.get((phase, op), 1.0)
        times = {"matmul": work.flops / (products * share), "copy": work.moved / (copy * COPY_SHARE)}
        bound = max(times, key=lambda name: times[name])
        found.append(Line(phase, op, work, times[bound], bound))
    return found


def optimizer_work(config: Config) -> dict[str, Work]:
    """The work of one update: AdamW's or Muon's bytes on all parameters, and Muon's products."""
    found = {"update": adamw_work(config, 1, torch.bfloat16)}
    if config.optimizer.kind == "muon":
        flops = 0.0
        for name, shape in parameter_shapes(config.model).items():
            if is_block_matrix(name):
                rows, columns = sorted(shape)
                # Five steps of two products of [rows, columns] and one of [rows, rows]. Packed matrices count as one.
                flops += 5 * (4 * rows * rows * columns + 2 * rows**3)
        found["Muon"] = Work(flops=flops)
    return found


def rates(device: str) -> tuple[float, float]:
    """(FLOP/s of products, bytes/s of copying): measured ones, else 0.8 and 0.9 of the datasheet's."""
    hardware = named(device)
    if hardware.name in RATES:
        return RATES[hardware.name]
    return 0.8e12 * hardware.tflops, 0.9e9 * hardware.bandwidth_gbs


def predictions(config: Config, device: str, micro_batch: int) -> Iterator[dict[str, Any]]:
    """Yields today's prediction, and that after each change, which keeps the ones before it."""
    seq_len = config.data.seq_len
    assert seq_len is not None
    tokens, assumed = micro_batch * seq_len, Assumed()
    usual = flops_per_token(config.model, seq_len).usual
    peak = 1e12 * named(device).tflops
    before = math.nan
    for name, change in {"today": {}, **CHANGES}.items():
        assumed = replace(assumed, **change)
        seconds = sum(line.seconds for line in lines(config, device, micro_batch, assumed))
        yield {
            "change": name,
            "micro_batch_ms": 1e3 * seconds,
            "saves_ms": None if math.isnan(before) else 1e3 * (before - seconds),
            "tokens_per_second": tokens / seconds,
            "mfu": usual * tokens / seconds / peak,
        }
        before = seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/125m.json")
    parser.add_argument("--device", default="H200", help="a GPU of llm/hardware.json (default %(default)s)")
    parser.add_argument("--micro_batch", type=int, default=16, help="sequences (default %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the result there, as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    options = parser.parse_args(arguments)

    def run() -> None:
        stated = load_config(options.config, [*options.overrides, f"model.vocab_size={ASSUMED_VOCAB_SIZE}"])
        config, _ = resolve(stated, None)
        listed = lines(config, options.device, options.micro_batch, Assumed())
        total = sum(line.seconds for line in listed)
        print(f"{'phase':<10} {'operation':<21} {'GB':>7} {'TFLOP':>7} {'ms':>7} {'share':>6}  bound")
        for line in sorted(listed, key=lambda line: -line.seconds):
            print(
                f"{line.phase:<10} {line.op:<21} {line.work.moved / 1e9:>7.2f} {line.work.flops / 1e12:>7.3f} "
                f"{1e3 * line.seconds:>7.2f} {line.seconds / total:>6.1%}  {line.bound}"
            )
        results = list(predictions(config, options.device, options.micro_batch))
        print(f"\n{'ms':>7} {'saves':>6} {'tokens/s':>9} {'MFU':>6}")
        for result in results:
            saves = "" if result["saves_ms"] is None else f"{result['saves_ms']:.1f}"
            print(
                f"{result['micro_batch_ms']:>7.1f} {saves:>6} {result['tokens_per_second']:>9,.0f} "
                f"{metrics.percent(result['mfu']):>6}  {result['change']}"
            )
        if options.output:
            named = {"config": options.config, "device": options.device, "micro_batch": options.micro_batch}
            atomic_text(options.output, json.dumps({**named, "predicted": results}, indent=1) + "\n")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
