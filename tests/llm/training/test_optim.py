import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import SMALL_MODEL, small_config

from llm.config import Config, ModelConfig
from llm.config_file import parse_config
from llm.errors import UserError
from llm.model.transformer import Transformer
from llm.training.optim import learning_rate, make_optimizer


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
def test_muon_trains_at_the_stages_of_adamw_but_3(stage: int, precision: str) -> None:
    chosen = {"optimizer__kind": "muon", "deepspeed__zero_stage": stage, "train__precision": precision}
    tree = small_config(Path("data"), Path("run"), **chosen)
    if stage < 3 and (stage, precision) != (0, "fp16"):
        assert parse_config(tree, "test").optimizer.kind == "muon"
        return
    what = "train.precision=fp16" if stage == 0 else "optimizer.kind=muon"
    with pytest.raises(
        UserError, match=re.escape(f"{what} does not train at deepspeed.zero_stage {stage} (")
    ) as caught:
        parse_config(tree, "test")
    assert ("use deepspeed.zero_stage=2, 1 or 0" if stage == 3 else "use deepspeed.zero_stage=1") in str(caught.value)


def test_matrices_are_decayed_norms_biases_and_embeddings_are_not() -> None:
    model = Transformer(ModelConfig(**SMALL_MODEL, vocab_size=100, qk_norm=True, attention_bias="qkvo"))
    optimizer = make_optimizer(model, config(1, 0, 0.1).optimizer)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = 0.0 if "norm" in name or name.endswith(".bias") or name == "embed_tokens.weight" else 0.1
        assert decay[id(parameter)] == expected, name
    assert len(decay) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_without_a_token_keep_every_bit(kind: str, tied: bool) -> None:
    shape = ModelConfig(**SMALL_MODEL, vocab_size=100, embedding_rows=110, tie_embeddings=tied)
    model = Transformer(shape)
    model.init_weights(0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert all(before[name][100:110].abs().min() > 0 for name in before if "embed" in name or "head" in name)
    chosen = config(1, 0, 0.1).optimizer.model_copy(update={"kind": kind, "muon_lr": 0.1 if kind == "muon" else None})
    optimizer = make_optimizer(model, chosen)
    ids = torch.randint(100, (2, 20), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids, z_loss=1e-3).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        changed = (parameter != before[name]).flatten(1).any(1) if parameter.dim() > 1 else None
        if "embed" in name or "head" in name:
            assert not changed[100:].any()
            assert changed[:100].any()
    assert model(ids).shape[-1] == 100
