"""The LM head and its cross-entropy as one op, which never stores all logits.

    loss = cross_entropy(x W^T, target)               formulas in kernels/cross_entropy.py

The rows are computed in chunks, so only one chunk's logits exist at a time. With G the gradient of a chunk's logits,
the chunk computes dx = G W and adds dW += G^T x; dW is accumulated in fp32 for every dtype of the inputs. For "sum" and
"mean", forward also computes the gradients, up to a factor from backward, so that the logits are computed only once and
the weight is not needed again (as in Liger-Kernel, Hsu et al. 2024). For "none", each row has its own factor, so
backward computes the logits again.

The backends differ only in the loss and gradient of a chunk. Triton and the C++ keep the logits in x's dtype, as the
product rounds them, and overwrite them with the gradient. So a logit is written and read twice in total, and half a GiB
of bf16 logits has twice the rows, which halves the memory traffic of dW. Plain torch has fp32 logits. A CPU without
bf16 instructions computes in fp32.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import cpu
from kernels.cross_entropy import Options, check_options, cross_entropy_in_place, cross_entropy_loss, reduced
from kernels.dispatch import cpu_has_bf16, resolve
from kernels.linear import add_product, gradient_sum, product, rounded

# The default chunk. On a CPU its logits should stay in the cache, but there is a pass over dW per chunk. A GPU needs
# thousands of rows, so that the traffic of dW is small compared with the products.
CPU_CHUNK_BYTES, CPU_CHUNK_ROWS = 2**21, 1024
CPU_BF16_ELEMENTS = 2**18  # elements of the weight; products with a smaller weight are fast in fp32 too
GPU_CHUNK_BYTES, GPU_CHUNK_ROWS = 2**29, 1024
GPU_ROWS_MULTIPLE = 128  # the height of a tile of a large product


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    chunk_rows: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    return_z: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes cross-entropy of x @ weight^T in nats, in fp32 (fp64 for fp64 inputs).

    Args:
        x: [N, D], the hidden states.
        weight: [V, D], the LM head, in x's dtype, or in fp32: then products round it to x's, and its gradient is not
            rounded (kernels.linear).
        target: int64 [N].
        chunk_rows: number of rows whose logits exist at once; None: chosen from V.
        return_z: return (loss, z). z is the z_loss * lse^2 part of the loss, with the same reduction and without
            gradient; it is empty without a z_loss.
        vocab_size, ignore_index, z_loss, reduction, backend: as for cross_entropy.

    Raises ValueError for an unknown reduction or shapes that do not fit.
    """
    check_options("linear_cross_entropy", x, weight.shape[0], target, vocab_size, reduction)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"kernels.linear_cross_entropy: chunk_rows {chunk_rows} is not positive")
    chosen = resolve("linear_cross_entropy", x.device, x.dtype, backend, cpp=cpu.mixture(x, weight))
    if chosen != "triton" and x.device.type == "cpu" and not _fast_in_bf16(weight):
        # Cast once, not per chunk. autograd casts the gradients back to the inputs' dtype.
        x, weight = x.to(_accumulation(x)), weight.to(_accumulation(x))
    options = Options(vocab_size or weight.shape[0], ignore_index, z_loss)
    chunk = _Chunk(chosen, chunk_rows or _default_rows(chosen, x, weight.shape[0]), options)
    # For evaluation, because _Reduced would also compute dx and dW, two more products.
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        loss, z = _losses(x, rounded(weight, x.dtype), target, chunk)
        loss = reduced(loss, target, ignore_index, reduction)
        z = reduced(z, target, ignore_index, reduction) if z_loss else z
    elif reduction == "none":
        loss, z = _PerRow.apply(x, weight, target, chunk)
    else:
        loss, z = _Reduced.apply(x, weight, target, chunk, reduction)
    return (loss, z) if return_z else loss


class _Chunk(NamedTuple):
    """How chunks are computed."""

    backend: str
    rows: int
    options: Options


