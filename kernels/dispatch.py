"""Chooses the backend of an op: a Triton kernel, the C++ of csrc/cpu/, or plain torch.

Each call chooses once, from its `backend` argument, else `set_backend`, else the environment variable LLM_KERNELS, else
`auto`: triton on an NVIDIA device of compute capability >= 8.0, cpp on a CPU, torch elsewhere. If this backend does not
support a call (fp64, for example), `auto` uses torch and warns once. An explicit "triton" or "cpp" that cannot run
raises CannotRun; it never falls back silently. "torch" means plain torch on every device.

With TRITON_INTERPRET=1 set before Python starts, an explicit "triton" runs on a CPU in Triton's interpreter. This is
thousands of times slower; it is for checks of kernels without a GPU.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

import torch

from kernels import cpu
from kernels.launch import INTERPRETED, capability

Backend = Literal["triton", "cpp", "torch"]

OPS = ("attention", "rms_norm", "add_rms_norm", "rope", "norm_rope", "swiglu", "cross_entropy", "linear_cross_entropy")
CHOICES = ("auto", "triton", "cpp", "torch")
MIN_CAPABILITY = (8, 0)  # bf16 tensor cores and asynchronous copies begin with Ampere


class CannotRun(RuntimeError):
    """An explicit "triton" or "cpp" does not support this call or this device."""


_choice: str | None = None
_warned: set[str] = set()


def set_backend(backend: str | None) -> None:
    """Sets the backend of later calls without a `backend` argument: one of CHOICES; None: the value of LLM_KERNELS.

    Raises ValueError for any other name.
    """
    global _choice
    _choice = None if backend is None else _checked(backend, "kernels.set_backend")


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Calls set_backend and restores the old value at the end of the block."""
    global _choice
    before = _choice
    set_backend(backend)
    try:
        yield
    finally:
        _choice = before


def requested() -> str:
    """Returns the backend, one of CHOICES, of calls without a `backend` argument."""
    if _choice is not None:
        return _choice
    # `or`, because an empty LLM_KERNELS means that it is not set.
    return _checked(os.environ.get("LLM_KERNELS") or "auto", "the environment variable LLM_KERNELS")


def resolve(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None = None,
    *,
    triton: str | None = None,
    cpp: str | None = None,
    slow_in_cpp: bool = False,
) -> Backend:
    """Chooses the backend for a call of `op`.

    Args:
        op: one of OPS, or "sampling", which has no C++ here.
        device, dtype: device and dtype of its input.
        backend: the argument of the call.
        triton, cpp: why this backend does not support the call; None if it does.
        slow_in_cpp: whether torch is faster than the C++ for this call; then `auto` uses torch.

    Raises CannotRun if an explicit backend cannot run; RuntimeError for bf16 on an NVIDIA device without it;
    ValueError for an unknown backend.
    """
    choice = requested() if backend is None else _checked(backend, f"kernels.{op}")
    # Checked before a backend is chosen, because plain torch must not compute it there either.
    if dtype == torch.bfloat16 and device.type == "cuda":
        _check_bf16(device)
    chosen = _best(device) if choice == "auto" else choice
    # An explicit "cpp" is used even if it is slower.
    if chosen == "torch" or (choice == "auto" and chosen == "cpp" and slow_in_cpp):
        return "torch"
    # Under `auto`, _best has checked the device already; an explicit choice is checked here.
    obstacle = device_obstacle(chosen, device) or _dtype_obstacle(chosen, device, dtype)
    obstacle = obstacle or (triton if chosen == "triton" else cpp)
    if obstacle is None:
        return "triton" if chosen == "triton" else "cpp"  # literals, because for mypy `chosen` is any str
    if choice != "auto":
        raise CannotRun(f"kernels.{op}: backend '{chosen}' cannot run here: {obstacle}; use 'torch' or 'auto'")
    _warn_once(f"kernels.{op}: torch computes this one: {obstacle}")
    return "torch"


