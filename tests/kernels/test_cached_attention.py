"""Attention over a cache with what a step does around it: against the separate reference ops."""

import pytest
import torch
from machines import EXACT, TRITON, Machine
from torch import Tensor

import kernels
from kernels import reference
from kernels.dispatch import using
from kernels.launch import force_tile
from llm.config import ModelConfig
from llm.model.transformer import KVCache, Transformer

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SLOTS = 96
SHAPES = [  # B, Hq, Hkv, D
    (2, 4, 2, 16),
    (1, 3, 1, 48),
    (2, 2, 2, 32),
    (1, 40, 2, 16),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def expected(
    qkv: Tensor, keys: Tensor, values: Tensor, angles: list[Tensor], position: int, first: Tensor, norms
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (attention [B, Hq, D], new key, new value [B, Hkv, D]), the softmax in fp64; keys: [B, Hkv, slots, D]."""
    kv_heads = keys.shape[1]
    heads = qkv.shape[1] - 2 * kv_heads
    q, k, v = qkv[:, None].split((heads, kv_heads, kv_heads), dim=2)
    if norms is not None:
        q, k = (reference.rms_norm(x, norm, 1e-5) for x, norm in zip((q, k), norms, strict=True))
    q, k = reference.rope(q, k, *(table[position : position + 1] for table in angles))
    seen = [torch.cat((cache[:, :, :position].transpose(1, 2), x), 1).double() for cache, x in ((keys, k), (values, v))]
    return reference.attention(q.double(), *seen, doc_start=first[:, None].int())[:, 0], k[:, 0], v[:, 0]


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("machine", TRITON)
@pytest.mark.parametrize(("b", "hq", "hkv", "d"), SHAPES)
@pytest.mark.parametrize("split", [32, 128])
@pytest.mark.parametrize("with_norms", [False, True])
def test_a_step_is_what_the_separate_ops_compute(
    machine: Machine, b: int, hq: int, hkv: int, d: int, split: int, with_norms: bool
) -> None:
    """At the edges of blocks and splits; masked slots may hold NaN, and only the new token's slot is written."""
    angles = list(kernels.rope_cos_sin(0, SLOTS, d, 10_000.0, torch.device(machine.device)))
    norms = (machine.randn(d), machine.randn(d)) if with_norms else None
    for position, first in ((0, 0), (31, 0), (32, 32), (63, 40), (64, 3), (70, 70), (95, 33)):
        qkv = machine.randn(b, hq + 2 * hkv, d)
        starts = torch.tensor([first, *[0] * (b - 1)], device=machine.device)
        keys, values = machine.randn(b, hkv, SLOTS, d), machine.randn(b, hkv, SLOTS, d)
        for cache in (keys, values):
            cache[0, :, :first] = cache[:, :, position:] = float("nan")
        out, k, v = expected(qkv, keys.nan_to_num(), values.nan_to_num(), angles, position, starts, norms)
        before = [keys.clone(), values.clone()]
        with force_tile("cached_attention.step", {"SPLIT_KEYS": split, "BLOCK_K": 16}):
            found = kernels.cached_attention(
                qkv, keys, values, *angles, torch.tensor([position], device=machine.device), starts, SLOTS, norms, 1e-5
            )
        limit = TOLERANCE[machine.dtype]
        torch.testing.assert_close(found.double(), out, atol=limit, rtol=limit)
        for cache, old, new in zip((keys, values), before, (k, v), strict=True):
            torch.testing.assert_close(cache[:, :, position], new, atol=limit, rtol=limit)
            cache[:, :, position] = old[:, :, position]
            assert torch.equal(cache.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize("changes", [{}, {"qk_norm": False, "n_kv_heads": 4}, {"attention_bias": "qkvo"}])
@torch.inference_mode()
def test_a_models_step_is_torchs(machine: Machine, changes: dict[str, object]) -> None:
    config = ModelConfig(n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, vocab_size=300)
    model = Transformer(config.model_copy(update=changes))
    model.init_weights(0)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape) if parameter.dim() == 1 else 0.0)
    model.to(machine.device)
    caches = [KVCache.empty(model.config, 2, 48, machine.device, torch.float32) for _ in range(2)]
    first = torch.tensor([0, 5], device=machine.device)
    for position in range(5, 20):
        ids, slot = torch.randint(300, (2, 1)).to(machine.device), torch.tensor([position], device=machine.device)
        logits = []
        for cache, backend in zip(caches, ("torch", "triton"), strict=True):
            with using(backend):
                logits.append(model.step(ids, cache, slot, 48, first))
        torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_other_calls_are_torchs() -> None:
    """On a CPU, where the decoder in C++ has its own attention, and by choice."""
    x, keys = torch.zeros(1, 1, 64), torch.zeros(2, 1, 2, 16, 16)
    assert not kernels.runs_in_place(x, keys, 4)
    with using("torch"):
        assert not kernels.runs_in_place(x, keys, 4)


@pytest.mark.parametrize("machine", EXACT)
def test_shapes_that_no_tile_holds_are_torchs(machine: Machine) -> None:
    def runs(keys: Tensor, heads: int) -> bool:
        return kernels.runs_in_place(machine.randn(1, 1, 64), keys, heads)

    with using("triton"):
        assert runs(machine.randn(1, 2, 16, 16), 4)
        for keys, heads, why in (
            (machine.randn(1, 2, 16, 24), 4, "head dimension 24"),
            (machine.randn(1, 1, 16, 16), 65, "65 query heads"),
            (machine.randn(1, 2, 16, 16).half(), 4, "cache is torch.float16"),
        ):
            with pytest.raises(kernels.dispatch.CannotRun, match=why):
                runs(keys, heads)
