"""The host's time for a call of an op, and for its launch alone: processor time, on a device that computes nothing.

python -m tests.stub_gpu --run python -m tests.stub_gpu.host_time
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import kernels
from kernels import launch as launching

CALLS, ROUNDS = 100, 25


def cases() -> dict[str, Callable[[], Any]]:
    """Calls of the shapes of a micro-batch of configs/125m.json with two rows."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype)

    x, weight, gate_up = empty(4096, 768), empty(768), empty(4096, 4096)
    q, k, v = empty(2, 2048, 36, 64).split(12, dim=2)
    doc_start = torch.zeros(2, 2048, device="cuda", dtype=torch.int32)
    qkv, norm, cos = empty(2, 2048, 36 * 64), empty(64), empty(2048, 32, dtype=torch.float32)
    return {
        "rms_norm": lambda: kernels.rms_norm(x, weight),
        "add_rms_norm": lambda: kernels.add_rms_norm(x, x, weight),
        "swiglu": lambda: kernels.swiglu(gate_up),
        "norm_rope": lambda: kernels.norm_rope(qkv, norm, norm, cos, cos, n_heads=12),
        "attention": lambda: kernels.attention(q, k, v, doc_start=doc_start),
        "torch.add": lambda: torch.add(x, x),
    }


def microseconds(call: Callable[[], Any]) -> float:
    """The least time of a call over ROUNDS, without what other processes take."""
    rounds = []
    for _ in range(ROUNDS):
        begin = time.thread_time()
        for _ in range(CALLS):
            call()
        rounds.append((time.thread_time() - begin) / CALLS * 1e6)
    return min(rounds)


def last_launch(call: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of the last launch of an op, if it has one."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    launch = launching._launch_bound

    def record(*args: Any) -> None:
        seen.append(args)
        launch(*args)

    launching._launch_bound = record
    call()
    launching._launch_bound = launch
    return seen[-1] if seen else None


@torch.no_grad()
def main() -> None:
    print(f"microseconds of the host, torch {torch.__version__}, Triton {sys.modules['triton'].__version__}")
    for name, call in cases().items():
        whole, arguments = microseconds(call), last_launch(call)
        alone = "" if arguments is None else f", its launch {microseconds(lambda a=arguments: launch_again(*a)):.1f}"
        print(f"{name}: {whole:.1f}{alone}")


def launch_again(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    launching.launch(kernel, grid, *args, **meta)


if __name__ == "__main__":
    main()
