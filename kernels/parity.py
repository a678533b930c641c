"""The rule by which a backend agrees with the reference implementation (kernels.reference), for tests and `llm doctor`.

An element agrees if its error against the reference in high precision (fp64; on a GPU fp32 for lower dtypes) is at most

    2 x the largest error of naive torch at the same dtype + 1e-5 x sqrt(rows summed) + one unit in the last place

(after flash-attention's tests): no op and no size has a tolerance of its own. Naive torch is the reference with
upcast=False. Inputs are meant to come from N(0, 1). A gradient's root mean square error must also be small relative to
the gradient's own root mean square, because the largest error does not show a small error that all elements share.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

FLOOR = 1e-5
# bf16 and fp16: torch.finfo.eps. fp32 and fp64 get 8 and 4,096 times theirs, 2^-23 and 2^-52.
ULP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-20, torch.float64: 2.0**-40}
RMSE = {torch.bfloat16: 0.005, torch.float16: 0.001, torch.float32: 1e-5, torch.float64: 1e-10}
SMALL_RMS = 1e-4  # a gradient's root mean square below which its relative error has no meaning


@dataclass(frozen=True)
class Parity:
    """How one output or gradient of an op compares."""

    name: str  # "output 0", "gradient 1", ...
    error: float  # largest, against the reference in high precision
    torch_error: float  # of naive torch at the same dtype
    rmse: float  # root mean square error over the reference's root mean square
    agrees: bool


def compare(
    name: str,
    actual: Tensor,
    same: Tensor,
    naive: Tensor,
    exact: Tensor,
    *,
    rows: int = 1,
    gradient: bool = False,
) -> Parity:
    """Compares `actual` by the rule.

    Args:
        same, naive: the reference at the same dtype, with and without upcast.
        exact: the reference in high precision. All have one shape, and NaN agrees with NaN.
        rows: how many rows each element is a sum over.
        gradient: apply the rule of the root mean square error too.
    """
    if exact.numel() == 0:  # max() of no element would raise
        return Parity(name, 0.0, 0.0, 0.0, agrees=True)
    undefined = exact.isnan()
    agrees = torch.equal(actual.isnan(), undefined)
    # NaN - NaN is NaN, and no tolerance would accept it; the line above has compared where NaN is.
    exact = exact.masked_fill(undefined, 0.0)

    def error_of(x: Tensor) -> Tensor:
        return (x.to(exact.dtype).masked_fill(undefined, 0.0) - exact).abs()

    def rms(x: Tensor) -> float:
        return float(x.square().mean().sqrt())

    error, torch_error = error_of(actual), float(error_of(naive).max())
    # The root of `rows`: independent rounding errors of a sum grow like the root of its terms.
    agrees &= bool((error <= 2 * torch_error + FLOOR * rows**0.5 + ULP[actual.dtype] * exact.abs()).all())
    if gradient and rms(exact) > SMALL_RMS:
        # Twice the reference's own error where that is larger: where terms cancel, as in RMSNorm of width 1, no kernel
        # can be closer.
        agrees &= rms(error) <= max(RMSE[actual.dtype] * rms(exact), 2 * rms(error_of(same)))
    # `or 1.0`: a gradient that is zero everywhere has no relative error.
    return Parity(name, float(error.max()), torch_error, rms(error) / (rms(exact) or 1.0), agrees)


def check(
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    *,
    rows: Mapping[str, int] | None = None,
    gradient_layout: Callable[[Tensor], Tensor] = torch.clone,
    seed: int = 0,
) -> list[Parity]:
    """Runs op and reference on the same inputs, forward and backward, and compares every output and every gradient.

    Args:
        op: a function of the inputs only; reference: the same from kernels.reference, which takes `upcast` too.
        inputs: floating-point tensors of the dtype to test; each one's gradient is compared.
        rows: by name ("output 0", "gradient 1"), how many rows each element is a sum over; 1 where not named.
        gradient_layout: changes the layout of each incoming gradient: other strides, or an expanded one.
        seed: of the incoming gradients, N(0, 1).

    Raises AssertionError if the op changes an input, or returns another shape or dtype than the reference.
    """
    # fp32 against fp32 would leave naive torch no error to measure by.
    # On a GPU fp64 is slow, and fp32 is fine enough to judge fp16 and bf16.
    wide = torch.float32 if inputs[0].is_cuda and inputs[0].dtype != torch.float32 else torch.float64
    before = [x.detach().clone() for x in inputs]
    run = partial(_forward_backward, dtype=inputs[0].dtype, gradient_layout=gradient_layout, seed=seed)
    actual = run(op, inputs)
    for i, (x, old) in enumerate(zip(inputs, before, strict=True)):
        assert torch.equal(x, old), f"the op changes its input {i}"
    same = run(reference, inputs)
    for name, tensor in same.items():
        ours = (actual[name].shape, actual[name].dtype)
        assert ours == (tensor.shape, tensor.dtype), f"{name} is {ours}, not {(tensor.shape, tensor.dtype)}"
    # The measure of the rule: what rounding at every step costs at this dtype and these inputs.
    naive = run(partial(reference, upcast=False), inputs)
    exact = run(reference, [x.detach().to(wide) for x in inputs])
    return [
        compare(
            name,
            actual[name],
            same[name],
            naive[name],
            exact[name],
            rows=(rows or {}).get(name, 1),
            gradient=name.startswith("gradient"),
        )
        for name in exact
    ]


def _forward_backward(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    *,
    dtype: torch.dtype,
    gradient_layout: Callable[[Tensor], Tensor],
    seed: int,
) -> dict[str, Tensor]:
    # A view of each input, so that strides and storage offsets reach the function as the caller made them.
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    # On the CPU, so that every device and every run of the four gets the same gradients.
    generator = torch.Generator().manual_seed(seed)
    # Rounded to the tested dtype before it is widened: the exact run must get the same values.
    behind = [gradient_layout(torch.randn(y.shape, generator=generator).to(dtype).to(y)) for y in outputs]
    # autograd may share one gradient among several functions, so a backward pass must not write to it.
    before = [g.clone() for g in behind]
    gradients = torch.autograd.grad(outputs, leaves, behind)
    for i, (g, old) in enumerate(zip(behind, before, strict=True)):
        assert torch.equal(g, old), f"backward changes the gradient of output {i}"
    named = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"gradient {i}": g for i, g in enumerate(gradients)}
