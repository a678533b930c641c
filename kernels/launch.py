"""The code between an op and its Triton kernels: launch, tile sizes per architecture, registration with torch."""

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
except ImportError:  # on macOS and Windows the kernels stay plain functions that are never called
    # The names that the modules need on import: decorator, parameter annotations, and LOWEST in cross_entropy.py.
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=int)
    INTERPRETED = False
else:
    # Read once, because Triton reads it when it decorates a kernel: later changes have no effect.
    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run in numpy, on CPU tensors

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
TILES = Path(__file__).parent / "tiles"
INTERPRETER_ARCHITECTURE = "sm_90"  # the interpreter uses the tiles of this architecture
BOUND = 4096  # binaries that are held by their specialisation; a call with other integers adds one
INTERPRETER_PROCESSORS = 3  # so that a grid with one program per processor has several programs

P = ParamSpec("P")
R = TypeVar("R")
Tile = dict[str, int]

_forced: dict[str, Tile] = {}
_bound: dict[tuple[Any, ...], tuple[Any, Any, tuple[Any, ...]]] = {}  # {specialisation: (kernel, binary, constants)}
_launches_on_meta = False


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Runs a kernel on the device of its first argument. Does nothing for an empty grid.

    Args:
        kernel: a @triton.jit function.
        grid: number of programs per axis.
        args: tensors and scalars; meta: constexpr values, num_warps and num_stages.
    """
    if 0 in grid:
        return
    device = args[0].device
    if INTERPRETED or device.type != "cuda":
        kernel[grid](*args, enable_fp_fusion=True, **meta)
    elif device.index == torch.cuda.current_device():
        _launch_bound(kernel, grid, args, meta)
    else:  # Triton launches on the current device
        with torch.cuda.device(device):
            _launch_bound(kernel, grid, args, meta)


def _launch_bound(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """Launches on the current device. The binary of an earlier call that was specialised alike is launched directly,
    because Triton's own search for it takes several times as long as the launch.

    Such binaries are kept by a key that is finer than Triton's own.
    """
    key = (id(kernel), args[0].device.index, *[_specialised(x) for x in args], *meta.items())
    bound = _bound.get(key)
    if bound is None:
        # Contraction into FMAs is explicit, because its default differs between versions of Triton.
        binary = kernel[grid](*args, enable_fp_fusion=True, **meta)
        if len(_bound) == BOUND:
            _bound.clear()
        # The launcher of a binary takes the constexpr values too, in the order of the signature. The entry holds the
        # kernel, so that no other kernel gets its id.
        _bound[key] = kernel, binary, tuple(meta[name] for name in kernel.arg_names[len(args) :])
        return
    _, binary, constants = bound
    binary[grid + (1,) * (3 - len(grid))](*args, *constants)


def _specialised(x: Any) -> Any:
    """What Triton may compile an argument of a kernel into: equal for two arguments only if one binary serves both.

    Triton tells pointers apart by dtype and by alignment to 16 bytes, integers by their width, by 1 and by multiples of
    16, and numbers of another type not at all. Here an integer is told apart by its value.
    """
    kind = type(x)
    if kind is int:
        return x
    return kind if kind is float or x is None else (x.dtype, x.data_ptr() & 15)


@lru_cache
def processors(device: torch.device) -> int:
    """Returns the number of streaming multiprocessors: at least so many programs run at once."""
    if device.type != "cuda":
        return INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """torch.cuda.get_device_capability, cached, because every call of an op needs it."""
    return torch.cuda.get_device_capability(device)


def architecture(device: torch.device) -> str:
    """Returns the architecture whose tiles fit the device: one of ARCHITECTURES.

    For other devices: that of the same generation with the least shared memory or, if there is none, of all.
    """
    if device.type != "cuda":
        return INTERPRETER_ARCHITECTURE
    major, minor = capability(device)
    exact = f"sm_{major}{minor}"
    # sm_86 has 100 KB of shared memory per multiprocessor; none of ARCHITECTURES has less.
    return exact if exact in ARCHITECTURES else {9: "sm_90", 10: "sm_100", 12: "sm_120"}.get(major, "sm_86")


def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up. Triton's function of this name takes microseconds: it also serves inside kernels."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Returns the least power of 2 that is at least n, for n >= 1; not Triton's, as for `cdiv`."""
    return 1 << (n - 1).bit_length()


