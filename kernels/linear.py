"""The product of a linear layer whose fp32 weight is rounded to the 16 bits of its input (mixed precision).

    y = x W^T + b,   dx = dy W,   dW = dy^T x

Micikevicius et al. 2018 keep master weights in fp32. autograd alone would round one at each use, round dW, widen it
again and add it to the sum of gradients: 24 bytes of traffic per weight and micro-batch, in three launches. On a GPU
the product of 16-bit factors writes the fp32 that it sums in, so dW is never rounded. Inside a `MasterWeights` block
weights are rounded once a step, and the product itself adds dW to `.grad` (Megatron-LM's gradient accumulation fusion).

Where all dtypes agree (fp32, and ZeRO 1 to 3, where DeepSpeed has the masters and the model 16-bit weights), autograd
differentiates the plain product, and rounds dW to the weight's dtype. So it does on a CPU, which has no product that
writes another dtype than it reads.
"""

from collections.abc import Iterable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class MasterWeights:
    """Inside the block, products take copies of these weights that last for a step, and add gradients to `.grad`.

    Call `changed` after each change of the weights, whoever made it: torch's fused AdamW does not count a tensor's
    versions, and flat buffers have other tensors. Then the next block makes new copies, in a few launches for all. Old
    ones are never written, so a graph that still holds them stays right.

    A gradient that a product has added is None for autograd: hooks and torch.autograd.grad do not see it. So the block
    is for code that only reads `.grad`: not for ZeRO 1 to 3, whose hooks reduce gradients as they come. Outside of it,
    each use rounds the weight, and autograd gets dW in fp32.

    Args:
        weights: those in fp32 on a GPU count; others are left to autograd.
        dtype: that of the model's products; None: the weights' own, and nothing is left to do.
    """

    def __init__(self, weights: Iterable[Tensor], dtype: torch.dtype | None) -> None:
        self.weights = [weight for weight in weights if _is_master(weight, dtype)]
        self._dtype = dtype
        self._copies: dict[int, Tensor] = {}  # by id, because a tensor has no cheap key; `weights` keeps ids valid
        self._outer: MasterWeights | None = None

    def changed(self) -> None:
        self._copies = {}

    def copy(self, weight: Tensor) -> Tensor | None:
        return self._copies.get(id(weight))

    @torch.no_grad()
    def __enter__(self) -> Self:
        global _active
        if not self._copies and self.weights:
            copies = [torch.empty_like(weight, dtype=self._dtype) for weight in self.weights]
            torch._foreach_copy_(copies, self.weights)
            self._copies = {id(weight): copy for weight, copy in zip(self.weights, copies, strict=True)}
        self._outer, _active = _active, self
        return self

    def __exit__(self, *error: object) -> None:
        global _active
        self._outer, _active = None, self._outer


# Of the process, not of the thread: autograd runs backward in a thread of its own.
_active: MasterWeights | None = None


def _is_master(weight: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether a product in `dtype` rounds this weight, and can write its gradient in fp32 (meta stands for a GPU)."""
    mixed = weight.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)
    return mixed and weight.device.type in ("cuda", "meta")


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the weight in `dtype`: itself, its copy of this step, or a new one."""
    copy = None if _active is None or weight.dtype == dtype else _active.copy(weight)
    return copy if copy is not None and copy.dtype == dtype else weight.to(dtype)


def gradient_sum(weight: Tensor) -> Tensor | None:
    """Returns the fp32 `.grad` that an op adds the weight's gradient to; None: autograd gets the gradient."""
    return None if _active is None or _active.copy(weight) is None else weight.grad


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes x W^T + b in x's dtype.

    Args:
        x: [..., I]; weight: [O, I] and bias: [O], in one dtype, that of x or a wider one. Their gradients have it too.

    Returns [..., O].
    """
    if _is_master(weight, x.dtype):
        return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return]
    # No copy if the dtypes agree. Otherwise autograd casts the gradient back to the weight's dtype.
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        copy = rounded(weight, x.dtype)
        needs_dx, needs_dw, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_dw else None, copy if needs_dx else None)
        # Not saved: activation checkpointing would give back an alias, without `.grad`. A leaf makes no cycle.
        ctx.weight = weight
        return F.linear(x, copy, None if bias is None else rounded(bias, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, copy = ctx.saved_tensors
        rows, dw = dy.reshape(-1, dy.shape[-1]), None
        if x is not None:
            x, total = x.reshape(-1, x.shape[-1]), gradient_sum(ctx.weight)
            if total is None:
                dw = product(rows.T, x)
            else:
                add_product(total, rows.T, x)
        dx = None if copy is None else dy @ copy
        return dx, dw, rows.sum(0, dtype=torch.float32) if ctx.needs_input_grad[2] else None


def product(a: Tensor, b: Tensor) -> Tensor:
    """Computes a @ b in fp32 (fp64 for fp64). On a GPU, tensor cores multiply in low precision and sum in fp32.

    On a CPU, a bf16 product sums in fp32 too, but rounds its result; a product of fp32 copies takes twice as long.
    """
    acc = torch.promote_types(a.dtype, torch.float32)
    return (a @ b).to(acc) if a.is_cpu or a.dtype == acc else torch.mm(a, b, out_dtype=acc)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Computes total += a @ b; total has the dtype of `product`. Only a CPU makes a temporary of its size, for bf16."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cpu:
        total += product(a, b)
    elif not a.is_meta:  # for which torch 2.11 lacks this product
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
