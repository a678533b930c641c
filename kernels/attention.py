"""Causal attention within documents, grouped-query, in flash-attention's layout (Dao et al. 2022, Dao 2023).

    out[i] = sum_j p[i, j] v[j],   p[i] = softmax_j(scale * q[i] . k[j])   over the keys j that query i sees

    dv[j] = sum_i p[i, j] dout[i],   ds[i, j] = p[i, j] (dout[i] . v[j] - delta[i]),   delta[i] = dout[i] . out[i]
    dq[i] = scale * sum_j ds[i, j] k[j],   dk[j] = scale * sum_i ds[i, j] q[i]

Query i is at position P = Sk - Sq + i (aligned bottom right), and sees key j iff doc_start[i] <= j <= P. So one
function serves training (Sq == Sk), prefill and decoding against a cache (Sq < Sk), and rows packed with documents.

The Triton kernels never store the scores. A program holds one tile of queries (for dk and dv: of keys) and loops over
the blocks of the other side. It does not load a block that no element of the tile sees, and it masks only blocks that
contain the diagonal, the edge of a document or the end of a row. The softmax is computed in base 2, with the scale and
log2(e) in one factor; backward recomputes p from lse[i] = log2(sum_j 2^(s[i, j])). dq and (dk, dv) have separate
kernels, so that every sum has a fixed order and the same bits on every run.

The C++ (csrc/cpu/attention.cpp) runs the same ops on a CPU. The backend torch is scaled_dot_product_attention, which
takes documents as one additive mask [B, 1, Sq, Sk] for all heads. The layers of a forward pass can share this mask if
the caller makes it with `attention_mask`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import cpu
from kernels.dispatch import resolve
from kernels.launch import cdiv, launch, next_power_of_2, registered, tile, tl, triton

MAX_HEAD_DIM = 256
DECODING_QUERIES = 16  # up to this number a call is bound by reading the keys, and has a tile of its own
CACHED_BYTES = 16 * 2**20  # keys and values of all heads that run at once; fits into the L2 cache of most devices
CPU_QUERIES = 16  # from this number on, the C++, with one query per vector lane, is faster than torch


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
    """Computes attention of q over k and v: [B, Sq, Hq, D] in q's dtype.

    Args:
        q: [B, Sq, Hq, D]; fp32, fp16, bf16 (or fp64).
        k, v: [B, Sk, Hkv, D], 1 <= Sq <= Sk; Hkv divides Hq, and query head h reads head h // (Hq / Hkv).
        causal: query i sees no key after its position Sk - Sq + i.
        doc_start: int32 [B, Sq], the first key that each query sees: the start of its document or of a left-padded
            prompt. It never decreases along a row. A query that sees no key gives zeros. Needs causal.
        scale: factor of the scores; default D^-0.5.
        mask: the result of attention_mask(doc_start, Sk, ...), shared by many calls; None: made here if needed.
        backend: as for every op (kernels/dispatch.py); None: the default.

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
    scale = d**-0.5 if scale is None else scale
    unsupported = _unsupported(q, k, v, scale)
    # A mask on a CPU was made for torch, because the C++ needs none.
    slow = sq < CPU_QUERIES or mask is not None
    chosen = resolve("attention", q.device, q.dtype, backend, triton=unsupported, cpp=unsupported, slow_in_cpp=slow)
    # A backend ignores a mask that was made for another backend, because doc_start has the same information.
    if chosen == "torch":
        return _sdpa(q, k, v, causal, doc_start, scale, mask if mask is not None and mask.is_floating_point() else None)
    doc_end = mask if mask is not None and mask.dtype == torch.int32 else None
    return _Attention.apply(q, k, v, doc_start, doc_end, causal, scale)


