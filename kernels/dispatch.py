"""Chooses who computes an op: a Triton kernel, or torch.

The choice is made once a call, from its `backend` argument, else `set_backend`, else the environment variable
LLM_KERNELS, else `auto`: Triton on an NVIDIA device of compute capability >= 8.0, torch elsewhere and for a call that
the Triton kernel does not cover, which is said once. An explicit "triton" that cannot run raises; it never falls back
silently. The "torch" of a CPU is C++ in fp32 and bf16 (kernels/cpu.py).

With TRITON_INTERPRET=1 set before Python starts, an explicit "triton" runs on a CPU in Triton's interpreter, thousands
of times slower: to check kernels without a GPU.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

import torch

from kernels import cpu
from kernels.launch import INTERPRETED

Backend = Literal["triton", "torch"]

OPS = ("attention", "rms_norm", "add_rms_norm", "rope", "swiglu", "cross_entropy", "linear_cross_entropy")
MIN_CAPABILITY = (8, 0)  # bf16 tensor cores and asynchronous copies begin with Ampere

_CHOICES = ("auto", "triton", "torch")


class CannotRun(RuntimeError):
    """An explicit "triton" does not cover this call, or not on this device."""


_choice: str | None = None
_warned: set[str] = set()


def set_backend(backend: str | None) -> None:
    """Sets the backend of every later call that names none: "auto", "triton" or "torch"; None: what LLM_KERNELS says.

    Raises ValueError for any other name.
    """
    global _choice
    _choice = None if backend is None else _checked(backend, "kernels.set_backend")


@contextmanager
def using(backend: str) -> Iterator[None]:
    """set_backend, undone at the end of the block."""
    global _choice
    before = _choice
    set_backend(backend)
    try:
        yield
    finally:
        _choice = before


def requested() -> str:
    """The backend that calls without a `backend` argument ask for: "auto", "triton" or "torch"."""
    if _choice is not None:
        return _choice
    return _checked(os.environ.get("LLM_KERNELS") or "auto", "the environment variable LLM_KERNELS")


def resolve(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None = None,
    unsupported: str | None = None,
) -> Backend:
    """The backend that computes `op`.

    Args:
        op: one of OPS.
        device, dtype: of its input.
        backend: the call's own argument.
        unsupported: why the Triton kernel does not cover this call, if so.

    Raises CannotRun where "triton" is asked for and cannot run; RuntimeError for bf16 on an NVIDIA device without it;
    ValueError for an unknown backend.
    """
    choice = requested() if backend is None else _checked(backend, f"kernels.{op}")
    if dtype == torch.bfloat16 and device.type == "cuda":
        _check_bf16(device)
    if choice == "torch":
        return "torch"
    obstacle = device_obstacle(device)
    if choice == "triton":
        obstacle = obstacle or _dtype_obstacle(device, dtype) or unsupported
        if obstacle is not None:
            raise CannotRun(f"kernels.{op}: backend 'triton' cannot run here: {obstacle}; use 'torch' or 'auto'")
        return "triton"
    if obstacle is not None or device.type != "cuda":  # nobody wants the interpreter who does not name it
        return "torch"
    obstacle = _dtype_obstacle(device, dtype) or unsupported
    if obstacle is not None:
        _warn_once(f"kernels.{op}: torch computes this one: {obstacle}")
        return "torch"
    return "triton"


@torch.compiler.assume_constant_result
def device_obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on `device`; None if it can, or has only shapes to tell (meta)."""
    if device.type == "meta" or (INTERPRETED and device.type == "cpu"):  # on meta an op tells shapes alone
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"Triton needs an NVIDIA device, and the tensors are on {device.type}"
    capability = _capability(device)
    if capability < MIN_CAPABILITY:
        return (
            f"Triton needs compute capability 8.0, and {torch.cuda.get_device_name(device)} has {_dotted(capability)}"
        )
    return None


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _dtype_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels compute in fp32, and the tensors are {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16 and device.type == "cpu":
        return "Triton's interpreter computes bf16 wrongly; take fp32 or fp16"
    return None


@torch.compiler.assume_constant_result
def _check_bf16(device: torch.device) -> None:
    if torch.version.hip is None and _capability(device) < MIN_CAPABILITY:
        name, capability = torch.cuda.get_device_name(device), _dotted(_capability(device))
        raise RuntimeError(f"{name} (compute capability {capability}) has no bf16; set train.precision=fp16, or fp32")


@torch.compiler.assume_constant_result
def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


@lru_cache
def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware (AVX-512 BF16, AMX, Arm's BF16)."""
    return any(has is True and "bf16" in name for name, has in torch.cpu.get_capabilities().items())


def describe(device: torch.device | str | None = None) -> dict[str, dict[str, str]]:
    """What would run for tensors on `device` (default: the first NVIDIA device, else the CPU), and why.

    Returns {op: {"backend": "triton", "torch" or "error", "reason": one line}}.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = _describe(device)
    return {op: dict(chosen) for op in OPS}


def _describe(device: torch.device) -> dict[str, str]:
    choice = requested()
    if choice == "torch":
        source = "kernels.set_backend" if _choice is not None else "LLM_KERNELS"
        return {"backend": "torch", "reason": f"{source} asks for it"}
    obstacle = device_obstacle(device)
    if obstacle is not None:
        if device.type == "cpu":
            obstacle += "; in fp32 and bf16 C++ computes" if cpu.BUILT else "; the C++ is not built: run `make setup`"
        return {"backend": "error" if choice == "triton" else "torch", "reason": obstacle}
    if device.type == "cuda":
        return {"backend": "triton", "reason": f"it runs on {torch.cuda.get_device_name(device)}"}
    if choice == "triton":
        return {"backend": "triton", "reason": "in Triton's interpreter, which is for checking kernels"}
    return {"backend": "torch", "reason": "Triton's interpreter runs only where LLM_KERNELS=triton asks for it"}


def _checked(backend: str, source: str) -> str:
    if backend not in _CHOICES:
        raise ValueError(f"{source}: unknown backend {backend!r}; choose from {', '.join(_CHOICES)}")
    return backend


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