# A Function, because autograd would keep the logits of every chunk of a recorded loop until backward.
class _Reduced(torch.autograd.Function):
    """(loss, z), each the sum or mean over rows. Forward computes the gradients of the sum; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, target: Tensor, chunk: _Chunk, reduction: str
    ) -> tuple[Tensor, Tensor]:
        copy = rounded(weight, x.dtype)
        loss, z, dx, dw = _gradients(x, copy, target, None, chunk, ctx.needs_input_grad)
        count = (target != chunk.options.ignore_index).sum() if reduction == "mean" else None
        # Without any target, the mean is NaN and its gradient zero, as in torch.
        ctx.save_for_backward(dx, dw, None if count is None else count.clamp(min=1))
        # Only a master weight has a sum to add to; any other would live longer than it must.
        ctx.weight, ctx.weight_dtype = None if copy is weight else weight, weight.dtype
        loss, z = (loss, z) if count is None else (loss / count, z / count)  # by the true count: 0 / 0 is NaN
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, count = ctx.saved_tensors
        scale = grad_output if count is None else grad_output / count
        # Scaled in the accumulation dtype: 1/N rounded to bf16 would change every gradient by the same factor. Saved
        # tensors are not changed, because backward may run twice.
        dx = None if dx is None else (dx.to(scale.dtype) * scale).to(dx.dtype)
        total = None if ctx.weight is None else gradient_sum(ctx.weight)
        if dw is not None and total is not None:
            total.addcmul_(dw, scale)
            dw = None
        return dx, None if dw is None else (dw * scale).to(ctx.weight_dtype), None, None, None


class _PerRow(torch.autograd.Function):
    """(loss, z) of each row. Backward computes the logits again, because each row has its own factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        # Logits are not saved: backward computes each chunk's logits again instead of storing [N, V].
        copy = rounded(weight, x.dtype)
        ctx.save_for_backward(x, copy, target)
        ctx.chunk, ctx.weight_dtype = chunk, weight.dtype
        loss, z = _losses(x, copy, target, chunk)
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, target = ctx.saved_tensors
        _, _, dx, dw = _gradients(x, weight, target, grad_output, ctx.chunk, ctx.needs_input_grad)
        return dx, None if dw is None else dw.to(ctx.weight_dtype), None, None


