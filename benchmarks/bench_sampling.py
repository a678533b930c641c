"""Measures how long it takes to choose a token from logits on the CPU, against the same in torch's operations.

    python -m benchmarks.bench_sampling [--vocab_size 32000] [--batch_sizes 1 8] [--rounds 100]

Both give a token and its log-probability for each row, in turn in one process, on normal random logits with a standard
deviation of `--spread`. torch computes a row by softmax, topk, a sort for top-p, and multinomial. Columns:

ours, torch us   microseconds a row, median of the rounds
ratio            torch / ours, median of the rounds' ratios, and the range of their middle half
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_generate import describe
from benchmarks.timing import wall_seconds
from llm.atomic import atomic_text
from llm.inference.sampling import Sampler, Sampling

SETTINGS = {
    "greedy": Sampling(temperature=0),
    "temperature 0.8": Sampling(temperature=0.8),
    "top-k 50": Sampling(temperature=0.8, top_k=50),
    "top-p 0.95": Sampling(temperature=0.8, top_p=0.95),
    "min-p 0.05": Sampling(temperature=0.8, min_p=0.05),
    "top-k 50, top-p 0.95": Sampling(temperature=0.8, top_k=50, top_p=0.95),
    "top-p 0.95, min-p 0.05": Sampling(temperature=0.8, top_p=0.95, min_p=0.05),
    "penalty 1.1, top-p 0.95": Sampling(temperature=0.8, repetition_penalty=1.1, top_p=0.95),
}
HELD = 256  # tokens before the one that is chosen


def in_torch(logits: Tensor, generators: Sequence[torch.Generator], sampling: Sampling, held: list[int]) -> None:
    """Chooses a token for each row of logits, fp32 [B, V]."""
    normalisers = logits.logsumexp(dim=-1)
    for row, generator in enumerate(generators):
        token = sample(logits[row], generator, sampling, held)
        float(logits[row, token] - normalisers[row])


def sample(logits: Tensor, generator: torch.Generator, sampling: Sampling, held: list[int]) -> int:
    if sampling.repetition_penalty != 1:
        index = torch.tensor(held).unique()
        value, penalty = logits[index], sampling.repetition_penalty
        logits = logits.index_copy(0, index, torch.where(value > 0, value / penalty, value * penalty))
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()) / sampling.temperature
    if sampling.top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(sampling.top_k, len(logits))).values[-1], -torch.inf)
    probability = logits.softmax(dim=-1)
    if sampling.top_p is not None:
        ordered, index = probability.sort(descending=True, stable=True)
        probability[index[ordered.cumsum(dim=-1) - ordered >= sampling.top_p]] = 0.0
    if sampling.min_p is not None:
        probability[probability < sampling.min_p * probability.max()] = 0.0
    return int(torch.multinomial(probability, 1, generator=generator))


def measure(setting: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one line of the table."""
    noise = torch.Generator().manual_seed(0)
    logits = options.spread * torch.randn(batch, options.vocab_size, generator=noise)
    array, sampling, rows = logits.numpy(), SETTINGS[setting], range(batch)
    held = torch.randint(options.vocab_size, (HELD,), generator=noise).tolist()
    generators = [torch.Generator().manual_seed(row) for row in rows]
    sampler = Sampler(sampling, [held] * batch, options.vocab_size, rows)
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: sampler.choose(array, rows),
        "torch": lambda: in_torch(logits, generators, sampling, held),
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds + 1):
        for name, call in calls.items():
            taken[name].append(wall_seconds(call, logits.device) / batch)
    ours, theirs = (times[1:] for times in taken.values())  # the first round touches new memory
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    return {
        "setting": setting,
        "batch": batch,
        "ours_us_a_row": 1e6 * statistics.median(ours),
        "torch_us_a_row": 1e6 * statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "ratio_middle_half": [ratios[len(ratios) // 4], ratios[math.ceil(3 * len(ratios) / 4) - 1]],
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['device']}, {result['threads']} threads on {result['cores']} cores, load {result['load_before']:.1f} "
        f"before; torch {result['versions']['torch']}",
        f"{result['vocab_size']:,} tokens, median of {result['rounds']} rounds",
        "",
        f"{'setting':<23}  batch  ours us  torch us  ratio",
    ]
    for line in result["lines"]:
        low, high = line["ratio_middle_half"]
        lines.append(
            f"{line['setting']:<23}  {line['batch']:>5}  {line['ours_us_a_row']:>7.0f}  "
            f"{line['torch_us_a_row']:>8,.0f}  {line['ratio']:>5.1f} ({low:.1f} to {high:.1f})"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_sampling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--spread", type=float, default=3.0, help="standard deviation of the logits (default 3)")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--output", type=Path, help="also write the result there, as JSON")
    options = parser.parse_args(arguments)
    result = describe(torch.device("cpu")) | {
        "vocab_size": options.vocab_size,
        "spread": options.spread,
        "rounds": options.rounds,
    }
    result["lines"] = [measure(setting, batch, options) for setting in SETTINGS for batch in options.batch_sizes]
    print(table(result))
    if options.output:
        atomic_text(options.output, json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
