"""The axes of charts, and what is seen in them."""

from collections.abc import Sequence
from typing import Any

import pytest

from llm.tools.charts import Chart, Line, draw, png, svg, tick_labels


def axes_of(*lines: Line, x_label: str = "tokens trained on", y_label: str = "loss", **options: Any) -> Any:
    figure = draw(Chart("name", "title", x_label, y_label, lines, **options))
    figure.draw_without_rendering()
    return figure.axes[0]


def labels(axis: Any) -> list[str]:
    """The labels of the ticks that are inside the axis."""
    low, high = sorted(axis.get_view_interval())
    return [tick.label1.get_text() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1e-5, 2e-5], ["0", "1e-5", "2e-5"]),
        ([0, 2.5e-4, 5e-4], ["0", "2.5e-4", "5.0e-4"]),
        ([0, 0.001, 0.002], ["0", "0.001", "0.002"]),
        ([2.0, 2.5, 3.0], ["2.0", "2.5", "3.0"]),
        ([2.3105, 2.311], ["2.3105", "2.3110"]),
        ([0, 500, 1000], ["0", "500", "1000"]),
        ([0, 1e6, 2e6], ["0", "1e6", "2e6"]),
        ([-1e-17, 0.2], ["0", "0.2"]),
        ([0, 0], ["0", "0"]),
        ([], []),
    ],
)
def test_ticks_have_the_digits_that_tell_them_apart(values: Sequence[float], expected: list[str]) -> None:
    assert tick_labels(values) == expected


def test_counts_have_units() -> None:
    assert tick_labels([0, 500, 1500, 2e6, 3e9, 4e12], counts=True) == ["0", "500", "1.5k", "2M", "3G", "4T"]


@pytest.mark.parametrize("tokens", [0, 1, 3, 60, 10**14])
def test_an_axis_has_whole_tokens(tokens: int) -> None:
    found = labels(axes_of(Line([tokens], [2.5], style="dots")).xaxis)
    assert 2 <= len(found) <= 9
    assert not any("m" in label or "." in label.rstrip("kMGT") for label in found)
    assert found[0] == "0"


def test_the_only_value_of_a_chart_has_an_axis_around_it() -> None:
    axes = axes_of(Line([0], [4.3736], style="dots"))
    low, high = axes.get_ylim()
    assert low < 4.3736 < high
    assert len(set(labels(axes.yaxis))) >= 3


@pytest.mark.parametrize(
    "values", [[1.0, 1.1, 1.2], [0.4, 1.5], [0.01, 5.0], [1e-9, 1e12], [3.0], [0.0, 0.0], [1e-7, 3e-7]]
)
def test_a_logarithmic_axis_has_a_few_labels(values: list[float]) -> None:
    found = labels(axes_of(Line(range(len(values)), values), log_y=True).yaxis)
    assert 1 <= len(found) <= 8
    assert len(set(found)) == len(found)


def test_a_constant_is_inside_an_axis_from_zero() -> None:
    axes = axes_of(Line([1, 2, 3], [5e8, 5e8, 5e8]), y_label="bytes", from_zero=True)
    low, high = axes.get_ylim()
    assert low == 0
    assert 5e8 < high < 6e8
    assert labels(axes.yaxis)[:2] == ["0", "100M"]


def test_a_copy_leaves_the_line_under_it_visible() -> None:
    lines = [Line([0, 1], [1, 2], color=number, copy=number, style="dots") for number in range(3)]
    first, second, third = axes_of(*lines).lines
    assert first.get_linestyle() == "-"
    assert {second.get_linestyle(), third.get_linestyle()} == {"--"}
    assert first.get_fillstyle() == "full"
    assert second.get_fillstyle() == third.get_fillstyle() == "none"
    assert first.get_markersize() < second.get_markersize() < third.get_markersize()


def test_a_long_run_has_few_values_for_the_pointer_and_its_newest() -> None:
    many = 100_000
    text = svg(Chart("name", "title", "tokens", "loss", (Line(range(many), [1.0] * many, "a", style="pale"),)))
    assert len(text) < 200_000
    assert f",{many - 1}.0]" in text


def test_dollars_and_underscores_in_names_are_no_markup() -> None:
    lines = [Line([0, 1], [2, 1], name, color) for color, name in enumerate((r"lr$3e-4_$\x", "_b", "$^$"))]
    chart = Chart("name", r"a$_$\y", "tokens", "loss", tuple(lines), note=r"note $_$\z")
    assert png(chart).startswith(b"\x89PNG")
    assert "</svg>" in svg(chart)
    names = [text.get_text() for text in draw(chart).legend().get_texts()]
    assert [name.lstrip("\u200b") for name in names] == [r"lr$3e-4_$\x", "_b", "$^$"]


def test_all_of_a_note_and_a_legend_is_in_the_picture() -> None:
    lines = tuple(Line([0, 1], [0, 1], f"the run with a long name {number}") for number in range(6))
    short = Chart("name", "title", "tokens", "loss", lines[:1])
    long = Chart("name", "title", "tokens", "loss", lines, note="A sentence of some words. " * 10)
    height = [int.from_bytes(png(chart)[20:24], "big") for chart in (short, long)]
    assert height[1] > height[0] + 150


def test_a_logarithmic_x_axis_has_a_tick_at_each_point() -> None:
    axes = axes_of(Line([1, 2, 4, 1024], [1.0, 2.0, 4.0, 9.0]), x_label="devices", log_x=True)
    assert labels(axes.xaxis) == ["1", "2", "4", "1024"]
