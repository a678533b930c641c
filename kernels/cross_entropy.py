"""Cross-entropy of rows of logits.

    lse = log sum_v exp(logit_v)                      over the first vocab_size columns
    loss = (1 - s) (lse - logit_target) + s (lse - mean_v logit_v) + z_loss * lse^2

s is label smoothing as torch defines it (the smoothed target is (1 - s) onehot + s / vocab_size); z_loss keeps the
normaliser near 1 (PaLM, Chowdhery et al. 2022, section 5). The gradient of a valid row is

    (1 + 2 z_loss lse) softmax - (1 - s) onehot - s / vocab_size
"""

from torch import Tensor

from kernels import reference
from kernels.dispatch import resolve

REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy in nats, in fp32 (fp64 for fp64 logits).

    Args:
        logits: [N, V].
        target: int64 [N], each in 0 .. vocab_size - 1 or ignore_index, which gives loss and gradient 0.
        vocab_size: columns >= vocab_size (padding) take no part and get gradient 0; None: V.
        z_loss: weight of lse^2, part of the returned loss.
        label_smoothing: share of the target mass that is spread over the vocabulary, 0 .. 1.
        reduction: "mean" over the rows that are not ignored (NaN if there is none), "sum" (0 if there is none), or
            "none" for [N].
        backend: "triton", "torch", "auto", or None for the default.

    Raises ValueError for an unknown reduction or shapes that do not fit.
    """
    check_options("cross_entropy", logits, logits.shape[-1], target, vocab_size, reduction)
    resolve("cross_entropy", logits.device, logits.dtype, backend)
    return reference.cross_entropy(
        logits,
        target,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def check_options(op: str, rows: Tensor, columns: int, target: Tensor, vocab_size: int | None, reduction: str) -> None:
    """Raises ValueError for what no cross-entropy can compute; shared by the fused form."""
    if rows.dim() != 2 or target.shape != rows.shape[:1]:
        raise ValueError(f"kernels.{op}: {list(rows.shape)} and target {list(target.shape)} are not [N, ...] and [N]")
    if vocab_size is not None and not 1 <= vocab_size <= columns:
        raise ValueError(f"kernels.{op}: vocab_size {vocab_size} is not in 1 .. {columns}, the number of columns")
    if reduction not in REDUCTIONS:
        raise ValueError(f"kernels.{op}: unknown reduction {reduction!r}; choose from {', '.join(REDUCTIONS)}")
