"""The least work of each op: it reads every input once, writes every output once, and computes its matrix products.

item: bytes per element. Linear cross-entropy has three matrix products, even if a kernel computes one twice.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Work:
    """The least work of a call."""

    moved: float = 0.0  # bytes read and written
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.moved + other.moved, self.flops + other.flops)

    def __mul__(self, times: float) -> "Work":
        return Work(self.moved * times, self.flops * times)

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Returns the least time at these rates."""
        # The larger of the two, not the sum, because a kernel can load while it computes.
        return max(self.moved / bytes_per_second, self.flops / flops_per_second)


class ForwardBackward(NamedTuple):
    forward: Work
    backward: Work


def attention(item: int, rows: int, hq: int, hkv: int, d: int, pairs: float) -> ForwardBackward:
    """rows: tokens. pairs: number of (query, key that it attends to), over all rows. Each pair and head takes 4 D FLOPs
    in forward, and 2.5 times as many in backward, which computes the scores again (Dao et al. 2022).
    """
    once = item * rows * d
    return ForwardBackward(
        # Forward: q and out, k and v; q.k and p v take 2 D FLOPs each. Backward: q, out, dout, dq, and k, v, dk, dv.
        Work(once * 2 * (hq + hkv), 4 * d * hq * pairs),
        Work(once * 4 * (hq + hkv), 10 * d * hq * pairs),
    )


def rms_norm(item: int, rows: int, d: int) -> ForwardBackward:
    once = item * rows * d
    return ForwardBackward(Work(2 * once), Work(3 * once))  # x, y; dy, x, dx


def add_rms_norm(item: int, rows: int, d: int) -> ForwardBackward:
    once = item * rows * d
    # Both inputs have the same gradient, so backward moves: dy, the sum and its gradient, dx.
    return ForwardBackward(Work(4 * once), Work(4 * once))


def rope(item: int, rows: int, heads: int, d: int) -> ForwardBackward:
    """heads: number of query and key heads together."""
    once = item * rows * heads * d
    return ForwardBackward(Work(2 * once), Work(2 * once))


def norm_rope(item: int, rows: int, hq: int, hkv: int, d: int) -> ForwardBackward:
    once = item * rows * d
    # Forward: the heads of q and k, before and after. Backward: these and their gradients, and v's gradient, which is
    # moved next to theirs.
    return ForwardBackward(Work(once * 2 * (hq + hkv)), Work(once * (3 * (hq + hkv) + 2 * hkv)))


def swiglu(item: int, rows: int, f: int) -> ForwardBackward:
    once = item * rows * f
    return ForwardBackward(Work(3 * once), Work(5 * once))  # gate, up, y; dy, gate, up, dgate, dup


def cross_entropy(item: int, rows: int, v: int) -> ForwardBackward:
    """Each pass reads the logits once. The gradient may overwrite them."""
    once = item * rows * v
    return ForwardBackward(Work(once), Work(once))


def linear_cross_entropy(item: int, rows: int, d: int, v: int) -> ForwardBackward:
    product, inputs = 2 * rows * d * v, item * (rows + v) * d
    # The logits do not count, because a fused kernel need not store them. Backward has products for dx and dW.
    return ForwardBackward(Work(inputs, product), Work(inputs, 2 * product))


def linear(item: int, rows: int, d_in: int, d_out: int) -> ForwardBackward:
    """A linear layer without a bias. Backward has two products, for the gradients of input and weight."""
    product, moved = 2 * rows * d_in * d_out, item * (rows * d_in + d_in * d_out + rows * d_out)
    # Each product of backward moves three matrices of the same sizes as in forward.
    return ForwardBackward(Work(moved, product), Work(2 * moved, 2 * product))
