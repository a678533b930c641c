"""What a training step on a GPU should take: `python -m benchmarks.model --config configs/125m.json --device H200`.

`llm plan` predicts a step by the same arithmetic: llm/tools/roofline.py has it, with the rates, and the shares of them
that each op reaches. Here each op has its line. A change that was looked at replaces one share or removes bytes, and
has its own prediction, with the changes before it; benchmarks/LOG.md says why it is not made.
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
from llm.model.flops import flops_per_token
from llm.tools.roofline import BUSY, PRODUCT_SHARES, nominal_rates, op_seconds, passes_work, update_work
from llm.training.resolve import ASSUMED_VOCAB_SIZE, resolve


@dataclass(frozen=True)
class Assumed:
    """What a change alters."""

    attention_backward: float = PRODUCT_SHARES["backward", "attention"]
    swiglu_bytes: float = 1.0  # of those of SwiGLU's forward and backward


CHANGES: dict[str, dict[str, float]] = {
    # The epilogue keeps gate and up, which backward reads, and writes the result: the two reads go.
    "SwiGLU in its product's epilogue": {"swiglu_bytes": 0.75},
    "attention backward with five products in one kernel": {"attention_backward": 0.48},
}
"""{change, in the order of the work: what it alters}. 0.48: cuDNN's share on an H200 at 125m's heads.

Both are hopes: a product in Triton as fast as cuBLAS's, and no wait for the order of dq's sums.
"""


@dataclass(frozen=True)
class Line:
    """An operation of a micro-batch, or the optimizer's share of it."""

    phase: str
    op: str
    work: Work
    seconds: float
    bound: str


def lines(config: Config, device: str, micro_batch: int, assumed: Assumed) -> list[Line]:
    """Returns the operations of one micro-batch in bf16 at the config's full length, one document a sequence."""
    rates, _ = nominal_rates(named(device))
    works = passes_work(config, micro_batch, torch.bfloat16)
    for phase in ("forward", "backward"):
        works[phase, "swiglu"] *= assumed.swiglu_bytes
    assert config.data.seq_len is not None
    steps = micro_batch * config.data.seq_len / config.train.batch
    works |= {key: work * steps for key, work in update_work(config, 1, torch.bfloat16).items()}
    found = []
    for (phase, op), work in works.items():
        times = op_seconds(phase, op, work, rates)
        if (phase, op) == ("backward", "attention"):
            times["matmul"] *= PRODUCT_SHARES[phase, op] / assumed.attention_backward
        bound = max(times, key=lambda name: times[name])
        found.append(Line(phase, op, work, times[bound], bound))
    computing = sum(line.seconds for line in found)
    return [*found, Line("", "between kernels", Work(), computing * (1 / BUSY - 1), "")]


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
