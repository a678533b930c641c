"""The cases of the kernel benchmark: each op at the sizes of the shipped models, with its least work.

kernels/work.py defines the least work of a call.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import kernels
from kernels import parity, reference, work
from kernels.work import Work

FORWARD, BOTH = "forward", "forward+backward"
MODES = (FORWARD, BOTH)

DOCUMENT_MEDIAN, DOCUMENT_SIGMA = 400, 1.04  # tokens; log-normal with mean 690, as in web text (FineWeb: 403 and 690)

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Operand:
    """A floating-point input, N(0, scale^2), that has a gradient."""

    shape: tuple[int, ...]
    by_row: bool = True  # whether its first dimension counts independent rows or sequences of tokens
    scale: float = 1.0


@dataclass(frozen=True)
class Case:
    """One op at one size."""

    op: str
    name: str
    dtype: torch.dtype
    device: torch.device
    operands: tuple[Operand, ...]
    forward: Work
    backward: Work
    part: int  # number of last rows that are checked
    by_row: Mapping[str, Tensor] = field(default_factory=dict)  # other arguments with one row per operand row
    shared: Mapping[str, Tensor] = field(default_factory=dict)  # other tensors
    options: Mapping[str, int] = field(default_factory=dict)  # other arguments

    def __str__(self) -> str:
        return f"{self.op} {self.name}"

    @property
    def extras(self) -> dict[str, Tensor]:
        return {**self.by_row, **self.shared}

    def work(self, mode: str) -> Work:
        return self.forward if mode == FORWARD else self.forward + self.backward

    def draw(self, seed: int) -> list[Tensor]:
        """Returns the operands, the same for the same seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return [
            torch.randn(x.shape, generator=generator, device=self.device, dtype=self.dtype) * x.scale
            for x in self.operands
        ]


@dataclass(frozen=True)
class Variant:
    """One way to compute an op."""

    function: Function  # takes only the operands
    whole: bool = False  # whether it returns outputs and gradients itself, without autograd


def attention(
    device: torch.device, dtype: torch.dtype, b: int, s: int, hq: int, hkv: int, d: int, *, documents: bool = False
) -> Case:
    q, kv = Operand((b, s, hq, d)), Operand((b, s, hkv, d))
    starts = document_starts(b, s)
    pairs = b * s * (s + 1) / 2 - (float(starts.sum(dtype=torch.int64)) if documents else 0.0)
    return Case(
        "attention",
        f"{b}x{s} {hq}/{hkv}x{d} {'documents' if documents else 'causal'}",
        *(dtype, device, (q, kv, kv)),
        *work.attention(dtype.itemsize, b * s, hq, hkv, d, pairs),
        part=1,
        by_row={"doc_start": starts.to(device)} if documents else {},
    )


def rms_norm(device: torch.device, dtype: torch.dtype, rows: int, d: int) -> Case:
    operands = (Operand((rows, d)), Operand((d,), by_row=False))
    both = work.rms_norm(dtype.itemsize, rows, d)
    return Case("rms_norm", f"{rows}x{d}", dtype, device, operands, *both, part=64)


def add_rms_norm(device: torch.device, dtype: torch.dtype, rows: int, d: int) -> Case:
    operands = (Operand((rows, d)), Operand((rows, d)), Operand((d,), by_row=False))
    both = work.add_rms_norm(dtype.itemsize, rows, d)
    return Case("add_rms_norm", f"{rows}x{d}", dtype, device, operands, *both, part=64)


def rope(device: torch.device, dtype: torch.dtype, b: int, s: int, hq: int, hkv: int, d: int) -> Case:
    cos, sin = kernels.rope_cos_sin(0, s, d, 10_000.0)
    return Case(
        "rope",
        f"{b}x{s} {hq}/{hkv}x{d}",
        *(dtype, device, (Operand((b, s, hq, d)), Operand((b, s, hkv, d)))),
        *work.rope(dtype.itemsize, b * s, hq + hkv, d),
        part=1,
        shared={"cos": cos.to(device), "sin": sin.to(device)},
    )


