"""What a run's folder keeps of the run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llm.config import load_config
from llm.training.run_folder import RunFolder


def test_a_resumed_run_keeps_the_date_of_its_start(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_config())
    dates = iter(["2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00", "2026-01-03T00:00:00+00:00"])
    monkeypatch.setattr("llm.training.run_folder._now", lambda: next(dates))

    def started(resumed_step: int | None) -> str:
        with RunFolder(config, [], resumed_step, {"parameters": 5}, print) as folder:
            described = json.loads((folder.path / "run.json").read_text())
        assert described["parameters"] == 5
        return str(described["started"])

    assert started(None) == "2026-01-01T00:00:00+00:00"
    assert started(3) == "2026-01-01T00:00:00+00:00"
    assert started(None) == "2026-01-02T00:00:00+00:00"
    # A run of an older version does not have it.
    path = Path(config.checkpoint.dir) / "run.json"
    path.write_text("{}")
    assert started(3) == "2026-01-03T00:00:00+00:00"
