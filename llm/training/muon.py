"""Muon (Jordan et al. 2024) for the matrices inside the blocks, with AdamW for the rest."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels import cpu

BATCH_ELEMENTS = 2**26
"""Elements of the matrices that a process orthogonalises at once: enough to fill a GPU, few in its memory."""

Shape = tuple[int, int]


class Muon(torch.optim.AdamW):
    """Muon for the groups that have `shapes`, AdamW for the others.

    A matrix W [rows, columns] with gradient G moves by

        M = momentum * M + (1 - momentum) * G
        W = (1 - lr * weight_decay) * W - lr * 0.2 * sqrt(max(rows, columns)) * orthogonalised(Nesterov's M)

    The scale is that of Liu et al. 2025 ("Muon is scalable for LLM training"): it gives an update about the root mean
    square of one of AdamW's, so that one learning rate and one weight decay do for both.

    One parameter may hold several matrices, such as q, k and v, one above the other. A group's `shapes` lists the
    shapes of each parameter's matrices; each matrix is orthogonalised by itself, in the group's `dtype`.

    ZeRO 1 and 2 replace a group's parameters by one flat fp32 tensor: this process's partition of all of them, in
    their order. The momentum then is as flat. See `_whole_matrices`. With train.same_bits it is flat at every stage: a
    group's `whole` says whether it is all of them, and `at_once` how many matrices are one batch.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, **options)
        # Before ZeRO's offload moves what is stepped to the host.
        self._device = self.param_groups[0]["params"][0].device

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        hidden: list[tuple[nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            if "shapes" in group:
                self._step_matrices(group)
                hidden += [(parameter, parameter.grad) for parameter in group["params"]]
        for parameter, _ in hidden:
            parameter.grad = None  # so that AdamW skips it
        result = super().step(closure)
        for parameter, gradient in hidden:
            parameter.grad = gradient
        return result

    def _step_matrices(self, group: dict[str, Any]) -> None:
        stepped = [(number, p) for number, p in enumerate(group["params"]) if p.grad is not None]
        directions = []
        for _, parameter in stepped:
            gradient, state = parameter.grad, self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            # The momentum stays in fp32; only the products are in the group's dtype.
            buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            # In place, because a copy of all gradients would be many a run's peak; nobody reads them after the step.
            directions.append(gradient.lerp_(buffer, group["momentum"]).to(self._device))
        if stepped and group.get("whole"):
            shapes = list(chain.from_iterable(group["shapes"]))
            flat = directions[0][: sum(rows * columns for rows, columns in shapes)]
            pieces = flat.split([rows * columns for rows, columns in shapes])
            whole = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
            orthogonalise_all(whole, group["dtype"], shared=True, at_once=group["at_once"])
        elif stepped and stepped[0][1].ndim == 1:
            with_exchange = _whole_matrices(directions[0], list(chain.from_iterable(group["shapes"])))
            orthogonalise_all(next(with_exchange), group["dtype"], shared=False, at_once=group.get("at_once"))
            next(with_exchange, None)
        else:
            matrices: list[Tensor] = []
            for (number, _), direction in zip(stepped, directions, strict=True):
                matrices += direction.split([rows for rows, _ in group["shapes"][number]])
            orthogonalise_all(matrices, group["dtype"], shared=True)
        for (_, parameter), direction in zip(stepped, directions, strict=True):
            # Decoupled from the update, as in AdamW.
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(direction.to(parameter.device), alpha=-group["lr"])


def _spans(shapes: list[Shape]) -> list[tuple[int, int]]:
    """Returns where each matrix begins and ends in the concatenation of all."""
    ends = list(accumulate(rows * columns for rows, columns in shapes))
    return [(end - rows * columns, end) for end, (rows, columns) in zip(ends, shapes, strict=True)]


def moved_elements(shapes: list[Shape], length: int, size: int) -> list[list[int]]:
    """Returns moved[i][j]: how much of process j's partition, from its beginning, belongs to a matrix of process i.

    length: elements of each of the `size` partitions of all matrices.
    """
    moved = [[0] * size for _ in range(size)]
    for begin, end in _spans(shapes):
        owner = begin // length
        for other in range(owner + 1, math.ceil(end / length)):
            moved[owner][other] = min(end, (other + 1) * length) - other * length
    return moved


def shared_batches(shapes: list[Shape], size: int, at_once: int | None = None) -> Iterator[tuple[Shape, int]]:
    """Yields (shape, number of matrices) of each batch that `size` processes orthogonalise and gather.

    Matrices of a shape, or of its transpose, are alike. at_once: as in `orthogonalise_all`.
    """
    alike = Counter((min(shape), max(shape)) for shape in shapes)
    for shape, count in alike.items():
        step = (at_once or _at_once(shape)) * size
        for first in range(0, count, step):
            yield shape, min(step, count - first)


def _at_once(shape: Sequence[int]) -> int:
    return max(1, BATCH_ELEMENTS // math.prod(shape))


def step_bytes(
    shapes: list[Shape],
    processes: int,
    dtype: torch.dtype,
    *,
    partition: int | None,
    on_cpu: bool,
    at_once: int | None = None,
) -> int:
    """Returns the most bytes that `Muon.step` takes on a process beside weights, gradients and momentum.

    Args:
        shapes: of all matrices, in their order.
        dtype: in which they are orthogonalised.
        partition: the elements of a process's flat partition of them; None: each process has all of them.
        on_cpu: where the C++ of `_gram_polynomial` has memory of its own, and gloo gathers into a copy.
        at_once: as in `orthogonalise_all`.
    """
    if partition is None:
        batches = shared_batches(shapes, processes, at_once)
        return max(_batch_bytes(shape, count, processes, dtype, on_cpu=on_cpu) for shape, count in batches)
    spans, moved, peaks = _spans(shapes), moved_elements(shapes, partition, processes), [0]
    for rank in range(processes):
        owned = [shape for (begin, _), shape in zip(spans, shapes, strict=True) if begin // partition == rank]
        batches = shared_batches(owned, 1, at_once)
        products = max((_batch_bytes(shape, count, 1, dtype, on_cpu=on_cpu) for shape, count in batches), default=0)
        taken, lent = sum(moved[rank]), sum(of[rank] for of in moved)
        straddling = math.prod(owned[-1]) if taken else 0
        peaks.append(4 * (taken + straddling) + max(products, 4 * lent))
    return max(peaks)


def _batch_bytes(shape: Shape, count: int, processes: int, dtype: torch.dtype, *, on_cpu: bool) -> int:
    """Returns the most bytes for a batch of `count` matrices, of which each process orthogonalises a share."""
    (rows, columns), each = sorted(shape), math.ceil(count / processes)
    stacked = 4 * count * rows * columns
    matrices, grams = (dtype.itemsize * each * rows * width for width in (columns, rows))
    in_cpp = on_cpu and cpu.covers_gram(torch.empty(0, rows, columns, dtype=dtype))
    if _in_gram(dtype, rows, columns, in_cpp):
        scratch = 16 * rows * rows * min(each, torch.get_num_threads())  # C++ has four matrices a thread
        products = max(2 * grams + scratch if in_cpp else 5 * grams, grams + matrices)
    else:
        products = 2 * grams + 2 * matrices
    if processes == 1:
        return stacked + products
    return stacked + matrices + max(products, processes * matrices * (2 if on_cpu else 1))


def _whole_matrices(part: Tensor, shapes: list[Shape]) -> Iterator[list[Tensor]]:
    """Yields the matrices that begin in this process's partition, to be changed in place; then puts them back.

    A process owns the matrices that begin in its partition, so that it gets at most one piece of others' partitions,
    or several of one matrix where partitions are smaller than it, and sends at most one. All else never leaves it.

    part: [N] of the concatenation of all matrices, on each of the processes, in their order.
    """
    size, rank, length = _world_size(), _rank(), part.numel()
    spans, moved = _spans(shapes), moved_elements(shapes, length, size)
    lent = [moved[other][rank] for other in range(size)]
    taken = moved[rank]
    foreign = part.new_empty(sum(taken))
    exchanges = any(chain.from_iterable(moved))
    if exchanges:
        dist.all_to_all_single(foreign, part[: sum(lent)].contiguous(), taken, lent)
    matrices, straddling = [], None
    for (begin, end), shape in zip(spans, shapes, strict=True):
        if begin // length != rank:
            continue
        piece = part[begin - rank * length : end - rank * length]
        if end > (rank + 1) * length:
            straddling = begin - rank * length
            piece = torch.cat([piece, foreign])
        matrices.append(piece.view(shape))
    yield matrices
    if straddling is not None:
        whole, own = matrices[-1].flatten(), length - straddling
        part[straddling:].copy_(whole[:own])
        foreign.copy_(whole[own:])
    if exchanges:
        returned = part.new_empty(sum(lent))
        dist.all_to_all_single(returned, foreign, lent, taken)
        part[: sum(lent)].copy_(returned)


def orthogonalise_all(matrices: list[Tensor], dtype: torch.dtype, *, shared: bool, at_once: int | None = None) -> None:
    """Replaces each matrix by 0.2 sqrt(max(rows, columns)) times the orthogonalised one.

    Matrices of a shape, or of its transpose, go through the products as one batch: few large products instead of many
    small ones. shared: all processes have the same matrices, so each computes some, and all gather the results.
    at_once: the matrices of a process's batch; None: as many as BATCH_ELEMENTS allow.
    """
    same_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        # Views, so that writing to one changes the matrix.
        wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
        same_shape[wide.shape].append(wide)
    for shape, alike in same_shape.items():
        each = at_once or _at_once(shape)
        step = each * (_world_size() if shared else 1)
        for first in range(0, len(alike), step):
            _orthogonalise_batch(alike[first : first + step], dtype, shared=shared)


def _orthogonalise_batch(matrices: list[Tensor], dtype: torch.dtype, *, shared: bool) -> None:
    # A function of its own, so that nothing of one batch is left beside the next.
    stacked = torch.stack(matrices)
    results = _orthogonalise_shared(stacked, dtype) if shared else orthogonalise(stacked, dtype)
    results *= 0.2 * math.sqrt(stacked.shape[2])
    for matrix, result in zip(matrices, results, strict=True):
        matrix.copy_(result)


def _orthogonalise_shared(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """As `orthogonalise`, but each process computes a share of the matrices, and all gather the results."""
    size = _world_size()
    if size == 1:
        return orthogonalise(matrices, dtype)
    each = math.ceil(len(matrices) / size)
    own = matrices[_rank() * each :][:each]
    # All processes give the gather the same number of matrices; those beyond the last are zeros, cut off at the end.
    share = matrices.new_zeros(each, *matrices.shape[1:], dtype=dtype)
    share[: len(own)] = orthogonalise(own, dtype)
    gathered = share.new_empty(size * each, *matrices.shape[1:])
    dist.all_gather_into_tensor(gathered, share)
    return gathered[: len(matrices)]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


A, B, C = 3.4445, -4.7750, 2.0315
"""Jordan's quintic: of those that stay bounded, the one with the steepest slope at zero: small values grow fastest."""
STEPS = 5


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns about U V^T of each matrix U S V^T in [N, rows, columns] fp32, in dtype, rows <= columns.

    Takes five Newton-Schulz steps X <- (A + B X X^T + C (X X^T)^2) X. The singular values become 0.7 to 1.2. `matrices`
    is overwritten, which saves the memory of a copy.
    """
    # The Frobenius norm bounds the largest singular value, so all begin in [0, 1]. The clamp is for a zero gradient.
    x = matrices.div_(matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)).to(dtype)
    rows, columns = x.shape[1:]
    in_cpp = cpu.covers_gram(x)
    if _in_gram(dtype, rows, columns, in_cpp):
        return torch.bmm(_gram_polynomial(torch.bmm(x, x.mT), in_cpp), x)
    for _ in range(STEPS):
        square = torch.bmm(x, x.mT)
        # baddbmm adds within the product's kernel.
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=B, alpha=C), x, beta=A)
    return x


def _in_gram(dtype: torch.dtype, rows: int, columns: int, in_cpp: bool) -> bool:
    """Whether the five steps are one polynomial of the Gram matrix.

    It takes 17 products of [rows, rows], in C++ half of each, and two of [rows, columns], instead of 5 and 10. It
    squares small singular values, for which bf16 has too few bits.
    """
    return dtype == torch.float32 and (in_cpp or 2 * columns > 3 * rows)


def _gram_polynomial(gram: Tensor, in_cpp: bool) -> Tensor:
    """Returns the polynomial Q of R = X X^T for which the five steps are Q X, all [N, rows, rows].

    A step multiplies X by P = A + B R + C R^2. All are polynomials of the first R, so they commute, and the next R is
    P R P^T = R P^2.
    """
    if in_cpp:
        result = torch.empty_like(gram)
        cpu.gram_polynomial(gram, (A, B, C), STEPS, result)
        return result
    polynomial = None
    for step in range(STEPS):
        # P - A: with A on its diagonal the small numbers there would be rounded as the large one is.
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        if polynomial is None:
            polynomial = factor.clone()
            polynomial.diagonal(dim1=1, dim2=2).add_(A)
        else:
            polynomial = torch.baddbmm(polynomial, factor, polynomial, beta=A)
        if step < STEPS - 1:
            once = torch.baddbmm(gram, factor, gram, beta=A)
            gram = torch.baddbmm(once, factor, once, beta=A)
    assert polynomial is not None
    return polynomial
