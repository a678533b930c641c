"""The rule for a backend to agree with the reference implementation (kernels.reference), for tests and `llm doctor`.

An element agrees if its error against the reference in high precision (fp64; on a GPU fp32 for lower dtypes) is at most

    2 x the largest error of naive torch at the same dtype + 1e-5 x sqrt(rows summed) + one unit in the last place

(after flash-attention's tests). No op or size has its own tolerance. Naive torch is the reference with
upcast=False. Inputs should be N(0, 1). The root mean square error of a gradient must also be small relative to the
gradient's root mean square, because the largest error does not show a small error that all elements have. Where naive
torch exceeds that limit, terms cancel, and a kernel may have as much error as naive torch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

FLOOR = 1e-5
# bf16 and fp16: torch.finfo.eps. fp32 and fp64 get 8 and 4,096 times theirs, 2^-23 and 2^-52.
ULP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-20, torch.float64: 2.0**-40}
RMSE = {torch.bfloat16: 0.005, torch.float16: 0.001, torch.float32: 1e-5, torch.float64: 1e-10}
DIGESTED_AT_ONCE = 2**24  # elements, so that the digest takes little memory
SMALL_RMS = 1e-4  # below this root mean square, the relative error of a gradient has no meaning


@dataclass(frozen=True)
class Parity:
    """The comparison of one output or gradient of an op."""

    name: str  # "output 0", "gradient 1", ...
    error: float  # largest difference from the reference in high precision
    torch_error: float  # largest error of naive torch in the same dtype
    rmse: float  # root mean square error over the reference's root mean square
    agrees: bool
    bits: str = ""  # of `digest`
    reason: str = ""  # which limit it exceeds, with the numbers


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
    """Compares `actual` with the reference by the rule.

    Args:
        same, naive: the reference in the same dtype, with and without upcast.
        exact: the reference in high precision. All have the same shape, and NaN agrees with NaN.
        rows: how many rows each element is a sum over.
        gradient: also apply the rule for the root mean square error.
    """
    if exact.numel() == 0:  # max() of no elements raises
        return Parity(name, 0.0, 0.0, 0.0, agrees=True)
    undefined = exact.isnan()
    reasons = [] if torch.equal(actual.isnan(), undefined) else ["NaN at other places"]
    # NaN - NaN is NaN, which no tolerance accepts; the line above has compared the positions of NaN.
    exact = exact.masked_fill(undefined, 0.0)

    def error_of(x: Tensor) -> Tensor:
        return (x.to(exact.dtype).masked_fill(undefined, 0.0) - exact).abs()

    def rms(x: Tensor) -> float:
        return float(x.square().mean().sqrt())

    error, torch_error = error_of(actual), float(error_of(naive).max())
    # sqrt(rows), because independent rounding errors of a sum grow like the root of the number of terms.
    allowed = 2 * torch_error + FLOOR * rows**0.5 + ULP[actual.dtype] * exact.abs()
    if not (error <= allowed).all():
        worst = int((error - allowed).argmax())
        reasons.append(f"error {error.flatten()[worst]:.3g} above {allowed.flatten()[worst]:.3g}")
    # `or 1.0`, because a gradient that is zero everywhere has no relative error.
    scale = rms(exact) or 1.0
    rmse = rms(error) / scale
    if gradient and rms(exact) > SMALL_RMS:
        # More where terms cancel. Then the reference's own rounding is larger, as in RMSNorm of width 1, or the
        # rounding of what any kernel stores on its way: attention's output where the softmax is nearly one-hot, or the
        # logits. Naive torch, which rounds every step, shows how much. Elsewhere it is below RMSE.
        limit = max(RMSE[actual.dtype], 2 * rms(error_of(same)) / scale, rms(error_of(naive)) / scale)
        if not rmse <= limit:
            reasons.append(f"relative root mean square error {rmse:.3g} above {limit:.3g}")
    return Parity(name, float(error.max()), torch_error, rmse, not reasons, reason=", ".join(reasons))


def disagreements(results: Iterable[Parity]) -> str:
    """Names the results that disagree, with their numbers, in one line; empty if all agree."""
    return "; ".join(f"{result.name}: {result.reason}" for result in results if not result.agrees)


def check(
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    *,
    rows: Mapping[str, int] | None = None,
    gradient_layout: Callable[[Tensor], Tensor] = torch.clone,
    seed: int = 0,
) -> list[Parity]:
    """Runs op and reference on the same inputs, forward and backward, and compares all outputs and gradients.

    Args:
        op: a function of the inputs only; reference: the same from kernels.reference, which also takes `upcast`.
        inputs: floating-point tensors in the dtype to test; their gradients are compared.
        rows: {"output 0", "gradient 1", ...: how many rows each element is a sum over}; default 1.
        gradient_layout: changes the layout of each incoming gradient, such as its strides.
        seed: seed of the incoming gradients, N(0, 1).

    Raises AssertionError if the op changes an input, or returns a shape or dtype that differs from the reference.
    """
    # fp64 for fp32, because naive torch in fp32 would have no error relative to fp32.
    # On a GPU fp64 is slow, and fp32 is precise enough to judge fp16 and bf16.
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
    # The measure of the rule: the error of rounding at every step with this dtype and these inputs.
    naive = run(partial(reference, upcast=False), inputs)
    exact = run(reference, [x.detach().to(wide) for x in inputs])
    found = [
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
    return [replace(one, bits=digest(actual[one.name])) for one in found]


def digest(x: Tensor) -> str:
    """Returns 16 hexadecimal digits of a tensor's bits, for comparisons between processes and machines.

    Each element's bits are multiplied by an odd number of its own, on the device: one element that differs always
    changes the digest. Sums of whole numbers have no order.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for at, part in enumerate(x.detach().reshape(-1).view(integers).split(DIGESTED_AT_ONCE)):
        place = torch.arange(part.numel(), device=x.device) + at * DIGESTED_AT_ONCE
        # Any large even factor will do. Products wrap around.
        total += ((place * 0x3E3779B97F4A7C16 + 1) * part).sum()
    return f"{int(total) % 2**64:016x}"


def _forward_backward(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    *,
    dtype: torch.dtype,
    gradient_layout: Callable[[Tensor], Tensor],
    seed: int,
) -> dict[str, Tensor]:
    # Views of the inputs, so that the function gets the caller's strides and storage offsets.
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    # On the CPU, so that every device and each of the four runs gets the same gradients.
    generator = torch.Generator().manual_seed(seed)
    # Rounded to the tested dtype first, because the exact run must get the same values.
    behind = [gradient_layout(torch.randn(y.shape, generator=generator).to(dtype).to(y)) for y in outputs]
    # autograd may share one gradient among several functions, so a backward pass must not write to it.
    before = [g.clone() for g in behind]
    gradients = torch.autograd.grad(outputs, leaves, behind)
    for i, (g, old) in enumerate(zip(behind, before, strict=True)):
        assert torch.equal(g, old), f"backward changes the gradient of output {i}"
    named = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"gradient {i}": g for i, g in enumerate(gradients)}
