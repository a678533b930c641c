"""Cross-entropy fused with the LM head: the backends against the reference, and what they may hold in memory."""

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from losses import ALONE_AND_IN_PAIRS, SETTINGS, any_strides, targets
from machines import CPU, CUDA, EVERYWHERE, INTERPRETER, ONE_DTYPE, Machine
from mutation import mutated
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import reference
from kernels.parity import Parity, check, compare, disagreements

REDUCTIONS = ["none", "mean", "sum"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def hidden_and_weight(machine: Machine, n_rows: int, d: int, v: int) -> tuple[Tensor, Tensor]:
    """x and weight whose logits are of N(0, 1), as a model's are at first."""
    return machine.randn(n_rows, d), machine.randn(v, d) / d**0.5


def parity(
    machine: Machine, x: Tensor, weight: Tensor, target: Tensor, module=kernels, gradient_layout=torch.clone, **options
) -> list[Parity]:
    target = target.to(machine.device)
    chunk_rows = options.pop("chunk_rows", None)
    n_rows = max(1, x.shape[0])
    return check(
        partial(module.linear_cross_entropy, target=target, chunk_rows=chunk_rows, backend=machine.backend, **options),
        partial(reference.linear_cross_entropy, target=target, **options),
        [x, weight],
        rows={"output 0": n_rows, "gradient 1": n_rows},
        gradient_layout=gradient_layout,
    )


def assert_parity(*arguments, **options) -> None:
    results = parity(*arguments, **options)
    assert all(result.agrees for result in results), disagreements(results)


def on(machine: Machine) -> Callable[..., Tensor]:
    return partial(kernels.linear_cross_entropy, backend=machine.backend)


@pytest.mark.parametrize("machine", EVERYWHERE)
@pytest.mark.parametrize("options", ALONE_AND_IN_PAIRS, ids=str)
def test_options_alone_and_in_pairs(machine: Machine, options: dict) -> None:
    assert_parity(machine, *hidden_and_weight(machine, 7, 16, 40), targets(7, 31), chunk_rows=3, **options)


@pytest.mark.parametrize("machine", EVERYWHERE)
@pytest.mark.parametrize("chunk_rows", [1, 7, 9, 1000, None])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_any_number_of_rows_a_chunk(machine: Machine, chunk_rows: int | None, reduction: str) -> None:
    options = {"chunk_rows": chunk_rows, "reduction": reduction, "z_loss": 0.01}
    assert_parity(machine, *hidden_and_weight(machine, 9, 16, 40), targets(9, 31), vocab_size=31, **options)


@pytest.mark.parametrize(
    ("machine", "n_rows", "d", "v"),
    [
        pytest.param(*machine.values, *size, id=f"{machine.id}-{size}", marks=machine.marks)
        for machines, sizes in (
            (CPU, [(0, 8, 31), (1, 1, 31), (129, 64, 1000), (300, 16, 5000), (600, 64, 5000)]),
            (INTERPRETER, [(0, 8, 31), (1, 1, 31), (5, 64, 1000), (2, 8, 50304)]),
            (CUDA, [(0, 8, 31), (1, 1, 31), (129, 64, 1000), (3000, 64, 50304), (3000, 64, 50257), (600, 64, 128256)]),
        )
        for machine in machines
        for size in sizes
    ],
)
def test_sizes(machine: Machine, n_rows: int, d: int, v: int) -> None:
    for reduction in ("sum", "none"):
        assert_parity(machine, *hidden_and_weight(machine, n_rows, d, v), targets(n_rows, v), reduction=reduction)


@pytest.mark.parametrize("machine", EVERYWHERE)
@any_strides
def test_any_strides_of_inputs_and_gradients(machine: Machine, layout) -> None:
    x, weight = (layout(t) for t in hidden_and_weight(machine, 5, 16, 24))
    assert_parity(machine, x, weight, targets(5, 24), gradient_layout=layout, chunk_rows=2, reduction="none")


@pytest.mark.parametrize("machine", ONE_DTYPE)
def test_a_weight_tied_to_the_embedding_gets_both_gradients(machine: Machine) -> None:
    ids, target = torch.randint(30, (8,), device=machine.device), targets(8, 30).to(machine.device)

    def tied(function: Callable[..., Tensor], weight: Tensor, **options) -> Tensor:
        return function(F.embedding(ids, weight), weight, target, **options)

    results = check(
        partial(tied, on(machine)),
        partial(tied, reference.linear_cross_entropy),
        [machine.randn(30, 16) / 4],
        rows={"gradient 0": 8},
    )
    assert all(result.agrees for result in results), disagreements(results)


@pytest.mark.parametrize("options", ALONE_AND_IN_PAIRS, ids=str)
def test_gradcheck(options: dict) -> None:
    target = targets(5, 31)
    x, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 33))
    for function in (reference.linear_cross_entropy, kernels.linear_cross_entropy):
        assert torch.autograd.gradcheck(
            lambda x, w, f=function: f(x, w, target, **options), (x, weight), fast_mode=True
        )


