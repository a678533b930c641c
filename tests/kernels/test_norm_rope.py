"""QK-norm with RoPE: the backends against the reference, which is the norm and then the rotation."""

from functools import partial
from pathlib import Path

import pytest
import torch
from machines import EVERY_DTYPE, EVERYWHERE, EXACT, TRITON, Machine
from mutation import mutated
from torch import Tensor

import kernels
from kernels import reference
from kernels.norm_rope import norm_rope_backward, norm_rope_forward
from kernels.parity import Parity, check


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def angles(machine: Machine, s: int, d: int) -> tuple[Tensor, Tensor]:
    return kernels.rope_cos_sin(3, s, d, 10_000.0, torch.device(machine.device))


def inputs(machine: Machine, b: int, s: int, hq: int, hkv: int, d: int) -> list[Tensor]:
    return [machine.randn(b, s, (hq + 2 * hkv) * d), machine.randn(d), machine.randn(d)]


def parity(machine: Machine, given: list[Tensor], hq: int, module=kernels, **options) -> list[Parity]:
    (b, s, width), d = given[0].shape, given[1].shape[0]
    cos, sin = angles(machine, s, d)
    bound = {"cos": cos, "sin": sin, "n_heads": hq}
    kv_heads = (width // d - hq) // 2
    return check(
        partial(module.norm_rope, **bound, backend=machine.backend),
        partial(reference.norm_rope, **bound),
        given,
        rows={"gradient 1": b * s * hq, "gradient 2": b * s * kv_heads},
        **options,
    )


def assert_parity(*arguments, **options) -> None:
    results = parity(*arguments, **options)
    assert all(result.agrees for result in results), results


def test_the_reference_is_the_norm_and_then_the_rotation() -> None:
    qkv, q_weight, k_weight = torch.randn(2, 5, 7 * 6).double(), torch.randn(6).double(), torch.randn(6).double()
    cos, sin = (table.double() for table in kernels.rope_cos_sin(3, 5, 6, 100.0))
    q, k, v = qkv.view(2, 5, 7, 6).split((3, 2, 2), dim=2)
    expected = reference.rope(reference.rms_norm(q, q_weight), reference.rms_norm(k, k_weight), cos, sin)
    found = reference.norm_rope(qkv, q_weight, k_weight, cos, sin, n_heads=3)
    for x, y in zip(found, (*expected, v), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("machine", EVERY_DTYPE)
@pytest.mark.parametrize(
    ("b", "s", "hq", "hkv", "d"),
    [
        (1, 1, 1, 1, 2),
        (3, 1, 6, 2, 128),
        (2, 3, 3, 1, 80),
        (1, 129, 8, 2, 64),
        (2, 7, 14, 7, 6),
        (1, 2, 2, 1, 300),
        pytest.param(1, 127, 3, 3, 256, marks=pytest.mark.slow),
    ],
)
def test_backends_agree_with_the_reference(machine: Machine, b: int, s: int, hq: int, hkv: int, d: int) -> None:
    assert_parity(machine, inputs(machine, b, s, hq, hkv, d), hq)


@pytest.mark.parametrize("machine", EVERYWHERE)
@pytest.mark.parametrize(
    "layout",
    [lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]], lambda x: torch.cat((x, x), -1)[..., ::2]],
    ids=["slice", "every other column"],
)
def test_any_strides_of_inputs_and_gradients(machine: Machine, layout) -> None:
    given = [layout(x) for x in inputs(machine, 2, 5, 3, 1, 20)]
    assert_parity(machine, given, 3, gradient_layout=layout)


@pytest.mark.parametrize("machine", TRITON)
def test_v_is_a_view_and_only_its_gradient_reaches_its_columns(machine: Machine) -> None:
    given = [x.requires_grad_() for x in inputs(machine, 2, 5, 3, 1, 16)]
    _, _, v = kernels.norm_rope(*given, *angles(machine, 5, 16), n_heads=3, backend="triton")
    assert v.untyped_storage().data_ptr() == given[0].untyped_storage().data_ptr()
    (gradient,) = torch.autograd.grad(v.sum(), given[0])
    assert torch.equal(gradient, torch.cat((torch.zeros(2, 5, 64), torch.ones(2, 5, 16)), -1).to(gradient))


