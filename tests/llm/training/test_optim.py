import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import SMALL_MODEL, newton_schulz, small_config

from llm.config import Config, ModelConfig, OptimizerConfig, parse_config
from llm.errors import UserError
from llm.model.hf import to_hf
from llm.model.transformer import Transformer
from llm.training.optim import learning_rate, make_optimizer, orthogonalise


def config(total: int, warmup: int, low: float) -> Config:
    tree = small_config(Path("data"), Path("run"), train__total_tokens=total, schedule__warmup_tokens=warmup)
    tree["schedule"]["min_lr_ratio"] = low
    return parse_config(tree, "test")


def test_warmup_is_linear_and_ends_at_the_peak() -> None:
    made = config(total=51_200, warmup=2_048, low=0.1)
    rates = [learning_rate(512 * step, made) / made.optimizer.lr for step in range(5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_ends_at_the_floor() -> None:
    made = config(total=51_200, warmup=0, low=0.1)
    assert learning_rate(0, made) == made.optimizer.lr
    assert learning_rate(25_600, made) == pytest.approx(0.55 * made.optimizer.lr)
    assert learning_rate(51_200, made) == pytest.approx(0.1 * made.optimizer.lr)


def test_linear_and_wsd_end_at_the_floor() -> None:
    made = config(total=51_200, warmup=0, low=0.1)

    def rates(**schedule: object) -> list[float]:
        changed = made.model_copy(update={"schedule": made.schedule.model_copy(update=schedule)})
        return [learning_rate(tokens, changed) / made.optimizer.lr for tokens in (0, 25_600, 40_960, 46_080, 51_200)]

    assert rates(kind="linear") == pytest.approx([1.0, 0.55, 0.28, 0.19, 0.1])
    assert rates(kind="wsd") == pytest.approx([1.0, 1.0, 1.0, 0.55, 0.1])
    assert rates(kind="wsd", decay_tokens=51_200) == rates(kind="linear")
    assert rates(kind="wsd", decay_tokens=0) == [1.0] * 5


def test_decay_tokens_belong_to_wsd() -> None:
    tree = small_config(Path("data"), Path("run"), schedule__decay_tokens=1)
    with pytest.raises(UserError, match=r"schedule\.decay_tokens is for schedule\.kind=wsd, not cosine"):
        parse_config(tree, "test")


@given(
    total=st.integers(1, 10**12),
    warmup=st.integers(0, 10**12),
    low=st.floats(0, 1),
    tokens=st.integers(0, 2 * 10**12),
    kind=st.sampled_from(["cosine", "linear", "wsd"]),
)
def test_the_rate_never_leaves_its_bounds(total: int, warmup: int, low: float, tokens: int, kind: str) -> None:
    made = config(total, warmup, low)
    made = made.model_copy(update={"schedule": made.schedule.model_copy(update={"kind": kind})})
    assert 0 <= learning_rate(tokens, made) <= made.optimizer.lr * (1 + 1e-12)


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_muon_trains_at_stage_0_without_fp16_and_is_refused_elsewhere(stage: int, precision: str) -> None:
    chosen = {"optimizer__kind": "muon", "deepspeed__zero_stage": stage, "train__precision": precision}
    tree = small_config(Path("data"), Path("run"), **chosen)
    if stage == 0 and precision != "fp16":
        assert parse_config(tree, "test").optimizer.kind == "muon"
        return
    what = "train.precision=fp16" if stage == 0 else "optimizer.kind=muon"
    with pytest.raises(
        UserError, match=re.escape(f"{what} does not train at deepspeed.zero_stage {stage} (")
    ) as caught:
        parse_config(tree, "test")
    assert "zero_stage=1" not in str(caught.value), "which Muon does not train at"


def test_matrices_are_decayed_norms_and_embeddings_are_not() -> None:
    model = Transformer(ModelConfig(**SMALL_MODEL, vocab_size=100, qk_norm=True))
    optimizer = make_optimizer(model, config(1, 0, 0.1).optimizer)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = 0.0 if "norm" in name or name == "embed_tokens.weight" else 0.1
        assert decay[id(parameter)] == expected, name
    assert len(decay) == len(list(model.parameters()))


@pytest.mark.parametrize("shape", [(32, 96), (96, 32)])
def test_orthogonalising_leaves_the_directions_and_evens_the_singular_values(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(matrices)
    for matrix, result in zip(matrices, found, strict=True):
        assert result == pytest.approx(newton_schulz(matrix).float(), abs=1e-4)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        values = (u.T @ result @ v.T).diagonal()
        assert 0.6 < values.min() < values.max() < 1.3


@pytest.mark.parametrize("muon_lr", [None, 0.05])
def test_muon_updates_each_matrix_for_itself_and_adamw_the_rest(muon_lr: float | None) -> None:
    """Two updates: q, k, v, gate and up are matrices of their own; embeddings, head and norms are AdamW's."""
    shape = ModelConfig(**SMALL_MODEL, vocab_size=100, qk_norm=True)
    model, other = Transformer(shape), Transformer(shape)
    chosen = OptimizerConfig(kind="muon", lr=0.02, muon_lr=muon_lr, muon_momentum=0.9, weight_decay=0.1)
    decays = {"weight_decay": 0.1, "kind": "adamw"}
    optimizer, adamw = make_optimizer(model, chosen), make_optimizer(other, OptimizerConfig(lr=0.02, **decays))
    for some in (model, other):
        some.init_weights(3)
    expected = {
        key: part.clone() for name, p in model.named_parameters() for key, part in to_hf(shape, name, p).items()
    }
    momentum = {key: torch.zeros_like(part) for key, part in expected.items()}
    rate = muon_lr or 0.02
    generator = torch.Generator().manual_seed(4)
    for _ in range(2):
        for (name, parameter), by_adamw in zip(model.named_parameters(), other.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            by_adamw.grad = parameter.grad.clone()
            for key, gradient in to_hf(shape, name, parameter.grad).items():
                momentum[key] = 0.9 * momentum[key] + 0.1 * gradient
                direction = newton_schulz(0.9 * momentum[key] + 0.1 * gradient) if gradient.ndim == 2 else gradient
                scale = 0.2 * math.sqrt(max(gradient.shape))
                expected[key] = (1 - rate * 0.1) * expected[key] - rate * scale * direction
        optimizer.step()
        adamw.step()
    for (name, parameter), by_adamw in zip(model.named_parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None
        if parameter.ndim == 1 or not name.startswith("layers."):
            assert torch.equal(parameter, by_adamw), name
            continue
        for key, part in to_hf(shape, name, parameter.detach()).items():
            torch.testing.assert_close(part.double(), expected[key], rtol=0, atol=1e-5, msg=key)
