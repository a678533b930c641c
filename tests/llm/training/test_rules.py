"""Settings that follow: the rules' values and bounds; stated values win; a resumed run keeps what it began with."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import REPOSITORY, SMALL_MODEL, without_checksums

from llm.config import Config
from llm.config_file import load_config, parse_config
from llm.model.checkpoint import read_state
from llm.model.transformer import parameter_count
from llm.training import rules
from llm.training.resolve import resolve
from llm.training.rules import batch_tokens, follow, matrix_parameters, total_tokens, weight_decay

Llm = Callable[..., tuple[int, str, str]]
LADDER = st.integers(10**5, 10**11)


def followed(config: Config, text_tokens: int | None = None) -> Config:
    filled = config.model_copy(
        update={
            "model": config.model.model_copy(update={"vocab_size": config.model.vocab_size or 32_000}),
            "data": config.data.model_copy(update={"seq_len": config.data.seq_len or config.model.max_seq_len}),
        }
    )
    return follow(filled, text_tokens)[0]


@pytest.mark.parametrize(("name", "expected"), [("125m", 2.4e-3), ("350m", 1.6e-3), ("1.3b", 1.0e-3)])
def test_the_rates_are_those_of_tuned_runs(name: str, expected: float) -> None:
    """AdamW's at 20 tokens a parameter, within a factor 1.5 of those that the tuned recipes of other projects use."""
    config = followed(load_config(REPOSITORY / f"configs/{name}.json", ["optimizer.kind=adamw"]))
    assert expected / 1.5 < config.optimizer.lr < expected * 1.5
    assert config.train.total_tokens == 20 * parameter_count(config.model)


def test_muons_rate_at_125m_is_that_of_tuned_runs() -> None:
    config = followed(load_config(REPOSITORY / "configs/125m.json", ["optimizer.kind=muon", "deepspeed.zero_stage=0"]))
    assert 4.5e-3 / 1.5 < config.optimizer.muon_lr < 4.5e-3 * 1.5


def test_each_rule_gives_its_value_at_125m() -> None:
    """All that follows for configs/125m.json on web text: a changed constant or unit of a rule is seen here."""
    optimizer = {"kind": "muon", "lr": 2.4e-3, "muon_lr": 4.5e-3, "embed_lr": 1.62e-2, "norm_lr": 1.62e-2}
    config = followed(load_config(REPOSITORY / "configs/125m.json", ["deepspeed.zero_stage=0"]))
    found = config.optimizer.model_dump()
    assert {key: found[key] for key in optimizer} == optimizer
    assert config.optimizer.head_lr == 6.51e-3
    assert config.train.total_tokens == 20 * parameter_count(config.model) == 2_493_434_880
    assert config.train.global_batch_tokens == 131_072
    assert config.schedule.warmup_tokens == 2_493_434_880 // 50, "less than a token a parameter"
    assert (config.optimizer.beta2, config.optimizer.weight_decay) == (0.99, 0.0681)


@pytest.mark.parametrize(("batch", "expected"), [(64, 0.99), (2**19 - 64, 0.99), (2**19, 0.95), (2**22, 0.95)])
def test_the_second_moment_remembers_more_steps_of_a_small_batch(batch: int, expected: float) -> None:
    assert follow(small(train={"global_batch_tokens": batch}), None)[0].optimizer.beta2 == expected


def test_the_warm_up_of_a_long_run_is_a_token_a_parameter() -> None:
    config, _ = follow(small(train={"total_tokens": 10**9}), None)
    assert config.schedule.warmup_tokens == parameter_count(config.model)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_rates_from_trained_weights_are_a_tenth(kind: str) -> None:
    """And under AdamW all are the same, with the decay that other projects train with."""
    new, _ = follow(small(optimizer={"kind": kind}), 10**6)
    going_on, settings = follow(small(optimizer={"kind": kind}, train={"init_from": "run/latest"}), 10**6)
    rates = {key: value for key, value in new.optimizer.model_dump().items() if key.endswith("lr") and value}
    for key, rate in rates.items():
        expected = new.optimizer.lr if kind == "adamw" else rate
        assert getattr(going_on.optimizer, key) == pytest.approx(expected / 10, rel=1e-2), key
    assert going_on.optimizer.weight_decay == 0.1
    assert all("[" in setting.rule for setting in settings), "each names its source"


