"""Attention of one new token per sequence over a key-value cache, with all that a decoding step does around it.

For the token at slot P of a sequence that begins at slot F, with q, k, v of one projection:

    q, k = rope(rms_norm(q)), rope(rms_norm(k));   cache[P] = k, v;   out = softmax(scale * q . k[F .. P]) v[F .. P]

The norms are optional. One launch does this instead of seven, and reads each key and value once, in place, for all
query heads of its group. P and F are read on the device, and shapes depend on neither, so a CUDA graph can replay it.

A program has one head of keys of one sequence, and a split of the slots, so that a long text occupies the device at a
batch of 1. The split with slot P stores the new key and value, and uses them from registers. A second kernel adds the
splits if there are several. q and k are rounded once, after the rotation, as by kernels.norm_rope.
"""

import torch
from torch import Tensor

from kernels.dispatch import resolve
from kernels.launch import cdiv, launch, next_power_of_2, tile, tl, triton

MAX_HEAD_DIM = 256
MAX_GROUP = 64  # query heads that share keys; they are the rows of one tile


def runs_in_place(x: Tensor, keys: Tensor, n_heads: int) -> bool:
    """Whether `cached_attention` computes a step of activations x, with n_heads query heads, on this cache.

    keys: [..., Hkv, slots, D]. Otherwise torch does, by several ops (llm.model.transformer.Attention).
    """
    group, d, unsupported = n_heads // keys.shape[-3], keys.shape[-1], None
    if d % 16 or d > MAX_HEAD_DIM:
        unsupported = f"the head dimension {d} is not a multiple of 16 up to {MAX_HEAD_DIM}"
    elif group > MAX_GROUP:
        unsupported = f"{group} query heads share a key"
    elif x.dtype != keys.dtype:
        unsupported = f"the cache is {keys.dtype} and the activations are {x.dtype}"
    return resolve("attention", x.device, x.dtype, triton=unsupported, slow_in_cpp=True) == "triton"


