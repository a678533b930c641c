"""Charts: one description each, which matplotlib draws as PNG or as SVG with colours from CSS."""

import html
import io
import json
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llm.metrics import engineering

# Only the functions that draw import matplotlib, so that importing this module does not load it.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Light and dark. Neighbours differ in lightness as well as in hue.
INK = ("#24292f", "#d7dde5")
FAINT = ("#d9dee4", "#363d47")
ALARM = ("#c8102e", "#ff6b7a")
SERIES = (
    ("#2563c9", "#79aefc"),
    ("#d9690a", "#ffad5c"),
    ("#0b8a6a", "#4fd3ad"),
    ("#a2289a", "#ee8ce4"),
    ("#7a6a00", "#dcc84a"),
    ("#5d6b7a", "#a9b8c8"),
)
DASHES = ("-", "--", ":", "-.")
"""For runs beyond the number of colours."""
SIZE = (4.0, 2.5)
"""In inches. A page scales the SVG to its column, so a smaller figure has larger text."""
POINTS = 500
"""Largest number of points per line for the pointer in the page: more than a column has pixels."""


@dataclass(frozen=True)
class Line:
    """One series. color: an index into SERIES, then into DASHES."""

    x: Sequence[float]
    y: Sequence[float | None]  # None: a gap
    label: str = ""  # empty: not in the legend
    color: int = 0
    style: Literal["line", "faint", "pale", "dots", "rings"] = "line"
    hint: str | None = None  # its name at the pointer; None: the label; empty: not shown
    copy: int = 0  # number of earlier lines with the same values, which stay visible through its gaps


@dataclass(frozen=True)
class Band:
    """An expected value and its range at one x."""

    x: float
    value: float
    low: float
    high: float
    color: int = 0


@dataclass(frozen=True)
class Chart:
    name: str
    """The name of its file."""
    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    note: str = ""
    """Shown below the chart: what a reader must know."""
    bands: tuple[Band, ...] = ()
    log_x: bool = False
    """Whether equal ratios have equal lengths on the x axis, whose ticks are the points of the first line."""
    log_y: bool = False
    from_zero: bool = False
    x_end: float = 0
    """The axis ends at this or at the last point, whichever is later."""
    y_top: float | None = None
    """The end of the axis; None: above all values."""
    stacked: bool = False
    """Whether the lines, which have the same x, are drawn as stacked areas."""

    @property
    def y_counts(self) -> bool:
        """Whether the y axis counts things, so that 2000 is 2k there."""
        return self.y_label in ("bytes", "tokens/s")


