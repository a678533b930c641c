"""Gradients, norm and update whose bits do not depend on the number of processes (train.same_bits).

Floating-point addition is not associative, so every sum has one order here, which only the global batch defines.

- A step has n = 2^k * q micro-batches, q odd; number i is the m-th of process r, i = m * processes + r. The gradient
  is a binary tree over the k lowest bits of i: bit 0 at its root, bit k - 1 at its leaves, where a leaf is the sum of q
  micro-batches in their order. The micro-batches of each of 2^j processes are then a subtree.
- A process takes its micro-batches in such an order that siblings follow each other (`micro_batch_order`), and keeps
  one partial sum per level, as a binary counter keeps digits (`TreeSum`).
- The processes go on along the same tree, by recursive halving in fp32 (`reduce_scatter`): each gets the sum of one
  share of the gradient, for as many bytes as a ring sends.
- The norm is the correctly rounded sum of squares over pieces of PIECE elements, whatever process has computed them.

Weights and gradients lie in one tensor each, group by group of the optimizer, and the optimizer updates flat shares of
them. A share is a multiple of PIECE, because torch's AdamW rounds the last elements of a tensor otherwise than those
in full vectors. Weights are fp32 at every stage, and the model rounds them as it computes.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.metrics import exact_sum
from llm.world import World

PIECE = 2**12
"""Elements of a piece of the norm. torch adds so few in one thread, so that their number changes nothing."""
CHUNK = 2**24
"""Elements that a process receives at once: they take memory beside the gradient."""


def lanes(micro_batches: int) -> int:
    """Returns the leaves of the tree over so many micro-batches: the largest power of two that divides them."""
    return micro_batches & -micro_batches


def micro_batch_order(count: int) -> list[int]:
    """Returns the order in which a process takes its micro-batches 0 to count - 1.

    Their lowest bits decide at the root of the tree, so the leaves follow each other in the order of reversed bits.
    """
    leaves = lanes(count)
    bits = leaves.bit_length() - 1
    reversed_bits = [sum((leaf >> bit & 1) << (bits - 1 - bit) for bit in range(bits)) for leaf in range(leaves)]
    return [leaf + leaves * turn for leaf in reversed_bits for turn in range(count // leaves)]


def block_size(count: int) -> int:
    """Returns how many micro-batches in that order are added one after the other: a leaf, or two of one micro-batch."""
    odd = count // lanes(count)
    return odd if odd > 1 else min(count, 2)


def held_sums(count: int) -> int:
    """Returns how many partial sums a process of `count` micro-batches holds beside the gradient, at the most."""
    return (count // block_size(count)).bit_length() - 1


class TreeSum:
    """The sum of 2^k vectors as a binary tree, of which k + 1 are held at the most.

    Add each vector to `current`, which is zero before it, and call `close`. After the last one `current` is the sum.
    """

    def __init__(self, vectors: int, new: Callable[[], Tensor]) -> None:
        """new: makes a vector of zeros."""
        self._vectors, self._new = vectors, new
        self._held: list[Tensor] = []
        self._spare: list[Tensor] = []
        self._closed = 0
        self.current = new()

    def close(self) -> None:
        self._closed += 1
        number = self._closed
        # As in a binary counter: an even number completes one more subtree per trailing zero.
        while number % 2 == 0:
            sibling = self._held.pop()
            self.current += sibling
            self._spare.append(sibling)
            number //= 2
        if self._closed < self._vectors:
            self._held.append(self.current)
            self.current = self._spare.pop().zero_() if self._spare else self._new()

    def restart(self) -> None:
        self._spare += self._held
        self._held.clear()
        self._closed = 0
        self.current.zero_()


def reduce_scatter(vector: Tensor, rank: int, size: int) -> Tensor:
    """Sums a vector over all processes; returns the share of this one, a view. The rest of the vector is undefined.

    The processes must be a power of two, and divide the vector. Those whose highest bits differ exchange halves first,
    because they are siblings at the leaves of the tree.
    """
    distance = size // 2
    while distance:
        lower, upper = vector.chunk(2)
        kept, given = (lower, upper) if rank & distance == 0 else (upper, lower)
        for own, other in zip(kept.split(CHUNK), given.split(CHUNK), strict=True):
            received = torch.empty_like(own)
            _exchange(other, received, rank ^ distance)
            own += received
        vector, distance = kept, distance // 2
    return vector


def all_gather(vector: Tensor, rank: int, size: int) -> None:
    """Completes a vector of which each process has its share, in place."""
    share, distance = vector.numel() // size, 1
    while distance < size:
        own, other = ((at // distance) * distance * share for at in (rank, rank ^ distance))
        length = distance * share
        _exchange(vector[own : own + length], vector[other : other + length], rank ^ distance)
        distance *= 2


def _exchange(sent: Tensor, received: Tensor, other: int) -> None:
    operations = [dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


@dataclass(frozen=True)
class _Place:
    """Where a parameter is."""

    group: int
    begin: int
    """Its first element in the region of its group."""


class SameBits:
    """The weights, gradients and moments of one process.

    Every rank calls `accumulating` around the backward pass of each micro-batch, then `reduce`, and `updating` around
    the optimizer's step if the norm is finite.

    Args:
        optimizer: its groups get flat tensors in place of their parameters.
        parameters: those of the model, which become views.
        partitions: whether each process updates a share (ZeRO 1); otherwise all update everything.
        micro_batches: of a process in a step.
        communicating: a context for what the processes exchange in a step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        world: World,
        *,
        partitions: bool,
        micro_batches: int,
        communicating: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._optimizer, self._parameters, self._world, self._partitions = optimizer, parameters, world, partitions
        self._communicating = communicating
        self._places: dict[nn.Parameter, _Place] = {}
        self._sizes = [self._place(number, group["params"]) for number, group in enumerate(optimizer.param_groups)]
        self._weights = self._zeros()
        with torch.no_grad():
            for parameter in parameters:
                view = self._view(self._weights, parameter)
                view.copy_(parameter)
                parameter.data = view
        for group, region in zip(optimizer.param_groups, self._weights.split(self._sizes), strict=True):
            group["params"] = [nn.Parameter(self._updated(region))]
            if "shapes" in group:
                # A batch of matrices may be multiplied in another order than one of them.
                group |= {"whole": not partitions, "at_once": 1}
        self._block = block_size(micro_batches)
        self._sum = TreeSum(micro_batches // self._block, self._zeros)
        self._views: dict[int, list[Tensor]] = {}
        self._done = 0

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """The gradients of a backward pass in the block are added to the sum."""
        if self._done == 0:
            self._sum.restart()
        if self._done % self._block == 0:
            gradient = self._sum.current
            if gradient.data_ptr() not in self._views:
                self._views[gradient.data_ptr()] = [self._view(gradient, parameter) for parameter in self._parameters]
            for parameter, view in zip(self._parameters, self._views[gradient.data_ptr()], strict=True):
                parameter.grad = view
        yield
        self._done += 1
        if self._done % self._block == 0:
            self._sum.close()

    def reduce(self) -> float:
        """Sums the gradient over all processes; returns its norm. Collective."""
        self._done = 0
        world, gradient = self._world, self._sum.current
        norms = torch.zeros(len(gradient) // PIECE, dtype=torch.float64, device=gradient.device)
        for region, of_region in zip(
            gradient.split(self._sizes), norms.split([size // PIECE for size in self._sizes]), strict=True
        ):
            with self._communicating():
                own = reduce_scatter(region, world.rank, world.size)
            _share(of_region, world).copy_(torch.linalg.vector_norm(own.view(-1, PIECE), dim=1))
        with self._communicating():
            world.sum(norms)  # exact, because all but one process add zeros
        return math.sqrt(exact_sum(norms.square_().tolist()))

    @contextlib.contextmanager
    def updating(self, factor: float) -> Iterator[None]:
        """The optimizer's step in the block uses the gradient times `factor`. Collective."""
        world, gradients = self._world, self._sum.current.split(self._sizes)
        for group, region in zip(self._optimizer.param_groups, gradients, strict=True):
            if factor != 1:
                _share(region, world).mul_(factor)
            if not self._partitions:
                with self._communicating():
                    all_gather(region, world.rank, world.size)
            group["params"][0].grad = self._updated(region)
        yield
        if self._partitions:
            with self._communicating():
                for region in self._weights.split(self._sizes):
                    all_gather(region, world.rank, world.size)

    def read_moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        """Returns a whole moment. Collective."""
        held, inside, at = self._moment(parameter, moment)
        if not self._partitions:
            return held[inside].view(parameter.shape)
        # As integers: the sum with the zeros of other processes would turn -0.0 into 0.0.
        bits = torch.zeros(parameter.numel(), dtype=torch.int32, device=held.device)
        bits[at] = held[inside].view(torch.int32)
        return self._world.sum(bits).view(torch.float32).view(parameter.shape)

    def write_moment(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        held, inside, at = self._moment(parameter, moment)
        held[inside] = value.flatten()[at]

    def _moment(self, parameter: nn.Parameter, moment: str) -> tuple[Tensor, slice, slice]:
        """Returns this process's share of its group's moment, and which elements of it are which of the parameter's."""
        place = self._places[parameter]
        held: Tensor = self._optimizer.state[self._optimizer.param_groups[place.group]["params"][0]][moment]
        first = self._world.rank * len(held) if self._partitions else 0
        begin = min(max(place.begin, first), first + len(held))
        end = max(begin, min(place.begin + parameter.numel(), first + len(held)))
        return held, slice(begin - first, end - first), slice(begin - place.begin, end - place.begin)

    def _place(self, number: int, parameters: list[nn.Parameter]) -> int:
        """Places the parameters of a group one after the other. Returns the elements of its region."""
        size = 0
        for parameter in parameters:
            self._places[parameter] = _Place(number, size)
            size += parameter.numel()
        unit = PIECE * self._world.size
        return math.ceil(size / unit) * unit

    def _zeros(self) -> Tensor:
        return torch.zeros(sum(self._sizes), device=self._world.device)

    def _view(self, flat: Tensor, parameter: nn.Parameter) -> Tensor:
        place = self._places[parameter]
        begin = sum(self._sizes[: place.group]) + place.begin
        return flat[begin : begin + parameter.numel()].view(parameter.shape)

    def _updated(self, region: Tensor) -> Tensor:
        """Returns what this process updates of a group's region."""
        return _share(region, self._world) if self._partitions else region


def _share(region: Tensor, world: World) -> Tensor:
    return region.chunk(world.size)[world.rank]