@pytest.mark.parametrize("machine", ONE_DTYPE)
@pytest.mark.parametrize(("reduction", "value"), [("sum", 0.0), ("mean", float("nan"))])
def test_no_target_at_all_is_a_sum_of_zero_and_a_mean_of_nan_with_gradient_zero(
    machine: Machine, reduction: str, value: float
) -> None:
    x, weight = (t.requires_grad_() for t in (machine.randn(5, 3), machine.randn(7, 3)))
    target = targets(5, 7, "all").to(machine.device)
    loss = on(machine)(x, weight, target, reduction=reduction)
    torch.testing.assert_close(loss.detach().cpu(), torch.tensor(value), equal_nan=True)
    loss.backward()
    assert not x.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("machine", ONE_DTYPE)
def test_columns_of_padding_take_no_part(machine: Machine) -> None:
    x, weight = machine.randn(6, 4).requires_grad_(), machine.randn(12, 4)
    weight[9:] = 1e4
    target = targets(6, 9, "none").to(machine.device)
    loss = on(machine)(x, weight.requires_grad_(), target, vocab_size=9)
    torch.testing.assert_close(loss, F.cross_entropy((x @ weight.T)[:, :9], target))
    loss.backward()
    assert not weight.grad[9:].any()
    assert x.grad.abs().max() < 10


@pytest.mark.parametrize("machine", ONE_DTYPE)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_another_ignore_index(machine: Machine, reduction: str) -> None:
    target = targets(9, 20, "some", ignore_index=3)
    assert_parity(machine, *hidden_and_weight(machine, 9, 4, 20), target, ignore_index=3, reduction=reduction)


@pytest.mark.parametrize("machine", EVERYWHERE)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_gradients_the_loss_is_the_same(machine: Machine, reduction: str) -> None:
    x, weight = hidden_and_weight(machine, 9, 8, 100)
    call = partial(on(machine), weight=weight, target=targets(9, 100).to(machine.device), reduction=reduction)
    with torch.no_grad():
        quiet = call(x.requires_grad_(), chunk_rows=4)
    assert not quiet.requires_grad
    loss = call(x, chunk_rows=4).detach()
    if machine.backend == "torch" and reduction == "none":
        assert torch.equal(quiet, loss)
    else:  # another kernel, or sums in another order
        assert compare("loss", quiet, loss, loss, loss, rows=9).agrees


@pytest.mark.parametrize("machine", EVERYWHERE)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("gradients", [True, False])
def test_z_is_its_part_of_the_loss_and_has_no_gradient(machine: Machine, reduction: str, gradients: bool) -> None:
    x, weight = (t.requires_grad_(gradients) for t in hidden_and_weight(machine, 9, 16, 40))
    options = {"target": targets(9, 31).to(machine.device), "vocab_size": 31, "reduction": reduction}
    loss, z = on(machine)(x, weight, chunk_rows=4, z_loss=0.5, return_z=True, **options)
    assert torch.equal(loss, on(machine)(x, weight, chunk_rows=4, z_loss=0.5, **options))
    assert (loss.requires_grad, z.requires_grad) == (gradients, False)
    exact = [t.detach().double() for t in (x, weight)]
    with_z, without = (reference.linear_cross_entropy(*exact, z_loss=z_loss, **options) for z_loss in (0.5, 0.0))
    naive = reference.linear_cross_entropy(x.detach(), weight.detach(), z_loss=0.5, upcast=False, **options)
    allowed = 2 * float((naive - with_z).abs().max()) + 1e-5
    torch.testing.assert_close(z.double(), with_z - without, atol=allowed, rtol=2**-7)
    assert on(machine)(x, weight, return_z=True, **options)[1].numel() == 0


