"""What a run's folder keeps of the run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llm.config_file import load_config
from llm.training import run_folder
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


def test_the_result_of_a_run_that_was_copied_names_the_copys_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "copy/step-00000008").mkdir(parents=True)
    result = {"step": 8, "checkpoint": "/old/run/step-00000008", "best": "run/step-00000004"}
    (tmp_path / "copy/status.json").write_text(json.dumps({"status": "complete", "result": result}))
    found = run_folder.finished_result(tmp_path / "copy")
    # Of one that was not copied the old path is all there is.
    assert found == result | {"checkpoint": str(tmp_path / "copy/step-00000008")}
    for damaged in ("[]", '{"status": "complete", "result": 3}', '{"status": "complete", "result": {"best": 1}}'):
        (tmp_path / "copy/status.json").write_text(damaged)
        assert run_folder.finished_result(tmp_path / "copy") is None
