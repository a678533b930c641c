"""Everything between an op and its Triton kernels: launching, tiles by architecture, and registration with torch."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows: the kernels stay plain functions that are never called
    # What the modules use on import: the decorator, the annotations of parameters, and LOWEST in cross_entropy.py.
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=int)
    INTERPRETED = False
else:
    # Read once, as Triton reads it when it decorates a kernel: a later change of the variable has no effect.
    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run in numpy, on CPU tensors

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
TILES = Path(__file__).parent / "tiles"
INTERPRETER_ARCHITECTURE = "sm_90"  # whose tiles the interpreter runs
INTERPRETER_PROCESSORS = 3  # enough that a grid of one program a processor has several

P = ParamSpec("P")
R = TypeVar("R")
Tile = dict[str, int]

_forced: dict[str, Tile] = {}
_launches_on_meta = False


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Runs a kernel on the device of its first argument; an empty grid is nothing to do.

    Args:
        kernel: a @triton.jit function.
        grid: number of programs by axis.
        args: its tensors and scalars; meta: its constexpr values, num_warps and num_stages.
    """
    if 0 in grid:
        return
    # Contraction into FMAs is named because its default differs between Triton's versions.
    if args[0].device.type != "cuda":
        kernel[grid](*args, enable_fp_fusion=True, **meta)
        return
    # An autograd thread may have no current device, and Triton launches on the current one.
    with torch.cuda.device(args[0].device):
        kernel[grid](*args, enable_fp_fusion=True, **meta)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device: programs that surely run at once."""
    if device.type != "cuda":
        return INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def architecture(device: torch.device) -> str:
    """The architecture whose tiles fit the device: one of ARCHITECTURES.

    One that is not among them takes its generation's with the least shared memory or, when unknown, the least of all.
    """
    if device.type != "cuda":
        return INTERPRETER_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(device)
    exact = f"sm_{major}{minor}"
    # sm_86 has 100 KB of shared memory a multiprocessor, and none of ARCHITECTURES has less.
    return exact if exact in ARCHITECTURES else {9: "sm_90", 10: "sm_100", 12: "sm_120"}.get(major, "sm_86")


def tile(kernel: str, x: Tensor, width: int, size: int) -> Tile:
    """The constexpr sizes, num_warps and num_stages with which to run a kernel.

    Args:
        kernel: "OP.NAME": NAME in kernels/tiles/OP.json.
        x: its input, for the device and the bytes of an element.
        width: of a row or a head; size: the number of rows or keys.

    Raises LookupError where the table has no row for this kernel and width.
    """
    forced = _forced.get(kernel)
    # A copy: callers pop entries, and the cached tile must stay whole.
    return dict(forced if forced is not None else _tile(kernel, architecture(x.device), x.element_size(), width, size))


@contextmanager
def force_tile(kernel: str, chosen: Tile) -> Iterator[None]:
    """Runs a kernel with this tile instead of the table's: for the tuner, and for tests of unusual tiles."""
    before = _forced.get(kernel)
    _forced[kernel] = chosen
    try:
        yield
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before


def rows(kernel: str, architecture: str) -> list[dict[str, Any]]:
    """A kernel's table: rows {"bytes", "width", "size", and the tile}, of which the first that covers a call is taken.

    "width" and "size" are upper bounds, null for none. "*" is for every architecture that is not named.
    """
    op, name = kernel.split(".")
    by_architecture = tables(op)[name]
    return by_architecture.get(architecture) or by_architecture["*"]


def row_of(kernel: str, architecture: str, element_bytes: int, width: int, size: int) -> dict[str, Any]:
    """The row of a kernel's table that a call takes: the first whose bounds cover it.

    Raises LookupError where there is none.
    """
    for row in rows(kernel, architecture):
        bounds = (row["width"] is None or width <= row["width"], row["size"] is None or size <= row["size"])
        if row["bytes"] == element_bytes and all(bounds):
            return row
    raise LookupError(f"kernels/tiles: no tile of {kernel} on {architecture} for {element_bytes} bytes, width {width}")


def kernels_of(op: str) -> list[str]:
    """The names of an op's kernels that have tiles."""
    return list(tables(op))


@lru_cache
def tables(op: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    tables: dict[str, dict[str, list[dict[str, Any]]]] = json.loads((TILES / f"{op}.json").read_text())
    return tables


# Cached by plain values: an eager call would search the table at every launch.
@lru_cache(maxsize=4096)
def _tile(kernel: str, architecture: str, element_bytes: int, width: int, size: int) -> Tile:
    row = row_of(kernel, architecture, element_bytes, width, size)
    return {key: value for key, value in row.items() if key not in ("bytes", "width", "size")}


@contextmanager
def launch_on_meta() -> Iterator[None]:
    """Runs an op's launcher for meta tensors too, instead of its fake.

    Meta tensors have shapes, strides and dtypes but no storage: enough to compile kernels for a GPU that is not there,
    which the caller has `launch` do (benchmarks/aot.py). Outside, an op on meta tensors returns shapes alone.
    """
    global _launches_on_meta
    before = _launches_on_meta
    _launches_on_meta = True
    try:
        yield
    finally:
        _launches_on_meta = before


def _is_watched(x: Any) -> bool:
    """Whether an op has to go through torch's dispatcher: for meta tensors outside launch_on_meta, which have shapes
    alone, and under a mode that sees ops alone (selective checkpointing, a count of memory).
    """
    return (x.is_meta and not _launches_on_meta) or torch._C._len_torch_dispatch_stack() > 0


def registered(fake: Callable[P, R], mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a launcher an op of torch, llm::NAME, that torch.compile keeps whole.

    Eager calls run the launcher itself: the way through torch's dispatcher costs several microseconds. A profiler sees
    them under the op's name all the same.

    Args:
        fake: of the same signature; returns empty tensors of the right shapes, dtypes and strides.
        mutates_args: the arguments that the launcher writes over.
    """

    def decorate(launcher: Callable[P, R]) -> Callable[P, R]:
        name = f"llm::{launcher.__name__.strip('_')}"
        op = torch.library.custom_op(name, launcher, mutates_args=mutates_args)
        # torch.compile traces with tensors that have no memory, and the launchers need addresses.
        op.register_fake(fake)

        @wraps(launcher)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            # Traced tensors have no addresses for the C++ to take. args[0]: a call's tensors share a device.
            if torch.compiler.is_compiling() or _is_watched(args[0]):
                return op(*args, **kwargs)
            if torch.autograd._profiler_enabled():
                # As the dispatcher names an op: kernels are not traced back to a record_function around them.
                with torch._C._profiler._RecordFunctionFast(name):
                    return launcher(*args, **kwargs)
            return launcher(*args, **kwargs)

        call.op = op  # type: ignore[attr-defined]  # for torch.library.opcheck
        return call

    return decorate
