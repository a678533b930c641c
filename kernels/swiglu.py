"""SwiGLU (Shazeer 2020): silu(gate) * up, with silu(x) = x * sigmoid(x)."""

from torch import Tensor

from kernels import reference
from kernels.dispatch import resolve


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up, computed in fp32 (fp64 for fp64) and rounded once.

    Args:
        gate, up: [..., F] of one dtype; or `gate` alone, packed [..., 2F] as (gate, up), whose gradient is packed too.
        backend: "triton", "torch", "auto", or None for the default.

    Returns [..., F] in gate's dtype.
    """
    resolve("swiglu", gate.device, gate.dtype, backend)
    return reference.swiglu(gate, up)