def draw(chart: Chart) -> "Figure":
    """Makes a figure without pyplot, so without a display or global state."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    if chart.stacked:
        colors = [SERIES[line.color % len(SERIES)][0] for line in chart.lines]
        # stackplot cannot leave a gap, because a NaN would also remove the areas above it.
        heights = [[value or 0.0 for value in line.y] for line in chart.lines]
        axes.stackplot(chart.lines[0].x, heights, labels=[line.label for line in chart.lines], colors=colors, alpha=0.8)
    else:
        for line in chart.lines:
            _draw_line(axes, line)
    # If a run has only the validation before its first step, the only x is 0.
    end = max([chart.x_end, *(x for line in chart.lines for x in line.x)]) or 1
    for band in chart.bands:
        color = SERIES[band.color % len(SERIES)][0]
        strip = [band.x - 0.03 * end, band.x + 0.03 * end]
        axes.fill_between(strip, band.low, band.high, color=color, alpha=0.3, linewidth=0)
        axes.plot(strip, [band.value] * 2, color=color, linewidth=1)
    axes.set_xlim(-0.02 * end, (1.04 if chart.bands else 1.02) * end)
    # Tokens are integers, but a short axis would show 0.5.
    tokens = "tokens" in chart.x_label
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=tokens))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if chart.log_x:
        points = chart.lines[0].x
        axes.set_xscale("log")
        axes.set_xlim(0.9 * min(points), 1.1 * max(points))
        axes.xaxis.set_major_locator(FixedLocator(list(points)))
        axes.xaxis.set_minor_locator(NullLocator())
    if chart.log_y:
        _scale_log(axes, [value for line in chart.lines for value in line.y if value])
    if chart.from_zero:
        # matplotlib's margin is a part of the values' range, which may be tiny.
        axes.set_ylim(0, 1.05 * max(axes.dataLim.y1, 0) or 1)
    if chart.y_top is not None:
        axes.set_ylim(top=chart.y_top)
    for axis, counts in ((axes.xaxis, tokens), (axes.yaxis, chart.y_counts)):
        axis.set_major_formatter(_ticks(counts))
    axes.set_xlabel(chart.x_label, color=INK[0])
    axes.set_ylabel(chart.y_label, color=INK[0])
    axes.grid(color=FAINT[0], linewidth=0.7)
    # Lines are drawn over the grid.
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK[0], length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    # The page is visible behind it, light or dark. png() adds a white background.
    figure.patch.set_alpha(0.0)
    axes.patch.set_alpha(0.0)
    return figure


def _draw_line(axes: "Axes", line: Line) -> None:
    color = SERIES[line.color % len(SERIES)][0]
    dashes: Any = DASHES[line.color // len(SERIES) % len(DASHES)]
    if line.copy:
        dashes = (0, (4, 4 * line.copy))  # gaps show the lines below
    # matplotlib leaves a gap at a NaN.
    values = [float("nan") if value is None else value for value in line.y]
    # matplotlib leaves a label out of the legend if it begins with an underscore.
    label = f"\u200b{line.label}" if line.label.startswith("_") else line.label or None
    if line.style == "rings":
        axes.plot(line.x, values, "o", color=ALARM[0], fillstyle="none", markersize=7, label=label)
    elif line.style == "dots":
        # Those of a copy are larger and hollow.
        marker: dict[str, Any] = {
            "marker": "o",
            "markersize": 4 + 4 * line.copy,
            "fillstyle": "none" if line.copy else "full",
        }
        axes.plot(line.x, values, ls=dashes, color=color, markeredgewidth=0.8, label=label, **marker)
    else:
        alpha, width = {"line": (1.0, 1.4), "faint": (0.45, 1.4), "pale": (0.4, 0.7)}[line.style]
        axes.plot(line.x, values, ls=dashes, color=color, alpha=alpha, linewidth=width, label=label)


def _scale_log(axes: "Axes", values: list[float]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    positive = [value for value in values if value > 0]
    if not positive:
        return  # a logarithmic axis has nothing to show
    ratio = max(positive) / min(positive)
    linear = axes.yaxis.get_major_locator()
    axes.set_yscale("log")
    # A short range contains few or no powers of ten, so it gets other ticks.
    if ratio < 5:
        axes.yaxis.set_major_locator(linear)
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 200 else (1,), numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())


def _ticks(counts: bool) -> Any:
    from matplotlib.ticker import Formatter

    class Ticks(Formatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return tick_labels([x], counts)[0]

        def format_ticks(self, values: Sequence[float]) -> list[str]:
            return tick_labels(values, counts)

    return Ticks()


def tick_labels(values: Sequence[float], counts: bool = False) -> list[str]:
    """Returns the labels of the ticks of an axis, with enough digits to distinguish them.

    counts: whether the axis counts things, so that 2000 is 2k; tiny or huge other numbers get a power of ten.
    """
    if counts:
        return [engineering(value) for value in values]
    top = max((abs(value) for value in values), default=0.0)
    kind = "f" if top == 0 or 1e-3 <= top < 1e5 else "e"
    for digits in range(9):
        labels = [f"{value:.{digits}{kind}}" for value in values]
        if all(abs(float(label) - value) <= 1e-6 * top for label, value in zip(labels, values, strict=True)):
            break
    # 2e-05 becomes 2e-5, and 0e+00 becomes 0.
    return [re.sub(r"e([+-])0*(\d)", r"e\1\2", label).replace("e+", "e") if float(label) else "0" for label in labels]


def legend(chart: Chart) -> list[Line]:
    """Returns the lines of the legend."""
    return [line for line in chart.lines if line.label]


def png(chart: Chart) -> bytes:
    """Draws a chart on white, with its title, note and legend."""
    # Agg draws without a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(chart)
    labels = [line.label for line in legend(chart)]
    columns = max(1, min(3, 50 // (6 + max(map(len, labels), default=0))))
    if labels:
        drawn = figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9, labelcolor=INK[0])
        for text in drawn.get_texts():
            text.set_parse_math(False)  # two $ in the name of a run are no TeX
    figure.suptitle(chart.title, color=INK[0], fontsize=11, parse_math=False)
    # matplotlib does not break lines, and text around the axes makes the axes smaller.
    note = [part for line in chart.note.splitlines() for part in textwrap.wrap(line, 64)]
    figure.axes[0].set_title("\n".join(note), color=INK[0], fontsize=7, parse_math=False)
    figure.set_figheight(SIZE[1] + 0.3 + 0.13 * len(note) + 0.22 * math.ceil(len(labels) / columns))
    figure.patch.set(alpha=1.0, facecolor="white")
    figure.dpi = 160
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def svg(chart: Chart) -> str:
    """Draws an <svg> element without title and legend, for a page whose style contains `css`. Text can be selected.

    Its attribute data-chart holds what report.js shows under the pointer.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure, file = draw(chart), io.StringIO()
    # hashsalt and the empty metadata: equal charts give equal files, without random ids and a date.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.name, "path.simplify_threshold": 0.3}):
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    # The XML declaration and doctype before it are not allowed inside an HTML page.
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # these repeat from chart to chart
    # Without a size in points the page's style decides (report.css). count=1: the size of <svg> only.
    text = re.sub(r' width="[^"]*pt"', "", re.sub(r' height="[^"]*pt"', "", text, count=1), count=1)
    # A screen reader reads the label instead of the parts of the picture.
    values = html.escape(json.dumps(_under_pointer(chart, figure), separators=(",", ":")), quote=False)
    attributes = f"""role="img" aria-label="{html.escape(chart.title)}" data-chart='{values.replace("'", "&#39;")}'"""
    text = text.replace("<svg ", f"<svg {attributes} ", 1)
    # matplotlib writes colours in lower case, as the constants above have them.
    for name, (light, _) in _variables().items():
        text = text.replace(light, f"var(--{name})")
    return text


