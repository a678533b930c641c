"""The reference implementation of every op in plain torch, as simple as possible.

The tests and `llm doctor` compare every backend with these functions, so they should be obviously right, not fast.
Arithmetic is in fp32 for fp16 and bf16 inputs, else in the inputs' dtype (fp64 stays fp64), and results are rounded
once, at the end. With `upcast=False` every step is in the inputs' dtype, as in a naive model; kernels.parity derives
the allowed error of a kernel from it. Every function that computes numbers is differentiable; none changes an input.
"""

import torch
from torch import Tensor

MASS_UNIT = float(2**42)
"""Masses of tokens are multiples of its inverse, relative to the largest. 2^20 of them add up to less than 2^63."""


def _acc(x: Tensor, upcast: bool) -> torch.dtype:
    """Returns the dtype to compute in."""
    return torch.promote_types(x.dtype, torch.float32) if upcast else x.dtype


def attention_allowed(doc_start: Tensor | None, sq: int, sk: int, causal: bool, device: torch.device) -> Tensor:
    """Returns which key each query may see: bool [B or 1, Sq, Sk]. Query i is at position Sk - Sq + i."""
    key = torch.arange(sk, device=device)
    query = torch.arange(sk - sq, sk, device=device)[:, None]
    allowed = (key <= query if causal else torch.ones(sq, sk, dtype=torch.bool, device=device))[None]
    if doc_start is not None:
        allowed = allowed & (key >= doc_start[:, :, None])
    return allowed


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    doc_start: Tensor | None = None,
    scale: float | None = None,
    upcast: bool = True,
) -> Tensor:
    """softmax(scale * q k^T + mask) v; a query that sees no key gives zeros. Arguments as kernels.attention."""
    (_, sq, hq, d), (_, sk, hkv, _) = q.shape, k.shape
    acc = _acc(q, upcast)
    k, v = (x.to(acc).repeat_interleave(hq // hkv, dim=2) for x in (k, v))
    # Unlike the kernels, this stores all scores: it is the plain definition.
    scores = torch.einsum("bihd,bjhd->bhij", q.to(acc), k) * (d**-0.5 if scale is None else scale)
    allowed = attention_allowed(doc_start, sq, sk, causal, q.device)[:, None]
    probabilities = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    probabilities = torch.where(allowed, probabilities, 0.0)  # softmax over no keys is NaN
    return torch.einsum("bhij,bjhd->bihd", probabilities, v).to(q.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, upcast: bool = True) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    xf = x.to(_acc(x, upcast))
    return (xf * torch.rsqrt(xf.square().mean(dim=-1, keepdim=True) + eps) * weight.to(_acc(x, upcast))).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, upcast: bool = True
) -> tuple[Tensor, Tensor]:
    """Returns (rms_norm(x + residual), x + residual). The norm is computed from the rounded sum."""
    residual_out = x + residual
    # The sum is rounded first, because the next layer and backward get the rounded sum.
    return rms_norm(residual_out, weight, eps, upcast=upcast), residual_out


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, upcast: bool = True) -> tuple[Tensor, Tensor]:
    """Rotates the pairs (x[i], x[i + D/2]) of every head of q and k by the angles of their position."""

    def rotate(x: Tensor) -> Tensor:
        c, s = (table.to(_acc(x, upcast))[:, None, :] for table in (cos, sin))  # [S, 1, D/2]: the same for every head
        x1, x2 = x.to(_acc(x, upcast)).chunk(2, dim=-1)
        return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    *,
    n_heads: int,
    upcast: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (q, k, v): rms_norm and then rope of the heads of q and k in qkv, and its heads of v."""
    heads = qkv.unflatten(-1, (-1, q_weight.shape[0]))
    kv_heads = (heads.shape[2] - n_heads) // 2
    q, k, v = heads.split((n_heads, kv_heads, kv_heads), dim=2)
    acc = _acc(qkv, upcast)
    # Rounded once, after both.
    q, k = (rms_norm(x.to(acc), w.to(acc), eps, upcast=upcast) for x, w in ((q, q_weight), (k, k_weight)))
    q, k = rope(q, k, cos, sin, upcast=upcast)
    return q.to(qkv.dtype), k.to(qkv.dtype), v


def swiglu(gate: Tensor, up: Tensor | None = None, *, upcast: bool = True) -> Tensor:
    """silu(gate) * up, with silu(x) = x * sigmoid(x); one packed tensor is (gate, up) along the last dimension."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    gate_f, up_f = gate.to(_acc(gate, upcast)), up.to(_acc(gate, upcast))
    return (gate_f * torch.sigmoid(gate_f) * up_f).to(gate.dtype)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
    upcast: bool = True,
) -> Tensor:
    """-log softmax(logits)[target], with the options of kernels.cross_entropy."""
    logits = logits[:, :vocab_size].to(_acc(logits, upcast))
    valid = target != ignore_index
    lse = torch.logsumexp(logits, dim=-1)
    # gather needs valid indices; ignored rows take column 0 here, and the next line drops them.
    target_logit = logits.gather(1, torch.where(valid, target, 0)[:, None])[:, 0]
    loss = torch.where(valid, lse - target_logit + z_loss * lse.square(), 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    # No guard for zero rows: the mean over nothing is NaN, as in torch's cross_entropy.
    return loss.sum() / valid.sum()


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
    upcast: bool = True,
) -> Tensor:
    """cross_entropy(x @ weight^T, target), with the logits in the accumulation dtype."""
    return cross_entropy(
        x.to(_acc(x, upcast)) @ weight.to(_acc(x, upcast)).T,
        target,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        z_loss=z_loss,
        reduction=reduction,
        upcast=upcast,
    )


def likeliest_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (tokens, logprobs) as kernels.sampling.likeliest_tokens: argmax and log softmax in fp32."""
    logits = logits.float()
    tokens = logits.argmax(dim=-1)
    return tokens, _logprobs(logits, tokens)


def drawn_tokens(
    logits: Tensor, uniforms: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns (tokens, logprobs). Arguments and formulas as in kernels.sampling."""
    logits = logits.float()
    # The difference first: a tiny temperature must not overflow. + 0.0, because -0.0 must not come before 0.0. The
    # temperature is a tensor, because a GPU multiplies by the inverse of a number.
    distances = (logits.amax(dim=-1, keepdim=True) - logits + 0.0) / temperature
    distances, order = torch.sort(distances, dim=-1, stable=True)  # stable: of equal tokens the smallest id comes first
    weights = torch.exp(-distances)
    border = distances.index_select(1, top_k - 1)
    masses = torch.where(distances <= border, weights * MASS_UNIT, 0).to(torch.int64)
    sums = masses.cumsum(dim=-1)
    total = sums[:, -1:]
    wanted = torch.ceil(top_p * total).to(torch.int64)
    left = sums.gather(1, _reached(sums, torch.minimum(wanted, total)))  # after top-p
    likely = torch.where(weights >= min_p, masses, 0).sum(dim=-1, keepdim=True)
    left = torch.minimum(left, likely)
    target = (uniforms[:, None] * left).to(torch.int64) + 1
    chosen = _reached(sums, torch.minimum(target, left))  # the product may have been rounded up to `left`
    tokens = order.gather(1, chosen)[:, 0]
    return tokens, _logprobs(logits, tokens)


def _reached(sums: Tensor, target: Tensor) -> Tensor:
    """Returns the first place [B, 1] of each row at which the sum reaches the target [B, 1]."""
    # Beyond the end only in a row that is not finite.
    return torch.searchsorted(sums, target).clamp_(max=sums.shape[1] - 1)


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
