"""RoPE: the reference against the rotation in the complex plane, the backends against it."""

from functools import partial
from pathlib import Path

import pytest
import torch
from machines import EVERY_DTYPE, EVERYWHERE, EXACT, TRITON, Machine
from mutation import mutated
from torch import Tensor

import kernels
from kernels import reference
from kernels.parity import Parity, check, disagreements
from kernels.rope import MAX_WIDTH, rope_rotate


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def angles(machine: Machine, s: int, d: int) -> tuple[Tensor, Tensor]:
    return kernels.rope_cos_sin(3, s, d, 10_000.0, torch.device(machine.device))


def parity(machine: Machine, q: Tensor, k: Tensor, module=kernels, **options) -> list[Parity]:
    cos, sin = angles(machine, q.shape[1], q.shape[-1])
    return check(
        partial(module.rope, cos=cos, sin=sin, backend=machine.backend),
        partial(reference.rope, cos=cos, sin=sin),
        [q, k],
        **options,
    )


def assert_parity(*arguments, **options) -> None:
    results = parity(*arguments, **options)
    assert all(result.agrees for result in results), disagreements(results)


def test_reference_is_a_rotation_in_the_complex_plane() -> None:
    q, k = torch.randn(2, 9, 3, 16, dtype=torch.float64), torch.randn(2, 9, 1, 16, dtype=torch.float64)
    angle = torch.rand(9, 8, dtype=torch.float64) * 6
    for x, rotated in zip((q, k), reference.rope(q, k, angle.cos(), angle.sin()), strict=True):
        turned = torch.complex(x[..., :8], x[..., 8:]) * torch.exp(1j * angle)[:, None, :]
        torch.testing.assert_close(rotated, torch.cat((turned.real, turned.imag), -1))


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(1, 1, 1, 32, dtype=torch.float64), torch.randn(1, 1, 1, 32, dtype=torch.float64)
    cos, sin = (table.double() for table in kernels.rope_cos_sin(0, 50, 32, 10_000.0))
    rows_q, rows_k = kernels.rope(q.expand(1, 50, 1, 32), k.expand(1, 50, 1, 32), cos, sin)
    scores = rows_q[0, :, 0] @ rows_k[0, :, 0].T
    torch.testing.assert_close(scores[10:, 10:], scores[:-10, :-10], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("machine", EVERY_DTYPE)
@pytest.mark.parametrize(
    ("b", "s", "hq", "hkv", "d"),
    [
        (2, 0, 2, 2, 16),
        (0, 3, 2, 2, 16),
        (1, 1, 1, 1, 2),
        (3, 1, 6, 2, 128),
        (2, 3, 3, 1, 80),
        (1, 129, 8, 2, 64),
        (2, 7, 14, 7, 6),
        (1, 2, 2, 1, 300),
        pytest.param(1, 127, 3, 3, 256, marks=pytest.mark.slow),
        pytest.param(1, 1023, 3, 1, 64, marks=pytest.mark.slow),
    ],
)
def test_backends_agree_with_the_reference(machine: Machine, b: int, s: int, hq: int, hkv: int, d: int) -> None:
    assert_parity(machine, machine.randn(b, s, hq, d), machine.randn(b, s, hkv, d))


@pytest.mark.parametrize("machine", EVERYWHERE)
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat((x, x), -1)[..., :20],
        lambda x: torch.cat((x, x), -1)[..., ::2],
        lambda x: torch.cat((x, x), 2)[:, :, 2:5],
        lambda x: torch.cat((x.flatten(), x.flatten()))[3 : 3 + x.numel()].view(x.shape),
        lambda x: x[:, :1, :1].expand(x.shape),
    ],
    ids=["transposed", "slice of each head", "every other column", "slice of the heads", "offset", "expanded"],
)
def test_any_strides_of_inputs_and_gradients(machine: Machine, layout) -> None:
    q, k = (layout(machine.randn(2, 5, 3, 20)) for _ in range(2))
    assert_parity(machine, q, k, gradient_layout=layout)


