"""Cross-entropy fused with the LM head: the backends against the twin."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import reference
from kernels.parity import check


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [
    {"vocab_size": vocab_size, "z_loss": z_loss, "label_smoothing": smoothing, "reduction": reduction}
    for vocab_size, z_loss, smoothing, reduction in itertools.product(
        (None, 31), (0.0, 0.01), (0.0, 0.1), ("none", "mean", "sum")
    )
]


def targets(rows: int, vocab_size: int, ignored: str = "some", ignore_index: int = -100) -> Tensor:
    target = torch.randint(vocab_size, (rows,))
    if ignored == "all":
        target[:] = ignore_index
    elif ignored == "some":
        target[::3] = ignore_index
    return target


def test_no_target_at_all_is_a_sum_of_zero_and_a_mean_of_nan_with_gradient_zero() -> None:
    target = targets(5, 7, "all")
    for reduction, value in (("sum", 0.0), ("mean", float("nan"))):
        logits = torch.randn(5, 7, requires_grad=True)
        x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
        ours = kernels.cross_entropy(logits, target, reduction=reduction)
        fused = kernels.linear_cross_entropy(x, weight, target, reduction=reduction)
        torchs = F.cross_entropy(torch.randn(5, 7), target, reduction=reduction)
        for loss in (ours, fused, torchs):
            torch.testing.assert_close(loss.detach(), torch.tensor(value), equal_nan=True)
        (ours + fused).backward()
        assert not any(leaf.grad.any() for leaf in (logits, x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [1, 7, 33, 1000, None])
@pytest.mark.parametrize("options", OPTIONS)
def test_fused_form_agrees_with_the_twin(options: dict, chunk_rows: int | None, dtype: torch.dtype) -> None:
    target = targets(33, 31)
    results = check(
        partial(kernels.linear_cross_entropy, target=target, chunk_rows=chunk_rows, backend="torch", **options),
        partial(reference.linear_cross_entropy, target=target, **options),
        [torch.randn(33, 16).to(dtype), torch.randn(40, 16).to(dtype)],
        rows={"output 0": 33, "gradient 1": 33},
    )
    assert all(result.agrees for result in results), results


@pytest.mark.parametrize(("rows", "d", "v"), [(0, 8, 31), (1, 1, 31), (129, 64, 1000), (300, 16, 5000)])
def test_fused_form_at_other_sizes(rows: int, d: int, v: int) -> None:
    target = targets(rows, v)
    for reduction in ("sum", "none"):
        results = check(
            partial(kernels.linear_cross_entropy, target=target, reduction=reduction),
            partial(reference.linear_cross_entropy, target=target, reduction=reduction),
            [torch.randn(rows, d), torch.randn(v, d) / d**0.5],
            rows={"output 0": max(rows, 1), "gradient 1": max(rows, 1)},
        )
        assert all(result.agrees for result in results), results


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options: dict) -> None:
    target = targets(5, 31)
    logits = torch.randn(5, 33, dtype=torch.float64, requires_grad=True)
    x, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 33))
    assert torch.autograd.gradcheck(lambda z: reference.cross_entropy(z, target, **options), (logits,), fast_mode=True)
    for function in (reference.linear_cross_entropy, kernels.linear_cross_entropy):
        assert torch.autograd.gradcheck(
            lambda x, w, f=function: f(x, w, target, **options), (x, weight), fast_mode=True
        )


def test_columns_of_padding_take_no_part() -> None:
    logits = torch.randn(6, 12)
    logits[:, 9:] = 1e4
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(12, 4)
    weight[9:] = 1e4
    weight.requires_grad_()
    target = targets(6, 9, "none")
    torch.testing.assert_close(
        kernels.cross_entropy(logits, target, vocab_size=9), F.cross_entropy(logits[:, :9], target)
    )
    kernels.linear_cross_entropy(x, weight, target, vocab_size=9).backward()
    assert not weight.grad[9:].any()
    assert x.grad.abs().max() < 10


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_another_ignore_index(reduction: str) -> None:
    target = targets(9, 20, "some", ignore_index=3)
    x, weight = torch.randn(9, 4), torch.randn(20, 4)
    expected = F.cross_entropy(x @ weight.T, target, ignore_index=3, reduction=reduction)
    options = {"ignore_index": 3, "reduction": reduction}
    torch.testing.assert_close(kernels.cross_entropy(x @ weight.T, target, **options), expected)
    torch.testing.assert_close(kernels.linear_cross_entropy(x, weight, target, **options), expected)
    torch.testing.assert_close(
        kernels.linear_cross_entropy(x.requires_grad_(), weight, target, **options).detach(), expected
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_without_gradients_the_loss_is_the_same_bit_for_bit(reduction: str) -> None:
    x, weight, target = torch.randn(50, 8, requires_grad=True), torch.randn(100, 8), targets(50, 100)
    with torch.no_grad():
        quiet = kernels.linear_cross_entropy(x, weight, target, chunk_rows=50, reduction=reduction)
    assert not quiet.requires_grad
    assert torch.equal(
        quiet, kernels.linear_cross_entropy(x, weight, target, chunk_rows=50, reduction=reduction).detach()
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_fused_form_may_be_used_twice(reduction: str) -> None:
    """Two losses share a weight, and backward through one of them runs twice with other factors."""
    x, weight = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    target = targets(20, 30)

    def total(function) -> Tensor:
        first = function(x, weight, target, reduction=reduction).sum()
        return 2 * first + function(3 * x, weight, target, reduction=reduction).sum() - 0.5 * first

    expected = torch.autograd.grad(total(reference.linear_cross_entropy), (x, weight))
    ours = total(kernels.linear_cross_entropy)
    for _ in range(2):
        for got, want in zip(torch.autograd.grad(ours, (x, weight), retain_graph=True), expected, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("needed", [0, 1])
def test_only_the_gradient_that_is_needed_is_made(needed: int) -> None:
    leaves = [torch.randn(6, 4), torch.randn(9, 4)]
    leaves[needed].requires_grad_()
    for reduction in ("sum", "none"):
        kernels.linear_cross_entropy(*leaves, targets(6, 9), reduction=reduction).sum().backward()
    assert leaves[needed].grad is not None
    assert leaves[1 - needed].grad is None


def test_the_logits_never_exist_whole() -> None:
    """No tensor larger than one chunk of logits, the weight or x is ever made."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    x, weight = torch.randn(200, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    for reduction in ("sum", "none"):
        with Watch():
            kernels.linear_cross_entropy(
                x, weight, targets(200, 300), chunk_rows=20, reduction=reduction
            ).sum().backward()
    assert largest == 20 * 300


@pytest.mark.parametrize(
    "call",
    [
        lambda: kernels.cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), reduction="average"),
        lambda: kernels.cross_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)),
        lambda: kernels.cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), vocab_size=4),
        lambda: kernels.linear_cross_entropy(
            torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long), vocab_size=6
        ),
        lambda: kernels.linear_cross_entropy(
            torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long), chunk_rows=0
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(call) -> None:
    with pytest.raises(ValueError, match=r"kernels\.(linear_)?cross_entropy"):
        call()
