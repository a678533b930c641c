"""SwiGLU (Shazeer 2020): y = silu(g) u for gate g and up u, with silu(g) = g sigmoid(g).

    du = dy silu(g),   dg = dy u sigmoid(g) (1 + g (1 - sigmoid(g)))

The kernels are bound by memory: a program computes one block, and backward computes silu again, so that only the inputs
are kept. The halves of a packed input are read in place, and its gradient is written packed. On a CPU the same ops run
in C++ (csrc/cpu/rows.cpp).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import cpu, reference
from kernels.dispatch import resolve
from kernels.launch import cdiv, launch, registered, tile, tl, triton


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Computes silu(gate) * up in fp32 (fp64 for fp64), rounded once.

    Args:
        gate, up: [..., F] with the same dtype; or only `gate`, packed [..., 2F] as (gate, up), with a packed gradient.
        backend: as for every op (kernels/dispatch.py); None: the default.

    Returns [..., F] in gate's dtype. Raises ValueError for shapes that do not fit.
    """
    if up is None and gate.shape[-1] % 2:
        raise ValueError(f"kernels.swiglu: a packed input is [..., 2F], got {list(gate.shape)}")
    if up is not None and up.shape != gate.shape:
        raise ValueError(f"kernels.swiglu: gate {list(gate.shape)} and up {list(up.shape)} differ in shape")
    # Only the C++ needs equal dtypes: Triton converts each tensor when it loads it.
    if resolve("swiglu", gate.device, gate.dtype, backend, cpp=cpu.mixture(gate, up)) == "torch":
        return reference.swiglu(gate, up)
    return _SwiGLU.apply(gate, up)


@triton.jit
def _block(n_rows, f, ROWS: tl.constexpr, BLOCK_F: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the program's rows [ROWS, 1], columns [1, BLOCK_F], and which of its elements exist."""
    # Rows and columns share the first axis of the grid, because CUDA limits the others to 65,535 programs.
    blocks = tl.cdiv(f, BLOCK_F)
    # In 64 bits, because a row times its stride may exceed 2^31.
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    return row, column, (row < n_rows) & (column < f)


@triton.jit
def _swiglu_forward_kernel(  # type: ignore[no-untyped-def]
    y,
    gate,
    up,
    n_rows,
    f,
    gate_stride,
    up_stride,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Computes a block of y, ROWS x BLOCK_F."""
    row, column, within = _block(n_rows, f, ROWS, BLOCK_F)
    g = tl.load(gate + row * gate_stride + column, mask=within, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=within, other=0.0).to(tl.float32)
    tl.store(y + row * f + column, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=within)


@triton.jit
def _swiglu_backward_kernel(  # type: ignore[no-untyped-def]
    dgate,
    dup,
    dy,
    gate,
    up,
    n_rows,
    f,
    gradient_stride,
    dy_stride,
    gate_stride,
    up_stride,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Computes the same block of dgate and dup, ROWS x BLOCK_F."""
    row, column, within = _block(n_rows, f, ROWS, BLOCK_F)
    g = tl.load(gate + row * gate_stride + column, mask=within, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=within, other=0.0).to(tl.float32)
    d = tl.load(dy + row * dy_stride + column, mask=within, other=0.0).to(tl.float32)
    # Computed again, not saved by forward: the kernel waits for memory, so one exp per element costs nothing.
    sigmoid = tl.sigmoid(g)
    du = d * g * sigmoid
    dg = d * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(dgate + row * gradient_stride + column, dg.to(dgate.dtype.element_ty), mask=within)
    tl.store(dup + row * gradient_stride + column, du.to(dup.dtype.element_ty), mask=within)


def _rows(x: Tensor) -> Tensor:
    """Returns x [..., F] as [N, F] with a last stride of 1; a view if its strides allow it."""
    # The number of rows is explicit, because reshape cannot infer -1 if F is 0.
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (gate, up), each [N, F]; for a packed gate, its halves."""
    if up is not None:
        return _rows(gate), _rows(up)
    first, second = _rows(gate).chunk(2, dim=-1)
    return first, second


def _fake_forward(gate: Tensor, up: Tensor | None) -> Tensor:
    return gate.new_empty(*gate.shape[:-1], gate.shape[-1] // (2 if up is None else 1))


@registered(_fake_forward)
def swiglu_forward(gate: Tensor, up: Tensor | None) -> Tensor:
    """Computes silu(gate) * up [..., F] from gate and up [..., F], or from gate [..., 2F] alone."""
    # The fake allocates the output, so that compiled graph and kernel always agree about it.
    y = _fake_forward(gate, up)
    gate, up = _halves(gate, up)
    if cpu.covers(gate, up):
        cpu.swiglu_forward(y, gate, up)
        return y
    n_rows, f = gate.shape
    chosen = tile("swiglu.forward", gate, f, n_rows)
    launch(
        _swiglu_forward_kernel,
        (cdiv(n_rows, chosen["ROWS"]) * cdiv(f, chosen["BLOCK_F"]),),
        *(y, gate, up, n_rows, f, gate.stride(0), up.stride(0)),
        **chosen,
    )
    return y


def _fake_backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    # An op of torch cannot return None, so an absent dup is an empty tensor.
    return gate.new_empty(gate.shape), gate.new_empty(0) if up is None else up.new_empty(up.shape)


@registered(_fake_backward)
def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (dgate, dup) of y = swiglu(gate, up); for a packed gate, dgate is packed and dup empty."""
    gradients = _fake_backward(dy, gate, up)
    # Views of the packed gradient: the kernel writes both halves to their final place, and nothing is
    # concatenated.
    dgate, dup = _halves(gradients[0], None if up is None else gradients[1])
    dy, (gate, up) = _rows(dy), _halves(gate, up)
    if cpu.covers(gate, up, dy):
        cpu.swiglu_backward(dgate, dup, dy, gate, up)
        return gradients
    n_rows, f = gate.shape
    chosen = tile("swiglu.backward", gate, f, n_rows)
    launch(
        _swiglu_backward_kernel,
        (cdiv(n_rows, chosen["ROWS"]) * cdiv(f, chosen["BLOCK_F"]),),
        *(dgate, dup, dy, gate, up, n_rows, f),
        # dup has dgate's stride: both are halves of one tensor, or both are new and have the same shape.
        *(dgate.stride(0), dy.stride(0), gate.stride(0), up.stride(0)),
        **chosen,
    )
    return gradients


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    # once_differentiable: a second derivative raises, because autograd cannot see into the kernels and would compute a
    # wrong one.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = swiglu_backward(dy, gate, up)
        return dgate, None if up is None else dup