@given(parameters=LADDER, text=st.integers(1, 10**12))
def test_a_run_reads_no_text_more_than_four_times(parameters: int, text: int) -> None:
    assert total_tokens(parameters, None) == 20 * parameters
    assert total_tokens(parameters, text) == min(20 * parameters, 4 * text)


@given(total=LADDER, more=st.floats(1, 1e3), log2=st.integers(4, 13))
def test_the_batch_grows_with_the_run_and_is_a_power_of_two_of_sequences(total: int, more: float, log2: int) -> None:
    batch, larger = batch_tokens(total, 2**log2), batch_tokens(int(total * more), 2**log2)
    assert math.log2(batch / 2**log2).is_integer()
    assert batch <= larger
    # Within the rounding to a power of two, but for one sequence at least.
    assert batch == 2**log2 or 0.7 < batch / (0.58 * total**0.571) < 1.42


@given(n=LADDER, more=st.floats(1.01, 100))
def test_a_larger_model_has_lower_rates(n: int, more: float) -> None:
    assert rules.adamw_lr(int(n * more)) < rules.adamw_lr(n)
    assert rules.muon_lr(int(n * more)) < rules.muon_lr(n)
    assert rules.embed_lr(int(n * more)) < rules.embed_lr(n)
    assert rules.head_lr(int(n * more)) < rules.head_lr(n)


@given(lr=st.floats(1e-5, 1), steps=st.integers(1, 10**6), tokens_a_parameter=st.floats(0.1, 1_000))
def test_weight_decay_remembers_the_same_share_of_any_run(lr: float, steps: int, tokens_a_parameter: float) -> None:
    memory = 1 / (lr * weight_decay(lr, steps, tokens_a_parameter))
    assert memory / steps == pytest.approx(1.084 * tokens_a_parameter**-0.527, rel=1e-2)
    # Power Lines' own figure for 20 tokens a parameter.
    assert 1 / (lr * weight_decay(lr, steps, 20)) == pytest.approx(0.2236 * steps, rel=1e-2)


STATED = {
    "optimizer": {
        "kind": "muon",
        "lr": 0.5,
        "muon_lr": 0.25,
        "embed_lr": 0.1,
        "head_lr": 0.2,
        "norm_lr": 0.3,
        "beta2": 0.9,
        "weight_decay": 0.7,
    },
    "schedule": {"warmup_tokens": 77},
    "train": {"total_tokens": 12_345, "global_batch_tokens": 128},
}
MODEL = {**SMALL_MODEL, "vocab_size": 300}


def small(**sections: dict[str, object]) -> Config:
    return parse_config({"model": MODEL, "data": {"seq_len": 64}, "deepspeed": {"zero_stage": 0}, **sections}, "test")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [(section, key, value) for section, keys in STATED.items() for key, value in keys.items()],
)
def test_a_stated_value_wins(section: str, key: str, value: object) -> None:
    config, settings = follow(small(**{section: {key: value}}), 10**6)
    assert getattr(getattr(config, section), key) == value
    assert f"{section}.{key}" not in [setting.key for setting in settings]


def test_what_follows_is_told_with_its_rule_and_nothing_stays_open() -> None:
    config, settings = follow(small(), 10**6)
    for section, keys in STATED.items():
        for key in keys:
            assert getattr(getattr(config, section), key) is not None
            (setting,) = [setting for setting in settings if setting.key == f"{section}.{key}"]
            assert setting.value == getattr(getattr(config, section), key)
            assert "\n" not in setting.rule
    config, settings = follow(small(**STATED), 10**6)
    assert (settings, config) == ([], small(**STATED))


