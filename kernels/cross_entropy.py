"""Cross-entropy of rows of logits.

    lse = log sum_v exp(logit_v)                      over the first vocab_size columns
    loss = lse - logit_target + z_loss * lse^2

z_loss keeps the normaliser near 1 (PaLM, Chowdhery et al. 2022, section 5). The gradient of a row with a target is

    (1 + 2 z_loss lse) softmax - onehot

The kernels are bound by memory, and a program computes one row. The forward pass reads the logits once (online softmax,
Milakov & Gimelshein 2018); backward reads them again and writes the gradient. If the op owns the logits, as in linear
cross-entropy, one kernel computes the loss and overwrites them with the gradient: with one read and one write if the
row fits into the registers of a program. A longer row is read twice, the second time mostly from the cache. An ignored
row is not read at all.

The C++ (csrc/cpu/rows.cpp) only has the in-place form; the public function gives it copies of the logits.

lse is stored as the sum of two numbers, because with logits of 1e4 its fp32 value has an error of up to 5e-4, and so
would the softmax.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import cpu, reference
from kernels.dispatch import resolve
from kernels.launch import cdiv, launch, registered, tile, tl, triton

REDUCTIONS = ("none", "mean", "sum")
# A constexpr, because a kernel may not read other globals.
LOWEST = tl.constexpr(-3.4e38)  # below every logit except -inf, and finite, because -inf - -inf is NaN


class Options(NamedTuple):
    """The arguments of cross_entropy, apart from logits and target, that a row's loss depends on."""

    vocab_size: int
    ignore_index: int
    z_loss: float


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Computes cross-entropy in nats, in fp32 (fp64 for fp64 logits).

    Args:
        logits: [N, V].
        target: int64 [N], each in 0 .. vocab_size - 1, or ignore_index, which gives loss and gradient 0. Others raise
            IndexError in torch and the C++; Triton gives NaN, because a check would wait for the device.
        vocab_size: columns >= vocab_size (padding) are ignored and get gradient 0; None: V.
        z_loss: weight of lse^2; this term is part of the returned loss.
        reduction: "mean" over the rows that are not ignored (NaN if there is none), "sum" (0 if there is none), or
            "none" for [N].
        backend: as for every op (kernels/dispatch.py); None: the default.

    Raises ValueError for an unknown reduction or shapes that do not fit.
    """
    check_options("cross_entropy", logits, logits.shape[-1], target, vocab_size, reduction)
    chosen = resolve("cross_entropy", logits.device, logits.dtype, backend)
    if chosen == "torch":
        options: dict[str, Any] = {"vocab_size": vocab_size, "ignore_index": ignore_index, "z_loss": z_loss}
        return reference.cross_entropy(logits, target, **options, reduction=reduction)
    function = _CrossEntropy if chosen == "triton" else _CrossEntropyInPlace
    loss = function.apply(logits, target, Options(vocab_size or logits.shape[-1], ignore_index, z_loss))
    return reduced(loss, target, ignore_index, reduction)


def check_options(op: str, rows: Tensor, columns: int, target: Tensor, vocab_size: int | None, reduction: str) -> None:
    """Raises ValueError for invalid arguments; linear cross-entropy has the same check."""
    if rows.dim() != 2 or target.shape != rows.shape[:1]:
        raise ValueError(f"kernels.{op}: {list(rows.shape)} and target {list(target.shape)} are not [N, ...] and [N]")
    if vocab_size is not None and not 1 <= vocab_size <= columns:
        raise ValueError(f"kernels.{op}: vocab_size {vocab_size} is not in 1 .. {columns}, the number of columns")
    if reduction not in REDUCTIONS:
        raise ValueError(f"kernels.{op}: unknown reduction {reduction!r}; choose from {', '.join(REDUCTIONS)}")


def reduced(loss: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Reduces the losses of rows [N]."""
    if reduction == "none":
        return loss
    # The count stays on the device, so the host does not wait; 0 / 0 gives NaN, the mean over no rows.
    return loss.sum() if reduction == "sum" else loss.sum() / (target != ignore_index).sum()


