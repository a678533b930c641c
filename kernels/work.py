"""What each op must do at least: every input read once, every output written once, and its products.

`item` is the bytes of an element. Linear cross-entropy is three matrix products, whatever a kernel computes again.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What a call must do at least."""

    moved: float = 0.0  # bytes
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.moved + other.moved, self.flops + other.flops)

    def __mul__(self, times: float) -> "Work":
        return Work(self.moved * times, self.flops * times)

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The least time in which it can be done."""
        return max(self.moved / bytes_per_second, self.flops / flops_per_second)


Both = tuple[Work, Work]
"""Of the forward and of the backward pass."""


def attention(item: int, rows: int, hq: int, hkv: int, d: int, pairs: float) -> Both:
    """rows: tokens; pairs: of query and key that may see each other, over all rows: 4 D FLOPs each and head forward,
    2.5 times that backward.
    """
    once = item * rows * d
    return Work(once * 2 * (hq + hkv), 4 * d * hq * pairs), Work(once * 4 * (hq + hkv), 10 * d * hq * pairs)


def rms_norm(item: int, rows: int, d: int) -> Both:
    once = item * rows * d
    return Work(2 * once), Work(3 * once)


def add_rms_norm(item: int, rows: int, d: int) -> Both:
    once = item * rows * d
    return Work(4 * once), Work(4 * once)


def rope(item: int, rows: int, heads: int, d: int) -> Both:
    """heads: of queries and keys together."""
    once = item * rows * heads * d
    return Work(2 * once), Work(2 * once)


def swiglu(item: int, rows: int, f: int) -> Both:
    once = item * rows * f
    return Work(3 * once), Work(5 * once)


def cross_entropy(item: int, rows: int, v: int) -> Both:
    """One read for the loss, and one for loss and gradient."""
    once = item * rows * v
    return Work(once), Work(once)


def linear_cross_entropy(item: int, rows: int, d: int, v: int) -> Both:
    product, inputs = 2 * rows * d * v, item * (rows + v) * d
    return Work(inputs, product), Work(inputs, 2 * product)


def linear(item: int, rows: int, d_in: int, d_out: int) -> Both:
    """A linear layer without a bias; backward are the products for the input's and the weight's gradient."""
    product, moved = 2 * rows * d_in * d_out, item * (rows * d_in + d_in * d_out + rows * d_out)
    return Work(moved, product), Work(2 * moved, 2 * product)
