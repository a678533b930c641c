"""The linear layer in mixed precision: a weight that is rounded once a step, and gradients that are never rounded.

A CPU has no product of bf16 factors that writes fp32. `emulated` puts products of fp32 copies in its place, so that all
else is what runs on a GPU. tests/test_on_gpu.py compares the numbers there.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from losses import targets
from machines import CUDA, INTERPRETER, Machine
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.linear import MasterWeights, linear
from llm.config import ModelConfig
from llm.model.transformer import Transformer

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["kernels.linear"]
    monkeypatch.setattr(module, "_is_master", lambda w, dtype: w.dtype == torch.float32 and dtype == BF16)
    monkeypatch.setattr(module, "product", lambda a, b: a.float() @ b.float())


def leaves(rows: int = 40, bias: bool = True) -> tuple[Tensor, nn.Parameter, nn.Parameter | None]:
    """x [2, rows, 24] in bf16, weight [16, 24] and bias [16] in fp32."""
    x = torch.randn(2, rows, 24).to(BF16).requires_grad_()
    return x, nn.Parameter(torch.randn(16, 24) / 5), nn.Parameter(torch.randn(16)) if bias else None


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_on_a_cpu_it_is_the_plain_product(dtype: torch.dtype, bias: bool) -> None:
    x, *weights = leaves(bias=bias)
    x = x.detach().to(dtype).requires_grad_()
    given = [leaf for leaf in (x, *weights) if leaf is not None]
    dy = torch.randn(2, 40, 16).to(dtype)
    masters = MasterWeights(given[1:], dtype)
    with masters:
        ours = torch.autograd.grad(linear(x, *weights), given, dy)
    assert not masters.weights
    for got, want in zip(ours, torch.autograd.grad(plain(x, *weights), given, dy), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_its_result_is_the_plain_one_and_its_gradients_are_not_rounded(emulated: None, bias: bool, flat: bool) -> None:
    x, *weights = leaves(bias=bias)
    x = (x[0] if flat else x).detach().requires_grad_()
    given = [leaf for leaf in (x, *weights) if leaf is not None]
    y, expected = linear(x, *weights), plain(x, *weights)
    assert torch.equal(y, expected)
    dy = torch.randn(y.shape).to(BF16)
    dx, *ours = torch.autograd.grad(y, given, dy)
    dx_expected, *rounded = torch.autograd.grad(expected, given, dy)
    assert torch.equal(dx, dx_expected)
    rows, columns = dy.double().reshape(-1, 16), x.double().reshape(-1, 24)
    for got, other, exact in zip(ours, rounded, (rows.T @ columns, rows.sum(0)), strict=False):
        assert got.dtype == torch.float32
        error, of_rounded = ((one.double() - exact).abs().max() for one in (got, other))
        assert error <= 1e-5 < of_rounded


def test_in_the_block_products_add_to_what_is_there(emulated: None) -> None:
    _, weight, bias = leaves()
    given = [torch.randn(2, 40, 24).to(BF16) for _ in range(3)]
    for each in given:
        linear(each, weight, bias).square().sum().backward()
    expected, weight.grad = weight.grad, None
    seen, masters = [], MasterWeights([weight], BF16)
    weight.register_hook(lambda gradient: seen.append(gradient is not None))
    for each in given:
        with masters:
            linear(each, weight, bias).square().sum().backward()
    assert torch.equal(weight.grad, expected)
    assert sum(seen) == 1  # autograd set the first one


def test_outside_of_the_block_autograd_gets_the_gradient(emulated: None) -> None:
    x, weight, bias = leaves()
    y = linear(x, weight, bias).sum()
    weight.grad = torch.zeros_like(weight)
    with MasterWeights([weight], BF16):
        pass
    (found,) = torch.autograd.grad(y, weight)
    assert found.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("before", [False, True], ids=["first", "later"])
def test_a_weight_may_be_used_twice_in_a_graph(emulated: None, before: bool) -> None:
    """By two products, and also by an op that is not one, as a tied embedding is."""
    x, weight, _ = leaves(bias=False)
    ids = torch.tensor([3, 3, 5])

    def loss(product) -> Tensor:
        return product(x, weight, None).sum() + product(2 * x, weight, None)[..., 3].sum() + weight[ids].square().sum()

    (expected,) = torch.autograd.grad(loss(linear), weight)
    weight.grad = torch.ones_like(weight) if before else None
    with MasterWeights([weight], BF16):
        loss(linear).backward()
    torch.testing.assert_close(weight.grad, expected + before)


@pytest.mark.parametrize("frozen", ["x", "weight", "both", "no_grad"])
def test_only_the_gradients_that_are_needed_are_made(emulated: None, frozen: str) -> None:
    x, weight, _ = leaves(bias=False)
    x.requires_grad_(frozen not in ("x", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    with MasterWeights([weight], BF16), torch.set_grad_enabled(frozen != "no_grad"):
        y = linear(x, weight)
        assert torch.equal(y, plain(x, weight, None))
        assert y.requires_grad == (frozen in ("x", "weight"))
        if y.requires_grad:
            y.sum().backward()
    assert (x.grad is None) == (frozen != "weight")
    assert (weight.grad is None) == (frozen != "x")


def test_a_copy_lasts_until_the_weights_change(emulated: None) -> None:
    x, weight, _ = leaves(bias=False)
    masters = MasterWeights([weight], BF16)
    with masters:
        old, copy = linear(x, weight), masters.copy(weight)
    with masters:
        assert masters.copy(weight) is copy
    # What no version counts, as torch's fused AdamW and flat buffers.
    weight.data.mul_(2)
    masters.changed()
    with masters:
        assert torch.equal(linear(x, weight), plain(x, weight, None))
        assert not torch.equal(masters.copy(weight), copy)
    (dx,) = torch.autograd.grad(old.sum(), x)
    assert torch.equal(dx, torch.ones_like(old) @ copy)  # of the weights in its forward


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_model_with_any_checkpointing_gets_the_same_gradients(emulated: None, checkpointing: str, tie: bool) -> None:
    config = ModelConfig.model_validate(
        {"n_layers": 2, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 48, "vocab_size": 128, "max_seq_len": 16}
        | {"tie_embeddings": tie, "qk_norm": True, "attention_bias": "qkvo"}
    )
    batches = [torch.randint(128, (2, 16)) for _ in range(2)]

    def gradients(kind: str, inside: bool) -> list[Tensor]:
        model = Transformer(config, activation_checkpointing=kind, compute_dtype=BF16)  # type: ignore[arg-type]
        model.init_weights(0)
        masters = model.master_weights()
        assert len(masters.weights) == len(list(model.parameters())) - (not tie)
        for ids in batches:
            with masters if inside else MasterWeights([], BF16):
                model(ids, labels=ids).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients("none", inside=False)
    for got, want in zip(gradients(checkpointing, inside=True), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("machine", [INTERPRETER[1], *CUDA[:2]])
@pytest.mark.parametrize("op", ["rms_norm", "linear_cross_entropy"])
@pytest.mark.parametrize("inside", [False, True])
def test_other_ops_round_a_weight_too_and_not_its_gradient(
    machine: Machine, op: str, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["kernels.linear"]
    monkeypatch.setattr(module, "_is_master", lambda w, dtype: w.dtype == torch.float32 and dtype == machine.dtype)
    if machine.device == "cpu":
        monkeypatch.setattr(module, "product", lambda a, b: a.float() @ b.float())
    target, dy = targets(9, 40).to(machine.device), machine.randn(9, 16)

    def loss(x: Tensor, weight: Tensor, **options) -> Tensor:
        if op == "rms_norm":
            return (kernels.rms_norm(x, weight[0], **options) * dy).sum()
        return kernels.linear_cross_entropy(x, weight, target, reduction="sum", **options)

    x, weight = machine.randn(9, 16).requires_grad_(), nn.Parameter((torch.randn(40, 16) / 4).to(machine.device))
    with MasterWeights([weight] if inside else [], machine.dtype):
        for _ in range(2):
            ours = loss(x, weight, backend=machine.backend)
            ours.backward()
    y, rounded = (t.detach().to(machine.dtype).requires_grad_() for t in (x, weight))
    expected = loss(y, rounded, backend=machine.backend)
    expected.backward()
    assert torch.equal(ours, expected)
    assert torch.equal(x.grad, 2 * y.grad)
    once = weight.grad / 2  # exact, as is the sum of two equal gradients
    assert torch.equal(once.to(machine.dtype), rounded.grad)
    assert not torch.equal(once, rounded.grad.float())


class Made(TorchDispatchMode):
    """Counts the tensors of each number of elements that ops make."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not any(out is given for given in args) and not func.is_view:
            self.elements.append(out.numel())
        return out


def test_without_memory_every_op_gives_fp32_gradients_and_makes_none_in_the_block() -> None:
    """As `llm plan` traces a GPU. The head's gradient is made in forward, once for all chunks."""
    with torch.device("meta"):
        x, weight = torch.empty(700, 24, dtype=BF16, requires_grad=True), nn.Parameter(torch.empty(16, 24))
        head, norm = nn.Parameter(torch.empty(50, 24)), nn.Parameter(torch.empty(24))
        ids = torch.empty(700, dtype=torch.int64)

    def loss() -> Tensor:
        normal = kernels.rms_norm(x, norm, backend="triton") + linear(linear(x, weight), weight.T)
        return kernels.linear_cross_entropy(normal, head, ids, reduction="sum", chunk_rows=100, backend="triton")

    loss().backward()
    assert {each.grad.dtype for each in (weight, head, norm)} == {torch.float32}
    assert x.grad.dtype == BF16
    with MasterWeights([weight, head, norm], BF16), Made() as made:
        loss().backward()
    assert made.elements.count(head.numel()) == 1
