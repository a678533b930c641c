"""Plain-torch twins of every op: what each computes, said as simply as torch allows.

They are the oracle of the tests and of `llm doctor`, so they are written to be obviously right, not fast. Arithmetic is
in fp32 for fp16 and bf16 inputs, else in the inputs' own dtype (fp64 stays fp64); results are rounded once, at the end.
Every function is differentiable by autograd; none changes its inputs.
"""

import torch
from torch import Tensor


def _acc(x: Tensor) -> torch.dtype:
    """The dtype to compute in: at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def attention_allowed(doc_start: Tensor | None, sq: int, sk: int, causal: bool, device: torch.device) -> Tensor:
    """Which key each query may see: bool [B or 1, Sq, Sk]. Query i stands at position Sk - Sq + i."""
    key = torch.arange(sk, device=device)
    query = torch.arange(sk - sq, sk, device=device)[:, None]
    allowed = (key <= query if causal else torch.ones(sq, sk, dtype=torch.bool, device=device))[None]
    if doc_start is not None:
        allowed = allowed & (key >= doc_start[:, :, None])
    return allowed


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, doc_start: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale * q k^T + mask) v; a query that sees no key gives zeros. Arguments as kernels.attention."""
    (_, sq, hq, d), (_, sk, hkv, _) = q.shape, k.shape
    acc = _acc(q)
    k, v = (x.to(acc).repeat_interleave(hq // hkv, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q.to(acc), k) * (d**-0.5 if scale is None else scale)
    allowed = attention_allowed(doc_start, sq, sk, causal, q.device)[:, None]
    probabilities = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    probabilities = torch.where(allowed, probabilities, 0.0)  # softmax over no key at all is NaN
    return torch.einsum("bhij,bjhd->bihd", probabilities, v).to(q.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    xf = x.to(_acc(x))
    return (xf * torch.rsqrt(xf.square().mean(dim=-1, keepdim=True) + eps) * weight.to(_acc(x))).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); the norm is of the sum as it is stored."""
    residual_out = x + residual
    return rms_norm(residual_out, weight, eps), residual_out


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the pairs (x[i], x[i + D/2]) of every head of q and k by the angles of their position."""

    def rotate(x: Tensor) -> Tensor:
        c, s = (table.to(_acc(x))[:, None, :] for table in (cos, sin))  # [S, 1, D/2]: the same for every head
        x1, x2 = x.to(_acc(x)).chunk(2, dim=-1)
        return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, with silu(x) = x * sigmoid(x); one packed tensor is (gate, up) along the last dimension."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    gate_f, up_f = gate.to(_acc(gate)), up.to(_acc(gate))
    return (gate_f * torch.sigmoid(gate_f) * up_f).to(gate.dtype)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """-log softmax(logits)[target], with the options of kernels.cross_entropy."""
    logits = logits[:, :vocab_size].to(_acc(logits))
    valid = target != ignore_index
    lse = torch.logsumexp(logits, dim=-1)
    target_logit = logits.gather(1, torch.where(valid, target, 0)[:, None])[:, 0]
    loss = (1 - label_smoothing) * (lse - target_logit) + label_smoothing * (lse - logits.mean(dim=-1))
    loss = torch.where(valid, loss + z_loss * lse.square(), 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / valid.sum()


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy(x @ weight^T, target), with the logits in the accumulation dtype."""
    return cross_entropy(
        x.to(_acc(x)) @ weight.to(_acc(x)).T,
        target,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