def cached_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    first: Tensor,
    visible: int,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Adds a token to each sequence of the cache. Returns its attention [B, Hq, D].

    Args:
        qkv: [B, Hq + 2 Hkv, D], contiguous: the heads of q, then of k, then of v.
        keys, values: [B, Hkv, slots, D], contiguous, in qkv's dtype; written at slot `position`.
        cos, sin: fp32 [slots, D / 2], RoPE's angles at every slot.
        position: int64 [1]; first: int64 [B], at most `position`.
        visible: at least position + 1; it decides the number of programs.
        norms: weights [D] of the RMSNorm of each head of q and of k.
    """
    (batch, heads, d), (kv_heads, slots) = qkv.shape, keys.shape[1:3]
    group = heads // kv_heads - 2
    chosen = tile("cached_attention.step", qkv, d, slots)
    splits = cdiv(visible, chosen["SPLIT_KEYS"])
    out = qkv.new_empty(batch, kv_heads * group, d)
    # Of each split: the sum of weighted values, the largest score, and the sum of weights.
    sums, tops, totals = (
        qkv.new_empty(batch, kv_heads, splits, group, *width, dtype=torch.float32) if splits > 1 else None
        for width in ((d,), (), ())
    )
    q_norm, k_norm = norms or (None, None)
    launch(
        _cached_attention_step_kernel,
        (batch * kv_heads, splits),
        *(out, sums, tops, totals, qkv, q_norm, k_norm, keys, values, cos, sin, position, first, eps),
        *(d**-0.5 * 1.4426950408889634, kv_heads, slots),
        GROUP=group,
        BLOCK_GROUP=max(16, next_power_of_2(group)),  # a matrix instruction has 16 rows
        D=d,
        BLOCK_D=next_power_of_2(d),
        BLOCK_HALF=max(16, next_power_of_2(d // 2)),
        **chosen,
    )
    if splits > 1:
        launch(
            _cached_attention_sum_kernel,
            (batch * kv_heads * group,),
            *(out, sums, tops, totals, splits),
            GROUP=group,
            D=d,
            BLOCK_D=next_power_of_2(d),
            **tile("cached_attention.sum", qkv, d, slots),
        )
    return out


@triton.jit
def _rotated(at, weight, within, of_pair, pair, c, s, eps, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns both halves of heads [heads, BLOCK_HALF], normalised and rotated, in their dtype."""
    dtype: tl.constexpr = at.dtype.element_ty
    x1 = tl.load(at, mask=within, other=0.0).to(tl.float32)
    x2 = tl.load(at + D // 2, mask=within, other=0.0).to(tl.float32)
    if weight is not None:
        inverse = 1.0 / tl.sqrt_rn((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / D + eps)
        w1 = tl.load(weight + pair, mask=of_pair, other=0.0).to(tl.float32)
        w2 = tl.load(weight + D // 2 + pair, mask=of_pair, other=0.0).to(tl.float32)
        # Not rounded before the rotation, as in norm_rope, which computes the prompt.
        x1 = x1 * inverse[:, None] * w1[None, :]
        x2 = x2 * inverse[:, None] * w2[None, :]
    return (x1 * c - x2 * s).to(dtype), (x2 * c + x1 * s).to(dtype)


@triton.jit
def _cached_attention_step_kernel(  # type: ignore[no-untyped-def]
    out,
    sums_out,
    tops_out,
    totals_out,
    qkv,
    q_norm,
    k_norm,
    keys,
    values,
    cos,
    sin,
    position,
    first,
    eps,
    scale_log2,
    kv_heads,
    slots,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes a group's attention over SPLIT_KEYS slots; stores it, or its parts if there are several splits."""
    batch, head = (tl.program_id(0) // kv_heads).to(tl.int64), (tl.program_id(0) % kv_heads).to(tl.int64)
    split = tl.program_id(1)
    new, oldest = tl.load(position).to(tl.int32), tl.load(first + batch).to(tl.int32)
    row, pair, column = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_D)
    of_pair, of_column = pair < D // 2, column < D
    c = tl.load(cos + new * (D // 2) + pair, mask=of_pair, other=0.0)[None, :]
    s = tl.load(sin + new * (D // 2) + pair, mask=of_pair, other=0.0)[None, :]
    token = qkv + batch * kv_heads * (GROUP + 2) * D
    of_group = (row < GROUP)[:, None]
    q_at = token + (head * GROUP + row)[:, None] * D + pair[None, :]
    q1, q2 = _rotated(q_at, q_norm, of_group & of_pair[None, :], of_pair, pair, c, s, eps, D)
    k_at = token + (kv_heads * GROUP + head) * D + pair[None, :]
    k1, k2 = _rotated(k_at, k_norm, of_pair[None, :], of_pair, pair, c, s, eps, D)
    v = tl.load(token + (kv_heads * (GROUP + 1) + head) * D + column, mask=of_column, other=0.0)[None, :]
    keys += (batch * kv_heads + head) * slots * D
    values += (batch * kv_heads + head) * slots * D
    mine = new // SPLIT_KEYS == split
    new_row = new.to(tl.int64) * D
    # Comparisons: a vector & a scalar is int64 in the interpreter, which Triton 3.9 refuses as a mask.
    kept = tl.where(mine, D // 2, 0)
    tl.store(keys + new_row + pair[None, :], k1, mask=(pair < kept)[None, :])
    tl.store(keys + new_row + D // 2 + pair[None, :], k2, mask=(pair < kept)[None, :])
    tl.store(values + new_row + column[None, :], v, mask=(column < 2 * kept)[None, :])

    # The new token from registers, the others from the cache.
    score = tl.sum(q1.to(tl.float32) * k1.to(tl.float32) + q2.to(tl.float32) * k2.to(tl.float32), axis=1)
    top = tl.where(mine, score * scale_log2, -1e38)  # finite, because -inf gives NaN in a split without keys
    total = tl.where(mine, tl.full([BLOCK_GROUP], 1.0, dtype=tl.float32), 0.0)
    sums = total[:, None] * v.to(tl.float32)
    begin = tl.maximum(split * SPLIT_KEYS, oldest // BLOCK_K * BLOCK_K)
    end = tl.minimum((split + 1) * SPLIT_KEYS, new)
    for block in range(begin, end, BLOCK_K):
        key = block + tl.arange(0, BLOCK_K)
        seen = (key >= oldest) & (key < end)
        key_row = key.to(tl.int64)[:, None] * D
        held = seen[:, None] & of_pair[None, :]
        k1_tile = tl.load(keys + key_row + pair[None, :], mask=held, other=0.0)
        k2_tile = tl.load(keys + key_row + D // 2 + pair[None, :], mask=held, other=0.0)
        # ieee, because by default Triton rounds fp32 inputs to TF32, with 10 bits of mantissa.
        scores = tl.dot(q1, tl.trans(k1_tile), input_precision="ieee")
        scores = tl.dot(q2, tl.trans(k2_tile), scores, input_precision="ieee") * scale_log2
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, axis=1)
        v_tile = tl.load(values + key_row + column[None, :], mask=seen[:, None] & of_column[None, :], other=0.0)
        sums = tl.dot(p.to(v_tile.dtype), v_tile, sums * shrink[:, None], input_precision="ieee")
        top = new_top

    query = (batch * kv_heads + head) * GROUP + row
    stored = of_group & of_column[None, :]
    if sums_out is None:
        at = out + query[:, None] * D + column[None, :]
        tl.store(at, (sums / total[:, None]).to(out.dtype.element_ty), mask=stored)
    else:
        part = ((batch * kv_heads + head) * tl.num_programs(1) + split) * GROUP + row
        tl.store(sums_out + part[:, None] * D + column[None, :], sums, mask=stored)
        tl.store(tops_out + part, top, mask=row < GROUP)
        tl.store(totals_out + part, total, mask=row < GROUP)


@triton.jit
def _cached_attention_sum_kernel(  # type: ignore[no-untyped-def]
    out, sums_in, tops_in, totals_in, splits, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Adds the splits of one query head."""
    query = tl.program_id(0).to(tl.int64)
    part = query // GROUP * splits * GROUP + query % GROUP
    column = tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_D], dtype=tl.float32)
    total, top = 0.0, -1e38
    for _ in range(splits):
        part_top = tl.load(tops_in + part)
        new_top = tl.maximum(top, part_top)
        shrink, share = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
        total = total * shrink + tl.load(totals_in + part) * share
        sums = sums * shrink + tl.load(sums_in + part * D + column, mask=column < D, other=0.0) * share
        top = new_top
        part += GROUP
    tl.store(out + query * D + column, (sums / total).to(out.dtype.element_ty), mask=column < D)
