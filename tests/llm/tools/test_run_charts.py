"""Which lines, bands and sentences the charts of runs have."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm.tools.charts import Chart, Line
from llm.tools.history import Run
from llm.tools.run_charts import charts, loss_chart


def run(
    label: str = "a", losses: list[float] | None = None, val_losses: list[float | None] | None = None, **described: Any
) -> Run:
    """Steps and validations of 100 tokens each; train.total_tokens is 400."""

    def lines(key: str, values: list[Any], first: int) -> list[dict[str, Any]]:
        return [{"step": i, "tokens": 100 * i, "seconds": 1.0 * i, key: value} for i, value in enumerate(values, first)]

    steps = lines("loss", [5.0, 4.0, 3.5, 3.4] if losses is None else losses, 1)
    validations = lines("val_loss", [6.0, 5.0, 4.0, 3.0, 2.31] if val_losses is None else val_losses, 0)
    description = {"config": {"train": {"total_tokens": 400}}, **described}
    return Run(label, Path(label), steps, validations, description, {})


def chart(runs: list[Run], name: str = "loss") -> Chart:
    (found,) = [chart for section in charts(runs).values() for chart in section if chart.name == name]
    return found


def expecting(low: float, high: float, **options: Any) -> Run:
    return run(expected={"loss": (low + high) / 2, "low": low, "high": high}, **options)


@pytest.mark.parametrize(
    ("low", "high", "sentence"),
    [
        (2.25, 2.4, "The run ended at 2.31, inside the expected 2.25 to 2.40."),
        (2.0, 2.2427, "The run ended at 2.31, above the expected 2.00 to 2.24 by 3 %."),
        (2.3571, 3.0, "The run ended at 2.31, below the expected 2.36 to 3.00 by 2 %."),
        (2.31, 2.311, "The run ended at 2.31, inside the expected 2.3100 to 2.3110."),
    ],
)
def test_the_end_is_held_against_what_was_expected(low: float, high: float, sentence: str) -> None:
    found = chart([expecting(low, high)])
    (band,) = found.bands
    assert (band.x, band.low, band.high, band.color) == (400, low, high, 1)
    assert found.note.splitlines()[-1] == sentence


def test_a_run_in_progress_has_the_band_at_its_end() -> None:
    found = chart([expecting(2.25, 2.4, losses=[5.0, 4.0], val_losses=[6.0, 5.0])])
    assert [band.x for band in found.bands] == [400]
    assert found.x_end == 400
    assert found.note.splitlines()[-1] == (
        "The run is at 5 after 50.0 % of train.total_tokens; expected at the end: 2.25 to 2.40."
    )
    before = chart([expecting(2.25, 2.4, losses=[5.0], val_losses=[])])
    assert before.note.splitlines()[-1] == "Expected at the end: 2.25 to 2.40."


def test_a_run_that_ended_before_its_length_is_judged_by_its_best_validation() -> None:
    """As one with train.stop_patience."""
    early = replace(
        expecting(2.25, 2.4, losses=[5.0, 4.0, 3.9], val_losses=[6.0, 3.5, 4.5, 5.5]), status={"status": "complete"}
    )
    assert chart([early]).note.splitlines()[-1] == (
        "The run ended at 75.0 % of train.total_tokens, with 3.5 as the best validation loss; "
        "expected at the end: 2.25 to 2.40."
    )


def test_several_runs_name_whose_expectation_it_is() -> None:
    found = chart([run("a"), expecting(2.25, 2.4, label="b")])
    assert [(band.color, band.x) for band in found.bands] == [(1, 400)]
    assert found.note.splitlines()[1:] == ["b: the run ended at 2.31, inside the expected 2.25 to 2.40."]


def test_without_an_expectation_nothing_is_shown() -> None:
    found = chart([run()])
    assert found.bands == ()
    assert "xpected" not in found.note


def test_a_band_is_inside_the_axis_that_a_steep_beginning_leaves() -> None:
    losses = [50.0, *[3.0] * 99]
    found = chart([expecting(4.0, 5.0, losses=losses, val_losses=[])])
    assert found.y_top is not None
    assert 5.0 < found.y_top < 50
    assert "Begins at 50, above the chart." in found.note


def labels(found: Chart) -> list[str]:
    return [line.label for line in found.lines if line.label]


def test_equal_curves_are_seen_as_equal() -> None:
    other = run("c", losses=[5.0, 4.0, 3.5, 3.3], val_losses=[6.0, 5.1, 4.0, 3.0, 2.31])
    found = chart([run("a"), run("b"), other])
    assert labels(found) == ["a", "b (identical to a)", "c"]
    assert [(line.style, line.copy) for line in found.lines] == [
        *(("faint", 0), ("faint", 1), ("faint", 0)),  # training
        *(("dots", 0), ("dots", 1), ("dots", 0)),
    ]


def test_a_shorter_run_is_equal_as_far_as_it_goes() -> None:
    # The second has stopped between two validations, with one of its own at the end.
    stopped = run("b", losses=[5.0], val_losses=[6.0, 5.0, 4.0])
    stopped.validations.append({"step": 2, "tokens": 250, "seconds": 2.5, "val_loss": 3.7})
    assert labels(chart([run("a"), stopped])) == ["a", "b (identical to a up to 200)"]


def test_the_same_first_validation_makes_no_equal_curves() -> None:
    assert labels(chart([run("a"), run("b", val_losses=[6.0, 4.0, 3.9])])) == ["a", "b"]


def test_the_loss_is_smoothed_over_its_raw_line() -> None:
    losses = [3.0 + 0.2 * (i % 2) for i in range(100)]
    found = loss_chart([run(losses=losses, val_losses=[])], over="tokens")
    raw, mean = found.lines
    assert (raw.style, raw.y, raw.label) == ("pale", losses, "")
    assert (mean.style, mean.label) == ("line", "training")
    assert all(value == pytest.approx(3.1, abs=0.02) for value in mean.y[40:90])
    assert "pale: single steps" in found.note


def test_charts_over_tokens_share_their_axis() -> None:
    lines = [{**line, "grad_norm": 1.0} for line in run().steps[:2]]
    found = charts([Run("a", Path("a"), lines, run().validations, {}, {})])
    assert {chart.x_end for chart in found["Learning"] if chart.x_label == "tokens trained on"} == {400}


def test_an_outlier_above_the_axis_is_told() -> None:
    losses = [50.0, *[3.0] * 99]
    spiked = run(losses=losses, val_losses=[])
    spiked.steps[50]["outliers"] = [{"step": 51, "tokens": 5100, "metric": "loss", "value": 40.0, "deviations": 9.0}]
    found = chart([spiked])
    assert found.lines[-1] == Line([5100], [40.0], style="rings")
    assert "Ring: 1 outlier, 1 above the chart." in found.note
