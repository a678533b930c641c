"""Choice of the next token from logits: the likeliest one, or one that is drawn by a random number.

The options are tensors, so one CUDA graph serves all of them, and no step waits for the device. With
d = (max - logit) / temperature, a token has the mass floor(2^42 e^-d) if it is one of the top_k least d or equal to the
last of them, else 0. In the order of d, and of the id if these are equal, a draw keeps

    left = min(the first sum of masses >= top_p total, the sum of masses with e^-d >= min_p)

and takes the first token whose sum of masses reaches floor(uniform * left) + 1. Masses are integers, so sums are exact
in any order, and the choice is that of csrc/decoder/sampler.cpp, apart from the last bits of e^-d.

A kernel writes the bits of d as sort keys: the order of floats >= 0 is that of their bits, and torch sorts integers of
32 bits in half the passes of longer keys that would hold the row too. A second kernel reads d back from the sorted
keys, so nothing is gathered. The likeliest token needs the first kernel alone. A program has a row; it reads it in
blocks, more than once, mostly from the L2 cache.
"""

import torch
from torch import Tensor

from kernels import reference
from kernels.cross_entropy import with_adjacent_columns
from kernels.dispatch import resolve
from kernels.launch import launch, tile, tl, triton

# Constexprs, because a kernel may not read other globals.
UNIT = tl.constexpr(reference.MASS_UNIT)
INFINITE = tl.constexpr(0x7F800000)  # the bits of an infinite distance
SIGNLESS = tl.constexpr(0x7FFFFFFF)


def likeliest_tokens(logits: Tensor, out: tuple[Tensor, Tensor], *, backend: str | None = None) -> None:
    """Chooses the likeliest token of each row, and of equal ones that with the smallest id.

    Args:
        logits: [B, V].
        out: (tokens, int64 [B]; logprobs, fp32 [B], in nats), written in place. A logprob is NaN if a logit of the row
            is NaN or infinite, or if all are -infinite; the token is then any of the row.
        backend: as for every op (kernels/dispatch.py); None: the default. The C++ is torch here.
    """
    if _backend(logits, backend) != "triton":
        _write(out, reference.likeliest_tokens(logits))
        return
    logits = with_adjacent_columns(logits)
    (batch, columns), row_stride = logits.shape, logits.stride(0)
    launch(
        _sampling_keys_kernel,
        (batch,),
        *(logits, None, None, None, *out, None, row_stride, columns),
        **tile("sampling.keys", logits, columns, batch),
    )


def drawn_tokens(
    logits: Tensor,
    uniforms: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    out: tuple[Tensor, Tensor],
    *,
    backend: str | None = None,
) -> None:
    """Draws a token of each row among those that the options leave.

    Args:
        logits: [B, V], V at most 2^20.
        uniforms: fp64 [B], 0 <= u < 1.
        temperature, min_p: fp32 [1], temperature > 0.
        top_k: int64 [1], 1 to V; top_p: fp64 [1], above 0.
        out, backend: as for likeliest_tokens. The logprobs are those before any option.
    """
    options = (temperature, top_k, top_p, min_p)
    if _backend(logits, backend) != "triton":
        _write(out, reference.drawn_tokens(logits, uniforms, *options))
        return
    logits = with_adjacent_columns(logits)
    (batch, columns), row_stride = logits.shape, logits.stride(0)
    keys = logits.new_empty(batch, columns, dtype=torch.int32)
    tops, log_totals = (logits.new_empty(batch, dtype=torch.float32) for _ in range(2))
    launch(
        _sampling_keys_kernel,
        (batch,),
        *(logits, keys, tops, log_totals, None, None, temperature, row_stride, columns),
        **tile("sampling.keys", logits, columns, batch),
    )
    keys, order = torch.sort(keys, dim=-1, stable=True)  # stable: of equal tokens the smallest id comes first
    launch(
        _sampling_choose_kernel,
        (batch,),
        *(logits, keys, order, tops, log_totals, *out, uniforms, *options[1:], row_stride, columns),
        **tile("sampling.choose", logits, columns, batch),
    )


def _backend(logits: Tensor, backend: str | None) -> str:
    return resolve("sampling", logits.device, logits.dtype, backend, slow_in_cpp=True)


