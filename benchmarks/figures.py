"""The figures, tables and picture of the kernel benchmark."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import MODES
from llm.atomic import atomic_file


@dataclass(frozen=True)
class Figure:
    """One line of the table: a variant of a case with its figures, or the reason why there are none."""

    op: str
    case: str
    mode: str
    variant: str
    reason: str | None = None  # why it was not measured
    raised: bool = False  # whether the variant raised an exception
    samples: tuple[float, ...] = ()  # seconds per call
    method: str | None = None  # "graph", "events" (with launch gaps), "clock", or "difference" of two medians
    seconds: float | None = None  # median per call
    p20: float | None = None
    p80: float | None = None
    host_seconds: float | None = None  # host time of an eager call
    peak_bytes: int | None = None  # beyond the inputs
    temporary_bytes: int | None = None  # beyond the inputs and the results
    moved_bytes: float = 0.0
    flops: float = 0.0
    bound: str | None = None  # the limit: "copy" or "matmul"
    fraction: float | None = None  # fraction of this limit
    agrees: bool | None = None  # whether it agrees with the reference
    error: float | None = None  # the largest relative root mean square error of an output or gradient

    @property
    def ours(self) -> bool:
        return self.variant.startswith("ours")

    @property
    def failed(self) -> bool:
        """Whether it is our own variant and is wrong or raises."""
        return self.ours and (self.raised or self.agrees is False)

    def entry(self) -> dict[str, Any]:
        """Returns a dict for JSON, with the number of samples instead of the samples."""
        return {**asdict(self), "samples": len(self.samples)}


def heading(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items() if number)
    documents = report["documents"]
    return (
        f"{report['device']}, {report['dtype']}; {versions}; commit {report['commit'] or 'unknown'}\n"
        f"limits, measured in this run: copy {report['copy_bytes_per_second'] / 1e9:,.1f} GB/s, "
        f"matmul {report['matmul_flops'] / 1e12:,.2f} TFLOP/s\n"
        f"documents: {documents['lengths']} lengths, median {documents['median']} tokens, sigma {documents['sigma']}; "
        "MiB: beyond inputs and results"
    )


def text_of(report: dict[str, Any]) -> str:
    """Formats the whole report as text."""
    groups: dict[tuple[str, ...], list[Figure]] = {}
    for f in report["figures"]:
        groups.setdefault((f.op, f.case, f.mode), []).append(f)
    return "\n".join([heading(report), *map(table_of, groups.values())])


def table_of(figures: Sequence[Figure]) -> str:
    """Formats the variants of one case in one mode, the fastest first."""
    first = figures[0]
    ours = next((f.seconds for f in figures if f.ours and f.seconds), None)
    title = f"{first.op} {first.case}, {first.mode}" + (" (by difference)" if first.method == "difference" else "")
    unit = "TFLOP/s" if first.bound == "matmul" else "GB/s"
    lines = [f"\n{title}"]
    if any(f.seconds for f in figures):
        columns = ("us", "p20", "p80", unit, f"of {first.bound}", "x ours", "host us", "MiB")
        lines.append(f"  {'':26}" + "".join(f"{column:>11}" for column in columns))
    for f in sorted(figures, key=lambda f: f.seconds or math.inf):
        if f.seconds is None or f.fraction is None:
            lines.append(f"  {f.variant:26}  {f.reason}")
            continue
        rate = f"{f.flops / f.seconds / 1e12:.2f}" if f.bound == "matmul" else f"{f.moved_bytes / f.seconds / 1e9:,.1f}"
        cells = [
            *("" if seconds is None else f"{1e6 * seconds:,.1f}" for seconds in (f.seconds, f.p20, f.p80)),
            rate,
            f"{100 * f.fraction:.1f} %",
            "" if ours is None else f"{f.seconds / ours:.2f}",
            "" if f.host_seconds is None else f"{1e6 * f.host_seconds:,.0f}",
            "" if f.temporary_bytes is None else f"{f.temporary_bytes / 2**20:,.0f}",
        ]
        remarks = ["between events, with launch gaps"] if f.method == "events" else []
        remarks += [] if f.agrees else [f"DISAGREES with the reference: relative error {f.error:.1e}"]
        lines.append(f"  {f.variant:26}{''.join(f'{cell:>11}' for cell in cells)}  {'; '.join(remarks)}".rstrip())
    return "\n".join(lines)


def picture(report: dict[str, Any], path: Path) -> None:
    """Draws each variant's fraction of its limit as a bar, grouped by case."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    measured = [f for f in report["figures"] if f.seconds is not None and f.mode in MODES]
    groups = list(dict.fromkeys((f.op, f.case) for f in measured))
    drawing = Drawing(figsize=(14, 2 + 1.3 * len(groups)), layout="constrained")
    for axes, mode in zip(drawing.subplots(1, len(MODES), sharey=True), MODES, strict=True):
        for row, group in enumerate(groups):
            bars = [f for f in measured if f.mode == mode and (f.op, f.case) == group]
            height = 0.85 / max(1, len(bars))
            for i, f in enumerate(bars):
                place = row - 0.425 + (i + 0.5) * height
                axes.barh(
                    place, 100 * f.fraction, height * 0.9, color="tab:orange" if f.ours else "tab:blue", alpha=0.6
                )
                axes.text(1, place, f"{f.variant}  {100 * f.fraction:.0f} %", va="center", fontsize=6)
        axes.set_xlabel(f"{mode}: % of the measured limit")
        axes.set_yticks(range(len(groups)), [f"{op}\n{case}" for op, case in groups], fontsize=8)
        axes.set_xlim(0, 105)
        axes.set_ylim(max(1, len(groups)) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    drawing.suptitle(f"{report['device']}, {report['dtype']}, commit {report['commit'] or 'unknown'}")
    with atomic_file(path) as file:
        FigureCanvasAgg(drawing).print_png(file)
