"""Finds the fastest tiles of the kernels on this GPU and writes them to kernels/tiles.

    python -m benchmarks.tune [--op attention] [--minutes 30] [--jobs 14]

For each row of a kernel's table, the candidates below run on a call that uses the row. Several processes compile them
first, into Triton's cache. A candidate is dropped if it does not compile, needs more than the device has, spills
registers or computes something else. The others are timed together with the current tile, interleaved; the fastest one
replaces it if it is at least 2 % faster. The result is a table for this architecture; "*", for all other ones, does not
change. The buckets of width and size do not change either: to split one, add a row to the table and run this again.
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import kernels
from benchmarks import cases, timing
from benchmarks.cases import BOTH, FORWARD, Case, Operand, Variant, Work
from kernels import launch, parity
from kernels.cross_entropy import Options, cross_entropy_in_place
from kernels.launch import Tile
from llm.atomic import atomic_text

GAIN = 0.98  # ratio of times; a smaller gain is noise
SAMPLES = 30

ATTENTION = {"BLOCK_Q": (64, 128), "BLOCK_K": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3)}
# For each kernel, grids of values; every combination is tried.
CANDIDATES: dict[str, list[dict[str, tuple[int, ...]]]] = {
    "rms_norm.forward": [{"ROWS": (1, 2, 4, 8, 16), "num_warps": (2, 4, 8, 16)}],
    "rms_norm.backward": [{"ROWS": (1, 2, 4, 8), "PROGRAMS": (1, 2, 4, 8), "num_warps": (4, 8, 16)}],
    "cross_entropy.loss": [{"BLOCK_V": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16)}],
    "cross_entropy.gradient": [{"BLOCK_V": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16)}],
    "cross_entropy.in_place": [
        {"HELD": (1,), "BLOCK_V": (2048, 4096, 8192), "num_warps": (8, 16, 32)},
        {"HELD": (0,), "BLOCK_V": (2048, 4096, 8192), "num_warps": (4, 8, 16)},
    ],
    "attention.forward": [ATTENTION],
    "attention.dq": [ATTENTION],
    "attention.dkdv": [ATTENTION],
    "attention.decode": [
        {"BLOCK_Q": (16,), "BLOCK_K": (32, 64, 128, 256), "num_warps": (2, 4, 8), "num_stages": (2, 3, 4)}
    ],
    "cached_attention.step": [
        {"SPLIT_KEYS": (128, 256, 512), "BLOCK_K": (32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (2, 3)}
    ],
    "cached_attention.sum": [{"num_warps": (1, 2, 4)}],
    "sampling.keys": [{"BLOCK_V": (2048, 4096, 8192), "num_warps": (8, 16, 32)}],
    "sampling.choose": [{"BLOCK_V": (1024, 2048, 4096), "num_warps": (4, 8, 16)}],
    "swiglu.forward": [{"ROWS": (1, 2, 4), "BLOCK_F": (512, 1024, 2048, 4096), "num_warps": (4, 8)}],
    "swiglu.backward": [{"ROWS": (1, 2, 4), "BLOCK_F": (512, 1024, 2048, 4096), "num_warps": (4, 8)}],
    "norm_rope.forward": [{"TOKENS": (1, 2, 4, 8), "HEADS": (2, 4, 8), "num_warps": (2, 4, 8)}],
    "norm_rope.backward": [{"TOKENS": (2, 4, 8), "HEADS": (2, 4), "PROGRAMS": (4, 8, 16), "num_warps": (2, 4, 8)}],
    "rope.rotate": [{"TOKENS": (1, 2, 4, 8), "HEADS": (1, 2, 4, 8), "num_warps": (2, 4, 8)}],
}
MOST_ELEMENTS = 256  # elements of a block per thread: more would spill, after a long compilation
HELD_LIMIT = 65536  # columns; for a wider row the unrolled kernel takes minutes to compile
FASTEST_MEMORY = 8e12  # bytes/s, above any device: for the least time of a call
BACKWARD = (
    "rms_norm.backward",
    "cross_entropy.gradient",
    "attention.dq",
    "attention.dkdv",
    "norm_rope.backward",
    "swiglu.backward",
)

# The widths of the shipped models. A row is tuned for the widest one that it covers, else for its upper bound.
WIDTHS = {
    "rms_norm": (128, 768, 1024, 2048),
    "cross_entropy": (32000, 50304, 128256),
    "attention": (64, 128),
    "cached_attention": (64, 128),
    "sampling": (32000, 50304, 128256),
    "swiglu": (2048, 3072, 5888),
    "norm_rope": (64, 128),
    "rope": (64, 128),
}
# Keys of attention, or rows; elsewhere 32,768 rows.
SIZES = {"attention": 4096, "cached_attention": 4096, "cross_entropy": 8192, "sampling": 8}
DTYPES = {2: torch.bfloat16, 4: torch.float32}

Call = tuple[Case, str, Variant]


def candidates(kernel: str, width: int) -> list[Tile]:
    """Returns the tiles to try for a kernel at this width."""
    tiles = [
        dict(zip(grid, values, strict=True))
        for grid in CANDIDATES[kernel]
        for values in itertools.product(*grid.values())
    ]
    return [tile for tile in tiles if _held(kernel, tile, width) <= MOST_ELEMENTS * 32 * tile["num_warps"]]


def _held(kernel: str, tile: Tile, width: int) -> float:
    """Returns the number of elements that a program holds at once."""
    if tile.get("HELD"):
        return width if width <= HELD_LIMIT else math.inf
    whole_rows = kernel.startswith(("rms_norm", "norm_rope", "rope"))
    return math.prod(tile.get(key, 1) for key in ("ROWS", "TOKENS", "HEADS", "BLOCK_F", "BLOCK_V")) * (
        width if whole_rows else 1
    )


def calls(kernel: str, device: torch.device, element_bytes: int, width: int, size: int) -> list[Call]:
    """Returns calls that launch a kernel at this width and size (and other kernels of its op), to time it."""
    dtype, op = DTYPES[element_bytes], kernel.split(".")[0]
    if op == "cached_attention":
        return [_decoding_step(device, dtype, width, size)]
    if op == "sampling":
        return [_draw(device, dtype, width, size)]
    if kernel == "attention.decode":
        q, kv = Operand((32, 1, 12, width)), Operand((32, size, 4, width))
        made = [Case("attention", "decode", dtype, device, (q, kv, kv), Work(), Work(), part=1)]
    elif op == "attention":
        sizes = (max(1, 32768 // size), size, 12, 4, width)
        made = [cases.attention(device, dtype, *sizes, documents=documents) for documents in (False, True)]
    elif op in ("rope", "norm_rope"):
        made = [getattr(cases, op)(device, dtype, max(1, size // 2048), min(size, 2048), 12, 4, width)]
    else:
        made = [getattr(cases, op)(device, dtype, size, width)]
    if kernel == "cross_entropy.in_place":
        options = Options(width, -100, 0.0)
        target = made[0].by_row["target"]

        def in_place(logits: Tensor) -> tuple[Tensor, ...]:
            logits = logits.clone()  # every call needs the same logits; the time of the copy is the same for all tiles
            return cross_entropy_in_place(logits, target, None, *options)[0], logits

        return [(made[0], BOTH, Variant(in_place, whole=True))]
    mode = BOTH if kernel in BACKWARD else FORWARD
    return [
        (case, mode, Variant(partial(getattr(kernels, case.op), **case.extras, **case.options, backend="triton")))
        for case in made
    ]


def _decoding_step(device: torch.device, dtype: torch.dtype, width: int, size: int) -> Call:
    """Returns the last step of sequences that fill their cache. It writes the same slot with the same numbers again."""
    batch, heads, kv_heads = 8, 6, 2
    keys, values = (torch.randn(batch, kv_heads, size, width, device=device).to(dtype) for _ in "kv")
    norm = torch.ones(width, device=device, dtype=dtype)
    angles = (table.to(device) for table in kernels.rope_cos_sin(0, size, width, 10_000.0))
    position = torch.tensor([size - 1], device=device)
    first = torch.zeros(batch, dtype=torch.int64, device=device)
    rest = (keys, values, *angles, position, first, size, (norm, norm))
    case = Case(
        "cached_attention", "step", dtype, device, (Operand((batch, heads + 2 * kv_heads, width)),), Work(), Work(), 1
    )
    return case, FORWARD, Variant(lambda qkv: kernels.cached_attention(qkv, *rest))


def _draw(device: torch.device, dtype: torch.dtype, width: int, size: int) -> Call:
    """Returns a draw with top-p, which needs every pass of the kernels."""
    uniforms, top_p = (torch.full((n,), 0.9, dtype=torch.float64, device=device) for n in (size, 1))
    temperature, min_p = torch.full((1,), 0.8, device=device), torch.zeros(1, device=device)
    options = (temperature, torch.tensor([width], device=device), top_p, min_p)

    def draw(logits: Tensor) -> Tensor:
        tokens = torch.empty(size, dtype=torch.int64, device=device)
        logprobs = torch.empty(size, device=device)
        kernels.drawn_tokens(logits, uniforms, *options, (tokens, logprobs), backend="triton")
        return logprobs

    return Case("sampling", "draw", dtype, device, (Operand((size, width)),), Work(), Work(), 1), FORWARD, Variant(draw)


@dataclass(frozen=True)
class Trial:
    """A candidate: its time relative to the current tile, or why it was dropped."""

    tile: Tile
    ratio: float = math.inf
    reason: str | None = None


def try_tile(
    kernel: str,
    tile: Tile,
    now: Tile,
    expected: Sequence[Tensor],
    run: Callable[[], Sequence[Tensor]],
    ratio: Callable[[Tile, Tile], float],
) -> Trial:
    """Compares the results of a tile with those of the current tile, then times it.

    Args:
        expected: the result of `run` with the current tile.
        run: makes the calls once.
        ratio: returns the ratio of the times of two tiles.
    """
    try:
        with launch.force_tile(kernel, tile), launched(kernel) as compiled:
            found = run()
    except Exception as error:  # from Triton, from the driver or from an assertion: such a tile cannot be shipped
        return Trial(tile, reason=f"does not run ({type(error).__name__})")
    if any(getattr(binary, "n_spills", 0) for binary in compiled):
        return Trial(tile, reason="spills")
    if not all(_same(a, b) for a, b in zip(found, expected, strict=True)):
        return Trial(tile, reason="computes something else")
    return Trial(tile, ratio=ratio(tile, now))


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether two results of one dtype differ only by rounding."""
    difference, size = (found.float() - expected.float()).norm(), expected.float().norm()
    return bool(difference <= parity.RMSE[expected.dtype] * size)