def test_a_stated_rate_moves_those_that_go_with_it() -> None:
    ruled, _ = follow(small(optimizer={"kind": "adamw"}), 10**6)
    config, settings = follow(small(optimizer={"kind": "adamw", "lr": 2 * ruled.optimizer.lr}), 10**6)
    assert [setting.key for setting in settings if "times 2, the stated lr" in setting.rule] == [
        "optimizer.embed_lr",
        "optimizer.head_lr",
        "optimizer.norm_lr",
    ]
    for key in ("embed_lr", "head_lr", "norm_lr"):
        assert getattr(config.optimizer, key) == pytest.approx(2 * getattr(ruled.optimizer, key), rel=1e-2)
    assert config.optimizer.muon_lr is None, "AdamW has no use for it"


def test_a_text_that_is_read_again_lowers_the_rates_of_embedding_head_and_norms() -> None:
    once, _ = follow(small(train={"total_tokens": 40_000}), 40_000)
    again, settings = follow(small(train={"total_tokens": 40_000}), 10_000)
    for key in ("embed_lr", "head_lr", "norm_lr"):
        assert getattr(again.optimizer, key) == pytest.approx(getattr(once.optimizer, key) / 4, rel=1e-2)
    assert sum("over 4 epochs" in setting.rule for setting in settings) == 3
    assert (again.optimizer.lr, again.optimizer.muon_lr) == (once.optimizer.lr, once.optimizer.muon_lr)


@given(lr=st.floats(1e-5, 1), steps=st.integers(1, 10**6), ratio=st.floats(0.1, 1_000), epochs=st.floats(0.01, 100))
def test_the_memory_is_never_longer_than_most_of_an_epoch(lr: float, steps: int, ratio: float, epochs: float) -> None:
    decay, unread = weight_decay(lr, steps, ratio, epochs), weight_decay(lr, steps, ratio)
    assert 1 / (lr * decay) <= 0.7 * steps / epochs * 1.01
    assert decay >= unread
    assert decay == unread or 1 / (lr * decay) == pytest.approx(0.7 * steps / epochs, rel=1e-2)


def test_a_text_that_is_read_again_raises_the_weight_decay() -> None:
    total = {"total_tokens": 400_000, "global_batch_tokens": 64}
    for kind in ("muon", "adamw"):
        runs = [follow(small(train=total, optimizer={"kind": kind}), tokens)[0] for tokens in (10**9, 100_000, 50_000)]
        once, four_times, eight_times = (run.optimizer.weight_decay for run in runs)
        assert 1 / (four_times * (runs[1].optimizer.muon_lr or runs[1].optimizer.lr)) == pytest.approx(
            0.7 * 6250 / 4, 1e-2
        )
        assert eight_times == pytest.approx(2 * four_times, rel=1e-2)
        assert once < four_times


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"deepspeed": {"zero_stage": 0}}, "muon"),
        ({"deepspeed": {"zero_stage": 1}, "train": {"precision": "fp16"}}, "muon"),
        ({"deepspeed": {"zero_stage": 2, "offload": "cpu"}}, "muon"),
        ({"deepspeed": {"zero_stage": 3}}, "adamw"),
    ],
)
def test_muon_is_chosen_where_the_stage_has_it(changes: dict[str, dict[str, object]], kind: str) -> None:
    assert follow(small(**changes), None)[0].optimizer.kind == kind


def test_the_matrices_are_all_but_embedding_and_head() -> None:
    config = small()
    per_layer = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 64 + 2 * 32 + 2 * 16  # the last two terms: norms
    assert matrix_parameters(config) == 2 * per_layer + 32
    tied = config.model_copy(update={"model": config.model.model_copy(update={"tie_embeddings": True})})
    assert matrix_parameters(tied) == matrix_parameters(config)


@pytest.fixture
def shapes_alone(small_shards: Path, tmp_path: Path) -> Path:
    """A config that states a model, how long to train, and nothing that follows."""
    tree = {
        "model": SMALL_MODEL,
        "data": {"path": str(small_shards)},
        "train": {"total_tokens": 2_048, "device": "cpu", "precision": "fp32", "eval_tokens": 512},
        "checkpoint": {"dir": str(tmp_path / "run"), "every_steps": 4},
        "deepspeed": {"zero_stage": 0},
    }
    (tmp_path / "config.json").write_text(json.dumps(tree))
    return tmp_path / "config.json"


