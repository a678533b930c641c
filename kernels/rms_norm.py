"""RMSNorm (Zhang & Sennrich 2019), with or without the residual addition before it.

    y = x rstd w,   rstd = 1 / sqrt(mean(x^2) + eps)  over the last dimension

    dx = rstd (w dy - x rstd^2 mean(w dy x)),   dw = sum over rows of dy x rstd

The product with the weight is computed in fp32 and rounded once. Hugging Face's LlamaRMSNorm rounds the normalised x to
the inputs' dtype first. So the two agree in fp32, and differ by one rounding in bf16.

The kernels are bound by memory: a program holds whole rows in registers, several if rows are short, so that each is
read once and written once. In backward a program loops over many rows and sums its share of dw in fp32; the shares are
then added in a fixed order, so that dw has the same bits on every run. On a CPU the same ops run in C++
(csrc/cpu/rows.cpp), with shares of a fixed number of rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import cpu, reference
from kernels.dispatch import resolve
from kernels.launch import cdiv, launch, next_power_of_2, processors, registered, tile, tl, triton
from kernels.linear import rounded

MAX_WIDTH = 8192  # a wider row does not fit into the registers of one program


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """Computes RMSNorm over the last dimension.

    Args:
        x: [..., D]; the arithmetic is in fp32 (fp64 for fp64).
        weight: [D], in x's dtype, or in fp32: then it is rounded, and its gradient is not (kernels.linear).
        backend: as for every op (kernels/dispatch.py); None: the default.

    Returns y [..., D] in x's dtype. Raises ValueError for shapes that do not fit.
    """
    _check("rms_norm", x, weight)
    mixture = cpu.mixture(x, weight)
    if resolve("rms_norm", x.device, x.dtype, backend, triton=_unsupported(x), cpp=mixture) == "torch":
        return reference.rms_norm(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Adds x to the residual stream and computes RMSNorm of the sum. Returns (y, residual_out).

    Args:
        x, residual: [..., D] with the same dtype.
        weight: [D], in x's dtype, or in fp32: then it is rounded, and its gradient is not (kernels.linear).
        backend: as for every op (kernels/dispatch.py); None: the default.

    Returns y = rms_norm(residual_out) and residual_out = x + residual, [..., D] in x's dtype. The norm is computed from
    the rounded sum, as in the backward pass. Raises ValueError for shapes that do not fit.
    """
    _check("add_rms_norm", x, weight)
    # The residual is read at x's packed positions, without broadcasting: a smaller one would be read past its end.
    if residual.shape != x.shape:
        raise ValueError(f"kernels.add_rms_norm: x {list(x.shape)} and residual {list(residual.shape)} differ in shape")
    mixture = cpu.mixture(x, residual, weight)
    if resolve("add_rms_norm", x.device, x.dtype, backend, triton=_unsupported(x), cpp=mixture) == "torch":
        return reference.add_rms_norm(x, residual, weight, eps)
    return _AddRMSNorm.apply(x, residual, weight, eps)


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    # The kernels index the weight by x's columns and would read past the end of a shorter weight.
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"kernels.{op}: x [..., D] {list(x.shape)} and weight [D] {list(weight.shape)} do not fit")


def _unsupported(x: Tensor) -> str | None:
    return f"the width {x.shape[-1]} is above {MAX_WIDTH}" if x.shape[-1] > MAX_WIDTH else None