def tile(kernel: str, x: Tensor, width: int, size: int) -> Tile:
    """Returns the constexpr sizes, num_warps and num_stages for a kernel.

    Args:
        kernel: "OP.NAME": NAME in kernels/tiles/OP.json.
        x: its input, for the device and the bytes per element.
        width: width of a row or a head; size: number of rows or keys.

    Raises LookupError if the table has no row for this kernel and width.
    """
    forced = _forced.get(kernel)
    # A copy, because callers pop entries, but the cached tile must not change.
    return dict(forced if forced is not None else _tile(kernel, architecture(x.device), x.element_size(), width, size))


@contextmanager
def force_tile(kernel: str, chosen: Tile) -> Iterator[None]:
    """Runs a kernel with this tile instead of the one in the table, for the tuner and for tests of unusual tiles."""
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
    """Reads a kernel's table: rows {"bytes", "width", "size", and the tile}. The first row that covers a call is used.

    "width" and "size" are upper bounds, null for no bound. "*" is for all architectures that are not named.
    """
    op, name = kernel.split(".")
    by_architecture = tables(op)[name]
    return by_architecture.get(architecture) or by_architecture["*"]


def row_of(kernel: str, architecture: str, element_bytes: int, width: int, size: int) -> dict[str, Any]:
    """Returns the row of a kernel's table for a call: the first one whose bounds cover it.

    Raises LookupError if there is none.
    """
    for row in rows(kernel, architecture):
        bounds = (row["width"] is None or width <= row["width"], row["size"] is None or size <= row["size"])
        if row["bytes"] == element_bytes and all(bounds):
            return row
    raise LookupError(f"kernels/tiles: no tile of {kernel} on {architecture} for {element_bytes} bytes, width {width}")


def kernels_of(op: str) -> list[str]:
    """Returns the names of an op's kernels that have tiles."""
    return list(tables(op))


@lru_cache
def tables(op: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    tables: dict[str, dict[str, list[dict[str, Any]]]] = json.loads((TILES / f"{op}.json").read_text())
    return tables


# Cached by plain values; otherwise an eager call would search the table at every launch.
@lru_cache(maxsize=4096)
def _tile(kernel: str, architecture: str, element_bytes: int, width: int, size: int) -> Tile:
    row = row_of(kernel, architecture, element_bytes, width, size)
    return {key: value for key, value in row.items() if key not in ("bytes", "width", "size")}


@contextmanager
def launch_on_meta() -> Iterator[None]:
    """Inside this block, an op runs its launcher for meta tensors too, not its fake.

    Meta tensors have shapes, strides and dtypes but no storage. That is enough to compile kernels for a GPU that does
    not exist here (benchmarks/aot.py replaces `launch`). Outside the block, an op on meta tensors only gives shapes.
    """
    global _launches_on_meta
    before = _launches_on_meta
    _launches_on_meta = True
    try:
        yield
    finally:
        _launches_on_meta = before


def _is_watched(x: Any) -> bool:
    """Whether an op must go through torch's dispatcher: for meta tensors outside launch_on_meta, which only have
    shapes, and under a mode that only sees ops (selective checkpointing, a count of memory).
    """
    return (x.is_meta and not _launches_on_meta) or torch._C._len_torch_dispatch_stack() > 0


def registered(fake: Callable[P, R], mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Registers a launcher as an op of torch, llm::NAME, which torch.compile does not trace into.

    Eager calls run the launcher directly, because torch's dispatcher takes several microseconds. A profiler still shows
    them with the op's name.

    Args:
        fake: has the same signature; returns empty tensors with the right shapes, dtypes and strides.
        mutates_args: the arguments that the launcher overwrites.
    """

    def decorate(launcher: Callable[P, R]) -> Callable[P, R]:
        name = f"llm::{launcher.__name__.strip('_')}"
        op = torch.library.custom_op(name, launcher, mutates_args=mutates_args)
        # torch.compile traces with tensors without memory, but the launchers need addresses.
        op.register_fake(fake)

        @wraps(launcher)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            # Traced tensors have no addresses for the C++. args[0], because all tensors of a call share a device.
            if torch.compiler.is_compiling() or _is_watched(args[0]):
                return op(*args, **kwargs)
            if torch.autograd._profiler_enabled():
                # Recorded as the dispatcher does it: kernels inside a record_function are not traced back to it.
                with torch._C._profiler._RecordFunctionFast(name):
                    return launcher(*args, **kwargs)
            return launcher(*args, **kwargs)

        call.op = op  # type: ignore[attr-defined]  # for torch.library.opcheck
        return call

    return decorate