def norm_rope(device: torch.device, dtype: torch.dtype, b: int, s: int, hq: int, hkv: int, d: int) -> Case:
    cos, sin = kernels.rope_cos_sin(0, s, d, 10_000.0)
    weight = Operand((d,), by_row=False)
    return Case(
        "norm_rope",
        f"{b}x{s} {hq}/{hkv}x{d}",
        *(dtype, device, (Operand((b, s, (hq + 2 * hkv) * d)), weight, weight)),
        *work.norm_rope(dtype.itemsize, b * s, hq, hkv, d),
        part=1,
        shared={"cos": cos.to(device), "sin": sin.to(device)},
        options={"n_heads": hq},
    )


def swiglu(device: torch.device, dtype: torch.dtype, rows: int, f: int, *, packed: bool = True) -> Case:
    operands = (Operand((rows, 2 * f)),) if packed else (Operand((rows, f)), Operand((rows, f)))
    name = f"{rows}x{f} {'packed' if packed else 'apart'}"
    return Case("swiglu", name, dtype, device, operands, *work.swiglu(dtype.itemsize, rows, f), part=64)


def cross_entropy(device: torch.device, dtype: torch.dtype, rows: int, v: int) -> Case:
    return Case(
        "cross_entropy",
        f"{rows}x{v}",
        *(dtype, device, (Operand((rows, v)),)),
        *work.cross_entropy(dtype.itemsize, rows, v),
        part=64,
        by_row={"target": _targets(rows, v, device)},
    )


def linear_cross_entropy(device: torch.device, dtype: torch.dtype, rows: int, d: int, v: int) -> Case:
    return Case(
        "linear_cross_entropy",
        f"{rows}x{d}x{v}",
        *(dtype, device, (Operand((rows, d)), Operand((v, d), by_row=False, scale=d**-0.5))),
        *work.linear_cross_entropy(dtype.itemsize, rows, d, v),
        part=64,
        by_row={"target": _targets(rows, v, device)},
    )


def _targets(rows: int, v: int, device: torch.device) -> Tensor:
    return torch.randint(v, (rows,), generator=torch.Generator().manual_seed(0)).to(device)