def _default_rows(backend: str, x: Tensor, columns: int) -> int:
    bytes_of_row = columns * (x.element_size() if backend == "triton" else _accumulation(x).itemsize)
    if x.device.type != "cpu":
        return max(GPU_CHUNK_ROWS, GPU_CHUNK_BYTES // bytes_of_row // GPU_ROWS_MULTIPLE * GPU_ROWS_MULTIPLE)
    return max(CPU_CHUNK_ROWS, CPU_CHUNK_BYTES // bytes_of_row)


def _losses(x: Tensor, weight: Tensor, target: Tensor, chunk: _Chunk) -> tuple[Tensor, Tensor]:
    """Returns (loss, z) of each row, [N]. Without a gradient, torch replaces the C++, which always computes it."""
    found = []
    for xc, tc in zip(x.split(chunk.rows), target.split(chunk.rows), strict=True):
        if chunk.backend == "triton":
            loss, lse, _ = cross_entropy_loss(xc @ weight.T, tc, *chunk.options)
        else:
            loss, _, lse = _loss(product(xc, weight.T), tc, chunk.options)
        found.append((loss, _z(lse, tc, chunk.options)))
    return torch.cat([loss for loss, _ in found]), torch.cat([z for _, z in found])


def _z(lse: Tensor, target: Tensor, options: Options) -> Tensor:
    """Returns z_loss * lse^2 of each row with a target, 0 for other rows; empty without a z_loss."""
    if not options.z_loss:
        return lse.new_empty(0)
    return torch.where(target != options.ignore_index, options.z_loss * lse.square(), 0.0)


def _gradients(
    x: Tensor, weight: Tensor, target: Tensor, factor: Tensor | None, chunk: _Chunk, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns (sum of losses, sum of z, dx, dw) for each row's loss times its factor [N], or 1.

    dw has the accumulation dtype.
    """
    acc = _accumulation(x)
    losses: list[Tensor] = []
    zs: list[Tensor] = []
    # A row of dx comes from one chunk, so x's dtype is enough; dw is a sum over chunks, so it needs acc.
    dx = torch.empty_like(x) if needed[0] else None
    dw = torch.zeros(weight.shape, dtype=acc, device=x.device) if needed[1] else None
    for start in range(0, max(1, x.shape[0]), chunk.rows):
        rows = slice(start, start + chunk.rows)
        row_factor = None if factor is None else factor[rows]
        loss, lse, grad = _loss_and_gradient(x[rows], weight, target[rows], row_factor, chunk)
        losses.append(loss)
        zs.append(_z(lse, target[rows], chunk.options))
        if dx is not None:
            torch.mm(grad, weight, out=dx[rows])
        if dw is not None:
            add_product(dw, grad.T, x[rows])
        del grad  # otherwise it would exist together with the next chunk's logits
    # One sum for all chunks: on a GPU, each launch of a small tensor takes as long as that of a large one.
    return torch.cat(losses).sum(), torch.cat(zs).sum() if chunk.options.z_loss else zs[0], dx, dw


def _loss_and_gradient(
    x: Tensor, weight: Tensor, target: Tensor, factor: Tensor | None, chunk: _Chunk
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns for one chunk: loss [R], lse [R] (may be empty without a z_loss), and the gradient of each row's loss
    times its factor with respect to the logits, [R, V] in x's dtype.
    """
    if chunk.backend != "torch":
        logits = x @ weight.T
        loss, lse = cross_entropy_in_place(logits, target, factor, *chunk.options)
        return loss, lse, logits
    vocab_size, ignore_index, z_loss = chunk.options
    logits = product(x, weight.T)
    loss, log_p, lse = _loss(logits, target, chunk.options)
    # In place, because log_p is the largest tensor of a chunk and not needed again.
    grad = log_p.exp_()
    if z_loss:
        grad *= 1 + 2 * z_loss * lse[:, None]
    valid = target != ignore_index
    index = torch.where(valid, target, 0)[:, None]
    # Ignored rows lose 1 at column 0 here; the next line clears them.
    grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
    # Filled, not multiplied by 0, because an ignored row may contain NaN.
    grad.masked_fill_(~valid[:, None], 0.0)
    if factor is not None:
        grad *= factor[:, None]
    padding = weight.shape[0] - vocab_size
    grad = F.pad(grad, (0, padding)) if padding else grad  # F.pad copies even if it adds nothing
    return loss, lse, grad.to(x.dtype)


def _fast_in_bf16(weight: Tensor) -> bool:
    """Whether bf16 products on this processor are fast enough to accept the rounding of their results."""
    return weight.dtype == torch.bfloat16 and weight.numel() >= CPU_BF16_ELEMENTS and cpu_has_bf16()


def _accumulation(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _loss(logits: Tensor, target: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Returns for one chunk: loss [R], log-probabilities [R, vocab_size], lse [R]."""
    vocab_size, ignore_index, z_loss = options
    log_p = torch.log_softmax(logits[:, :vocab_size], dim=-1)
    valid = target != ignore_index
    # gather needs valid indices; the values of ignored rows are dropped at the end.
    index = torch.where(valid, target, 0)[:, None]
    target_log_p = log_p.gather(1, index)[:, 0]
    # log_softmax does not return lse, but the target's two numbers give it without another pass.
    lse = logits.gather(1, index)[:, 0] - target_log_p
    loss = -target_log_p
    if z_loss:
        loss += z_loss * lse.square()
    return torch.where(valid, loss, 0.0), log_p, lse
