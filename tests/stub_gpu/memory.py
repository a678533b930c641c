"""benchmarks.bench_memory on the stub, where every number is garbage: the checks of numbers let all of them pass.

STUB_GPU_COUNT=2 python -m tests.stub_gpu --run python -m tests.stub_gpu.memory --device cuda --processes 2 \\
    --precision bf16 --optimizer adamw muon --out benchmarks/results/memory-gpu.json
"""

import math
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from benchmarks import bench_memory
from llm.training import engine, first_update
from llm.training.nonfinite import NonFiniteGuard

_import_deepspeed = engine.import_deepspeed


def _import_unchecked(device: torch.device) -> ModuleType:
    """DeepSpeed would skip the update, and so its memory, where the norm of a gradient is not finite."""
    deepspeed = _import_deepspeed(device)
    from deepspeed.runtime import bf16_optimizer, utils
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module in (bf16_optimizer, utils, stage3, stage_1_and_2):
        module.is_invalid_grad_norm = lambda norm: False
    for optimizer in (stage3.DeepSpeedZeroOptimizer_Stage3, stage_1_and_2.DeepSpeedZeroOptimizer):
        optimizer.check_overflow = lambda *_, **__: None
    return deepspeed


def main() -> None:
    replaced: Any = engine
    replaced.import_deepspeed = _import_unchecked
    replaced.math = SimpleNamespace(**{**vars(math), "isfinite": lambda x: True})
    NonFiniteGuard.judge = lambda self, state, losses, applied: state  # type: ignore[method-assign]
    torch.Tensor.isfinite = lambda self: torch.ones(1, dtype=torch.bool)  # type: ignore[method-assign]
    first_update.what_is_wrong = lambda *_, **__: ""
    bench_memory.main()


if __name__ == "__main__":
    main()
