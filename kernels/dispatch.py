"""Chooses who computes an op: a Triton kernel, or torch.

The choice is made once a call, from its `backend` argument, else `set_backend`, else the environment variable
LLM_KERNELS, else `auto`: Triton on an NVIDIA device of compute capability >= 8.0, torch elsewhere and for an op that
has no Triton kernel. An explicit "triton" that cannot run raises; it never falls back silently.
"""

import os
from typing import Literal

import torch

Backend = Literal["triton", "torch"]

OPS = ("attention", "rms_norm", "add_rms_norm", "rope", "swiglu", "cross_entropy", "linear_cross_entropy")
TRITON_OPS: frozenset[str] = frozenset()  # those of OPS that have a Triton kernel
MIN_CAPABILITY = (8, 0)  # bf16 tensor cores and asynchronous copies begin with Ampere

_CHOICES = ("auto", "triton", "torch")
_choice: str | None = None


def set_backend(backend: str | None) -> None:
    """Sets the backend of every later call that names none: "auto", "triton" or "torch"; None: what LLM_KERNELS says.

    Raises ValueError for any other name.
    """
    global _choice
    _choice = None if backend is None else _checked(backend, "kernels.set_backend")


def requested() -> str:
    """The backend that calls without a `backend` argument ask for: "auto", "triton" or "torch"."""
    if _choice is not None:
        return _choice
    return _checked(os.environ.get("LLM_KERNELS") or "auto", "the environment variable LLM_KERNELS")


def resolve(op: str, device: torch.device, backend: str | None = None) -> Backend:
    """The backend that computes `op` for tensors on `device`.

    Raises RuntimeError where "triton" is asked for and cannot run, ValueError for an unknown backend.
    """
    choice = requested() if backend is None else _checked(backend, f"kernels.{op}")
    if choice == "torch":
        return "torch"
    obstacle = triton_obstacle(op, device)
    if obstacle is None:
        return "triton"
    if choice == "triton":
        raise RuntimeError(f"kernels.{op}: backend 'triton' cannot run here: {obstacle}; use 'torch' or 'auto'")
    return "torch"


def triton_obstacle(op: str, device: torch.device) -> str | None:
    """Why Triton cannot compute `op` on `device`; None if it can."""
    if op not in TRITON_OPS:
        return f"{op} has no Triton kernel"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"Triton needs an NVIDIA device, and the tensors are on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return (
            f"Triton needs compute capability 8.0, and {torch.cuda.get_device_name(device)} has {_dotted(capability)}"
        )
    return None


def describe(device: torch.device | str | None = None) -> dict[str, dict[str, str]]:
    """What would run for tensors on `device` (default: the first NVIDIA device, else the CPU), and why.

    Returns {op: {"backend": "triton", "torch" or "error", "reason": one line}}.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {op: _describe(op, device) for op in OPS}


def _describe(op: str, device: torch.device) -> dict[str, str]:
    choice = requested()
    if choice == "torch":
        source = "kernels.set_backend" if _choice is not None else "LLM_KERNELS"
        return {"backend": "torch", "reason": f"{source} asks for it"}
    obstacle = triton_obstacle(op, device)
    if obstacle is None:
        return {"backend": "triton", "reason": f"it runs on {torch.cuda.get_device_name(device)}"}
    return {"backend": "error" if choice == "triton" else "torch", "reason": obstacle}


def _checked(backend: str, source: str) -> str:
    if backend not in _CHOICES:
        raise ValueError(f"{source}: unknown backend {backend!r}; choose from {', '.join(_CHOICES)}")
    return backend


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