def _write(out: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> None:
    for given, values in zip(out, found, strict=True):
        given.copy_(values)


@triton.jit
def _sampling_keys_kernel(  # type: ignore[no-untyped-def]
    logits,
    keys,
    tops,
    log_totals,
    tokens,
    logprobs,
    temperature,
    row_stride,
    columns,
    BLOCK_V: tl.constexpr,
):
    """Writes the keys of a row, its largest logit, and log sum exp(logit - largest); keys=None: its likeliest token."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    # Maxima, sums and tokens of each place in a block, so the loops have no reduction across threads.
    peak = tl.full([BLOCK_V], float("-inf"), tl.float32)
    for first in range(0, columns, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        values = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        peak = tl.maximum(peak, values)
    top = tl.max(peak, axis=0)
    total = tl.zeros([BLOCK_V], tl.float32)
    token = tl.zeros([BLOCK_V], tl.int32) + (columns - 1)
    for first in range(0, columns, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        values = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        # NaN if the logit is NaN or infinite, or if all are -infinite.
        total += tl.exp(values - top)
        if keys is None:
            token = tl.minimum(token, tl.where(values == top, column, columns - 1))
        else:
            # The difference first: a tiny temperature must not overflow. Without the sign, which -0.0 has, or NaN.
            distance = tl.div_rn(top - values, tl.load(temperature))
            bits = distance.to(tl.int32, bitcast=True) & SIGNLESS
            tl.store(keys + row * columns + column, bits, mask=column < columns)
    log_total = tl.log(tl.sum(total, axis=0))
    if keys is None:
        tl.store(tokens + row, tl.min(token, axis=0).to(tl.int64))
        tl.store(logprobs + row, 0.0 - log_total)  # not -0.0
    else:
        tl.store(tops + row, top)
        tl.store(log_totals + row, log_total)


@triton.jit
def _load_masses(keys, column, columns, border):  # type: ignore[no-untyped-def]
    """Returns e^-d and the masses of these places in the order."""
    distance = tl.load(keys + column, mask=column < columns, other=INFINITE).to(tl.float32, bitcast=True)
    weight = tl.exp2(distance * -1.4426950408889634)  # as in the C++; exp would round the product elsewhere
    return weight, tl.where(distance <= border, weight * UNIT, 0.0).to(tl.int64)


@triton.jit
def _reach(keys, columns, border, target, BLOCK_V: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the first place at which the sum of masses reaches the target, at most the total, and this sum."""
    place = tl.full([], 0, tl.int32)
    reached = tl.full([], 0, tl.int64)
    for first in range(0, columns, BLOCK_V):
        if reached < target:  # else the place is known: mostly after one block, because the likeliest come first
            _, masses = _load_masses(keys, first + tl.arange(0, BLOCK_V), columns, border)
            sums = reached + tl.cumsum(masses, axis=0)
            place += tl.sum(tl.where(sums < target, 1, 0), axis=0)
            reached += tl.sum(tl.where(sums - masses < target, masses, 0), axis=0)
    return place, reached


@triton.jit
def _sampling_choose_kernel(  # type: ignore[no-untyped-def]
    logits,
    keys,
    order,
    tops,
    log_totals,
    tokens,
    logprobs,
    uniforms,
    top_k,
    top_p,
    min_p,
    row_stride,
    columns,
    BLOCK_V: tl.constexpr,
):
    """Chooses a token of a row from its sorted keys."""
    row = tl.program_id(0).to(tl.int64)
    keys += row * columns
    border = tl.load(keys + tl.load(top_k) - 1).to(tl.float32, bitcast=True)
    least = tl.load(min_p)
    totals, likely_totals = tl.zeros([BLOCK_V], tl.int64), tl.zeros([BLOCK_V], tl.int64)
    for first in range(0, columns, BLOCK_V):
        weight, masses = _load_masses(keys, first + tl.arange(0, BLOCK_V), columns, border)
        totals += masses
        likely_totals += tl.where(weight >= least, masses, 0)
    left = tl.sum(totals, axis=0)
    wanted = tl.ceil(tl.load(top_p) * left.to(tl.float64)).to(tl.int64)
    if wanted < left:
        _, left = _reach(keys, columns, border, wanted, BLOCK_V)
    left = tl.minimum(left, tl.sum(likely_totals, axis=0))
    # The product may have been rounded up to `left`. It is 0 only in a row that is not finite.
    target = tl.minimum((tl.load(uniforms + row) * left.to(tl.float64)).to(tl.int64) + 1, left)
    place, _ = _reach(keys, columns, border, target, BLOCK_V)
    # Never beyond the row, whatever the keys are: the token is an address below.
    token = tl.load(order + row * columns + tl.minimum(place, columns - 1))
    tl.store(tokens + row, token)
    logit = tl.load(logits + row * row_stride + token).to(tl.float32)
    tl.store(logprobs + row, (logit - tl.load(tops + row)) - tl.load(log_totals + row))
