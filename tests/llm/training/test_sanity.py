"""What makes no sense about a run is said before its first step, at the limits and not below them."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running import small_config

from llm import device_rates
from llm.config import Config
from llm.config_file import parse_config
from llm.data.manifest import read_manifest
from llm.data.mixture import mix
from llm.errors import STOPPED, UserError
from llm.training import sanity
from llm.training.batch_plan import make_plan
from llm.training.resolve import resolve
from llm.training.sanity import Size

WriteConfig = Callable[..., Path]
Llm = Callable[..., tuple[int, str, str]]

SOUND = Size(epochs=100.0, hours=1_000.0, steps=100, warmup=0.2, tokens_a_parameter=1.0, validation_tokens=10_000)
"""Every number at its limit."""


def test_at_its_limits_a_run_is_sound() -> None:
    assert list(sanity.mistakes(SOUND)) == []
    assert list(sanity.remarks(SOUND)) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"epochs": 100.1}, "train.total_tokens is 100 epochs over the text (more than 100; "),
        ({"epochs": 9_109.0}, "train.total_tokens is 9,109 epochs over the text"),
        ({"hours": 1_000.4}, "it takes about 1,000 hours (more than 1,000; an estimate: 40% of the matmul rate"),
        ({"hours": 13_489.0}, "it takes about 13,489 hours"),
    ],
)
def test_epochs_and_hours_above_the_limit_are_mistakes(change: dict[str, float], expected: str) -> None:
    (line,) = sanity.mistakes(replace(SOUND, **change))
    assert line.startswith(expected)
    assert list(sanity.remarks(replace(SOUND, **change))) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"steps": 99}, "a run of 99 steps is short"),
        ({"warmup": 0.21}, "schedule.warmup_tokens is long: 21% of the run"),
        ({"warmup": 1.5}, "schedule.warmup_tokens is long: 150% of the run"),
        ({"tokens_a_parameter": 0.017}, "the run reads 0.017 tokens a parameter: a smaller model learns about as much"),
        ({"validation_tokens": 9_999}, "validation scores 9,999 tokens, fewer than 10,000"),
    ],
)
def test_the_others_are_remarks(change: dict[str, float], expected: str) -> None:
    (line,) = sanity.remarks(replace(SOUND, **change))
    assert line.startswith(expected)
    assert list(sanity.mistakes(replace(SOUND, **change))) == []


@pytest.fixture
def sized(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, ...]]:
    """sized(**changes): the arguments (config, data, plan) of a small run at 1 GFLOP/s, on two processes."""
    monkeypatch.setattr(device_rates, "measure_matmul_flops", lambda *arguments: 1e9)
    data = mix([read_manifest(small_shards)], [1.0])

    def make(**changes: Any) -> tuple[Any, ...]:
        tree = small_config(small_shards, Path("run"), **{"train__force": False, **changes})
        config, _ = resolve(parse_config(tree, "test"), data)
        return config, data, make_plan(config, 2, torch.device("cpu"), dtype=torch.float32)

    return make


def test_a_runs_size(sized: Callable[..., tuple[Any, ...]], small_shards: Path) -> None:
    config, data, plan = sized(train__total_tokens=1_000_000, schedule__warmup_tokens=250_000, train__eval_tokens=1_000)
    size = sanity.measure(config, data, plan)
    assert size.steps == math.ceil(1_000_000 / 512)
    assert size.epochs == pytest.approx(size.steps * 8 / read_manifest(small_shards).sequences("train", 64))
    assert size.hours == pytest.approx(1_000_000 * plan.flops.usual / (0.4 * 1e9 * 2) / 3600)
    assert size.warmup == 0.25
    assert size.tokens_a_parameter == pytest.approx(1_000_000 / plan.parameters)
    assert size.validation_tokens == 1_024, "whole sequences"
    everything = sanity.measure(*sized(train__eval_tokens=None)).validation_tokens
    assert everything == 64 * read_manifest(small_shards).sequences("val", 64)


def test_a_run_is_refused_unless_it_is_forced_or_goes_on_as_it_began(sized: Callable[..., tuple[Any, ...]]) -> None:
    def check(config: Config, before: Config | None = None) -> list[str]:
        return sanity.check(config, data, plan, before)

    config, data, plan = sized(train__total_tokens=10**13)
    with pytest.raises(UserError, match=r"epochs over the text .*; it takes about .* hours .*train\.force=true"):
        check(config)
    forced = sized(train__total_tokens=10**13, train__force=True)[0]
    assert len(check(forced)) == 3, "epochs, hours and the few validation tokens"
    assert check(config, before=config) == []
    shorter = sized(train__total_tokens=10**12)[0]
    assert check(shorter, before=config) == []
    with pytest.raises(UserError, match="makes no sense"):
        check(config, before=shorter)
    assert len(check(forced, before=shorter)) == 3


def test_a_run_that_makes_no_sense_starts_nothing_and_says_so_in_a_line(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path
) -> None:
    config = write_config(train__total_tokens=10**8, train__force=False)
    code, out, err = llm_here("train", "--config", config)
    assert (code, out) == (1, "")
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "this run makes no sense: train.total_tokens is 1,5" in line
    assert not (tmp_path / "run").exists()

    code, _, err = llm_here("train", "--config", config, "train.total_tokens=1024", "schedule.warmup_tokens=512")
    assert code == 0, err
    notes = [line.split(None, 1)[1] for line in err.splitlines() if line.startswith("note ")]
    assert [note.split()[0] for note in notes] == ["a", "schedule.warmup_tokens", "the", "validation"]
    code, _, err = llm_here("train", "--config", config)
    assert (code, "makes no sense" in err) == (1, True)
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "complete", "nothing was touched"
    code, _, err = llm_here("train", "--config", config, "train.force=true", "train.max_minutes=1e-9")
    assert code == STOPPED, err
    assert "note        train.total_tokens is 1,5" in err
    code, _, err = llm_here("train", "--config", config, "train.max_minutes=1e-9")
    assert code == STOPPED, err
    assert "note " not in err, "it goes on as it began"