def attention_mask(
    doc_start: Tensor | None, sk: int, dtype: torch.dtype, *, backend: str | None = None
) -> Tensor | None:
    """Makes the mask that causal `attention` calls with this doc_start can share; None if they need none.

    Args:
        doc_start: int32 [B, Sq], or None.
        sk: number of keys.
        dtype: of q.

    Returns for SDPA [B, 1, Sq, Sk]: 0 where the query sees the key, else -inf; for the Triton kernels, if gradients
    are needed, int32 [B, Sk]: the first query whose document begins after the key.
    """
    if doc_start is None:
        return None
    slow = doc_start.shape[1] < CPU_QUERIES
    chosen = resolve("attention", doc_start.device, dtype, backend, slow_in_cpp=slow)
    if chosen == "torch":
        return _additive_mask(doc_start, sk, _sdpa_dtype(dtype, doc_start.device))
    # Only the dk and dv kernel reads it, so it is not needed without gradients.
    return _doc_end(doc_start, sk) if chosen == "triton" and torch.is_grad_enabled() else None


def _additive_mask(doc_start: Tensor, sk: int, dtype: torch.dtype) -> Tensor:
    sq = doc_start.shape[1]
    key = torch.arange(sk, dtype=torch.int32, device=doc_start.device)
    # key[sk - sq :] is also the position of each query.
    hidden = (key < doc_start[:, :, None]) | (key > key[sk - sq :, None])
    # Not bool, because SDPA would convert bools to such floats at every call.
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)[:, None]


def _doc_end(doc_start: Tensor, sk: int) -> Tensor:
    """Returns int32 [B, Sk]: for each key, the first query that no longer sees it because of its document."""
    keys = torch.arange(sk, dtype=torch.int32, device=doc_start.device).repeat(doc_start.shape[0], 1)
    # A search is right because doc_start never decreases; right=True gives the first query with doc_start > key.
    return torch.searchsorted(doc_start.contiguous(), keys, right=True, out_int32=True)


