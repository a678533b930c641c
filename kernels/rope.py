"""Rotary position embedding (Su et al. 2021) in the rotate-half form of Hugging Face's Llama.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)    for the two halves x1, x2 of a head's dimensions

The angle of pair i at position p is p * theta^(-2i / D). The inverse, which is also the backward pass, is the same
rotation with -sin.

The kernel is bound by memory: a program holds the angles of a few tokens in registers and rotates every head of q and
then of k, so that everything is read once and written once. q and k may be slices of one fused projection; they are not
copied. On a CPU the same op runs in C++ (csrc/cpu/rows.cpp).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import cpu, reference
from kernels.dispatch import resolve
from kernels.launch import cdiv, launch, next_power_of_2, registered, tile, tl, triton

MAX_WIDTH = 8192  # of a head; the pairs of a wider head do not fit into the registers of one program


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Rotates q and k by the angles of their positions.

    Args:
        q: [B, S, Hq, D]; k: [B, S, Hkv, D], D even. The arithmetic is in fp32 (fp64 for fp64).
        cos, sin: fp32 [S, D/2], from rope_cos_sin.
        backend: as for every op (kernels/dispatch.py); None: the default.

    Returns the rotated (q, k), new tensors in their dtypes. Raises ValueError for shapes that do not fit.
    """
    b, s, _, d = q.shape
    if d % 2 or k.shape != (b, s, k.shape[-2], d) or cos.shape != (s, d // 2) or sin.shape != cos.shape:
        raise ValueError(
            f"kernels.rope: q [B, S, Hq, D] {list(q.shape)}, k {list(k.shape)}, cos {list(cos.shape)} and sin "
            f"{list(sin.shape)} do not fit: k is [B, S, Hkv, D], cos and sin are [S, D/2]"
        )
    unsupported = _unsupported(q, k, cos, sin)
    if resolve("rope", q.device, q.dtype, backend, triton=unsupported, cpp=unsupported) == "torch":
        return reference.rope(q, k, cos, sin)
    return _RoPE.apply(q, k, cos, sin)


def rope_periods(head_dim: int, theta: float) -> Tensor:
    """Returns theta^(2i / D), fp32 [head_dim / 2]: the inverse of the frequency of each pair.

    It is computed on the CPU, with the same operations as in transformers. The power function of another device may
    differ in the last bit, and position 10,000 multiplies that error by 10,000.
    """
    # The device is explicit, because `with torch.device(...)` would change it.
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    return theta**exponent  # type: ignore[no-any-return]


def rope_cos_sin(
    start: int,
    length: int,
    head_dim: int,
    theta: float,
    device: torch.device | None = None,
    *,
    frequency: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, fp32 [length, head_dim / 2], of the angles at positions start .. start + length - 1.

    frequency: fp32 [head_dim / 2], of a RoPE for longer sequences; None: theta^(-2i / D).
    """
    frequency = 1.0 / rope_periods(head_dim, theta) if frequency is None else frequency
    frequency = frequency.to(device or "cpu", non_blocking=True)
    # fp32 is enough for positions, because it is exact for integers up to 2^24.
    position = torch.arange(start, start + length, dtype=torch.float32, device=frequency.device)
    angle = position[:, None] * frequency
    return angle.cos(), angle.sin()


def _unsupported(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if q.dtype != k.dtype:
        return f"q is {q.dtype} and k {k.dtype}"
    if q.shape[-1] > MAX_WIDTH:
        return f"the width {q.shape[-1]} is above {MAX_WIDTH}"
    # Only the reference can differentiate with respect to them, so torch computes.
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return "it has no gradient for cos and sin"
    return None


@triton.jit
def _rope_kernel(  # type: ignore[no-untyped-def]
    q_out,
    k_out,
    q,
    k,
    cos,
    sin,
    n_tokens,
    q_heads,
    k_heads,
    q_row_stride,
    q_token_stride,
    q_head_stride,
    k_row_stride,
    k_token_stride,
    k_head_stride,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Rotates TOKENS tokens of one row of the batch: the heads of q and then of k, HEADS at a time."""
    blocks = tl.cdiv(n_tokens, TOKENS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    # In 64 bits, as row and head, because a product with a stride may exceed 2^31.
    token = (tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    pair = tl.arange(0, BLOCK_HALF)
    within = (token < n_tokens)[:, None] & (pair < HALF)[None, :]
    angle = token[:, None] * HALF + pair[None, :]
    c = tl.load(cos + angle, mask=within, other=0.0).to(tl.float32)[:, None, :]
    s = tl.load(sin + angle, mask=within, other=0.0).to(tl.float32)[:, None, :]
    if INVERSE:
        s = -s
    q += row * q_row_stride
    k += row * k_row_stride
    q_out += row * n_tokens * q_heads * HALF * 2
    k_out += row * n_tokens * k_heads * HALF * 2
    token = token[:, None]
    # One loop over the heads of both, so that angles are loaded once. A block may begin in q and end in k.
    for first in range(0, q_heads + k_heads, HEADS):
        head = (first + tl.arange(0, HEADS)).to(tl.int64)[None, :]
        of_k = head - q_heads
        source = tl.where(
            of_k < 0,
            q + token * q_token_stride + head * q_head_stride,
            k + token * k_token_stride + of_k * k_head_stride,
        )
        target = tl.where(
            of_k < 0,
            q_out + (token * q_heads + head) * (HALF * 2),
            k_out + (token * k_heads + of_k) * (HALF * 2),
        )
        source = source[:, :, None] + pair[None, None, :]
        target = target[:, :, None] + pair[None, None, :]
        held = within[:, None, :] & (of_k < k_heads)[:, :, None]
        # Two loads, so that a thread has both members of its pairs; after one load, threads would exchange data.
        x1 = tl.load(source, mask=held, other=0.0).to(tl.float32)
        x2 = tl.load(source + HALF, mask=held, other=0.0).to(tl.float32)
        # k has q's dtype too: _unsupported rejects another one.
        tl.store(target, (x1 * c - x2 * s).to(q_out.dtype.element_ty), mask=held)
        tl.store(target + HALF, (x2 * c + x1 * s).to(q_out.dtype.element_ty), mask=held)


def _fake_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@registered(_fake_rotate)
def rope_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Rotates (q, k) by the angles, or back; q [B, S, Hq, D], k [B, S, Hkv, D], cos, sin [S, D/2]."""
    q_out, k_out = _fake_rotate(q, k, cos, sin, inverse)
    # The kernels accept any stride except the last one, so slices of a fused projection are not copied.
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    if cpu.covers(q, k):
        cpu.rope(q_out, k_out, q, k, cos.contiguous(), sin.contiguous(), inverse)
        return q_out, k_out
    (b, s, q_heads, d), k_heads = q.shape, k.shape[2]
    chosen = tile("rope.rotate", q, d, b * s)
    launch(
        _rope_kernel,
        (b * cdiv(s, chosen["TOKENS"]),),
        *(
            q_out,
            k_out,
            q,
            k,
            cos.contiguous(),
            sin.contiguous(),
            s,
            q_heads,
            k_heads,
            *q.stride()[:3],
            *k.stride()[:3],
        ),
        INVERSE=inverse,
        HALF=d // 2,
        BLOCK_HALF=next_power_of_2(d // 2),  # tl.arange needs a power of 2
        **chosen,
    )
    return q_out, k_out


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # The rotation is linear, so its gradient needs only the angles, not q or k.
        ctx.save_for_backward(cos, sin)
        return rope_rotate(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # autograd passes zeros for an unused output, so dq and dk are always tensors.
        return *rope_rotate(dq, dk, cos, sin, True), None, None
