"""The figures of a run's folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm.errors import UserError
from llm.tools.history import Run, about, best_of, figures, read_lines, smoothed


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(description: dict[str, Any], **validation: Any) -> Run:
    lines = [{"step": 5, "tokens": 50, "seconds": 1.0, "val_loss": 2.0, **validation}]
    return Run("run", Path("run"), [], lines, description, {"status": "complete"})


def test_time_is_that_of_the_steps(tmp_path: Path) -> None:
    lines = [{"step": 10, "loss": 1.0, "step_ms": 100.0}, {"step": 10, "val_loss": 1.0}]
    lines = [line | {"tokens": 0} for line in [*lines, {"step": 15, "loss": 1.0, "step_ms": 200.0}]]
    steps, validations, _ = read_lines(write_lines(tmp_path / "metrics.jsonl", lines))
    assert [line["seconds"] for line in steps] == [1.0, 2.0]
    assert [line["seconds"] for line in validations] == [1.0]


def test_a_smoothed_loss_is_the_mean_around_each_step() -> None:
    values = [float(value % 2) for value in range(100)]
    means = smoothed(values)
    # 5 to either side; fewer at the beginning and, on one side, at the end.
    assert means[50] == pytest.approx(sum(values[45:56]) / 11)
    assert means[:4] == values[:4]
    assert means[8] == pytest.approx(sum(values[6:11]) / 5)
    assert means[99] == pytest.approx(sum(values[94:]) / 6)
    # A gap is no zero, and a short run is left alone.
    assert smoothed([2.0] * 40 + [None] * 40)[:42] == pytest.approx([2.0] * 42)
    assert smoothed([2.0] * 40 + [None] * 40)[-1] is None
    assert smoothed([0.1, 0.7, 0.3]) == [0.1, 0.7, 0.3]


@pytest.mark.parametrize(
    ("better", "values", "best"),
    [
        ("low", [2.0, 1.0, 3.0], {"1.0"}),
        ("high", [2.0, 1.0, 3.0], {"3.0"}),
        ("low", [2.0, None, 3.0], {"2.0"}),
        ("low", [2.04, 2.01, 3.0], {"2.0"}),  # they look the same
        ("low", [2.0, 2.0], set()),
        ("low", [2.0, None], set()),
        (None, [2.0, 1.0], set()),
    ],
)
def test_the_best_of_a_row(better: Any, values: list[float | None], best: set[str]) -> None:
    from llm.tools.history import Figure

    row = [Figure("–" if value is None else f"{value:.1f}", value, better) for value in values]
    assert best_of([*row, None]) == best


def test_numbers_that_exploded_or_vanished_are_readable() -> None:
    for loss, text in ((3.04e12, "3.04e+12"), (1.5e-6, "1.5e-06"), (2.31049, "2.3105"), (0.0, "0.0000")):
        assert figures(run({}, val_loss=loss))["validation loss"].text == text


def test_what_a_run_was() -> None:
    sources = [{"path": "a", "weight": 3}, {"path": "b", "weight": 1}]
    described = {"config": {"data": {"sources": sources}}, "world_size": 8, "device": "GPU", "parameters": 10**9}
    found = about(run({**described, "started": "2026-03-01T09:05:07+02:00"}))
    assert found["data"] == "a (75 %), b (25 %)"
    assert found["device"] == "8 processes with GPU"
    assert found["parameters"] == "1,000,000,000"
    assert found["started"] == "2026-03-01 07:05 UTC"


@pytest.mark.parametrize("expected", [{"loss": 2.0, "low": 1.0}, {"loss": "?", "low": 1, "high": 2}, [1, 2]])
def test_a_damaged_expectation_names_the_file_and_the_key(expected: Any) -> None:
    with pytest.raises(UserError, match=r"run/run.json: expected: needs the numbers loss, low and high"):
        figures(run({"expected": expected}))