def _unsupported(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    d = q.shape[-1]
    if d % 16 or d > MAX_HEAD_DIM:
        return f"the head dimension {d} is not a multiple of 16 up to {MAX_HEAD_DIM}"
    # The forward kernel scales the maximum of a row, which is wrong for a negative scale.
    if scale <= 0:
        return f"the scale {scale} is not positive"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v are of several dtypes: {q.dtype}, {k.dtype}, {v.dtype}"
    return None


@triton.jit
def _assigned(program, n_tiles, section):  # type: ignore[no-untyped-def]
    """Returns (head, tile) of a program, for a grid of tiles of all heads.

    Heads run in sections, one section after another, so that the data of running programs stays in the L2 cache. The
    order in a section is tile by tile, so that its longest programs can start first.
    """
    n_heads = tl.num_programs(0) // n_tiles
    first = program // (section * n_tiles) * section
    size = tl.minimum(section, n_heads - first)
    rest = program - first * n_tiles
    return first + rest % size, rest // size


@triton.jit
def _rows(x, row, stride, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns pointers to these rows of a head [rows, BLOCK_D]."""
    # In 64 bits: a row times its stride may pass 2^31.
    return x + row.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load(at, row, n_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Loads rows [rows, BLOCK_D]; zeros beyond column D and, if CHECKED, beyond row n_rows."""
    if CHECKED:
        return tl.load(at, mask=(row < n_rows)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)
    if D < BLOCK_D:  # known at compile time, so heads of 64 or 128 have no mask here
        return tl.load(at, mask=(tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _store(at, values, row, n_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    within = (row < n_rows)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(at, values.to(at.dtype.element_ty), mask=within)


@triton.jit
def _key_blocks(  # type: ignore[no-untyped-def]
    first, sq, sk, doc_start, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Returns (begin, full, rest, end) for the tile of queries from `first` on.

    No query of the tile sees keys outside [begin, end); all of them see the keys in [full, rest). Blocks start at
    multiples of BLOCK_K. The two ranges outside [full, rest) need masks.
    """
    begin, full, rest, end = 0, 0, sk // BLOCK_K * BLOCK_K, sk
    if CAUSAL:
        last = tl.minimum(first + BLOCK_Q, sq) - 1
        end = sk - sq + last + 1
        rest = (sk - sq + first + 1) // BLOCK_K * BLOCK_K
        if doc_start is not None:
            # doc_start never decreases: the first query sees the oldest key of all, the last one has the newest start.
            oldest = tl.load(doc_start + first)
            # begin = end if the tile sees no key (left padding), so that no loop runs.
            begin = tl.where(oldest < end, oldest // BLOCK_K * BLOCK_K, end)
            full = tl.minimum(tl.cdiv(tl.load(doc_start + last), BLOCK_K) * BLOCK_K, end)
            rest = tl.maximum(full, rest)  # there may be no full block: the count must not be negative
    return begin, full, rest, end


@triton.jit
def _query_blocks(  # type: ignore[no-untyped-def]
    first, sq, sk, doc_end, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The same for the tile of keys from `first` on; queries outside [begin, end) see none of them."""
    begin, full, rest, end = 0, 0, sq // BLOCK_Q * BLOCK_Q, sq
    if CAUSAL:
        last = tl.minimum(first + BLOCK_K, sk) - 1
        # Causality hides no key of the tile from the first query that sees the last key, and from later ones.
        full = tl.cdiv(tl.maximum(last - (sk - sq), 0), BLOCK_Q) * BLOCK_Q
        if doc_end is not None:
            end = tl.load(doc_end + last)
            rest = tl.load(doc_end + first) // BLOCK_Q * BLOCK_Q
        begin = tl.maximum(first - (sk - sq), 0)
        begin = tl.where(begin < end, begin // BLOCK_Q * BLOCK_Q, end)
        full = tl.minimum(full, end)
        rest = tl.maximum(full, rest)
    return begin, full, rest, end


@triton.jit
def _seen(query, key, sq, sk, doc_start, CAUSAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns which of these keys each of the queries sees: [queries, keys]."""
    seen = (key < sk)[None, :]
    if CAUSAL:
        # No check of sk: positions of queries are below it, and results of queries beyond sq are not stored.
        seen = key[None, :] <= (sk - sq + query)[:, None]
        if doc_start is not None:
            seen &= key[None, :] >= tl.load(doc_start + query, mask=query < sq, other=0)[:, None]
    return seen


@triton.jit
def _attention_forward_kernel(  # type: ignore[no-untyped-def]
    out,
    lse,
    q,
    k,
    v,
    doc_start,
    scale_log2,
    sq,
    sk,
    heads,
    group,
    section,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes out and lse (infinite for a query that sees no key) of BLOCK_Q queries of one head."""
    n_tiles = tl.cdiv(sq, BLOCK_Q)
    batch_head, index = _assigned(tl.program_id(0), n_tiles, section)
    tile_begin = (n_tiles - 1 - index) * BLOCK_Q  # the last queries see the most keys
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    query = tile_begin + tl.arange(0, BLOCK_Q)
    if doc_start is not None:
        doc_start += batch * sq
    begin, full, rest, end = _key_blocks(tile_begin, sq, sk, doc_start, CAUSAL, BLOCK_Q, BLOCK_K)
    n_begin, n_full, n_rest = tl.cdiv(full - begin, BLOCK_K), (rest - full) // BLOCK_K, tl.cdiv(end - rest, BLOCK_K)

    q_tile = _load(_rows(q + batch * q_batch + head * q_head, query, q_row, BLOCK_D), query, sq, D, BLOCK_D, True)
    k_rows = _rows(k + batch * k_batch + head // group * k_head, tl.arange(0, BLOCK_K), k_row, BLOCK_D)
    v_rows = _rows(v + batch * v_batch + head // group * v_head, tl.arange(0, BLOCK_K), v_row, BLOCK_D)
    # fp32 for every dtype of the inputs: a sum over thousands of keys, rescaled at every block.
    sums = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)  # sum of 2^(s - top) v
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)  # sum of 2^(s - top)
    top = tl.full([BLOCK_Q], -1e38, dtype=tl.float32)  # finite, because -inf gives NaN if a query sees no key
    # Unrolled at compile time: the loop over blocks that every query sees has no mask and no bounds check.
    for MASKED in tl.static_range(2):
        for i in range((n_begin + n_rest) if MASKED else n_full):
            first = full + i * BLOCK_K
            if MASKED:
                # Both masked ranges share a loop, so that one masked copy of the body is compiled, not two.
                first = tl.where(i < n_begin, begin, rest - n_begin * BLOCK_K) + i * BLOCK_K
            key = first + tl.arange(0, BLOCK_K)
            k_tile = _load(k_rows + first * tl.cast(k_row, tl.int64), key, sk, D, BLOCK_D, MASKED)
            # ieee, because by default Triton rounds fp32 inputs to TF32, with 10 bits of mantissa.
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            if MASKED:
                scores = tl.where(_seen(query, key, sq, sk, doc_start, CAUSAL), scores, -float("inf"))
            # The maximum is scaled once per row; below, scale and subtraction are one FMA per element.
            new_top = tl.maximum(top, tl.max(scores, axis=1) * scale_log2)
            p = tl.exp2(scores * scale_log2 - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, axis=1)
            v_tile = _load(v_rows + first * tl.cast(v_row, tl.int64), key, sk, D, BLOCK_D, MASKED)
            sums = tl.dot(p.to(v_tile.dtype), v_tile, sums * shrink[:, None], input_precision="ieee")
            top = new_top
    # For a query that sees no key, 1 avoids 0 / 0, and an infinite lse makes p = 2^(s - lse) zero in backward.
    none = total == 0.0
    total = tl.where(none, 1.0, total)
    out_rows = _rows(out + (batch * sq * heads + head) * D, query, heads * D, BLOCK_D)
    _store(out_rows, sums / total[:, None], query, sq, D, BLOCK_D)
    lse += (batch * heads + head) * sq
    tl.store(lse + query, tl.where(none, float("inf"), top + tl.log2(total)), mask=query < sq)


@triton.jit
def _attention_dq_kernel(  # type: ignore[no-untyped-def]
    dq,
    delta,
    dout,
    q,
    k,
    v,
    out,
    lse,
    doc_start,
    scale,
    scale_log2,
    sq,
    sk,
    heads,
    group,
    section,
    dout_batch,
    dout_row,
    dout_head,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes dq, and delta for the other kernel, of BLOCK_Q queries of one head."""
    n_tiles = tl.cdiv(sq, BLOCK_Q)
    batch_head, index = _assigned(tl.program_id(0), n_tiles, section)
    tile_begin = (n_tiles - 1 - index) * BLOCK_Q
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    query = tile_begin + tl.arange(0, BLOCK_Q)
    if doc_start is not None:
        doc_start += batch * sq
    begin, full, rest, end = _key_blocks(tile_begin, sq, sk, doc_start, CAUSAL, BLOCK_Q, BLOCK_K)
    n_begin, n_full, n_rest = tl.cdiv(full - begin, BLOCK_K), (rest - full) // BLOCK_K, tl.cdiv(end - rest, BLOCK_K)

    dout += batch * dout_batch + head * dout_head
    dout_tile = _load(_rows(dout, query, dout_row, BLOCK_D), query, sq, D, BLOCK_D, True)
    packed = (batch * sq * heads + head) * D
    out_tile = _load(_rows(out + packed, query, heads * D, BLOCK_D), query, sq, D, BLOCK_D, True)
    # In fp32, because ds is the difference of dp and delta, which are nearly equal where p is near 1.
    delta_tile = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
    head_rows = (batch * heads + head) * sq + query
    tl.store(delta + head_rows, delta_tile, mask=query < sq)
    # inf: p is 0 for queries beyond the end.
    lse_tile = tl.load(lse + head_rows, mask=query < sq, other=float("inf"))
    q_tile = _load(_rows(q + batch * q_batch + head * q_head, query, q_row, BLOCK_D), query, sq, D, BLOCK_D, True)
    k_rows = _rows(k + batch * k_batch + head // group * k_head, tl.arange(0, BLOCK_K), k_row, BLOCK_D)
    v_rows = _rows(v + batch * v_batch + head // group * v_head, tl.arange(0, BLOCK_K), v_row, BLOCK_D)
    sums = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    for MASKED in tl.static_range(2):
        for i in range((n_begin + n_rest) if MASKED else n_full):
            first = full + i * BLOCK_K
            if MASKED:
                first = tl.where(i < n_begin, begin, rest - n_begin * BLOCK_K) + i * BLOCK_K
            key = first + tl.arange(0, BLOCK_K)
            k_tile = _load(k_rows + first * tl.cast(k_row, tl.int64), key, sk, D, BLOCK_D, MASKED)
            v_tile = _load(v_rows + first * tl.cast(v_row, tl.int64), key, sk, D, BLOCK_D, MASKED)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            p = tl.exp2(scores * scale_log2 - lse_tile[:, None])
            if MASKED:
                # After the exponential, because a hidden score may be above lse and overflow; it is dropped here.
                p = tl.where(_seen(query, key, sq, sk, doc_start, CAUSAL), p, 0.0)
            dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
            ds = p * (dp - delta_tile[:, None])
            sums = tl.dot(ds.to(k_tile.dtype), k_tile, sums, input_precision="ieee")
    # scale is a factor of ds; applied to the sums, it is outside the loop.
    _store(_rows(dq + packed, query, heads * D, BLOCK_D), sums * scale, query, sq, D, BLOCK_D)


@triton.jit
def _attention_dkdv_kernel(  # type: ignore[no-untyped-def]
    dk,
    dv,
    dout,
    q,
    k,
    v,
    lse,
    delta,
    doc_end,
    scale,
    scale_log2,
    sq,
    sk,
    kv_heads,
    group,
    section,
    dout_batch,
    dout_row,
    dout_head,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes dk and dv of BLOCK_K keys of one KV head, over the queries of all heads of its group.

    Scores are transposed, [keys, queries], so that p and ds are the left factors of their products.
    """
    batch_head, index = _assigned(tl.program_id(0), tl.cdiv(sk, BLOCK_K), section)
    tile_begin = index * BLOCK_K  # the first keys are seen by the most queries
    batch, kv_head = (batch_head // kv_heads).to(tl.int64), (batch_head % kv_heads).to(tl.int64)
    key = tile_begin + tl.arange(0, BLOCK_K)
    if doc_end is not None:
        doc_end += batch * sk
    begin, full, rest, end = _query_blocks(tile_begin, sq, sk, doc_end, CAUSAL, BLOCK_Q, BLOCK_K)
    n_begin, n_full, n_rest = tl.cdiv(full - begin, BLOCK_Q), (rest - full) // BLOCK_Q, tl.cdiv(end - rest, BLOCK_Q)

    k_rows = _rows(k + batch * k_batch + kv_head * k_head, key, k_row, BLOCK_D)
    v_rows = _rows(v + batch * v_batch + kv_head * v_head, key, v_row, BLOCK_D)
    k_tile = _load(k_rows, key, sk, D, BLOCK_D, True)
    v_tile = _load(v_rows, key, sk, D, BLOCK_D, True)
    q += batch * q_batch + kv_head * group * q_head
    dout += batch * dout_batch + kv_head * group * dout_head
    # Offsets in 32 bits take half the registers of pointers, and here registers are short. The step to a block has 64.
    q_rows = tl.arange(0, BLOCK_Q)[:, None] * q_row + tl.arange(0, BLOCK_D)[None, :]
    dout_rows = tl.arange(0, BLOCK_Q)[:, None] * dout_row + tl.arange(0, BLOCK_D)[None, :]
    lse += (batch * kv_heads + kv_head) * group * sq
    delta += (batch * kv_heads + kv_head) * group * sq
    NARROW: tl.constexpr = q.dtype.element_ty.primitive_bitwidth == 16
    dk_sums = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    dv_sums = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    for MASKED in tl.static_range(2):
        n_blocks = (n_begin + n_rest) if MASKED else n_full
        head, i = -1, n_blocks - 1  # counted, because a division would be one of fifteen instructions
        # In 16 bits masked blocks are not pipelined: they are few, and the buffers' addresses would spill. In fp32 the
        # products' factors would.
        for _ in tl.range(0, group * n_blocks, num_stages=1 if MASKED and NARROW else None):
            i = tl.where(i == n_blocks - 1, 0, i + 1)
            head += tl.where(i == 0, 1, 0)
            first = full + i * BLOCK_Q
            if MASKED:
                first = tl.where(i < n_begin, begin, rest - n_begin * BLOCK_Q) + i * BLOCK_Q
            # Where a block has queries, its first is never the end of a document. The compiler cannot know that, and
            # would load lse and delta in single words.
            first = tl.multiple_of(first, BLOCK_Q)
            query = first + tl.arange(0, BLOCK_Q)
            q_step = head * tl.cast(q_head, tl.int64) + first * tl.cast(q_row, tl.int64)
            q_tile = _load(q + q_step + q_rows, query, sq, D, BLOCK_D, MASKED)
            dout_step = head * tl.cast(dout_head, tl.int64) + first * tl.cast(dout_row, tl.int64)
            dout_tile = _load(dout + dout_step + dout_rows, query, sq, D, BLOCK_D, MASKED)
            row_step = head * tl.cast(sq, tl.int64) + first
            if MASKED:
                lse_tile = tl.load(lse + row_step + tl.arange(0, BLOCK_Q), mask=query < sq, other=float("inf"))
                delta_tile = tl.load(delta + row_step + tl.arange(0, BLOCK_Q), mask=query < sq, other=0.0)
            else:
                lse_tile = tl.load(lse + row_step + tl.arange(0, BLOCK_Q))
                delta_tile = tl.load(delta + row_step + tl.arange(0, BLOCK_Q))
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            p = tl.exp2(scores * scale_log2 - lse_tile[None, :])
            # Without CAUSAL only the ends are masked: there p is 0 by an infinite lse, or the keys are not stored.
            if MASKED and CAUSAL:
                seen = key[:, None] <= (sk - sq + query)[None, :]
                if doc_end is not None:
                    seen &= query[None, :] < tl.load(doc_end + key, mask=key < sk, other=0)[:, None]
                p = tl.where(seen, p, 0.0)
            dv_sums = tl.dot(p.to(dout_tile.dtype), dout_tile, dv_sums, input_precision="ieee")
            dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
            ds = p * (dp - delta_tile[None, :])
            dk_sums = tl.dot(ds.to(q_tile.dtype), q_tile, dk_sums, input_precision="ieee")
    packed = (batch * sk * kv_heads + kv_head) * D
    _store(_rows(dk + packed, key, kv_heads * D, BLOCK_D), dk_sums * scale, key, sk, D, BLOCK_D)
    _store(_rows(dv + packed, key, kv_heads * D, BLOCK_D), dv_sums, key, sk, D, BLOCK_D)


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    b, sq, hq, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, hq, sq), dtype=torch.float32)


@registered(_fake_forward)
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns (out, lse): lse fp32 [B, Hq, Sq], the base-2 logarithm of each query's sum of 2^(score log2(e))."""
    out, lse = _fake_forward(q, k, v, doc_start, causal, scale)
    (b, sq, hq, d), (sk, hkv) = q.shape, k.shape[1:3]
    # The kernels accept any stride except the last one, so slices of a fused projection are read in place.
    q, k, v = (_with_rows(x) for x in (q, k, v))
    if cpu.covers(q, k, v):
        cpu.attention_forward(out, lse, q, k, v, None if doc_start is None else doc_start.contiguous(), causal, scale)
        return out, lse
    chosen = tile("attention.decode" if sq <= DECODING_QUERIES else "attention.forward", q, d, sk)
    launch(
        _attention_forward_kernel,
        (b * hq * cdiv(sq, chosen["BLOCK_Q"]),),
        *(out, lse, q, k, v, None if doc_start is None else doc_start.contiguous(), scale * math.log2(math.e)),
        # _section counts KV heads, and this grid has a program for each query head.
        *(sq, sk, hq, hq // hkv, _section(k) * (hq // hkv)),
        *(q.stride()[:3] + k.stride()[:3] + v.stride()[:3]),
        CAUSAL=causal,
        D=d,
        BLOCK_D=next_power_of_2(d),
        **chosen,
    )
    return out, lse


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    doc_start: Tensor | None,
    doc_end: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@registered(_fake_backward)
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    doc_start: Tensor | None,
    doc_end: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dq, dk, dv) from inputs and outputs of attention_forward. doc_end: from _doc_end; None: made here."""
    dq, dk, dv = _fake_backward(dout, q, k, v, out, lse, doc_start, doc_end, causal, scale)
    (b, sq, hq, d), (sk, hkv) = q.shape, k.shape[1:3]
    dout, q, k, v = (_with_rows(x) for x in (dout, q, k, v))
    doc_start = None if doc_start is None else doc_start.contiguous()
    if cpu.covers(q, k, v, dout):
        cpu.attention_backward(dq, dk, dv, dout, q, k, v, out, lse, doc_start, causal, scale)
        return dq, dk, dv
    strides = dout.stride()[:3] + q.stride()[:3] + k.stride()[:3] + v.stride()[:3]
    scales = scale, scale * math.log2(math.e)
    common = {"CAUSAL": causal, "D": d, "BLOCK_D": next_power_of_2(d)}
    group, section = hq // hkv, _section(k)
    if doc_start is not None:
        # The caller made no mask, or made it for another backend.
        doc_end = _doc_end(doc_start, sk) if doc_end is None else doc_end.contiguous()
    delta = torch.empty_like(lse)
    # First, because it writes delta, which the next kernel reads.
    chosen = tile("attention.dq", q, d, sk)
    launch(
        _attention_dq_kernel,
        (b * hq * cdiv(sq, chosen["BLOCK_Q"]),),
        *(dq, delta, dout, q, k, v, out, lse, doc_start, *scales, sq, sk, hq, group, section * group, *strides),
        **common,
        **chosen,
    )
    chosen = tile("attention.dkdv", q, d, sk)
    launch(
        _attention_dkdv_kernel,
        # One program per KV head adds up its query heads, so that dk and dv need no atomics.
        (b * hkv * cdiv(sk, chosen["BLOCK_K"]),),
        *(dk, dv, dout, q, k, v, lse, delta, doc_end, *scales, sq, sk, hkv, group, section, *strides),
        **common,
        **chosen,
    )
    return dq, dk, dv


def _with_rows(x: Tensor) -> Tensor:
    """Returns x [B, S, H, D], copied only if the columns of a head are not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _section(k: Tensor) -> int:
    """Returns for how many KV heads keys and values fit into CACHED_BYTES."""
    return max(1, CACHED_BYTES // (2 * k.shape[1] * k.shape[3] * k.element_size()))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        doc_start: Tensor | None,
        doc_end: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Tensor:
        out, lse = attention_forward(q, k, v, doc_start, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse, doc_start, doc_end)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, doc_start, doc_end = ctx.saved_tensors
        gradients = attention_backward(dout, q, k, v, out, lse, doc_start, doc_end, ctx.causal, ctx.scale)
        return *gradients, None, None, None, None


def _sdpa_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype for SDPA. In low precision, SDPA on a CPU rounds the sums of dK and dV per block and head."""
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
    # SDPA takes [B, H, S, D]; a transposed view costs no copy.
    q, k, v = (x.to(_sdpa_dtype(dtype, x.device)).transpose(1, 2) for x in (q, k, v))
    if mask is None and doc_start is not None:
        mask = _additive_mask(doc_start, sk, q.dtype)
    elif mask is None and causal and 1 < sq < sk:  # SDPA's is_causal is aligned top left: right only if Sq == Sk
        mask = torch.full((1, 1, sq, sk), -torch.inf, dtype=q.dtype, device=q.device).triu_(sk - sq + 1)
    if mask is None:
        # A single query sees every key; with is_causal, aligned top left, it would see only the first.
        is_causal = causal and sq > 1
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=hq != hkv)
    elif q.is_cuda:
        # Two fused kernels accept a mask. cuDNN's, which torch would take, makes a plan for each number of keys (each
        # 256 tokens of a decoding), and its gradients under a mask were reported wrong (pytorch issues 191612, 196678).
        # The memory-efficient one does not support grouped heads.
        k, v = (x.repeat_interleave(hq // hkv, dim=1) if hq > hkv else x for x in (k, v))
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=hq != hkv)
    return out.transpose(1, 2).to(dtype)