@triton.jit
def _rms_norm_forward_kernel(  # type: ignore[no-untyped-def]
    y,
    total,
    rstd,
    x,
    residual,
    weight,
    eps,
    n_rows,
    d,
    heads,
    outer_stride,
    inner_stride,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes y and rstd of ROWS rows; with a residual, `total` = x + residual and its norm."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # 64 bits, because offsets may exceed 2^31
    column = tl.arange(0, BLOCK_D)
    within = (row < n_rows)[:, None] & (column < d)[None, :]
    begin = row // heads * outer_stride + row % heads * inner_stride
    values = tl.load(x + begin[:, None] + column[None, :], mask=within, other=0.0)
    packed = row[:, None] * d + column[None, :]
    if residual is not None:
        values = (values.to(tl.float32) + tl.load(residual + packed, mask=within, other=0.0).to(tl.float32)).to(
            total.dtype.element_ty  # the norm is of the sum as it is stored
        )
        tl.store(total + packed, values, mask=within)
    values = values.to(tl.float32)
    # Zeros beyond column d add nothing to the sum, and the mean is over d, not BLOCK_D.
    # sqrt_rn rounds correctly; on NVIDIA devices tl.rsqrt and tl.sqrt are approximate.
    inverse = 1.0 / tl.sqrt_rn(tl.sum(values * values, axis=1) / d + eps)
    tl.store(rstd + row, inverse, mask=row < n_rows)
    w = tl.load(weight + column, mask=column < d, other=0.0).to(tl.float32)
    tl.store(y + packed, (values * inverse[:, None] * w[None, :]).to(y.dtype.element_ty), mask=within)


@triton.jit
def _rms_norm_backward_kernel(  # type: ignore[no-untyped-def]
    dx,
    dw_shares,
    dy,
    dtotal,
    x,
    weight,
    rstd,
    n_rows,
    d,
    heads,
    outer_stride,
    inner_stride,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes dx of every n-th group of ROWS rows, and this program's share of dw."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    w = tl.load(weight + column, mask=column < d, other=0.0).to(tl.float32)[None, :]
    share = tl.zeros([BLOCK_D], dtype=tl.float32)  # in bf16, a sum over thousands of rows would stop growing
    for first in range(program * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        within = (row < n_rows)[:, None] & (column < d)[None, :]
        begin = row // heads * outer_stride + row % heads * inner_stride
        packed = row[:, None] * d + column[None, :]
        # 0 beyond the last row, so that these rows add nothing to dw.
        inverse = tl.load(rstd + row, mask=row < n_rows, other=0.0)[:, None]
        normal = tl.load(x + begin[:, None] + column[None, :], mask=within, other=0.0).to(tl.float32) * inverse
        dy_values = tl.load(dy + packed, mask=within, other=0.0).to(tl.float32)
        share += tl.sum(dy_values * normal, axis=0)
        dnormal = dy_values * w
        values = inverse * (dnormal - normal * (tl.sum(dnormal * normal, axis=1) / d)[:, None])
        # Added here, because a separate operation would read and write dx once more.
        if dtotal is not None:
            values += tl.load(dtotal + packed, mask=within, other=0.0).to(tl.float32)
        tl.store(dx + packed, values.to(dx.dtype.element_ty), mask=within)
    tl.store(dw_shares + program.to(tl.int64) * d + column, share, mask=column < d)


def _layout(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Returns (x, heads, outer stride, inner stride): row r begins at (r // heads) * outer + (r % heads) * inner.

    So heads of a fused projection [B, S, H, D], a slice of a wider tensor, are not copied; x with other strides is.
    """
    strides, shape = x.stride(), x.shape
    # For a contiguous x, .contiguous() below returns it without a copy.
    if not x.is_contiguous() and strides[-1] == 1:
        if x.dim() == 2:
            return x, 1, strides[0], 0
        # Two strides describe the rows only if all dimensions before the last two can be merged.
        if all(strides[i] == strides[i + 1] * shape[i + 1] for i in range(x.dim() - 3)):
            return x, shape[-2], strides[-3], strides[-2]
    return x.contiguous(), 1, shape[-1], 0


def _fake_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape)
    # An empty tensor, because an op of torch cannot return None.
    total = x.new_empty(x.shape if residual is not None else 0)
    return y, total, x.new_empty(x.shape[:-1], dtype=torch.float32)


@registered(_fake_forward)
def rms_norm_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (y, total, rstd) of x [..., D]: total = x + residual, empty without a residual; rstd fp32 [...]."""
    y, total, rstd = _fake_forward(x, residual, weight, eps)
    x, heads, outer_stride, inner_stride = layout = _layout(x)
    residual, weight = None if residual is None else residual.contiguous(), weight.contiguous()
    if cpu.covers(x, residual, weight):
        cpu.rms_norm_forward(y, total, rstd, layout, residual, weight, eps)
        return y, total, rstd
    d, n_rows = x.shape[-1], rstd.numel()
    chosen = tile("rms_norm.forward", x, d, n_rows)
    launch(
        _rms_norm_forward_kernel,
        (cdiv(n_rows, chosen["ROWS"]),),
        *(y, total, rstd, x, residual, weight, eps),
        *(n_rows, d, heads, outer_stride, inner_stride),
        BLOCK_D=next_power_of_2(d),
        **chosen,
    )
    return y, total, rstd


def _fake_backward(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32)


@registered(_fake_backward)
def rms_norm_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns (dx, dweight fp32) of y = rms_norm(x). dtotal: another gradient of x, or empty. Shapes as in forward."""
    # Not empty_like, which keeps x's strides: the kernels write packed rows.
    dx = x.new_empty(x.shape)
    x, heads, outer_stride, inner_stride = layout = _layout(x)
    dy, weight, dtotal = dy.contiguous(), weight.contiguous(), None if dtotal is None else dtotal.contiguous()
    if cpu.covers(x, weight, dy, dtotal):
        return dx, cpu.rms_norm_backward(dx, dy, dtotal, layout, weight, rstd)
    d, n_rows = x.shape[-1], rstd.numel()
    chosen = tile("rms_norm.backward", x, d, n_rows)
    # As many as the device runs at once, because each writes a share of D numbers to read again. PROGRAMS is per
    # processor.
    programs = min(cdiv(n_rows, chosen["ROWS"]), processors(x.device) * chosen.pop("PROGRAMS"))
    shares = torch.empty(programs, d, dtype=torch.float32, device=x.device)
    launch(
        _rms_norm_backward_kernel,
        (programs,),
        *(dx, shares, dy, dtotal, x, weight, rstd),
        *(n_rows, d, heads, outer_stride, inner_stride),
        BLOCK_D=next_power_of_2(d),
        **chosen,
    )
    return dx, shares.sum(dim=0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.dtype, weight = weight.dtype, rounded(weight, x.dtype)
        y, _, rstd = rms_norm_forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_norm_backward(dy, None, x, weight, rstd)
        return dx, dweight.to(ctx.dtype), None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.dtype, weight = weight.dtype, rounded(weight, x.dtype)
        y, total, rstd = rms_norm_forward(x, residual, weight, eps)
        # Saves only the sum, because backward needs neither x nor the residual; both can be freed.
        ctx.save_for_backward(total, weight, rstd)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_norm_backward(dy, dtotal, total, weight, rstd)
        return dx, dx, dweight.to(ctx.dtype), None  # both terms of a sum have its gradient
