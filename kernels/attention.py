"""Causal attention within documents, grouped-query, in flash-attention's layout.

    out[i] = sum_j p[i, j] v[j],   p[i] = softmax_j(scale * q[i] . k[j])   over the keys j that query i sees

Query i stands at position P = Sk - Sq + i (aligned bottom right), and sees key j iff doc_start[i] <= j <= P. So one
function serves training (Sq == Sk), prefill and decoding against a cache (Sq < Sk), and rows packed with documents.

The torch backend is scaled_dot_product_attention. Documents reach it as one additive mask [B, 1, Sq, Sk] that all heads
share; the layers of a forward pass share it too when the caller makes it once with `attention_mask`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import resolve

CPU_QUERY_BLOCK = 128  # queries; smaller blocks skip more keys but make smaller products


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    doc_start: Tensor | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of q over k and v: [B, Sq, Hq, D] in q's dtype.

    Args:
        q: [B, Sq, Hq, D]; fp32, fp16, bf16 (or fp64).
        k, v: [B, Sk, Hkv, D], 1 <= Sq <= Sk; Hkv divides Hq, and query head h reads head h // (Hq / Hkv).
        causal: query i sees no key after its position Sk - Sq + i.
        doc_start: int32 [B, Sq], the first key that each query sees, never decreasing along a row: where its document
            begins, or where a left-padded prompt does. A query that sees no key gives zeros. Needs causal.
        scale: of the scores; default D^-0.5.
        mask: what attention_mask(doc_start, Sk, ...) returned, made once for many calls; None: made here if needed.
        backend: "triton", "torch", "auto", or None for the default.

    Raises ValueError for shapes that do not fit.
    """
    (b, sq, hq, d), (sk, hkv) = q.shape, k.shape[1:3]
    if k.shape != (b, sk, hkv, d) or v.shape != k.shape or hq % hkv or not 1 <= sq <= sk:
        raise ValueError(
            f"kernels.attention: q [B, Sq, Hq, D] {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit: "
            "k and v are [B, Sk, Hkv, D] with Sk >= Sq >= 1 and Hkv a divisor of Hq"
        )
    if doc_start is not None and (not causal or doc_start.shape != (b, sq)):
        raise ValueError(f"kernels.attention: doc_start is int32 [B, Sq] with causal=True, got {list(doc_start.shape)}")
    resolve("attention", q.device, q.dtype, backend)
    return _sdpa(q, k, v, causal, doc_start, scale, mask)


def attention_mask(
    doc_start: Tensor | None, sk: int, dtype: torch.dtype, *, backend: str | None = None
) -> Tensor | None:
    """The mask that causal `attention` calls with this doc_start can share; None where they need none.

    Args:
        doc_start: int32 [B, Sq], or None.
        sk: number of keys.
        dtype: of q.

    Returns [B, 1, Sq, Sk]: 0 where the query sees the key, else -inf.
    """
    if doc_start is None:
        return None
    resolve("attention", doc_start.device, dtype, backend)
    sq = doc_start.shape[1]
    key = torch.arange(sk, dtype=torch.int32, device=doc_start.device)
    hidden = (key < doc_start[:, :, None]) | (key > key[sk - sq :, None])
    dtype = _sdpa_dtype(dtype, hidden.device)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)[:, None]


def _sdpa_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What SDPA computes in. At low precision, the CPU's would round the sums of dK and dV at each block and head."""
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    doc_start: Tensor | None,
    scale: float | None,
    mask: Tensor | None,
) -> Tensor:
    (_, sq, hq, _), (_, sk, hkv, _) = q.shape, k.shape
    dtype = q.dtype
    q, k, v = (x.to(_sdpa_dtype(dtype, x.device)).transpose(1, 2) for x in (q, k, v))
    if mask is None and doc_start is not None:
        mask = attention_mask(doc_start, sk, q.dtype, backend="torch")
    elif mask is None and causal and 1 < sq < sk:  # SDPA's is_causal is aligned top left: right for Sq == Sk only
        mask = torch.full((1, 1, sq, sk), -torch.inf, dtype=q.dtype, device=q.device).triu_(sk - sq + 1)
    if mask is None:
        is_causal = causal and sq > 1
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=hq != hkv)
    elif q.is_cuda:
        # The memory-efficient kernel is the only fused one that takes a mask, and it knows no grouped heads.
        k, v = (x.repeat_interleave(hq // hkv, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        # The CPU kernel skips no key that the mask hides; without those after its last query, a block of queries need
        # not pay for them.
        blocks = []
        for start in range(0, sq, CPU_QUERY_BLOCK):
            rows = slice(start, min(start + CPU_QUERY_BLOCK, sq))
            end = sk - sq + rows.stop
            blocks.append(
                F.scaled_dot_product_attention(
                    q[:, :, rows],
                    k[:, :, :end],
                    v[:, :, :end],
                    attn_mask=mask[:, :, rows, :end],
                    scale=scale,
                    enable_gqa=hq != hkv,
                )
            )
        out = torch.cat(blocks, dim=2)
    return out.transpose(1, 2).to(dtype)
