"""QK-norm and RoPE of a packed projection, in one pass over it (QK-norm: Henry et al. 2020; RoPE: Su et al. 2021).

    n = x / sqrt(mean(x^2) + eps),   y = n * weight,   out = rotate(y)          for each head x of q and k

    dy = rotate back(dout),   dn = dy * weight,   dx = (dn - n * mean(dn * n)) / sqrt(mean(x^2) + eps)

As separate ops, the norms and the rotation would read and write q and k twice in forward and three times in backward,
where a further pass would put the gradients of q, k and v together. The Triton kernels read each number once and write
the packed gradient. Between norm and rotation nothing is rounded.

Every other backend computes rms_norm and rope.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import resolve
from kernels.launch import cdiv, launch, next_power_of_2, processors, registered, tile, tl, triton
from kernels.linear import rounded
from kernels.rms_norm import rms_norm
from kernels.rope import MAX_WIDTH, rope


def norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    *,
    n_heads: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (q [B, S, Hq, D], k, v [B, S, Hkv, D]) of a projection: q and k normalised and rotated, v as a view.

    Args:
        qkv: [B, S, (Hq + 2 Hkv) D]: the heads of q, then of k, then of v.
        q_weight, k_weight: [D], of the norms, as for rms_norm: in qkv's dtype, or in fp32.
        cos, sin: [S, D / 2], as for rope.
        eps: added to the mean square.
        n_heads: Hq.
        backend: as for every op (kernels/dispatch.py); None: the default.

    Raises ValueError for shapes that do not fit.
    """
    d = q_weight.shape[-1]
    kv_heads, rest = divmod(qkv.shape[-1] - n_heads * d, 2 * d) if d else (0, 1)
    angles = (qkv.shape[1], d // 2)
    weights_fit = q_weight.shape == k_weight.shape == (d,) and d % 2 == 0
    if not weights_fit or rest or kv_heads < 1 or not cos.shape == sin.shape == angles:
        raise ValueError(
            f"kernels.norm_rope: qkv [B, S, (Hq + 2 Hkv) D] {list(qkv.shape)} with Hq = {n_heads}, weights [D] "
            f"{list(q_weight.shape)} and {list(k_weight.shape)}, cos {list(cos.shape)} and sin {list(sin.shape)} "
            "[S, D / 2] do not fit"
        )
    unsupported = _unsupported(d, cos, sin)
    if resolve("norm_rope", qkv.device, qkv.dtype, backend, triton=unsupported) == "triton":
        return _NormRoPE.apply(qkv, q_weight, k_weight, cos, sin, eps, n_heads)
    q, k, v = _heads(qkv, n_heads, d)
    q, k = rms_norm(q, q_weight, eps, backend=backend), rms_norm(k, k_weight, eps, backend=backend)
    return *rope(q, k, cos, sin, backend=backend), v


def _heads(qkv: Tensor, n_heads: int, d: int) -> list[Tensor]:
    """Returns views of q, k and v [B, S, H, D]."""
    heads = qkv.unflatten(-1, (-1, d))
    kv_heads = (heads.shape[2] - n_heads) // 2
    return list(heads.split((n_heads, kv_heads, kv_heads), dim=2))


def _unsupported(d: int, cos: Tensor, sin: Tensor) -> str | None:
    if d > MAX_WIDTH:
        return f"the head dimension {d} is above {MAX_WIDTH}"
    # Only the reference can differentiate with respect to them, so torch computes.
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return "it has no gradient for cos and sin"
    return None


@triton.jit
def _angles(cos, sin, token, n_tokens, seq_len, pair, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns (which pairs of these tokens exist [tokens, pairs], cos and sin of each [tokens, 1, pairs])."""
    within = (token < n_tokens)[:, None] & (pair < HALF)[None, :]
    angle = (token % seq_len)[:, None] * HALF + pair[None, :]
    c = tl.load(cos + angle, mask=within, other=0.0).to(tl.float32)[:, None, :]
    s = tl.load(sin + angle, mask=within, other=0.0).to(tl.float32)[:, None, :]
    return within, c, s


@triton.jit
def _weights(q_weight, k_weight, of_k, k_heads, pair, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the weights of both members of each pair [1, heads, pairs]. A block may begin in q and end in k.

    of_k: the number of each head among those of k, negative for q.
    """
    weight = tl.where(of_k < 0, q_weight, k_weight)[:, None] + pair[None, :]
    held = (of_k < k_heads)[:, None] & (pair < HALF)[None, :]
    w1 = tl.load(weight, mask=held, other=0.0).to(tl.float32)[None, :, :]
    w2 = tl.load(weight + HALF, mask=held, other=0.0).to(tl.float32)[None, :, :]
    return w1, w2


@triton.jit
def _norm_rope_forward_kernel(  # type: ignore[no-untyped-def]
    q_out,
    k_out,
    rstd,
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    eps,
    n_tokens,
    seq_len,
    q_heads,
    k_heads,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Normalises and rotates TOKENS tokens: the heads of q and then of k, HEADS at a time."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, BLOCK_HALF)
    within, c, s = _angles(cos, sin, token, n_tokens, seq_len, pair, HALF)
    token = token.to(tl.int64)[:, None]  # a product with a stride may exceed 2^31
    for first in range(0, q_heads + k_heads, HEADS):
        head = first + tl.arange(0, HEADS)
        of_k = head - q_heads
        held = within[:, None, :] & (of_k < k_heads)[None, :, None]
        w1, w2 = _weights(q_weight, k_weight, of_k, k_heads, pair, HALF)
        source = qkv + (token * (q_heads + 2 * k_heads) + head[None, :]) * (2 * HALF)
        source = source[:, :, None] + pair[None, None, :]
        # Two loads, so that a thread has both members of its pairs; after one load, threads would exchange data.
        x1 = tl.load(source, mask=held, other=0.0).to(tl.float32)
        x2 = tl.load(source + HALF, mask=held, other=0.0).to(tl.float32)
        # sqrt_rn rounds correctly; on NVIDIA devices tl.rsqrt and tl.sqrt are approximate.
        inverse = 1.0 / tl.sqrt_rn(tl.sum(x1 * x1 + x2 * x2, axis=2) / (2 * HALF) + eps)
        held_heads = (token < n_tokens) & (of_k < k_heads)[None, :]
        tl.store(rstd + token * (q_heads + k_heads) + head[None, :], inverse, mask=held_heads)
        y1, y2 = x1 * inverse[:, :, None] * w1, x2 * inverse[:, :, None] * w2
        target = tl.where(
            (of_k < 0)[None, :],
            q_out + (token * q_heads + head[None, :]) * (2 * HALF),
            k_out + (token * k_heads + of_k[None, :]) * (2 * HALF),
        )
        target = target[:, :, None] + pair[None, None, :]
        tl.store(target, (y1 * c - y2 * s).to(q_out.dtype.element_ty), mask=held)
        tl.store(target + HALF, (y2 * c + y1 * s).to(q_out.dtype.element_ty), mask=held)


@triton.jit
def _norm_rope_backward_kernel(  # type: ignore[no-untyped-def]
    dqkv,
    dweight_shares,
    dq,
    dk,
    dv,
    qkv,
    rstd,
    q_weight,
    k_weight,
    cos,
    sin,
    n_tokens,
    seq_len,
    q_heads,
    k_heads,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Computes dqkv of every n-th group of TOKENS tokens, and this program's share of both weights' gradients."""
    pair = tl.arange(0, BLOCK_HALF)
    # fp32 sums: in bf16, a sum over thousands of tokens would stop growing.
    q_share1 = tl.zeros([BLOCK_HALF], tl.float32)
    q_share2 = tl.zeros([BLOCK_HALF], tl.float32)
    k_share1 = tl.zeros([BLOCK_HALF], tl.float32)
    k_share2 = tl.zeros([BLOCK_HALF], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_tokens, TOKENS), tl.num_programs(0)):
        token = block * TOKENS + tl.arange(0, TOKENS)
        within, c, s = _angles(cos, sin, token, n_tokens, seq_len, pair, HALF)
        token = token.to(tl.int64)[:, None]
        for first in range(0, q_heads + k_heads, HEADS):
            head = first + tl.arange(0, HEADS)
            of_k = head - q_heads
            held = within[:, None, :] & (of_k < k_heads)[None, :, None]
            w1, w2 = _weights(q_weight, k_weight, of_k, k_heads, pair, HALF)
            held_heads = (token < n_tokens) & (of_k < k_heads)[None, :]
            row = token * (q_heads + k_heads) + head[None, :]
            inverse = tl.load(rstd + row, mask=held_heads, other=0.0)[:, :, None]
            gradient = tl.where(
                (of_k < 0)[None, :],
                dq + (token * q_heads + head[None, :]) * (2 * HALF),
                dk + (token * k_heads + of_k[None, :]) * (2 * HALF),
            )
            gradient = gradient[:, :, None] + pair[None, None, :]
            g1 = tl.load(gradient, mask=held, other=0.0).to(tl.float32)
            g2 = tl.load(gradient + HALF, mask=held, other=0.0).to(tl.float32)
            packed = (token * (q_heads + 2 * k_heads) + head[None, :]) * (2 * HALF)
            packed = packed[:, :, None] + pair[None, None, :]
            n1 = tl.load(qkv + packed, mask=held, other=0.0).to(tl.float32) * inverse
            n2 = tl.load(qkv + packed + HALF, mask=held, other=0.0).to(tl.float32) * inverse
            dy1, dy2 = g1 * c + g2 * s, g2 * c - g1 * s  # turned back
            is_q = (of_k < 0)[None, :, None]
            q_share1 += tl.sum(tl.sum(tl.where(is_q, dy1 * n1, 0.0), axis=1), axis=0)
            q_share2 += tl.sum(tl.sum(tl.where(is_q, dy2 * n2, 0.0), axis=1), axis=0)
            k_share1 += tl.sum(tl.sum(tl.where(is_q, 0.0, dy1 * n1), axis=1), axis=0)
            k_share2 += tl.sum(tl.sum(tl.where(is_q, 0.0, dy2 * n2), axis=1), axis=0)
            dn1, dn2 = dy1 * w1, dy2 * w2
            mean = (tl.sum(dn1 * n1 + dn2 * n2, axis=2) / (2 * HALF))[:, :, None]
            tl.store(dqkv + packed, (inverse * (dn1 - n1 * mean)).to(dqkv.dtype.element_ty), mask=held)
            tl.store(dqkv + packed + HALF, (inverse * (dn2 - n2 * mean)).to(dqkv.dtype.element_ty), mask=held)
        for first in range(0, k_heads, HEADS):
            head = first + tl.arange(0, HEADS)
            held = within[:, None, :] & (head < k_heads)[None, :, None]
            source = (token * k_heads + head[None, :]) * (2 * HALF)
            source = source[:, :, None] + pair[None, None, :]
            target = (token * (q_heads + 2 * k_heads) + q_heads + k_heads + head[None, :]) * (2 * HALF)
            target = target[:, :, None] + pair[None, None, :]
            tl.store(dqkv + target, tl.load(dv + source, mask=held, other=0.0), mask=held)
            tl.store(dqkv + target + HALF, tl.load(dv + source + HALF, mask=held, other=0.0), mask=held)
    share = dweight_shares + tl.program_id(0).to(tl.int64) * (4 * HALF) + pair
    tl.store(share, q_share1, mask=pair < HALF)
    tl.store(share + HALF, q_share2, mask=pair < HALF)
    tl.store(share + 2 * HALF, k_share1, mask=pair < HALF)
    tl.store(share + 3 * HALF, k_share2, mask=pair < HALF)


def _sizes(qkv: Tensor, weight: Tensor, n_heads: int) -> tuple[int, int, int, int, int]:
    """Returns (B, S, Hq, Hkv, D)."""
    b, s, width = qkv.shape
    d = weight.shape[0]
    return b, s, n_heads, (width // d - n_heads) // 2, d


def _fake_forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, n_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    b, s, hq, hkv, d = _sizes(qkv, q_weight, n_heads)
    rstd = qkv.new_empty((b, s, hq + hkv), dtype=torch.float32)
    return qkv.new_empty((b, s, hq, d)), qkv.new_empty((b, s, hkv, d)), rstd


@registered(_fake_forward)
def norm_rope_forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, n_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (q [B, S, Hq, D], k [B, S, Hkv, D], rstd): rstd fp32 [B, S, Hq + Hkv], one over each root mean square."""
    q, k, rstd = _fake_forward(qkv, q_weight, k_weight, cos, sin, eps, n_heads)
    b, s, hq, hkv, d = _sizes(qkv, q_weight, n_heads)
    chosen = tile("norm_rope.forward", qkv, d, b * s)
    launch(
        _norm_rope_forward_kernel,
        (cdiv(b * s, chosen["TOKENS"]),),
        *(q, k, rstd, qkv.contiguous(), q_weight.contiguous(), k_weight.contiguous()),
        *(cos.contiguous(), sin.contiguous(), eps, b * s, s, hq, hkv),
        HALF=d // 2,
        BLOCK_HALF=next_power_of_2(d // 2),  # tl.arange needs a power of 2
        **chosen,
    )
    return q, k, rstd


def _fake_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rstd: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), qkv.new_empty((2, q_weight.shape[0]), dtype=torch.float32)


@registered(_fake_backward)
def norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rstd: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns (dqkv, the gradients of q_weight and k_weight [2, D] in fp32)."""
    dqkv = qkv.new_empty(qkv.shape)
    b, s, hq, hkv, d = _sizes(qkv, q_weight, dq.shape[2])
    chosen = tile("norm_rope.backward", qkv, d, b * s)
    # As many as the device runs at once, because each writes its share of the weights' gradients to read again.
    # PROGRAMS is per processor.
    programs = min(cdiv(b * s, chosen["TOKENS"]), processors(qkv.device) * chosen.pop("PROGRAMS"))
    shares = torch.empty(programs, 2, d, dtype=torch.float32, device=qkv.device)
    launch(
        _norm_rope_backward_kernel,
        (programs,),
        *(dqkv, shares, dq.contiguous(), dk.contiguous(), dv.contiguous(), qkv.contiguous(), rstd),
        *(q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(), b * s, s, hq, hkv),
        HALF=d // 2,
        BLOCK_HALF=next_power_of_2(d // 2),
        **chosen,
    )
    return dqkv, shares.sum(dim=0)


class _NormRoPE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, n_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtypes = q_weight.dtype, k_weight.dtype
        q_weight, k_weight = (rounded(weight, qkv.dtype) for weight in (q_weight, k_weight))
        q, k, rstd = norm_rope_forward(qkv, q_weight, k_weight, cos, sin, eps, n_heads)
        ctx.save_for_backward(qkv, q_weight, k_weight, rstd, cos, sin)
        return q, k, _heads(qkv, n_heads, q_weight.shape[0])[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight, rstd, cos, sin = ctx.saved_tensors
        # autograd passes zeros for an unused output, so all three are tensors.
        dqkv, dweights = norm_rope_backward(dq, dk, dv, qkv, q_weight, k_weight, rstd, cos, sin)
        dq_weight, dk_weight = (dweight.to(dtype) for dweight, dtype in zip(dweights, ctx.dtypes, strict=True))
        return dqkv, dq_weight, dk_weight, None, None, None, None
