"""A run shows samples of the model's writing and sends its metrics to monitors, none of which can stop it."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llm.metrics import read_metrics

Llm = Callable[..., tuple[int, str, str]]
WriteConfig = Callable[..., Path]
PROMPTS = ["def ", "import os\n\n\nclass"]


class OfflineWandb(ModuleType):
    """Stands for W&B; loses its connection after some values."""

    def __init__(self, lasts: int) -> None:
        super().__init__("wandb")
        self.lasts = lasts
        self.project = ""
        self.logged: list[tuple[dict[str, float], int]] = []
        self.config = SimpleNamespace(update=lambda config, **_: self.configs.append(config))
        self.configs: list[dict[str, Any]] = []

    def init(self, project: str, **_: Any) -> None:
        self.project = project

    def log(self, data: dict[str, float], step: int, commit: bool | None) -> None:
        if len(self.logged) == self.lasts:
            raise ConnectionError("gone")
        self.logged.append((data, step))


def test_a_run_shows_samples_and_tells_monitors_one_of_which_fails(
    write_config: WriteConfig, llm_here: Llm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wandb = OfflineWandb(lasts=10)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = write_config(train__sample_prompts=PROMPTS, train__monitor=["wandb", "tensorboard", "csv"])
    code, out, err = llm_here("train", "--config", config, "--json")
    assert code == 0, err
    assert out.startswith('{"step": 8,')
    lines = read_metrics(tmp_path / "run/metrics.jsonl")

    assert wandb.project == "llm-from-scratch"
    assert wandb.configs == [json.loads((tmp_path / "run/run.json").read_text())["config"]]
    # What the terminal saw, apart from other programs' lines and from the last one, which comes after the run.
    start, *log = (tmp_path / "run/log.txt").read_text().splitlines()
    assert start.startswith("--- ")
    assert log == [line for line in err.splitlines() if line in set(log)]
    assert {"data", "step", "saved"} <= {line.split()[0] for line in log}
    assert wandb.logged[0] == ({"validation/tokens": 0}, 0)
    assert len(wandb.logged) == 10
    assert err.count("wandb failed and is left out from here on: ConnectionError: gone") == 1

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    told = {event.step: event.value for event in events.Scalars("train/loss")}
    assert told == pytest.approx({line["step"]: line["loss"] for line in lines if "loss" in line})
    assert [event.step for event in events.Scalars("validation/bits_per_byte")] == [0, 8]
    with open(tmp_path / "run/csv/train_grad_norm.csv") as file:
        rows = list(csv.reader(file))
    assert [float(row[1]) for row in rows[1:]] == [line["grad_norm"] for line in lines if "loss" in line]

    samples = [line["samples"] for line in lines if "val_loss" in line]
    assert [[sample["prompt"] for sample in at_once] for at_once in samples] == [PROMPTS, PROMPTS]
    generated = llm_here(
        *("generate", "--ckpt", tmp_path / "run", "--prompts", prompts_file(tmp_path), "--temperature", 0),
        *("--max_new_tokens", 32, "--json"),
    )[1]
    assert [sample["text"] for sample in samples[-1]] == [one["text"] for one in json.loads(generated)["completions"]]
    assert all(f"sample: {sample['prompt'] + sample['text']!r}" in err for sample in samples[-1])


def test_a_monitor_that_fails_at_its_start_is_one_line_and_stops_no_run(
    write_config: WriteConfig, llm_here: Llm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("no network")

    wandb = OfflineWandb(lasts=0)
    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    code, _, err = llm_here("train", "--config", write_config(train__monitor=["wandb"], train__total_tokens=2 * 512))
    assert code == 0, err
    assert err.count("wandb") == 1
    assert "monitor     wandb failed and is left out from here on: ConnectionError: no network" in err


def prompts_file(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train__monitor": ["wandb"]}, "train.monitor: wandb needs a package"),
        ({"train__sample_prompts": ["x = 1\n" * 40]}, "tokens long and the model holds 64"),
        ({"deepspeed__extra": {"tensorboard": {"enabled": True}}}, "is set by train.monitor"),
    ],
)
def test_what_cannot_be_shown_is_one_line_and_starts_nothing(
    write_config: WriteConfig,
    llm_here: Llm,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: dict[str, Any],
    expected: str,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = llm_here("train", "--config", write_config(**changes))
    assert code == 1
    assert expected in err
    assert not (tmp_path / "run").exists()
