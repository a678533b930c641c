"""Where the tests of the kernels run: the backends, devices and dtypes that one parametrisation covers."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Machine:
    """One backend on one device, at one dtype."""

    backend: str
    device: str
    dtype: torch.dtype

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.device, self.dtype)


def _on(name: str, backend: str, device: str, dtypes: list[torch.dtype], *marks: pytest.MarkDecorator) -> list:
    return [pytest.param(Machine(backend, device, t), id=f"{name}-{NAMES[t]}", marks=marks) for t in dtypes]


CPP = _on("cpp", "cpp", "cpu", [torch.float32, torch.bfloat16])
TORCH = _on("torch", "torch", "cpu", [torch.float32, torch.bfloat16, torch.float16])
# Triton's interpreter computes bf16 wrongly.
INTERPRETER = _on("interpreter", "triton", "cpu", [torch.float32, torch.float16], pytest.mark.interpreter)
FP16_IS_SLOW = [
    INTERPRETER[0],
    *_on("interpreter", "triton", "cpu", [torch.float16], pytest.mark.interpreter, pytest.mark.slow),
]
CUDA = _on("cuda", "triton", "cuda", [torch.bfloat16, torch.float16, torch.float32], pytest.mark.gpu)

TRITON = FP16_IS_SLOW + CUDA
CPU = CPP + TORCH
EVERYWHERE = CPU + TRITON
EVERY_DTYPE = CPU + INTERPRETER + CUDA  # for tests that show that each dtype is computed at all
EXACT = [INTERPRETER[0], CUDA[2]]  # fp32 on Triton, for tests that need one dtype only
ONE_DTYPE = [CPP[0], TORCH[0], *EXACT]  # fp32 on every backend