@pytest.mark.parametrize("machine", ONE_DTYPE)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_it_may_be_used_twice(machine: Machine, reduction: str) -> None:
    """Two losses share a weight, and backward through one of them runs twice with other factors."""
    x, weight = (t.requires_grad_() for t in (machine.randn(6, 8), machine.randn(30, 8)))
    target = targets(6, 30).to(machine.device)

    def total(function: Callable[..., Tensor]) -> Tensor:
        first = function(x, weight, target, reduction=reduction).sum()
        return 2 * first + function(3 * x, weight, target, reduction=reduction).sum() - 0.5 * first

    expected = torch.autograd.grad(total(reference.linear_cross_entropy), (x, weight))
    ours = total(on(machine))
    for _ in range(2):
        for got, want in zip(torch.autograd.grad(ours, (x, weight), retain_graph=True), expected, strict=True):
            assert compare("gradient", got, want, want, want, rows=6, gradient=True).agrees


@pytest.mark.parametrize("machine", ONE_DTYPE)
@pytest.mark.parametrize("needed", [0, 1])
def test_only_the_gradient_that_is_needed_is_made(machine: Machine, needed: int) -> None:
    leaves = [machine.randn(6, 4), machine.randn(9, 4)]
    leaves[needed].requires_grad_()
    for reduction in ("sum", "none"):
        on(machine)(*leaves, targets(6, 9).to(machine.device), reduction=reduction).sum().backward()
    assert leaves[needed].grad is not None
    assert leaves[1 - needed].grad is None


class Watch(TorchDispatchMode):
    """The largest tensor that is ever made, and the most of at least `size` elements that live at once."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.largest, self.most = size, 0, 0
        self.living: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():  # the interpreter copies bytes, which are its own
            self.largest = max(self.largest, out.numel())
            if out.numel() >= self.size:
                gc.collect()  # the interpreter leaves cycles
                self.living.add(out.untyped_storage())
                self.most = max(self.most, len({storage.data_ptr() for storage in self.living}))
        return out


@pytest.mark.parametrize("machine", ONE_DTYPE)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("gradients", [True, False])
def test_the_logits_never_exist_whole(machine: Machine, reduction: str, gradients: bool) -> None:
    """No tensor larger than one chunk of logits is ever made and, with Triton, only one chunk's logits live at once."""
    x, weight = (t.requires_grad_(gradients) for t in (machine.randn(20, 4), machine.randn(300, 4)))
    target = targets(20, 300).to(machine.device)
    with Watch(8 * 300) as watch:
        loss = on(machine)(x, weight, target, chunk_rows=8, reduction=reduction).sum()
        if gradients:
            loss.backward()
    assert watch.largest == 8 * 300
    if machine.backend == "triton":
        assert watch.most == 1


@pytest.mark.parametrize("machine", ONE_DTYPE)
@pytest.mark.parametrize("options", [*({key: value} for key, value in SETTINGS), {"ignore_index": 3}], ids=str)
def test_compiled_whole_it_is_the_same(machine: Machine, options: dict) -> None:
    torch.compiler.reset()
    target = targets(5, 31, ignore_index=options.get("ignore_index", -100)).to(machine.device)
    function = partial(on(machine), target=target, chunk_rows=3, **options)
    inputs = hidden_and_weight(machine, 5, 8, 40)
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in inputs]
        loss = run(*leaves)
        loss.sum().backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("machine", ONE_DTYPE)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("add_product(dw,", "add_product(dw.zero_(),"),
        ("out=dx[rows]", "out=dx[: len(grad)]"),
        ("(loss / count, z", "(loss / len(x), z"),
        ("/ count\n        # Scaled", "\n        # Scaled"),
        ("factor[rows]", "factor[: x[rows].shape[0]]"),
    ],
)
def test_a_changed_loop_disagrees(machine: Machine, old: str, new: str, tmp_path: Path) -> None:
    module = mutated("linear_cross_entropy", old, new, tmp_path)
    results = [
        result
        for reduction in ("mean", "none")
        for result in parity(
            machine, *hidden_and_weight(machine, 7, 8, 40), targets(7, 40), module, chunk_rows=3, reduction=reduction
        )
    ]
    assert not all(result.agrees for result in results)


@pytest.mark.parametrize("wrong", [{"vocab_size": 6}, {"chunk_rows": 0}, {"reduction": "average"}], ids=str)
def test_what_cannot_be_computed_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"kernels\.linear_cross_entropy"):
        kernels.linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long), **wrong)