def _under_pointer(chart: Chart, figure: "Figure") -> dict[str, Any]:
    """Returns the values of a drawn chart, and the position of its axes: left, right (SVG units) and their x."""
    (axes,) = figure.axes
    # After drawing, because drawing makes the layout. An SVG has 72 units per inch.
    box, width = axes.get_position(), 72 * SIZE[0]
    lines = []
    for line in chart.lines:
        hint = line.label if line.hint is None else line.hint
        if line.style == "rings" or (not hint and len(chart.lines) > 1):
            continue
        every = math.ceil(len(line.x) / POINTS)
        # Counted from the end, so that the newest point is included.
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None][::-1][::every][::-1]
        xs, ys = [float(f"{x:.7g}") for x, _ in points], [float(f"{y:.5g}") for _, y in points]
        lines.append({"name": hint, "color": line.color % len(SERIES), "x": xs, "y": ys})
    return {
        "box": [round(width * box.x0, 1), round(width * box.x1, 1)],
        "range": [float(f"{x:.7g}") for x in axes.get_xlim()],
        "x": chart.x_label,
        "lines": lines,
    }


def css(dark: bool) -> str:
    """Returns the custom properties that `svg` refers to."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in _variables().items())


def _variables() -> dict[str, tuple[str, str]]:
    return {"ink": INK, "faint": FAINT, "alarm": ALARM, **{f"series-{i}": pair for i, pair in enumerate(SERIES)}}
