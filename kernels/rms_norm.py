"""RMSNorm (Zhang & Sennrich 2019), alone and with the residual addition before it.

    y = x / sqrt(mean(x^2) + eps) * weight            over the last dimension

The product with the weight is taken in fp32 and rounded once. Hugging Face's LlamaRMSNorm rounds the normalised x to
the inputs' dtype first: in fp32 the two agree, in bf16 they differ by one rounding.
"""

from torch import Tensor

from kernels import reference
from kernels.dispatch import resolve


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """RMSNorm over the last dimension.

    Args:
        x: [..., D]; statistics are in fp32 (fp64 for fp64).
        weight: [D].
        backend: "triton", "torch", "auto", or None for the default.

    Returns y [..., D] in x's dtype.
    """
    resolve("rms_norm", x.device, backend)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """(y, residual_out): the sum of x and the residual stream, and its RMSNorm.

    Args:
        x, residual: [..., D] of one dtype.
        weight: [D].
        backend: "triton", "torch", "auto", or None for the default.

    Returns y = rms_norm(residual_out) and residual_out = x + residual, [..., D] in x's dtype. The norm is of the sum as
    it is stored, which is what a backward pass sees.
    """
    resolve("add_rms_norm", x.device, backend)
    return reference.add_rms_norm(x, residual, weight, eps)