@triton.jit
def _load_row(logits, target, row_stride, vocab_size, ignore_index):  # type: ignore[no-untyped-def]
    """This program's row: its first logit, its target, whether it counts and names a column, and its logit in fp32."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row)
    valid = label != ignore_index
    known = valid & (label >= 0) & (label < vocab_size)
    begin = logits + row * row_stride
    # NaN for a label outside the vocabulary: the loss shows the error, and no address outside the row is read.
    return begin, label, valid, known, tl.load(begin + label, mask=known, other=float("nan")).to(tl.float32)


@triton.jit
def _by_vector(values, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Reshapes [n] to [n / VECTOR, VECTOR]: a thread loads one row at once and reduces it in its registers."""
    return tl.reshape(values, [values.shape[0] // VECTOR, VECTOR])


@triton.jit
def _in_two_parts(maximum, total):  # type: ignore[no-untyped-def]
    """Returns lse = maximum + log(total) in fp32, and the rounding error of that."""
    log_total = tl.log(total)
    lse = maximum + log_total
    # Fast2Sum: exact if maximum is the larger number, and then lse loses most of log_total.
    return lse, (maximum - lse) + log_total


@triton.jit
def _row_loss(target_logit, lse, lse_low, valid, z_loss):  # type: ignore[no-untyped-def]
    # The two large numbers cancel first, so that lse_low is not lost.
    return tl.where(valid, (lse - target_logit) + lse_low + z_loss * lse * lse, 0.0)


@triton.jit
def _slopes(lse, lse_low, valid, factor, z_loss):  # type: ignore[no-untyped-def]
    """Returns (a, c) of a row: factor times the gradient is a exp(logit - lse), minus c at the target."""
    # exp(-lse_low) corrects the row by one factor, instead of a subtraction per element.
    a = factor * (1.0 + 2.0 * z_loss * lse) * tl.exp(-lse_low)
    return tl.where(valid, a, 0.0), tl.where(valid, factor, 0.0)


@triton.jit
def _cross_entropy_loss_kernel(  # type: ignore[no-untyped-def]
    loss,
    lse,
    lse_low,
    logits,
    target,
    factor,
    row_stride,
    columns,
    vocab_size,
    ignore_index,
    z_loss,
    IN_PLACE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Computes loss and lse of a row, block by block; IN_PLACE: the loss, then the gradient in a second pass."""
    begin, label, valid, known, target_logit = _load_row(logits, target, row_stride, vocab_size, ignore_index)
    # One running maximum and sum per vector that a thread loads, so the loop has no reduction across threads.
    peak = tl.full([BLOCK_V // VECTOR], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_V // VECTOR], tl.float32)
    for first in range(0, vocab_size, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        # Loads count all columns, which are a multiple of 16 where rows are padded: a mask by vocab_size would make
        # them narrow. Padding is dropped afterwards.
        # An ignored row loads zeros, so its lse is finite, and a = 0 makes its gradient 0, not NaN. Its mask is a
        # comparison, because `valid & (column < columns)` is int64 in the interpreter, which Triton 3.9 refuses.
        values = tl.load(begin + column, mask=column < tl.where(valid, columns, 0), other=0.0).to(tl.float32)
        vectors = _by_vector(tl.where(column < vocab_size, values, float("-inf")), VECTOR)
        higher = tl.maximum(peak, tl.max(vectors, axis=1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(vectors - higher[:, None]), axis=1)
        peak = higher
    maximum = tl.max(peak, axis=0)
    row_lse, row_lse_low = _in_two_parts(maximum, tl.sum(total * tl.exp(peak - maximum), axis=0))
    row = tl.program_id(0)
    tl.store(loss + row, _row_loss(target_logit, row_lse, row_lse_low, valid, z_loss))
    # None is known at compile time, so a variant without lse has no such branch.
    if lse is not None:
        tl.store(lse + row, row_lse)
    if IN_PLACE:
        share = 1.0 if factor is None else tl.load(factor + row)
        a, c = _slopes(row_lse, row_lse_low, valid, share, z_loss)
        tl.debug_barrier()  # every thread has read the target's logit before one writes over it
        for first in range(0, columns, BLOCK_V):
            column = first + tl.arange(0, BLOCK_V)
            values = tl.load(begin + column, mask=column < tl.where(valid, columns, 0), other=0.0).to(tl.float32)
            # Selected, not multiplied by 0, because padding may be infinite or NaN.
            gradient = tl.where(column < vocab_size, a * tl.exp(values - row_lse), 0.0)
            tl.store(begin + column, gradient.to(logits.dtype.element_ty), mask=column < columns)
        _store_at_target(begin, label, known, target_logit, row_lse, a, c)
    else:
        tl.store(lse_low + row, row_lse_low)


@triton.jit
def _cross_entropy_held_kernel(  # type: ignore[no-untyped-def]
    loss,
    lse,
    logits,
    target,
    factor,
    row_stride,
    columns,
    vocab_size,
    ignore_index,
    z_loss,
    VECTOR: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Computes the loss of a row that is held in registers as BLOCKS blocks, and overwrites it with the gradient."""
    begin, label, valid, known, target_logit = _load_row(logits, target, row_stride, vocab_size, ignore_index)
    # One pointer and constant offsets, because a pointer per block would cost two registers each.
    pointers = begin + tl.arange(0, BLOCK_V)
    blocks = ()
    peak = tl.full([BLOCK_V // VECTOR], LOWEST, tl.float32)
    for i in tl.static_range(BLOCKS):
        column = i * BLOCK_V + tl.arange(0, BLOCK_V)
        # Loads include all columns, as in the kernel above; padding becomes -inf.
        values = tl.load(pointers + i * BLOCK_V, mask=column < tl.where(valid, columns, 0), other=0.0)
        values = tl.where(column < vocab_size, values, float("-inf"))
        peak = tl.maximum(peak, tl.max(_by_vector(values.to(tl.float32), VECTOR), axis=1))
        # In the logits' dtype: bf16 takes half the registers of fp32, so longer rows fit.
        blocks += (values,)  # type: ignore[assignment]
    maximum = tl.max(peak, axis=0)
    # Relative to the maximum here, to lse below; shared exponentials would need registers too.
    total = tl.zeros([BLOCK_V // VECTOR], tl.float32)
    for i in tl.static_range(BLOCKS):
        total += tl.sum(_by_vector(tl.exp(blocks[i].to(tl.float32) - maximum), VECTOR), axis=1)
    row_lse, row_lse_low = _in_two_parts(maximum, tl.sum(total, axis=0))
    row = tl.program_id(0)
    tl.store(loss + row, _row_loss(target_logit, row_lse, row_lse_low, valid, z_loss))
    if lse is not None:
        tl.store(lse + row, row_lse)
    share = 1.0 if factor is None else tl.load(factor + row)
    a, c = _slopes(row_lse, row_lse_low, valid, share, z_loss)
    tl.debug_barrier()  # every thread has read the target's logit before one writes over it
    for i in tl.static_range(BLOCKS):
        column = i * BLOCK_V + tl.arange(0, BLOCK_V)
        gradient = a * tl.exp(blocks[i].to(tl.float32) - row_lse)
        tl.store(pointers + i * BLOCK_V, gradient.to(logits.dtype.element_ty), mask=column < columns)
    _store_at_target(begin, label, known, target_logit, row_lse, a, c)


@triton.jit
def _store_at_target(begin, label, known, target_logit, lse, a, c):  # type: ignore[no-untyped-def]
    """Writes the target's gradient, from its logit in fp32, because a rounded softmax - 1 has lost its digits."""
    tl.debug_barrier()  # after the rest of the row
    gradient = a * tl.exp(target_logit - lse) - c
    tl.store(begin + label, gradient.to(begin.dtype.element_ty), mask=known)


@triton.jit
def _cross_entropy_gradient_kernel(  # type: ignore[no-untyped-def]
    dlogits,
    dloss,
    logits,
    target,
    lse,
    lse_low,
    row_stride,
    columns,
    vocab_size,
    ignore_index,
    z_loss,
    BLOCK_V: tl.constexpr,
):
    """Computes dlogits of a block of a row from the lse of the forward pass."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    label = tl.load(target + row)
    valid = label != ignore_index
    row_lse = tl.load(lse + row)
    a, c = _slopes(row_lse, tl.load(lse_low + row), valid, tl.load(dloss + row), z_loss)
    within = column < tl.where(valid, columns, 0)
    values = tl.load(logits + row * row_stride + column, mask=within, other=0.0).to(tl.float32)
    # Subtracts before rounding, so that, unlike in place, the target needs no separate store.
    gradient = a * tl.exp(values - row_lse) - tl.where(column == label, c, 0.0)
    gradient = tl.where(column < vocab_size, gradient, 0.0)
    tl.store(dlogits + row * columns + column, gradient.to(dlogits.dtype.element_ty), mask=column < columns)


def _fake_loss(
    logits: Tensor, target: Tensor, vocab_size: int, ignore_index: int, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    loss, lse, lse_low = (logits.new_empty(target.shape, dtype=torch.float32) for _ in range(3))
    return loss, lse, lse_low


@registered(_fake_loss)
def cross_entropy_loss(
    logits: Tensor, target: Tensor, vocab_size: int, ignore_index: int, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (loss, lse, lse_low) of each row, fp32 [N]; the log of the normaliser is lse + lse_low."""
    loss, lse, lse_low = _fake_loss(logits, target, vocab_size, ignore_index, z_loss)
    logits = with_adjacent_columns(logits)
    (n_rows, columns), row_stride = logits.shape, logits.stride(0)
    launch(
        _cross_entropy_loss_kernel,
        (n_rows,),
        *(loss, lse, lse_low, logits, target.contiguous(), None, row_stride, columns),
        *(vocab_size, ignore_index, z_loss),
        IN_PLACE=False,
        VECTOR=16 // logits.element_size(),  # 16 bytes, the widest load of a thread
        **tile("cross_entropy.loss", logits, columns, n_rows),
    )
    return loss, lse, lse_low


def _fake_gradient(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    vocab_size: int,
    ignore_index: int,
    z_loss: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


@registered(_fake_gradient)
def cross_entropy_gradient(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    vocab_size: int,
    ignore_index: int,
    z_loss: float,
) -> Tensor:
    """Returns dlogits [N, V], contiguous, in the logits' dtype, for dloss [N]."""
    options = Options(vocab_size, ignore_index, z_loss)
    dlogits = _fake_gradient(dloss, logits, target, lse, lse_low, *options)
    logits = with_adjacent_columns(logits)
    (n_rows, columns), row_stride = logits.shape, logits.stride(0)
    chosen = tile("cross_entropy.gradient", logits, columns, n_rows)
    launch(
        _cross_entropy_gradient_kernel,
        (n_rows, cdiv(columns, chosen["BLOCK_V"])),
        *(dlogits, dloss.contiguous(), logits, target.contiguous(), lse, lse_low, row_stride, columns, *options),
        **chosen,
    )
    return dlogits


def _fake_in_place(
    logits: Tensor, target: Tensor, factor: Tensor | None, vocab_size: int, ignore_index: int, z_loss: float
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(target.shape, dtype=torch.float32)
    # Empty, because an op of torch cannot return None.
    return loss, torch.empty_like(loss) if z_loss else loss.new_empty(0)


@registered(_fake_in_place, mutates_args=("logits",))
def cross_entropy_in_place(
    logits: Tensor, target: Tensor, factor: Tensor | None, vocab_size: int, ignore_index: int, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Returns (loss, lse) of each row, fp32 [N]; overwrites the logits with the gradient of the loss times factor.

    lse is empty without a z_loss, because then no caller needs it.

    Args:
        logits: [N, V], overwritten. Columns must be adjacent, rows must not overlap.
        target: int64 [N].
        factor: [N]; None: ones.
        vocab_size, ignore_index, z_loss: as for cross_entropy.

    Raises ValueError if columns are not adjacent; on a CPU, IndexError for a target outside the vocabulary.
    """
    (n_rows, columns), (row_stride, column_stride) = logits.shape, logits.stride()
    # Not copied, because the gradient would go into the copy. The stride of a single column has no meaning.
    if column_stride != 1 and columns > 1:
        raise ValueError(f"kernels.cross_entropy_in_place: column stride {column_stride}; make the logits contiguous")
    loss, lse = _fake_in_place(logits, target, factor, vocab_size, ignore_index, z_loss)
    wanted = lse if z_loss else None
    target, factor = target.contiguous(), None if factor is None else factor.contiguous()
    if cpu.covers(logits):
        cpu.cross_entropy_in_place(loss, wanted, logits, target, factor, vocab_size, ignore_index, z_loss)
        return loss, lse
    arguments = (logits, target, factor, row_stride, columns, vocab_size, ignore_index, z_loss)
    chosen = tile("cross_entropy.in_place", logits, columns, n_rows) | {"VECTOR": 16 // logits.element_size()}
    # HELD chooses the kernel and is not one of its arguments.
    if chosen.pop("HELD"):
        blocks = cdiv(columns, chosen["BLOCK_V"])
        launch(_cross_entropy_held_kernel, (n_rows,), loss, wanted, *arguments, BLOCKS=blocks, **chosen)
    else:
        launch(_cross_entropy_loss_kernel, (n_rows,), loss, wanted, None, *arguments, IN_PLACE=True, **chosen)
    return loss, lse


def with_adjacent_columns(logits: Tensor) -> Tensor:
    """Returns the logits themselves, also if they are a slice of wider rows, or else a copy."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


class _CrossEntropy(torch.autograd.Function):
    """Returns the loss of each row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, options: Options) -> Tensor:
        loss, lse, lse_low = cross_entropy_loss(logits, target, *options)
        ctx.save_for_backward(logits, target, lse, lse_low)
        ctx.options = options
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return cross_entropy_gradient(dloss, *ctx.saved_tensors, *ctx.options), None, None


# The C++ only has the in-place form, but the public function must not change its caller's logits.
class _CrossEntropyInPlace(torch.autograd.Function):
    """Returns the loss of each row; both passes overwrite a copy of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, options: Options) -> Tensor:
        ctx.save_for_backward(logits, target)
        ctx.options = options
        return cross_entropy_in_place(_copy(logits), target, None, *options)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, target = ctx.saved_tensors
        gradient = _copy(logits)
        cross_entropy_in_place(gradient, target, dloss, *ctx.options)
        return gradient, None, None


def _copy(logits: Tensor) -> Tensor:
    # A plain clone would keep the strides, but the in-place op needs adjacent columns.
    return logits.clone(memory_format=torch.contiguous_format)
