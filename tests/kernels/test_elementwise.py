"""RoPE and SwiGLU: the twins against other formulas, the backends against the twins."""

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


def holds(op, twin, inputs: list[Tensor], rows: dict[str, int] | None = None) -> bool:
    results = check(op, twin, inputs, rows=rows)
    assert all(result.agrees for result in results), results
    return True


class TestRope:
    def test_twin_is_a_rotation_in_the_complex_plane(self) -> None:
        q, k = torch.randn(2, 9, 3, 16, dtype=torch.float64), torch.randn(2, 9, 1, 16, dtype=torch.float64)
        angle = torch.rand(9, 8, dtype=torch.float64) * 6
        for x, rotated in zip((q, k), reference.rope(q, k, angle.cos(), angle.sin()), strict=True):
            turned = torch.complex(x[..., :8], x[..., 8:]) * torch.exp(1j * angle)[:, None, :]
            torch.testing.assert_close(rotated, torch.cat((turned.real, turned.imag), -1))

    def test_scores_depend_on_the_distance_alone(self) -> None:
        q, k = torch.randn(1, 1, 1, 32, dtype=torch.float64), torch.randn(1, 1, 1, 32, dtype=torch.float64)
        cos, sin = (table.double() for table in kernels.rope_cos_sin(0, 50, 32, 10_000.0))
        rows_q, rows_k = kernels.rope(q.expand(1, 50, 1, 32), k.expand(1, 50, 1, 32), cos, sin)
        scores = rows_q[0, :, 0] @ rows_k[0, :, 0].T
        torch.testing.assert_close(scores[10:, 10:], scores[:-10, :-10], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("s", "hq", "hkv", "d"), [(0, 2, 2, 16), (1, 1, 1, 2), (65, 4, 1, 64), (7, 3, 3, 80)])
    def test_torch_backend_agrees_with_the_twin(self, s: int, hq: int, hkv: int, d: int, dtype: torch.dtype) -> None:
        q, k = torch.randn(2, s, hq, d).to(dtype), torch.randn(2, s, hkv, d).to(dtype)
        cos, sin = kernels.rope_cos_sin(3, s, d, 10_000.0)
        assert holds(partial(kernels.rope, cos=cos, sin=sin), partial(reference.rope, cos=cos, sin=sin), [q, k])

    def test_gradcheck(self) -> None:
        q, k = (torch.randn(1, 3, h, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1))
        cos, sin = (table.double() for table in kernels.rope_cos_sin(0, 3, 4, 100.0))
        for module in (reference, kernels):
            assert torch.autograd.gradcheck(lambda q, k, rope=module.rope: rope(q, k, cos, sin), (q, k))

    def test_angles(self) -> None:
        cos, sin = kernels.rope_cos_sin(5, 3, 8, 10_000.0)
        angle = torch.tensor([[p * 10_000.0 ** (-2 * i / 8) for i in range(4)] for p in (5, 6, 7)])
        torch.testing.assert_close(cos, angle.cos())
        torch.testing.assert_close(sin, angle.sin())
        assert cos.dtype == sin.dtype == torch.float32

    def test_angles_are_those_of_transformers_bit_for_bit(self) -> None:
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


class TestSwiGLU:
    def test_twin_is_the_formula(self) -> None:
        gate, up = torch.randn(2, 4, 6, dtype=torch.float64)
        torch.testing.assert_close(reference.swiglu(gate, up), F.silu(gate) * up)
        torch.testing.assert_close(reference.swiglu(torch.cat((gate, up), -1)), F.silu(gate) * up)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("rows", "f"), [(0, 8), (1, 1), (3, 127), (129, 384)])
    def test_torch_backend_agrees_with_the_twin(self, rows: int, f: int, dtype: torch.dtype) -> None:
        gate, up = torch.randn(rows, f).to(dtype), torch.randn(rows, f).to(dtype)
        assert holds(kernels.swiglu, reference.swiglu, [gate, up])
        assert holds(kernels.swiglu, reference.swiglu, [torch.cat((gate, up), -1)])

    @pytest.mark.parametrize("module", [reference, kernels])
    def test_gradcheck(self, module) -> None:
        gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradcheck(module.swiglu, (gate, up))
        assert torch.autograd.gradcheck(module.swiglu, (torch.randn(3, 6, dtype=torch.float64, requires_grad=True),))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_far_from_zero(self, dtype: torch.dtype) -> None:
        gate = torch.tensor([-200.0, -30.0, 30.0, 200.0], dtype=dtype)
        assert kernels.swiglu(gate, torch.ones_like(gate)).isfinite().all()
