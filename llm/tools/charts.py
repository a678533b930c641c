"""Charts: each has one description, which matplotlib draws as PNG, or as SVG whose colours a page chooses by CSS."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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


@dataclass(frozen=True)
class Line:
    """One series. `color` is an index, which runs through SERIES and then DASHES."""

    x: Sequence[float]
    y: Sequence[float | None]  # None: a gap
    label: str = ""  # empty: not in the legend
    color: int = 0
    style: Literal["line", "faint", "dots", "rings"] = "line"


@dataclass(frozen=True)
class Chart:
    name: str
    """The name of its file."""
    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    note: str = ""
    """Shown under the chart: what a reader has to know to read it."""
    log_y: bool = False
    from_zero: bool = False
    y_top: float | None = None
    """Where the axis ends; None: above all values."""
    stacked: bool = False
    """The lines have the same x and are drawn as stacked areas."""


def draw(chart: Chart) -> "Figure":
    """A figure of its own rather than pyplot's: no display is touched and no global state is kept."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, NullFormatter

    figure = Figure(figsize=(4.4, 2.8), layout="constrained")
    axes = figure.subplots()
    if chart.stacked:
        colors = [SERIES[line.color % len(SERIES)][0] for line in chart.lines]
        # stackplot cannot leave a gap: a NaN would also remove the areas above it.
        heights = [[value or 0.0 for value in line.y] for line in chart.lines]
        axes.stackplot(chart.lines[0].x, heights, labels=[line.label for line in chart.lines], colors=colors, alpha=0.8)
    else:
        for line in chart.lines:
            _draw_line(axes, line)
    if chart.log_y:
        axes.set_yscale("log")
        positive = [value for line in chart.lines for value in line.y if value]
        narrow = bool(positive) and max(positive) < 10 * min(positive)  # there may be no power of ten to label
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if narrow else NullFormatter())
    if chart.from_zero:
        axes.set_ylim(bottom=0)
    if chart.y_top is not None:
        axes.set_ylim(top=chart.y_top)
    axes.set_xlim(left=0)
    axes.margins(x=0.02)
    axes.set_xlabel(chart.x_label, color=INK[0])
    axes.set_ylabel(chart.y_label, color=INK[0])
    if "tokens" in chart.x_label:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if chart.y_label in ("bytes", "tokens/s"):
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color=FAINT[0], linewidth=0.7)
    # Lines are drawn over the grid.
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK[0], length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    # The page shows through, light or dark. png() paints its own white.
    figure.patch.set_alpha(0.0)
    axes.patch.set_alpha(0.0)
    return figure


def _draw_line(axes: "Axes", line: Line) -> None:
    color = SERIES[line.color % len(SERIES)][0]
    dashes = DASHES[line.color // len(SERIES) % len(DASHES)]
    # matplotlib leaves a gap at a NaN.
    values = [float("nan") if value is None else value for value in line.y]
    if line.style == "rings":
        axes.plot(line.x, values, "o", color=ALARM[0], fillstyle="none", markersize=7, label=line.label or None)
    elif line.style == "dots":
        axes.plot(line.x, values, dashes, color=color, marker="o", markersize=4, label=line.label or None)
    else:
        alpha = 0.45 if line.style == "faint" else 1.0
        axes.plot(line.x, values, dashes, color=color, alpha=alpha, linewidth=1.4, label=line.label or None)


def legend(chart: Chart) -> list[Line]:
    """The lines of the legend."""
    return [line for line in chart.lines if line.label]


def png(chart: Chart) -> bytes:
    """Draws a chart on white, with its title, note and legend."""
    # Agg draws without a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(chart)
    # A single line is named by the title.
    if len(legend(chart)) > 1:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK[0])
    figure.suptitle(chart.title, color=INK[0], fontsize=11)
    figure.axes[0].set_title(chart.note, color=INK[0], fontsize=7)
    figure.patch.set(alpha=1.0, facecolor="white")
    figure.dpi = 160
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def svg(chart: Chart) -> str:
    """Draws an <svg> element without title and legend, for a page whose style contains `css`. Text can be selected."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    # hashsalt and the empty metadata: equal charts give equal files, without random ids and a date.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.name, "path.simplify_threshold": 0.3}):
        FigureCanvasSVG(draw(chart)).print_svg(file, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    # The XML declaration and doctype before it are not allowed inside an HTML page.
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # these repeat from chart to chart
    # Without a size in points the page's style decides (report.css). count=1: the size of <svg> only.
    text = re.sub(r' width="[^"]*pt"', "", re.sub(r' height="[^"]*pt"', "", text, count=1), count=1)
    # A screen reader reads the label instead of the picture's many parts.
    text = text.replace("<svg ", f'<svg role="img" aria-label="{chart.name}" ', 1)
    # matplotlib writes colours in lower case, as the constants above have them.
    for name, (light, _) in _variables().items():
        text = text.replace(light, f"var(--{name})")
    return text


def css(dark: bool) -> str:
    """The custom properties that `svg` refers to."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in _variables().items())


def _variables() -> dict[str, tuple[str, str]]:
    return {"ink": INK, "faint": FAINT, "alarm": ALARM, **{f"series-{i}": pair for i, pair in enumerate(SERIES)}}