def _best(device: torch.device) -> str:
    """Returns the backend that `auto` uses on this device."""
    # On a CPU, `auto` never chooses Triton's interpreter, because it is too slow.
    best = {"cuda": "triton", "cpu": "cpp"}.get(device.type, "torch")
    # No warning, unlike in resolve: a machine without the extension would warn at every op. describe has the reason.
    return "torch" if best == "torch" or device_obstacle(best, device) is not None else best


# torch.compile keeps the answer as a constant, because a device does not change while a process runs.
@torch.compiler.assume_constant_result
def device_obstacle(backend: str, device: torch.device) -> str | None:
    """Returns why "triton" or "cpp" cannot run on `device`, or None if it can."""
    if backend == "cpp":
        if device.type != "cpu":
            return f"the C++ needs a CPU, and the tensors are on {device.type}"
        if INTERPRETED:  # a launcher cannot distinguish the two by its tensors
            return "TRITON_INTERPRET=1 gives the CPU to Triton's interpreter"
        return None if cpu.BUILT else "the C++ is not built: run `make setup`"
    if device.type == "meta" or (INTERPRETED and device.type == "cpu"):  # on meta an op only computes shapes
        return None
    # In torch for AMD the devices are called cuda too; torch.version.hip distinguishes them.
    if device.type != "cuda" or torch.version.hip is not None:
        return f"Triton needs an NVIDIA device, and the tensors are on {device.type}"
    if capability(device) < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"Triton needs compute capability 8.0, and {name} has {_dotted(capability(device))}"
    return None


def _dtype_obstacle(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    name = str(dtype).removeprefix("torch.")
    if backend == "cpp":
        return None if dtype in cpu.DTYPES else f"the C++ computes fp32 and bf16, and the tensors are {name}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels compute in fp32, and the tensors are {name}"
    if dtype == torch.bfloat16 and device.type == "cpu":
        return "Triton's interpreter computes bf16 wrongly; take fp32 or fp16"
    return None


@torch.compiler.assume_constant_result
def _check_bf16(device: torch.device) -> None:
    if torch.version.hip is None and capability(device) < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise RuntimeError(
            f"{name} (compute capability {_dotted(capability(device))}) has no bf16; set train.precision=fp16, or fp32"
        )


# torch.compile calls this while it traces; a traced warning would break the graph.
@torch.compiler.assume_constant_result
def _warn_once(message: str) -> None:
    # Python's own filter would warn once per line that calls the op.
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)  # names the line that called the op, not resolve or the op


@lru_cache
def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware (AVX-512 BF16, AMX, Arm's BF16)."""
    # `is True`, because some values are not flags, such as the name of the architecture.
    return any(has is True and "bf16" in name for name, has in torch.cpu.get_capabilities().items())


def describe(device: torch.device | str | None = None) -> dict[str, dict[str, str]]:
    """Describes which backend computes on `device` (default: the first NVIDIA device, else the CPU), and why.

    Returns {op: {"backend": "triton", "cpp", "torch" or "error", "reason": one line}}.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = _describe(device)
    return {op: dict(chosen) for op in OPS}


def _describe(device: torch.device) -> dict[str, str]:
    choice = requested()
    obstacle = None if choice in ("auto", "torch") else device_obstacle(choice, device)
    if obstacle is not None:
        return {"backend": "error", "reason": obstacle}
    if choice != "auto":
        source = "LLM_KERNELS" if _choice is None else "kernels.set_backend"
        return {"backend": choice, "reason": f"{source} asks for it"}
    backend = _best(device)
    if backend == "triton":
        return {"backend": backend, "reason": f"it runs on {torch.cuda.get_device_name(device)}"}
    if backend == "cpp":
        return {"backend": backend, "reason": "C++ computes fp32 and bf16 on a CPU, torch the other dtypes"}
    reason = device_obstacle("cpp" if device.type == "cpu" else "triton", device)
    return {"backend": backend, "reason": str(reason)}


def _checked(backend: str, source: str) -> str:
    if backend not in CHOICES:
        raise ValueError(f"{source}: unknown backend {backend!r}; choose from {', '.join(CHOICES)}")
    return backend


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