def test_the_lines_of_what_followed_can_be_given_as_overrides(shapes_alone: Path, llm_here: Llm) -> None:
    def lines(*overrides: str) -> list[str]:
        code, out, err = llm_here("plan", "--config", shapes_alone, *overrides)
        assert code == 0, err
        return [line.removeprefix("by rule     ") for line in out.splitlines() if line.startswith("by rule")]

    first = lines("train.total_tokens=null")
    stated = [line.split(": ")[0] for line in first if "=" in line.split(": ")[0]]
    assert {"optimizer.kind=muon", "train.total_tokens=265_984"} <= set(stated)
    assert len(stated) == len(first) - 1, "the last line explains N, D and d"
    assert lines(*stated) == []


def test_a_run_keeps_what_followed_at_its_first_start(
    shapes_alone: Path, tmp_path: Path, llm_here: Llm, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = llm_here("train", "--config", shapes_alone)
    assert code == 0, err
    assert "by rule     optimizer.lr=0.0" in err
    run = tmp_path / "run"
    first = json.loads((run / "run.json").read_text())
    assert first["rules"]["optimizer.lr"]["value"] == first["config"]["optimizer"]["lr"]
    # Another release, with other rules, and a run that goes on for longer.
    monkeypatch.setattr(rules, "adamw_lr", lambda *arguments: 0.123)
    monkeypatch.setattr(rules, "batch_tokens", lambda *arguments: 64)
    code, _, err = llm_here("train", "--config", shapes_alone, "train.total_tokens=4096")
    assert code == 0, err
    assert "by rule" not in err
    second = json.loads((run / "run.json").read_text())
    assert second["rules"] == first["rules"]
    assert second["config"]["optimizer"] == first["config"]["optimizer"]
    assert second["config"]["train"]["global_batch_tokens"] == first["config"]["train"]["global_batch_tokens"]
    assert second["config"]["train"]["total_tokens"] == 4_096


def test_a_run_of_an_earlier_release_goes_on_as_it_was(
    shapes_alone: Path, tmp_path: Path, llm_here: Llm, write_config: Callable[..., Path]
) -> None:
    """Its checkpoint holds the defaults of its time, and none of the keys that came later."""
    begun = write_config(deepspeed__zero_stage=0, train__total_tokens=1_024)
    assert llm_here("train", "--config", begun)[0] == 0
    newest = without_checksums(max((tmp_path / "run").glob("step-*")))
    state = json.loads((newest / "state.json").read_text())
    for key in ("embed_lr", "head_lr", "norm_lr"):
        del state["config"]["optimizer"][key]
    (newest / "state.json").write_text(json.dumps(state))
    shapes_alone.write_text(
        json.dumps({**json.loads(begun.read_text()), "model": SMALL_MODEL, "optimizer": {}, "schedule": {}})
    )
    code, _, err = llm_here("train", "--config", shapes_alone, "train.total_tokens=2048")
    assert code == 0, err
    _, config = read_state(max((tmp_path / "run").glob("step-*")))
    assert (config.optimizer.kind, config.optimizer.lr, config.optimizer.embed_lr) == ("adamw", 3e-3, None)
    assert (config.schedule.kind, config.schedule.min_lr_ratio, config.model.qk_norm) == ("cosine", 0.1, False)
    assert config.train.total_tokens == 2_048


def test_a_mixtures_epoch_ends_with_its_first_source(small_shards: Path) -> None:
    from llm.data.manifest import read_manifest
    from llm.data.mixture import mix
    from llm.training.resolve import epoch_tokens

    manifest = read_manifest(small_shards)
    one = mix([manifest], [1.0])
    assert epoch_tokens(one, 64) == manifest.sequences("train", 64) * 64
    assert resolve(small(data={"path": str(small_shards)}, model=SMALL_MODEL), one)[0].train.total_tokens is not None
