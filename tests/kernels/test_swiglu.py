"""SwiGLU: the reference against torch's silu, the backends against it, packed and not."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from machines import EVERY_DTYPE, EVERYWHERE, EXACT, TRITON, Machine
from mutation import mutated
from torch import Tensor

import kernels
from kernels import reference
from kernels.parity import Parity, check, disagreements
from kernels.swiglu import swiglu_backward, swiglu_forward


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def parity(machine: Machine, gate: Tensor, up: Tensor, packed: Tensor, module=kernels, **options) -> list[Parity]:
    op = partial(module.swiglu, backend=machine.backend)
    return check(op, reference.swiglu, [gate, up], **options) + check(op, reference.swiglu, [packed], **options)


def assert_parity(*arguments, **options) -> None:
    results = parity(*arguments, **options)
    assert all(result.agrees for result in results), disagreements(results)


def test_reference_is_the_formula() -> None:
    gate, up = torch.randn(2, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(reference.swiglu(gate, up), F.silu(gate) * up)
    torch.testing.assert_close(reference.swiglu(torch.cat((gate, up), -1)), F.silu(gate) * up)


@pytest.mark.parametrize("machine", EVERY_DTYPE)
@pytest.mark.parametrize(
    ("rows", "f"),
    [
        (0, 8),
        (1, 1),
        (3, 17),
        (129, 64),
        (127, 127),
        (16, 384),
        (3, 2048),
        (1, 8191),
        pytest.param(1023, 128, marks=pytest.mark.slow),
        pytest.param(128, 5888, marks=pytest.mark.slow),
    ],
)
def test_backends_agree_with_the_reference(machine: Machine, rows: int, f: int) -> None:
    assert_parity(machine, machine.randn(rows, f), machine.randn(rows, f), machine.randn(rows, 2 * f))


@pytest.mark.parametrize("machine", EVERYWHERE)
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
        lambda x: torch.cat((x, x), -1)[..., ::2],
        lambda x: torch.cat((x, x), 1)[:, 1:4],
        lambda x: torch.cat((x.flatten(), x.flatten()))[3 : 3 + x.numel()].view(x.shape),
        lambda x: x[:1, :1].expand(x.shape),
    ],
    ids=["transposed", "slice of each row", "every other column", "slice of the rows", "offset", "expanded"],
)
def test_any_strides_of_inputs_and_gradients(machine: Machine, layout: Callable[[Tensor], Tensor]) -> None:
    gate, up, packed = (layout(machine.randn(3, 5, f)) for f in (20, 20, 40))
    assert_parity(machine, gate, up, packed, gradient_layout=layout)


@pytest.mark.parametrize("machine", TRITON)
def test_packed_halves_are_not_copied_and_their_gradient_is_written_packed(machine: Machine) -> None:
    packed = machine.randn(3, 5, 40).requires_grad_()
    with torch.profiler.profile() as profile:
        y = kernels.swiglu(packed, backend="triton")
        (gradient,) = torch.autograd.grad(y, packed, torch.ones_like(y))
    assert not {"aten::contiguous", "aten::clone", "aten::cat"} & {event.name for event in profile.events()}
    assert gradient.is_contiguous()


@pytest.mark.parametrize("machine", EVERYWHERE)
def test_far_from_zero(machine: Machine) -> None:
    gate = torch.tensor([-200.0, -100.0, -30.0, 30.0, 100.0, 200.0]).to(machine.device, machine.dtype)
    up = machine.randn(6)
    assert_parity(machine, gate, up, torch.cat((gate, up)))
    y = kernels.swiglu(gate, torch.ones_like(gate), backend=machine.backend)
    assert torch.equal(y[3:], gate[3:])
    assert (y[:2] == 0).all()


@pytest.mark.parametrize("module", [reference, kernels])
def test_gradcheck(module) -> None:
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(module.swiglu, (gate, up))
    assert torch.autograd.gradcheck(module.swiglu, (torch.randn(3, 6, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize("packed", [False, True])
def test_registered_ops_pass_opcheck(machine: Machine, packed: bool) -> None:
    inputs = (machine.randn(3, 48), None) if packed else (machine.randn(3, 24), machine.randn(3, 24))
    torch.library.opcheck(swiglu_forward.op, inputs)
    torch.library.opcheck(swiglu_backward.op, (machine.randn(3, 24), *inputs))


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_is_eager(machine: Machine, packed: bool) -> None:
    function = partial(kernels.swiglu, backend="triton")
    inputs = [machine.randn(2, 3, 24) for _ in range(1 if packed else 2)]

    def run(function) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    torch._dynamo.reset()
    compiled = run(torch.compile(lambda *x: function(*x), fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(x, y) for x, y in zip(compiled, run(function), strict=True))


@pytest.mark.parametrize("machine", EXACT)
def test_offsets_beyond_32_bits(machine: Machine) -> None:
    # Memory that is never touched is never committed: the rows lie 2^30 elements apart.
    packed = torch.empty(3 * 2**30 + 16, dtype=torch.float16, device=machine.device).as_strided((4, 16), (2**30, 1))
    packed.copy_(torch.randn(4, 16))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        y = kernels.swiglu(leaf, backend="triton")
        return y, *torch.autograd.grad(y, leaf, packed[:, 3:11])

    assert all(torch.equal(far, near) for far, near in zip(run(packed), run(packed.contiguous()), strict=True))


@pytest.mark.parametrize("backend", ["cpp", "torch", "triton"])
def test_shapes_that_do_not_fit_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=r"kernels\.swiglu: a packed input is \[\.\.\., 2F\], got \[3, 5\]"):
        kernels.swiglu(torch.zeros(3, 5), backend=backend)
    with pytest.raises(ValueError, match=r"gate \[3, 4\] and up \[4\] differ in shape"):
        kernels.swiglu(torch.zeros(3, 4), torch.zeros(4), backend=backend)


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("g * tl.sigmoid(g) * u", "tl.sigmoid(g) * u"),
        ("d * u * sigmoid", "d * sigmoid"),
        ("1.0 + g * (1.0 - sigmoid)", "1.0 + g * sigmoid"),
        ("d * g * sigmoid", "g * sigmoid"),
        ("% blocks * BLOCK_F", "% blocks * BLOCK_F // 2"),
        ("(column < f)", "(column < f - 1)"),
        ("(row < n_rows)", "(row < n_rows - 1)"),
        ("dy + row * dy_stride", "dy + row * f"),
        ("dup + row * gradient_stride", "dup + row * f"),
    ],
)
@pytest.mark.usefixtures("unwritten_is_nan")
def test_a_changed_kernel_disagrees(machine: Machine, old: str, new: str, tmp_path: Path) -> None:
    def wider(dy: Tensor) -> Tensor:
        return torch.cat((dy, dy), -1)[..., : dy.shape[-1]]

    inputs = [machine.randn(3, f) for f in (2100, 2100, 4200)]
    results = parity(machine, *inputs, mutated("swiglu", old, new, tmp_path), gradient_layout=wider)
    assert not all(result.agrees for result in results)
