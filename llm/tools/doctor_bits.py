"""Whether the ranks of `llm doctor --kernels` compute the same bits for the same inputs."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from kernels.parity import digest
from llm.world import PRECISIONS, World

PRODUCT_ROWS = 512


def of_all(world: World, value: Any) -> list[Any]:
    """Returns every rank's value. Collective."""
    values = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def bits_of(checks: list[dict[str, Any]]) -> dict[str, str]:
    """Returns {what was computed: its digest}."""
    return {
        f"{one['op']} in {one['dtype']} by {one['backend']}, {result['name']}": result["bits"]
        for one in checks
        for result in one["results"]
    }


def product_bits(device: torch.device, low: torch.dtype, width: int) -> dict[str, str]:
    """Returns the digests of products of matrices, most of the arithmetic of a step."""
    found = {}
    for dtype in (low, torch.float32):
        generator = torch.Generator(device).manual_seed(0)
        a, b = (torch.randn(PRODUCT_ROWS, width, generator=generator, device=device, dtype=dtype) for _ in range(2))
        found[f"product in {PRECISIONS[dtype]}, {PRODUCT_ROWS} x {width}"] = digest(a @ b.T)
        found[f"product in {PRECISIONS[dtype]}, {width} x {PRODUCT_ROWS}"] = digest(a.T @ b)
    return found


def compare_bits(ranks: list[tuple[dict[str, str], list[str]]], say: Callable[[str], None]) -> dict[str, Any]:
    """Says which ranks have other bits than most. ranks: (digests, what does not agree with its reference) of each."""
    other: dict[int, list[str]] = {}
    for what in ranks[0][0]:
        values = [bits.get(what) for bits, _ in ranks]
        usual, _ = Counter(values).most_common(1)[0]
        for rank, value in enumerate(values):
            if value != usual:
                other.setdefault(rank, []).append(what)
    for rank, different in sorted(other.items()):
        say(f"rank {rank:<6} OTHER BITS than most ranks: {'; '.join(different)}")
    if not other:
        say(f"the same bits on all {len(ranks)} ranks: {len(ranks[0][0])} results")
    wrong = [f"{what} (rank {rank})" for rank, (_, failed) in enumerate(ranks) for what in failed]
    return {
        "ranks": {
            "size": len(ranks),
            "same_bits": not other,
            "other": {str(rank): what for rank, what in other.items()},
        },
        "failed": wrong + [f"rank {rank} computes other bits" for rank in sorted(other)],
    }
