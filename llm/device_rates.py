"""Measures a device: its peak from the datasheet, the rates of a matrix product and of a copy, and its memory."""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llm.hardware import recognised


def peak_flops(device: torch.device) -> float | None:
    """Returns datasheet bf16 FLOP/s of a known GPU, None for other devices, because a guess would make MFU wrong."""
    if device.type != "cuda":
        return None
    hardware = recognised(torch.cuda.get_device_name(device))
    return None if hardware is None else hardware.flops


def device_memory(device: torch.device) -> int | None:
    """Returns the bytes of a GPU's memory; None for a CPU, whose memory other programs use too."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Measures FLOP/s of a square matrix product on this machine: the best of several runs within `seconds`."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    # The product of two square matrices takes size^3 multiplications and as many additions.
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, b), device, seconds)


def measure_copy_bytes(device: torch.device, seconds: float = 0.3) -> float:
    """Measures bytes/s, read plus written, of a copy in the device's memory: the best of runs within `seconds`."""
    # Written, not empty: Linux maps unwritten pages to one page of zeros, which would be read from the cache.
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device, seconds)


def _best_seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Returns the shortest run of call(), of those that fit into `seconds`, at least one, after a warm-up."""
    best, end = math.inf, time.perf_counter() + seconds
    # The first call includes allocation, library handles and the choice of a kernel.
    call()
    while True:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        now = time.perf_counter()
        # The minimum, not the mean: other programs can only make a run slower.
        best = min(best, now - start)
        if now > end:
            return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Begins a new peak for `peak_memory_bytes`, so that a run's is not that of another one in this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # A container may have it read-only; then the peak is that of the process.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes the memory of now


def free_cached_memory() -> None:
    """Gives the memory of a GPU back that torch keeps for later tensors."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the peak so far: of the device's allocator on a GPU, of the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    # The kernel's "kB" are units of 1,024 bytes.
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