def document_starts(b: int, s: int, seed: int = 0) -> Tensor:
    """Returns doc_start, int32 [B, S], of sequences cut from one stream of documents with log-normal lengths."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2 + b * s, generator=generator)  # more documents than tokens: enough for all lengths
    lengths = (math.log(DOCUMENT_MEDIAN) + DOCUMENT_SIGMA * normal).exp().long().clamp(min=2)  # BOS and EOS at least
    begins = torch.zeros(b * s, dtype=torch.bool)
    first = lengths.cumsum(0)
    begins[first[first < b * s]] = True
    index = torch.arange(s, dtype=torch.int32).expand(b, s)
    return torch.where(begins.view(b, s), index, 0).cummax(dim=1).values


def cases(device: torch.device) -> Iterator[Case]:
    """Yields all cases, those of benchmarks/day_one.py first, each made when it is needed; on a CPU, small cases.

    On a GPU most have 32,768 tokens. `125m` has width 768, 6 heads of 128 over 2 and FFN 2048; `1.3b` has width 2048,
    16 heads of 128 over 8 and FFN 5888; heads of 64 are usual in other projects at width 768.
    """
    packed_sequences, apart = partial(attention, documents=True), partial(swiglu, packed=False)
    listed: list[tuple[Callable[..., Case], tuple[int, ...]]]
    if device.type == "cuda":
        dtype = torch.bfloat16
        listed = [
            (attention, (16, 2048, 12, 4, 64)),
            (attention, (8, 4096, 16, 8, 128)),
            (rms_norm, (32768, 768)),
            (rms_norm, (32768, 2048)),
            (cross_entropy, (8192, 50304)),
            (cross_entropy, (8192, 32000)),
            (swiglu, (32768, 2048)),
            (rope, (16, 2048, 6, 2, 128)),
            (linear_cross_entropy, (65536, 768, 32000)),
            (norm_rope, (16, 2048, 6, 2, 128)),
            (packed_sequences, (16, 2048, 6, 2, 128)),
            (add_rms_norm, (32768, 768)),
            (attention, (16, 2048, 6, 2, 128)),
            (linear_cross_entropy, (65536, 768, 50304)),
            (packed_sequences, (8, 4096, 16, 8, 128)),
            (cross_entropy, (8192, 128256)),
            (packed_sequences, (16, 2048, 12, 4, 64)),
            (add_rms_norm, (32768, 2048)),
            (swiglu, (32768, 5888)),
            (apart, (32768, 2048)),
            (rope, (8, 4096, 16, 8, 128)),
            (linear_cross_entropy, (32768, 2048, 32000)),
        ]
    else:
        dtype = torch.float32
        listed = [
            (attention, (2, 256, 6, 2, 32)),
            (rms_norm, (512, 256)),
            (cross_entropy, (128, 1000)),
            (linear_cross_entropy, (256, 64, 1000)),
            (swiglu, (512, 256)),
            (rope, (2, 256, 6, 2, 32)),
            (norm_rope, (2, 256, 6, 2, 32)),
            (packed_sequences, (2, 256, 6, 2, 32)),
            (add_rms_norm, (512, 256)),
            (apart, (512, 256)),
        ]
    for make, sizes in listed:
        yield make(device, dtype, *sizes)


def results(variant: Variant, mode: str, operands: list[Tensor], behind: list[Tensor | None]) -> tuple[Tensor, ...]:
    """Returns the outputs of a call and, for forward+backward, the gradients of the operands.

    Args:
        behind: the gradient of each output; None for a loss, whose backward starts from 1.
    """
    if mode == FORWARD:
        with torch.no_grad():
            return as_tuple(variant.function(*operands))
    if variant.whole:
        return as_tuple(variant.function(*operands))
    leaves = [x.detach().requires_grad_() for x in operands]
    outputs = as_tuple(variant.function(*leaves))
    return *(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, behind)


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def draw_behind(case: Case, seed: int) -> list[Tensor | None]:
    """Returns N(0, 1) for each output; None for a loss."""
    operands = [torch.empty(x.shape, dtype=case.dtype, device="meta") for x in case.operands]
    extras = {name: x.to("meta") for name, x in case.extras.items()}
    outputs = as_tuple(getattr(reference, case.op)(*operands, **extras, **case.options))
    generator = torch.Generator(case.device).manual_seed(seed)
    return [
        torch.randn(y.shape, generator=generator, device=case.device, dtype=case.dtype) if y.dim() else None
        for y in outputs
    ]


def check(case: Case, build: Callable[[dict[str, Tensor]], Variant], mode: str) -> list[parity.Parity]:
    """Compares a variant's results for the last rows of a full-size call with the reference for only these rows.

    The other rows contribute nothing: they have no target, or a zero gradient. So gradients of weights, which are sums
    over all rows, can be compared too, and the checked rows include those beyond 32-bit offsets.

    Args:
        build: makes the variant for these other arguments of the op.
    """
    part = case.part
    whole, behind = case.draw(0), draw_behind(case, 1)
    cut = [x[-part:].clone() if operand.by_row else x.clone() for x, operand in zip(whole, case.operands, strict=True)]
    cut_extras = {**{name: x[-part:] for name, x in case.by_row.items()}, **case.shared}
    extras = case.extras
    if "target" in extras:
        extras["target"] = extras["target"].clone()
        extras["target"][:-part] = -100
    for gradient in behind:
        if gradient is not None:
            gradient[:-part] = 0.0
    cut_behind = [None if gradient is None else gradient[-part:].clone() for gradient in behind]
    by_row = [y is not None for y in behind] + [operand.by_row for operand in case.operands]
    actual = results(build(extras), mode, whole, behind)
    actual = tuple(y[-part:] if rows else y for y, rows in zip(actual, by_row, strict=False))

    def expected(dtype: torch.dtype, **options: bool) -> tuple[Tensor, ...]:
        function = partial(getattr(reference, case.op), **cut_extras, **case.options, **options)
        wide_behind = [None if gradient is None else gradient.to(dtype) for gradient in cut_behind]
        return results(Variant(function), mode, [x.to(dtype) for x in cut], wide_behind)

    wide = torch.float32 if case.device.type == "cuda" else torch.float64
    outputs = len(behind)
    return [
        parity.compare(
            f"output {i}" if i < outputs else f"gradient {i - outputs}",
            *tensors,
            rows=1 if by_row[i] else part,
            gradient=i >= outputs,
        )
        for i, tensors in enumerate(
            zip(actual, expected(case.dtype), expected(case.dtype, upcast=False), expected(wide), strict=True)
        )
    ]