@contextlib.contextmanager
def launched(kernel: str) -> Iterator[list[Any]]:
    """Yields a list to which each launch of the kernel's op adds its compiled kernel."""
    compiled: list[Any] = []

    class Recording:
        def __init__(self, function: Any) -> None:
            self.function = function

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **meta: compiled.append(self.function[grid](*args, **meta))

    def record(function: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        launch.launch(Recording(function), grid, *args, **meta)

    with mock.patch.object(sys.modules[f"kernels.{kernel.split('.')[0]}"], "launch", record):
        yield compiled


Ahead = tuple[str, dict[str, Any], Tile]
"""(kernel, row of its table, candidate) to compile."""


def compile_ahead(work: Sequence[Ahead], processes: int) -> None:
    """Runs every candidate once in one of several processes, so that Triton's cache on disk has its binary."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(_run_once, work, chunksize=4):
            pass


def _run_once(work: Ahead) -> None:
    kernel, row, tile = work
    device = torch.device("cuda")
    width, size = call_of(kernel.split(".")[0], row, launch.rows(kernel, launch.architecture(device)))
    # A candidate that cannot run, or for which this process has no memory, raises again when it is tried.
    with contextlib.suppress(Exception), launch.force_tile(kernel, tile):
        for case, mode, variant in calls(kernel, device, row["bytes"], width, size):
            cases.results(variant, mode, *_inputs(case, mode, 0))


def choose(trials: Sequence[Trial], now: Tile) -> Trial:
    """Returns the fastest tile, or the current one if no other is clearly faster."""
    best = min(trials, key=lambda trial: trial.ratio, default=Trial(now, 1.0))
    return best if best.ratio < GAIN else Trial(now, 1.0)


def _inputs(case: Case, mode: str, seed: int) -> tuple[list[Tensor], list[Tensor | None]]:
    """Returns the operands and, for forward+backward, the gradients of the outputs."""
    return case.draw(seed), cases.draw_behind(case, seed + timing.MAX_CALLS) if mode == BOTH else []


def tune(kernel: str, row: dict[str, Any], device: torch.device) -> tuple[Trial, list[Trial]]:
    """Returns the best tile for a row of the kernel's table, and all candidates."""
    op = kernel.split(".")[0]
    width, size = call_of(op, row, launch.rows(kernel, launch.architecture(device)))
    now = {key: value for key, value in row.items() if key not in ("bytes", "width", "size")}
    first: list[partial[tuple[Tensor, ...]]] = []
    replay: list[partial[tuple[Tensor, ...]]] = []
    for case, mode, variant in calls(kernel, device, row["bytes"], width, size):
        set_bytes = sum(x.nbytes for x in case.draw(0))
        sets = timing.input_sets(set_bytes, device)
        inputs = [_inputs(case, mode, seed) for seed in range(sets)]
        made = [partial(cases.results, variant, mode, *each) for each in inputs]
        first.append(made[0])
        replay += made * (timing.calls_a_replay(sets, set_bytes / FASTEST_MEMORY, device) // sets)

    def run() -> list[Tensor]:
        return [y for call in first for y in call()]

    def with_tile(tile: Tile, call: Callable[[], Any]) -> Any:
        with launch.force_tile(kernel, tile):
            return call()

    def ratio(tile: Tile, other: Tile) -> float:
        both = {
            name: [partial(with_tile, each, call) for call in replay] for name, each in (("", tile), ("now", other))
        }
        taken = timing.interleaved(both, device, samples=SAMPLES)
        medians = [each.median if isinstance(each, timing.Timing) else math.inf for each in taken.values()]
        return medians[0] / medians[1]

    with launch.force_tile(kernel, now):
        expected = run()
    trials = [try_tile(kernel, tile, now, expected, run, ratio) for tile in candidates(kernel, width) if tile != now]
    return choose(trials, now), trials


def call_of(op: str, row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Returns (width, size) of a call that uses this row of a table."""
    size = row["size"] or SIZES.get(op, 32768)

    def takes(width: int) -> bool:
        covering = (
            r
            for r in rows
            if r["bytes"] == row["bytes"]
            and (r["width"] is None or width <= r["width"])
            and (r["size"] is None or size <= r["size"])
        )
        return next(covering, None) == row

    return max(filter(takes, WIDTHS[op]), default=row["width"] or max(WIDTHS[op])), size


def text_of(tables: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Formats a file of tiles, one row per line."""
    kernels = []
    for name, by_architecture in tables.items():
        parts = [
            f"    {json.dumps(architecture)}: [\n" + ",\n".join(f"      {json.dumps(row)}" for row in rows) + "\n    ]"
            for architecture, rows in by_architecture.items()
        ]
        kernels.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(parts) + "\n  }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def write_row(path: Path, name: str, architecture: str, index: int, tile: Tile) -> None:
    """Puts a tile into one row of the table of an architecture, which starts as a copy of "*"."""
    tables = json.loads(path.read_text())
    by_architecture = tables[name]
    rows = by_architecture.setdefault(architecture, [dict(row) for row in by_architecture["*"]])
    rows[index] = {key: rows[index][key] for key in ("bytes", "width", "size")} | tile
    atomic_text(path, text_of(tables))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    ops = sorted(WIDTHS)
    parser.add_argument("--op", nargs="*", choices=ops, default=ops, help="default: all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after so many minutes")
    cores = max(1, (os.cpu_count() or 1) - 2)
    parser.add_argument("--jobs", type=int, default=cores, help="processes that compile (default %(default)s)")
    options = parser.parse_args(arguments)
    if launch.INTERPRETED or not torch.cuda.is_available():
        print("error: tuning needs an NVIDIA GPU, and torch finds none; the tiles stay as they are", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    end, architecture = time.monotonic() + 60 * options.minutes, launch.architecture(device)
    print(f"{torch.cuda.get_device_name(device)}: tiles for {architecture}")
    rows = [
        (f"{op}.{name}", index, row)
        for op in options.op
        for name in launch.kernels_of(op)
        for index, row in enumerate(launch.rows(f"{op}.{name}", architecture))
    ]
    if options.jobs > 1:
        widths = [
            (kernel, row, call_of(kernel.split(".")[0], row, launch.rows(kernel, architecture))[0])
            for kernel, _, row in rows
        ]
        compile_ahead(
            [(kernel, row, tile) for kernel, row, width in widths for tile in candidates(kernel, width)], options.jobs
        )
    for kernel, index, row in sorted(rows, key=lambda item: item[2]["bytes"]):  # bf16 comes first
        what = f"{kernel}, {row['bytes']} bytes, width <= {row['width']}, size <= {row['size']}"
        if time.monotonic() > end:
            print(f"{what}: not tuned, the time was over")
            continue
        best, trials = tune(kernel, row, device)
        reasons = [trial.reason for trial in trials if trial.reason]
        counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons))
        tried = f"{len(trials)} tried" + (f", of which {counts}" if counts else "")
        if best.ratio == 1.0:
            print(f"{what}: stays {_short(best.tile)} ({tried})", flush=True)
            continue
        op, name = kernel.split(".")
        write_row(launch.TILES / f"{op}.json", name, architecture, index, best.tile)
        before = {key: row[key] for key in best.tile if key in row}
        print(f"{what}: {_short(before)} -> {_short(best.tile)}, {best.ratio:.2f} x the time ({tried})", flush=True)
    return 0


def _short(tile: Tile) -> str:
    return " ".join(f"{key}={value}" for key, value in tile.items())


if __name__ == "__main__":
    sys.exit(main())
