"""Rotary position embedding (Su et al. 2021) in the rotate-half form of Hugging Face's Llama.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)    for the two halves x1, x2 of a head's dimensions

The angle of pair i at position p is p * theta^(-2i / D). The inverse is the same rotation with -sin.
"""

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import resolve


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Rotates q and k by their positions.

    Args:
        q: [B, S, Hq, D]; k: [B, S, Hkv, D]. The arithmetic is in fp32 (fp64 for fp64).
        cos, sin: fp32 [S, D/2], from rope_cos_sin.
        backend: "triton", "torch", "auto", or None for the default.

    Returns the rotated (q, k), new tensors in their dtypes.
    """
    resolve("rope", q.device, q.dtype, backend)
    return reference.rope(q, k, cos, sin)


def rope_cos_sin(
    start: int, length: int, head_dim: int, theta: float, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [length, head_dim / 2], of the angles of positions start .. start + length - 1.

    The frequencies are computed in fp32 on the CPU, operation by operation as transformers does: another device's power
    function may differ in the last bit, which position 10,000 would multiply by 10,000.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequency = (1.0 / theta**exponent).to(device or "cpu", non_blocking=True)
    position = torch.arange(start, start + length, dtype=torch.float32, device=frequency.device)
    angle = position[:, None] * frequency
    return angle.cos(), angle.sin()
