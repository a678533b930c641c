"""A run that is complete, started again: with nothing to do, with more tokens, and from where its decay began."""

import itertools
import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import read_losses, small_config

from llm.config import Config
from llm.config_file import parse_config
from llm.metrics import read_metrics
from llm.model import checkpoint_path
from llm.model.checkpoint import DataState, TrainState
from llm.training.optim import decay_begin, decay_begins, learning_rate
from llm.training.run_log import describe_rate

WriteConfig = Callable[..., Path]
Llm = Callable[..., tuple[int, str, str]]


def config(**changes: Any) -> Config:
    return parse_config(small_config(Path("data"), Path("run"), **changes), "test")


def state(step: int) -> TrainState:
    return TrainState(step, 512 * step, DataState("", 64, 0, "", 0))


@pytest.mark.parametrize("steps", [1, 2, 10, 37])
@pytest.mark.parametrize("surplus", [0, 100])
def test_a_decay_begins_after_one_step_at_most_and_the_rate_falls_from_there(steps: int, surplus: int) -> None:
    total = 512 * steps + surplus
    for decay, warmup in itertools.product((0, 1, 512, 1024, 1025, 5_000, total), (0, 511, 512, 3_000, 512 * steps)):
        made = config(
            train__total_tokens=total,
            schedule__kind="wsd",
            schedule__decay_tokens=decay,
            schedule__warmup_tokens=warmup,
        )
        rates = [learning_rate(512 * step, made) for step in range(steps + 2)]  # of the step after so many
        begins = [step for step in range(1, steps + 1) if decay_begins(512 * step, made)]
        level = decay_begin(made)
        assert begins == ([math.ceil(level / 512)] if level and 512 * math.ceil(level / 512) < total else [])
        for step in begins:
            assert max(rates[:step]) == made.optimizer.lr
            assert max(rates[step + 1 :]) < made.optimizer.lr


def test_only_wsd_has_a_step_where_its_decay_begins() -> None:
    for kind in ("cosine", "linear"):
        made = config(schedule__kind=kind, schedule__warmup_tokens=1024)
        assert not any(decay_begins(512 * step, made) for step in range(20))


def steps_in(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint_path.saved(run)]


def test_the_line_that_ends_a_wsd_run_goes_on_as_if_its_decay_had_not_begun(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path
) -> None:
    # A blank, because the line goes into a shell.
    run, longer = tmp_path / "a run", tmp_path / "a run-longer"
    path = write_config(
        schedule__kind="wsd",
        schedule__decay_tokens=4 * 512,
        checkpoint__keep_last=1,
        checkpoint__dir=str(run),
        train__total_tokens=10 * 512,
        optimizer__lr=None,
    )
    code, _, err = llm_here("train", "--config", path, "checkpoint.every_steps=4")
    assert code == 0, err
    assert steps_in(run) == [6, 10], "where the decay begins, and the last"
    added = shlex.split(re.search(r"^to train longer at the level rate, .* add to the command: (.*)$", err, re.M)[1])
    assert added == [
        *("--resume", str(run / "step-00000006")),
        *(f"checkpoint.dir={run}-longer", f"train.total_tokens={20 * 512}"),
    ]
    code, _, err = llm_here("train", "--config", path, *added)
    assert code == 0, err
    assert "it rises" not in err
    rules, kept = (json.loads((folder / "run.json").read_text())["rules"] for folder in (run, longer))
    assert "optimizer.lr" in rules
    assert kept == rules, "of the run that it goes on from"
    whole = tmp_path / "whole"
    code, _, err = llm_here("train", "--config", path, f"checkpoint.dir={whole}", f"train.total_tokens={20 * 512}")
    assert code == 0, err
    assert read_losses(longer) == read_losses(whole)[6:]
    assert steps_in(longer) == steps_in(whole) == [16, 20]

    code, _, err = llm_here("train", "--config", path, f"train.total_tokens={12 * 512}")
    assert code == 0, err
    assert steps_in(run) == [6, 12], "kept for good"


def test_a_complete_run_says_that_it_is_and_names_the_settings_that_change_nothing(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path
) -> None:
    train = ["train", "--json", "--config", write_config(), "schedule.kind=linear"]
    done = llm_here(*train)
    assert done[0] == 0, done[2]
    complete = f"nothing to train: {tmp_path / 'run'} is complete at step 8, 4,096 tokens"
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    code, out, err = llm_here(*train)
    assert (code, out) == (0, done[1])
    assert f"{complete}\na higher train.total_tokens goes on from its last checkpoint\n" in err
    code, out, err = llm_here(*train, "optimizer.lr=0.1", "train.total_tokens=1024")
    assert (code, out) == (0, done[1])
    changed = "optimizer.lr: 0.003 -> 0.1, train.total_tokens: 4096 -> 1024"
    assert f"{complete}; these settings are not those it ended with, and change nothing: {changed}\n" in err
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before

    code, _, err = llm_here(*train, f"train.total_tokens={20 * 512}")
    assert code == 0, err
    rates = {line["step"]: line["lr"] for line in read_metrics(tmp_path / "run/metrics.jsonl") if "lr" in line}
    assert rates[9] > 1.1 * rates[8]
    said = f"{rates[8]:.2e} at step 8, {rates[9]:.2e} at step 9, {rates[20]:.2e} at the end; it rises without a warm-up"
    assert f"rate        {said}: for one, begin another run with train.init_from=" in err
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "complete"


def test_the_rate_is_told_where_the_schedule_is_another_and_a_rise_where_there_is_one() -> None:
    level = {"schedule__kind": "wsd", "schedule__decay_tokens": 512}
    assert describe_rate(state(4), config(), config(checkpoint__keep_last=7)) == ""
    longer = describe_rate(state(4), config(**level), config(**level, train__total_tokens=40 * 512))
    assert longer == "3.00e-03 at step 4, 3.00e-03 at step 5, 3.00e-03 at the end"
    lower = describe_rate(state(4), config(**level), config(**level, optimizer__lr=1e-3))
    assert lower == "3.00e-03 at step 4, 1.00e-03 at step 5, 1.00e-03 at the end"
    for changes in ({"optimizer__lr": 4e-3}, {"schedule__kind": "linear", "train__total_tokens": 100 * 512}):
        told = describe_rate(state(7), config(), config(**changes))
        assert "it rises without a warm-up" in told, changes
