"""train.stop_patience: a run whose validation loss has turned ends at one step, however often it is stopped before."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import read_losses, small_config, without_checksums
from torch import Tensor

from llm.config import TrainConfig
from llm.config_file import parse_config
from llm.errors import STOPPED, UserError
from llm.metrics import read_metrics
from llm.model import checkpoint
from llm.model.checkpoint import DataState, TrainState
from llm.model.transformer import LMHead

WriteConfig = Callable[..., Path]
Llm = Callable[..., tuple[int, str, str]]

TURNING = {
    "train__total_tokens": 20 * 512,
    "train__eval_every_steps": 1,
    "train__log_every_steps": 2,
    "optimizer__lr": 5e-2,
    "schedule__warmup_tokens": 0,
    "schedule__kind": "wsd",
}
"""Changes to the small config after which the validation loss falls to step 4 and is higher at the next three."""


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"total_tokens": 10_000, "global_batch_tokens": 100, "eval_every_steps": 2, **changes})


def state(step: int, **fields: Any) -> TrainState:
    return TrainState(step, 100 * step, DataState("", 64, 0, "", 0), **fields)


def after(losses: list[float], train: TrainConfig) -> TrainState:
    """The state after validations at steps 2, 4, 6, ... with these losses."""
    now = state(0)
    for number, loss in enumerate(losses, 1):
        counted = state(2 * number, best_val_loss=now.best_val_loss, worse_validations=now.worse_validations)
        now = counted.validated(loss, train)
    return now


@pytest.mark.parametrize(
    ("losses", "best", "worse"),
    [
        ([3.0], 3.0, 0),
        ([3.0, 2.0, 2.5, 2.1], 2.0, 2),
        ([3.0, 2.0, 2.0], 2.0, 1),
        ([3.0, 4.0, 4.0, 2.9], 2.9, 0),
        ([3.0, math.nan, math.inf], 3.0, 2),
        ([math.nan, 5.0], 5.0, 0),
    ],
)
def test_validations_without_a_new_best_are_counted_and_a_new_best_ends_the_count(
    losses: list[float], best: float, worse: int
) -> None:
    now = after(losses, settings())
    assert (now.best_val_loss, now.worse_validations) == (best, worse)
    assert now.is_best == (worse == 0)
    for patience in range(1, 4):
        assert now.out_of_patience(settings(stop_patience=patience)) == (worse >= patience)
    assert not now.is_complete(settings())


@pytest.mark.parametrize("step", [0, 3])
def test_a_validation_outside_the_schedule_counts_for_nothing(step: int) -> None:
    before = state(step, best_val_loss=2.0, worse_validations=1)
    for loss in (1.0, 3.0):
        now = before.validated(loss, settings())
        assert (now.val_loss, now.best_val_loss, now.worse_validations) == (loss, 2.0, 1)


def test_a_patience_needs_the_best_checkpoint() -> None:
    tree = small_config(Path("data"), Path("run"), train__stop_patience=2, checkpoint__keep_best=False)
    with pytest.raises(UserError, match=r"use checkpoint\.keep_best=true or train\.stop_patience=null"):
        parse_config(tree, "test")


def val_losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["val_loss"]) for line in read_metrics(run / "metrics.jsonl") if "val_loss" in line]


@pytest.fixture
def stop_at_every_second_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After a call, SIGTERM comes at the second step: its validation is left to the run that goes on."""
    forward, steps = LMHead.forward, 0

    def forward_and_stop(self: LMHead, *arguments: Any) -> Tensor:
        nonlocal steps
        steps += self.training
        if steps == 2 and self.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *arguments)

    def begin() -> None:
        nonlocal steps
        steps = 0
        monkeypatch.setattr(LMHead, "forward", forward_and_stop)

    return begin


@pytest.mark.parametrize("patience", [2, 3])
def test_a_run_ends_where_its_loss_has_turned_also_if_it_is_stopped_at_every_second_step(
    write_config: WriteConfig,
    llm_here: Llm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at_every_second_step: Callable[[], None],
    patience: int,
) -> None:
    whole, stopped, end = tmp_path / "whole", tmp_path / "stopped", 4 + patience
    train = ["train", "--json", "--config", write_config(**TURNING, train__stop_patience=patience)]
    why = f"stopped: no better validation loss for {patience} validations; the best is "

    def assert_ended(run: Path, called: tuple[int, str, str]) -> dict[str, Any]:
        code, out, err = called
        assert code == 0, err
        status, result = json.loads((run / "status.json").read_text()), json.loads(out.splitlines()[-1])
        assert (status["status"], status["message"]) == ("complete", f"{why}{run}/step-00000004")
        assert f"{why}{run}/step-00000004; a higher train.stop_patience, or null, goes on" in err
        assert f"next: llm generate --ckpt {run}/step-00000004 --prompt" in err, "not the last, which is worse"
        assert (result["step"], result["best"]) == (end, str(run / "step-00000004"))
        assert (run / "best").readlink() == Path("step-00000004")
        best, _ = checkpoint.read_state(run / "best")
        assert (best.step, best.val_loss) == min(val_losses(run), key=lambda line: line[1])
        return result

    result = assert_ended(whole, llm_here(*train, f"checkpoint.dir={whole}"))
    assert [step for step, _ in val_losses(whole)] == list(range(end + 1))

    for _ in range(3):
        with monkeypatch.context():
            stop_at_every_second_step()
            code, _, err = llm_here(*train, f"checkpoint.dir={stopped}")
        assert code in (0, STOPPED), err
        if checkpoint.read_state(stopped / "latest")[0].step == end:
            break
        assert json.loads((stopped / "status.json").read_text())["status"] == "stopped"
        assert code == STOPPED
    monkeypatch.undo()
    assert_ended(stopped, llm_here(*train, f"checkpoint.dir={stopped}"))
    assert val_losses(stopped) == val_losses(whole)
    assert read_losses(stopped) == read_losses(whole)
    for file in sorted((whole / "latest").glob("*.safetensors")):
        assert file.read_bytes() == (stopped / "latest" / file.name).read_bytes(), file.name
    states = [json.loads((run / "latest/state.json").read_text()) for run in (whole, stopped)]
    # The configs differ in their folders, and with them the checksum of the state.
    assert states[0] | {"config": None, "checksum": None} == states[1] | {"config": None, "checksum": None}

    if patience == 3:
        before = (whole / "metrics.jsonl").stat().st_mtime_ns
        again = llm_here(*train, f"checkpoint.dir={whole}")
        assert assert_ended(whole, again) == result
        assert f"nothing to train: {whole} is complete at step 7, 3,584 tokens" in again[2]
        assert (whole / "metrics.jsonl").stat().st_mtime_ns == before
        code, out, err = llm_here(*train, f"checkpoint.dir={whole}", "train.stop_patience=4")
        assert (code, json.loads(out.splitlines()[-1])["step"]) == (0, 8), err
        code, out, err = llm_here(*train, f"checkpoint.dir={whole}", "train.stop_patience=null")
        assert (code, json.loads(out.splitlines()[-1])["step"]) == (0, 20), err
        assert json.loads((whole / "status.json").read_text())["message"] is None


def test_a_checkpoint_from_before_begins_its_count(random_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(random_checkpoint / "step-00000000/state.json", tmp_path)
    file = without_checksums(tmp_path) / "state.json"
    tree = json.loads(file.read_text())
    for key in ("best_val_loss", "worse_validations"):
        del tree[key]
    file.write_text(json.dumps(tree))
    older, _ = checkpoint.read_state(tmp_path)
    assert (older.best_val_loss, older.worse_validations) == (None, 0)