def test_gradcheck() -> None:
    given = [x.double().requires_grad_() for x in (torch.randn(1, 3, 16), torch.randn(4), torch.randn(4))]
    cos, sin = (table.double() for table in kernels.rope_cos_sin(0, 3, 4, 100.0))
    assert torch.autograd.gradcheck(lambda *x: kernels.norm_rope(*x, cos, sin, n_heads=2), given)


@pytest.mark.parametrize("machine", EXACT)
def test_registered_ops_pass_opcheck(machine: Machine) -> None:
    given, tables = inputs(machine, 2, 3, 2, 1, 16), angles(machine, 3, 16)
    torch.library.opcheck(norm_rope_forward.op, (*given, *tables, 1e-6, 2))
    gradients = [machine.randn(2, 3, heads, 16) for heads in (2, 1, 1)]
    rstd = torch.rand(2, 3, 3, device=machine.device) + 0.5
    torch.library.opcheck(norm_rope_backward.op, (*gradients, *given, rstd, *tables))


@pytest.mark.parametrize("machine", EXACT)
def test_compiled_is_eager(machine: Machine) -> None:
    def run(function) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in given]
        outputs = function(*leaves, *angles(machine, 3, 16))
        return [*outputs, *torch.autograd.grad(outputs, leaves, behind)]

    given, behind = inputs(machine, 2, 3, 2, 1, 16), [machine.randn(2, 3, heads, 16) for heads in (2, 1, 1)]
    function = partial(kernels.norm_rope, n_heads=2, backend="triton")
    torch._dynamo.reset()
    compiled = run(torch.compile(function, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(x, y) for x, y in zip(compiled, run(function), strict=True))


@pytest.mark.parametrize("backend", ["cpp", "torch", "triton"])
@pytest.mark.parametrize(
    ("qkv", "q_weight", "k_weight", "cos"),
    [
        ((1, 2, 16), (4,), (4,), (3, 2)),
        ((1, 2, 16), (4,), (8,), (2, 2)),
        ((1, 2, 12), (4,), (4,), (2, 2)),
        ((1, 2, 8), (4,), (4,), (2, 2)),
        ((1, 2, 15), (3,), (3,), (2, 1)),
    ],
    ids=["angles", "weights", "heads", "no heads of k", "odd width"],
)
def test_shapes_that_do_not_fit(backend: str, qkv, q_weight, k_weight, cos) -> None:
    tensors = (torch.zeros(shape) for shape in (qkv, q_weight, k_weight, cos, cos))
    with pytest.raises(ValueError, match=r"kernels\.norm_rope: .* do not fit"):
        kernels.norm_rope(*tensors, n_heads=2, backend=backend)


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("/ (2 * HALF) + eps)", "/ (2 * HALF))"),
        ("/ (2 * HALF) + eps)", "/ HALF + eps)"),
        ("x1 * inverse[:, :, None] * w1", "x1 * inverse[:, :, None]"),
        ("tl.where(of_k < 0, q_weight, k_weight)", "tl.where(of_k < 1, q_weight, k_weight)"),
        ("(y2 * c + y1 * s)", "(y2 * c - y1 * s)"),
        ("(token % seq_len)[:, None] * HALF", "token[:, None] * HALF"),
        ("g2 * c - g1 * s  #", "g2 * c + g1 * s  #"),
        ("q_share1 += tl.sum", "q_share1 = tl.sum"),
        ("tl.where(is_q, 0.0, dy2 * n2)", "dy2 * n2"),
        ("dn1 - n1 * mean", "dn1"),
        ("+ q_heads + k_heads + head[None, :]) * (2 * HALF)", "+ q_heads + head[None, :]) * (2 * HALF)"),
        ("tl.cdiv(n_tokens, TOKENS), tl.num_programs(0))", "tl.cdiv(n_tokens, TOKENS), tl.num_programs(0) * 2)"),
    ],
)
def test_a_changed_kernel_disagrees(machine: Machine, old: str, new: str, tmp_path: Path) -> None:
    # More tokens than the programs of a GPU take at once; eps counts where the numbers are small.
    given = inputs(machine, 2, 2500 if machine.device == "cuda" else 150, 3, 2, 10)
    given[0] *= torch.rand(given[0].shape[:2], device=machine.device)[:, :, None] * 1e-2
    assert_parity(machine, given, 3)
    module = mutated("norm_rope", old, new, tmp_path)
    assert not all(result.agrees for result in parity(machine, given, 3, module=module))