@pytest.mark.parametrize("machine", TRITON)
def test_slices_of_a_fused_projection_are_not_copied(machine: Machine) -> None:
    q, k, _ = machine.randn(2, 5, 10, 16).requires_grad_().split((6, 2, 2), dim=2)
    with torch.profiler.profile() as profile:
        rotated = kernels.rope(q, k, *angles(machine, 5, 16), backend="triton")
    assert not {"aten::contiguous", "aten::clone"} & {event.name for event in profile.events()}
    assert all(x.is_contiguous() for x in rotated)


@pytest.mark.parametrize("machine", EVERYWHERE)
def test_the_negative_angle_turns_back(machine: Machine) -> None:
    q, k = machine.randn(1, 5, 2, 16), machine.randn(1, 5, 1, 16)
    cos, sin = angles(machine, 5, 16)

    def there_and_back(module, q: Tensor, k: Tensor, **options) -> tuple[Tensor, Tensor]:
        return module.rope(*module.rope(q, k, cos, sin, **options), cos, -sin, **options)

    ours = partial(there_and_back, kernels, backend=machine.backend)
    results = check(ours, partial(there_and_back, reference), [q, k])
    assert all(result.agrees for result in results), disagreements(results)
    exact = there_and_back(reference, q.double(), k.double())
    torch.testing.assert_close(exact, (q.double(), k.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("machine", EVERYWHERE)
def test_the_gradient_of_one_output_alone(machine: Machine) -> None:
    q, k = (machine.randn(1, 5, heads, 16).requires_grad_() for heads in (2, 1))
    cos, sin = angles(machine, 5, 16)
    rotated_q, _ = kernels.rope(q, k, cos, sin, backend=machine.backend)
    rotated_q.sum().backward()
    assert q.grad.any()
    assert k.grad is None or not k.grad.any()


@pytest.mark.parametrize("module", [reference, kernels])
def test_gradcheck(module) -> None:
    q, k = (torch.randn(1, 3, h, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1))
    cos, sin = (table.double() for table in kernels.rope_cos_sin(0, 3, 4, 100.0))
    assert torch.autograd.gradcheck(lambda q, k: module.rope(q, k, cos, sin), (q, k))


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize("inverse", [False, True])
def test_registered_op_passes_opcheck(machine: Machine, inverse: bool) -> None:
    q, k, _ = machine.randn(2, 3, 4, 16).split((2, 1, 1), dim=2)
    torch.library.opcheck(rope_rotate.op, (q, k, *angles(machine, 3, 16), inverse))


@pytest.mark.parametrize("machine", EXACT)
def test_compiled_is_eager(machine: Machine) -> None:
    def rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = qkv.split((2, 1, 1), dim=2)
        return kernels.rope(q, k, cos, sin, backend="triton")

    def run(function) -> list[Tensor]:
        leaf = qkv.clone().requires_grad_()
        outputs = function(leaf, *angles(machine, 3, 16))
        return [*outputs, *torch.autograd.grad(outputs, leaf, behind)]

    qkv, behind = machine.randn(2, 3, 4, 16), [machine.randn(2, 3, heads, 16) for heads in (2, 1)]
    torch._dynamo.reset()
    compiled = run(torch.compile(rotate, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(x, y) for x, y in zip(compiled, run(rotate), strict=True))


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["rows", "tokens", "heads"])
def test_offsets_beyond_32_bits(machine: Machine, axis: int) -> None:
    # Memory that is never touched is never committed: what lies along the axis is 2^30 elements apart.
    shape, strides = [1, 1, 1, 8], [8, 8, 8, 1]
    shape[axis], strides[axis] = 4, 2**30
    q = torch.empty(3 * 2**30 + 8, dtype=torch.float16, device=machine.device).as_strided(shape, strides)
    q.copy_(torch.randn(shape))
    cos, sin = angles(machine, shape[1], 8)
    far, near = (kernels.rope(x, x, cos, sin, backend="triton") for x in (q, q.contiguous()))
    assert all(torch.equal(x, y) for x, y in zip(far, near, strict=True))


@pytest.mark.parametrize("backend", ["cpp", "torch", "triton"])
@pytest.mark.parametrize(
    ("q", "k", "cos"),
    [
        ((1, 4, 2, 15), (1, 4, 1, 15), (4, 7)),
        ((1, 4, 2, 16), (1, 4, 1, 8), (4, 8)),
        ((1, 4, 2, 16), (1, 5, 1, 16), (4, 8)),
        ((1, 4, 2, 16), (1, 4, 1, 16), (3, 8)),
        ((1, 4, 2, 16), (1, 4, 1, 16), (4, 16)),
    ],
    ids=["odd D", "k's D", "k's S", "too few positions", "a whole D of angles"],
)
def test_shapes_that_do_not_fit_are_refused(backend: str, q, k, cos) -> None:
    with pytest.raises(ValueError, match=r"kernels\.rope: .*do not fit"):
        kernels.rope(torch.zeros(q), torch.zeros(k), torch.zeros(cos), torch.zeros(cos), backend=backend)


@pytest.mark.parametrize("machine", TRITON)
def test_what_the_kernel_does_not_cover_is_refused_by_name(machine: Machine) -> None:
    q, (cos, sin) = machine.randn(1, 2, 1, 8), angles(machine, 2, 8)
    with pytest.raises(RuntimeError, match="it has no gradient for cos and sin"):
        kernels.rope(q, q, cos.requires_grad_(), sin, backend="triton")
    with pytest.raises(RuntimeError, match=r"k torch\.float64"):
        kernels.rope(q, q.double(), cos.detach(), sin, backend="triton")
    wide = machine.randn(1, 1, 1, MAX_WIDTH + 2)
    with pytest.raises(RuntimeError, match=f"width {MAX_WIDTH + 2} is above {MAX_WIDTH}"):
        kernels.rope(wide, wide, *angles(machine, 1, MAX_WIDTH + 2), backend="triton")


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x1 * c - x2 * s", "x1 * c + x2 * s"),
        ("x2 * c + x1 * s", "x2 * c"),
        ("        s = -s", "        s = s"),
        ("angle = token[:, None] * HALF", "angle = 0 * token[:, None]"),
        ("(token < n_tokens)[:, None] & (pair", "(token < n_tokens - 1)[:, None] & (pair"),
        ("pair < HALF", "pair < HALF - 1"),
        ("of_k < k_heads", "of_k < k_heads - 1"),
        ("0, q_heads + k_heads, HEADS", "0, q_heads, HEADS"),
        ("of_k * k_head_stride", "head * k_head_stride"),
        ("of_k < 0,\n            q + ", "of_k < -1,\n            q + "),
        ("% blocks * TOKENS", "% blocks"),
    ],
)
@pytest.mark.usefixtures("unwritten_is_nan")
def test_a_changed_kernel_disagrees(machine: Machine, old: str, new: str, tmp_path: Path) -> None:
    q, _, k, _ = machine.randn(2, 19, 40, 12).split((8, 10, 2, 20), dim=2)
    results = parity(machine, q, k, mutated("rope", old, new, tmp_path))
    assert not all(result.agrees for result in results)


def test_angles() -> None:
    cos, sin = kernels.rope_cos_sin(5, 3, 8, 10_000.0)
    angle = torch.tensor([[p * 10_000.0 ** (-2 * i / 8) for i in range(4)] for p in (5, 6, 7)])
    torch.testing.assert_close(cos, angle.cos())
    torch.testing.assert_close(sin, angle.sin())
    assert cos.dtype == sin.dtype == torch.float32


def test_angles_are_those_of_transformers_bit_for_bit() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(4000)[None])
    ours = kernels.rope_cos_sin(1000, 3000, 128, 500_000.0)
    assert torch.equal(ours[0], cos[0, 1000:, :64])
    assert torch.equal(ours[1], sin[0, 1000:, :64])
