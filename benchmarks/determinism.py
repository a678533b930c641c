"""Whether every op gives the same bits on every run: `python -m benchmarks.determinism [--runs 10] [--output FILE]`.

Each op runs forward and backward on the same inputs, at the sizes of the kernel benchmark, with and without documents,
on the default backend of this machine.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bench_kernels import default_device
from benchmarks.cases import BOTH, Case, cases, draw_behind, results
from benchmarks.rivals import IN_PLACE, CannotRun, variants
from llm.atomic import atomic_text


def chosen(device: torch.device) -> Iterator[Case]:
    """Returns the first case of each op, and for attention also the first one with documents."""
    seen = set()
    for case in cases(device):
        kind = (case.op, "doc_start" in case.extras)
        if kind not in seen:
            seen.add(kind)
            yield case


def unstable(case: Case, name: str, runs: int) -> list[int]:
    """Returns the indexes of outputs and gradients that differ in a bit between runs of a variant."""
    variant, behind = variants(case, BOTH)[name](case.extras), draw_behind(case, 1)
    first: tuple[Tensor, ...] = ()
    different: set[int] = set()
    for _ in range(runs):
        # Drawn again, because a variant may work in place.
        found = results(variant, BOTH, case.draw(0), [None if g is None else g.clone() for g in behind])
        first = first or tuple(y.clone() for y in found)
        different |= {i for i, (a, b) in enumerate(zip(found, first, strict=True)) if not _same_bits(a, b)}
    return sorted(different)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(x.contiguous().view(torch.uint8) if x.dim() else x.view(1).view(torch.uint8) for x in (a, b)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.determinism", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    parser.add_argument("--runs", type=int, default=10, help="default %(default)s")
    parser.add_argument("--output", type=Path, help="also write the result there, as JSON")
    options = parser.parse_args(arguments)
    device = torch.device(options.device) if options.device else default_device()
    found = {}
    for case in chosen(device):
        used, *others = variants(case, BOTH)
        for name in [used, *(name for name in others if name == IN_PLACE)]:
            try:
                different = unstable(case, name, options.runs)
            except CannotRun:
                continue
            found[f"{case}, {name}"] = different
            verdict = f"differ: {different}" if different else "the same bits"
            print(f"{case}, {name}: {options.runs} runs, {verdict}", flush=True)
    if options.output:
        atomic_text(options.output, json.dumps({"runs": options.runs, "different": found}, indent=1) + "\n")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
