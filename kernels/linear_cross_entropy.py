"""The LM head and its cross-entropy as one op: the logits never exist whole.

    loss = cross_entropy(x W^T, target)               formulas in kernels/cross_entropy.py

Rows go through in chunks. With G the gradient of a chunk's logits, the chunk adds dx = G W and dW += G^T x, so that one
chunk's logits are all that is ever held; dW is accumulated in fp32 whatever the inputs' dtype. For "sum" and "mean"
the gradients are computed in the forward pass, up to the factor that backward brings: the logits are not computed
twice, and the weight is not needed again (as Liger-Kernel does, Hsu et al. 2024). For "none" each row brings its own
factor, so backward computes the logits again.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cross_entropy import check_options
from kernels.dispatch import resolve

# The default chunk. A CPU wants its logits to stay in the cache, but enough rows to pay for a pass over dW a chunk; a
# GPU wants thousands of rows, so that dW's traffic vanishes beside the products (2^27 logits are half a GiB in fp32).
CPU_CHUNK_LOGITS, CPU_CHUNK_ROWS = 2**19, 256
GPU_CHUNK_LOGITS, GPU_CHUNK_ROWS = 2**27, 1024


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    chunk_rows: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of x @ weight^T in nats, in fp32 (fp64 for fp64 inputs).

    Args:
        x: [N, D], the hidden states.
        weight: [V, D] of x's dtype, the LM head.
        target: int64 [N].
        chunk_rows: rows whose logits exist at once; None: chosen from V.
        vocab_size, ignore_index, z_loss, label_smoothing, reduction, backend: as for cross_entropy.

    Raises ValueError for an unknown reduction or shapes that do not fit.
    """
    check_options("linear_cross_entropy", x, weight.shape[0], target, vocab_size, reduction)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"kernels.linear_cross_entropy: chunk_rows {chunk_rows} is not positive")
    resolve("linear_cross_entropy", x.device, x.dtype, backend)
    if not x.is_cuda:  # a CPU has no product of low-precision matrices with an fp32 result
        acc = torch.promote_types(x.dtype, torch.float32)
        x, weight = x.to(acc), weight.to(acc)
    rows = chunk_rows or _default_rows(weight)
    options = _Options(vocab_size or weight.shape[0], ignore_index, z_loss, label_smoothing)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        if reduction == "none":
            return _PerRow.apply(x, weight, target, rows, options)
        return _Reduced.apply(x, weight, target, rows, options, reduction)
    loss = _losses(x, weight, target, rows, options)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (target != ignore_index).sum()


class _Options(NamedTuple):
    vocab_size: int
    ignore_index: int
    z_loss: float
    label_smoothing: float


class _Reduced(torch.autograd.Function):
    """The sum or mean over rows; forward computes the gradients of the sum, backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, target: Tensor, rows: int, options: _Options, reduction: str
    ) -> Tensor:
        acc = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=acc, device=x.device)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros(weight.shape, dtype=acc, device=x.device) if ctx.needs_input_grad[1] else None
        for start in range(0, x.shape[0], rows):
            chunk = slice(start, start + rows)
            loss, grad = _loss_and_grad(x[chunk], weight, target[chunk], options)
            total += loss.sum()
            if dx is not None:
                dx[chunk] = grad.to(x.dtype) @ weight
            if dw is not None:
                dw += _product(grad.to(x.dtype).T, x[chunk])
        count = (target != options.ignore_index).sum() if reduction == "mean" else None
        # Without any target the mean is NaN and its gradient zero, as torch has it.
        ctx.save_for_backward(dx, dw, None if count is None else count.clamp(min=1))
        ctx.dtype = x.dtype
        return total if count is None else total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, count = ctx.saved_tensors
        scale = grad_output if count is None else grad_output / count
        # Scaled in the accumulation dtype: 1/N rounded to bf16 would bend every gradient alike. The saved tensors stay
        # as they are, since backward may run twice.
        dx, dw = (None if d is None else (d.to(scale.dtype) * scale).to(ctx.dtype) for d in (dx, dw))
        return dx, dw, None, None, None, None


class _PerRow(torch.autograd.Function):
    """The loss of each row; backward computes the logits again, since each row brings its own factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, rows: int, options: _Options) -> Tensor:
        ctx.save_for_backward(x, weight, target)
        ctx.rows, ctx.options = rows, options
        return _losses(x, weight, target, rows, options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, target = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros(weight.shape, dtype=grad_output.dtype, device=x.device) if ctx.needs_input_grad[1] else None
        for start in range(0, x.shape[0], ctx.rows):
            chunk = slice(start, start + ctx.rows)
            _, grad = _loss_and_grad(x[chunk], weight, target[chunk], ctx.options)
            grad *= grad_output[chunk, None]
            if dx is not None:
                dx[chunk] = grad.to(x.dtype) @ weight
            if dw is not None:
                dw += _product(grad.to(x.dtype).T, x[chunk])
        return dx, None if dw is None else dw.to(weight.dtype), None, None, None


def _default_rows(weight: Tensor) -> int:
    if weight.is_cuda:
        return max(GPU_CHUNK_ROWS, GPU_CHUNK_LOGITS // weight.shape[0])
    return max(CPU_CHUNK_ROWS, CPU_CHUNK_LOGITS // weight.shape[0])


def _losses(x: Tensor, weight: Tensor, target: Tensor, rows: int, options: _Options) -> Tensor:
    """Each row's loss, [N]."""
    chunks = zip(x.split(rows), target.split(rows), strict=True)
    return torch.cat([_loss(_product(xc, weight.T), tc, options)[0] for xc, tc in chunks])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the accumulation dtype: on a GPU, tensor cores take low precision and give fp32."""
    acc = torch.promote_types(a.dtype, torch.float32)
    return a @ b if a.dtype == acc else torch.mm(a, b, out_dtype=acc)


def _loss(logits: Tensor, target: Tensor, options: _Options) -> tuple[Tensor, Tensor, Tensor]:
    """Of one chunk: loss [R], log-probabilities [R, vocab_size], lse [R]."""
    vocab_size, ignore_index, z_loss, smoothing = options
    log_p = torch.log_softmax(logits[:, :vocab_size], dim=-1)
    valid = target != ignore_index
    index = torch.where(valid, target, 0)[:, None]
    target_log_p = log_p.gather(1, index)[:, 0]
    lse = logits.gather(1, index)[:, 0] - target_log_p
    loss = (smoothing - 1) * target_log_p
    if smoothing:
        loss -= smoothing * log_p.mean(dim=-1)
    if z_loss:
        loss += z_loss * lse.square()
    return torch.where(valid, loss, 0.0), log_p, lse


def _loss_and_grad(x: Tensor, weight: Tensor, target: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """Of one chunk: loss [R], and the gradient of its sum by the logits [R, V], in the accumulation dtype."""
    vocab_size, ignore_index, z_loss, smoothing = options
    logits = _product(x, weight.T)
    loss, log_p, lse = _loss(logits, target, options)
    grad = log_p.exp_()
    if z_loss:
        grad *= 1 + 2 * z_loss * lse[:, None]
    if smoothing:
        grad -= smoothing / vocab_size
    valid = target != ignore_index
    index = torch.where(valid, target, 0)[:, None]
    grad.scatter_add_(1, index, torch.full_like(index, smoothing - 1, dtype=grad.dtype))
    grad.masked_fill_(~valid[:, None], 0.0)
    padding = weight.shape[0] - vocab_size
    return loss, F.pad(grad, (0, padding)) if padding else grad  # F.pad copies even where it adds nothing
