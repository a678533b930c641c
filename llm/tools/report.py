"""`llm report`: draws one or several runs, as a page and as pictures."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from llm.atomic import atomic_file, atomic_text
from llm.metrics import OUTLIER_DEVIATIONS, OUTLIER_WINDOW
from llm.tools.charts import SERIES, Chart, Line, css, legend, png, svg
from llm.tools.history import Run, column, figures, outliers, read_lines, read_runs, time_unit


def report(
    run_dirs: Sequence[str | os.PathLike[str]], out_dir: str | os.PathLike[str] | None = None, *, show: bool = False
) -> dict[str, Any]:
    """Writes report.html, which needs no other file and no network, and its charts as PNG.

    Args:
        run_dirs: folders of runs (checkpoint.dir); several are drawn over each other, with a table of what differs.
        out_dir: None: `report` in the first run's folder.
        show: print the page's path.

    Returns report (the page), pictures, and runs (their names in it). Raises UserError for a folder without a run.
    """
    runs = read_runs(run_dirs)
    out = Path(out_dir) if out_dir is not None else runs[0].path / "report"
    pictures = []
    sections = []
    for heading, charts in _charts(runs).items():
        # A metric that this machine or version lacks, such as the MFU of an unknown device, is None in every line.
        known = [replace(chart, lines=tuple(line for line in chart.lines if _has_values(line))) for chart in charts]
        drawn = [chart for chart in known if chart.lines]
        for chart in drawn:
            pictures.append(out / f"{chart.name}.png")
            with atomic_file(pictures[-1]) as file:
                file.write(png(chart))
        elements = "".join(_figure(chart) for chart in drawn)
        sections.append(f'<section><h2>{heading}</h2><div class="charts">{elements}</div></section>')
    page = out / "report.html"
    atomic_text(page, _page(runs, sections))
    if show:
        print(page)
    return {"report": str(page), "pictures": [str(path) for path in pictures], "runs": [run.label for run in runs]}


def _has_values(line: Line) -> bool:
    return any(value is not None for value in line.y)


def loss_curve(metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draws training and validation loss over tokens from a metrics.jsonl into a PNG.

    Raises UserError where there is no such file or no step in it.
    """
    steps, validations = read_lines(Path(metrics_path))
    picture = png(_loss([Run("", Path(), steps, validations, {}, {})], over="tokens"))
    with atomic_file(png_path) as file:
        file.write(picture)


# Charts.


def _curves(runs: list[Run], key: str, *, named: bool = True, **options: Any) -> list[Line]:
    """One metric of the training steps over tokens, a line a run. named: list several runs in the legend."""
    return [
        _curve(run.steps, key, color, label=run.label if named and len(runs) > 1 else "", **options)
        for color, run in enumerate(runs)
    ]


def _curve(lines: list[dict[str, Any]], key: str, color: int, *, scale: float = 1.0, **options: Any) -> Line:
    return Line([line["tokens"] for line in lines], column(lines, key, scale), color=color, **options)


def _charts(runs: list[Run]) -> dict[str, list[Chart]]:
    tokens = "tokens trained on"
    several = len(runs) > 1

    def over_tokens(
        name: str, title: str, y_label: str, key: str, scale: float = 1.0, faint: str | None = None, **options: Any
    ) -> Chart:
        """faint: another metric, which is drawn faint."""
        lines = _curves(runs, key, scale=scale)
        if faint is not None:
            lines += _curves(runs, faint, named=False, scale=scale, style="faint")
        return Chart(name, title, tokens, y_label, tuple(lines), **options)

    percent = {"scale": 100.0, "from_zero": True}
    bits = tuple(
        _curve(run.validations, "bits_per_byte", color, label=run.label if several else "", style="dots")
        for color, run in enumerate(runs)
    )
    return {
        "Learning": [
            _loss(runs, over="tokens"),
            _loss(runs, over="seconds"),
            Chart("bits_per_byte", "Validation, bits per byte", tokens, "bits per byte", bits),
            over_tokens("learning_rate", "Learning rate", "learning rate", "lr", from_zero=True),
            _gradient_norm(runs),
        ],
        "Speed": [
            over_tokens(
                "tokens_per_second",
                "Throughput",
                "tokens/s",
                "tokens_per_second",
                from_zero=True,
                faint="tokens_per_second_run",
                note="Faint: of the whole run so far, validation and saves included.",
            ),
            over_tokens(
                "mfu",
                "MFU",
                "%",
                "mfu",
                **percent,
                faint="mfu_causal",
                note="6N + 12 L d T FLOPs a token over the device's datasheet peak. Faint: causal attention, half.",
            ),
            over_tokens(
                "matmul_fraction",
                "Share of this machine's matmul rate",
                "%",
                "matmul_fraction",
                **percent,
                faint="matmul_fraction_causal",
                note="The same FLOPs over the rate of a matrix product measured when the run began. Faint: causal.",
            ),
            *(_step_time(run, number if several else 0) for number, run in enumerate(runs, 1)),
            over_tokens(
                "memory",
                "Peak memory",
                "bytes",
                "memory",
                from_zero=True,
                note="Of the GPU's allocator, or of the process on a CPU; on rank 0.",
            ),
        ],
    }


def _loss(runs: list[Run], over: str) -> Chart:
    unit, scale = ("", 1.0) if over == "tokens" else time_unit(max(run.last["seconds"] for run in runs))
    alone = len(runs) == 1
    lines: list[Line] = []
    for color, run in enumerate(runs):
        trained, validated = run.steps, run.validations
        lines.append(
            Line(
                [line[over] / scale for line in trained],
                column(trained, "loss"),
                "training" if alone else "",
                color,
                "line" if alone else "faint",
            )
        )
        lines.append(
            Line(
                [line[over] / scale for line in validated],
                column(validated, "val_loss"),
                "validation" if alone else run.label,
                color + 1 if alone else color,  # a run alone has the next color free to tell validation from training
                "dots",
            )
        )
    # Before the rings are added: an outlier must not stretch the axis.
    top, begins = _top(lines)
    if over == "tokens":
        lines += _rings(runs, "loss")
    notes = [] if alone else ["Dots: validation. Faint: training."]
    if lines[-1].style == "rings":
        notes.append(f"Rings: {len(lines[-1].x)} outliers.")
    if top is not None:
        notes.append(f"Begins at {begins:.1f}, above the chart.")
    return Chart(
        "loss" if over == "tokens" else "loss_over_time",
        "Loss over tokens" if over == "tokens" else "Loss over time",
        "tokens trained on" if over == "tokens" else f"training time ({unit})",
        "loss (nats per token)",
        tuple(line for line in lines if _has_values(line)),
        note=" ".join(notes),
        y_top=top,
    )


def _top(lines: list[Line]) -> tuple[float | None, float]:
    """Returns where the axis ends if a steep beginning would flatten the rest, else None; and the highest value."""
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if y is not None]
    # Without the first twentieth of the run, where a steep beginning would be.
    later = [y for x, y in points if x > 0.05 * max(x for x, _ in points)]
    highest, lowest = max(y for _, y in points), min(y for _, y in points)
    if not later or max(later) - lowest > (highest - lowest) / 2:
        return None, highest
    return max(later) + 0.1 * (max(later) - lowest), highest


def _gradient_norm(runs: list[Run]) -> Chart:
    rings = _rings(runs, "grad_norm")
    count = len(rings[0].x) if rings else 0
    found = "1 outlier" if count == 1 else f"{count or 'No'} outliers"
    return Chart(
        "gradient_norm",
        "Gradient norm, before clipping",
        "tokens trained on",
        "norm",
        (*_curves(runs, "grad_norm"), *rings),
        note=f"{found}: more than {OUTLIER_DEVIATIONS:g} deviations above the "
        f"median of the {OUTLIER_WINDOW} steps before.",
        log_y=True,
    )


def _rings(runs: list[Run], metric: str) -> list[Line]:
    """Rings around the outliers, also around those of steps that were not logged."""
    found = [entry for run in runs for entry in outliers(run, metric)]
    return [Line([e["tokens"] for e in found], [e["value"] for e in found], style="rings")] if found else []


STEP_PARTS = ("data_wait", "forward", "backward", "optimizer", "communication")


def _step_time(run: Run, number: int) -> Chart:
    """How the milliseconds of a step divide among its parts."""
    steps = [line for line in run.steps if line.get("step_ms") is not None]
    parts = [part for part in STEP_PARTS if any(f"{part}_ms" in line for line in steps)]
    x = [line["tokens"] for line in steps]
    known = [[line.get(f"{part}_ms") or 0.0 for line in steps] for part in parts]
    of_known = [sum(values) for values in zip(*known, strict=True)] if known else [0.0] * len(steps)
    # Parts that overlap can add up to more than the step: the host waits for data while a GPU still computes.
    rest = [max(0.0, line["step_ms"] - spent) for line, spent in zip(steps, of_known, strict=True)]
    # A run may have no timed step yet.
    whole = max(1e-9, sum(of_known) + sum(rest))
    lines = [
        Line(x, values, part.replace("_", " "), color)
        for color, (part, values) in enumerate(zip((*parts, "the rest"), (*known, rest), strict=True))
    ]
    shares = [f"{line.label} {100 * sum(value or 0.0 for value in line.y) / whole:.2g} %" for line in lines]
    return Chart(
        f"step_time_{number}" if number else "step_time",
        f"A step's time{f', {run.label}' if number else ''}",
        "tokens trained on",
        "ms a step",
        tuple(lines),
        note=", ".join(shares) + ".",
        from_zero=True,
        stacked=True,
    )


# The page.


def _page(runs: list[Run], sections: list[str]) -> str:
    names = ", ".join(run.label for run in runs)
    parts = [
        f"<header><h1>{escape(names)}</h1><p>{escape(_subtitle(runs))}</p></header>",
        _tiles(runs[0]) if len(runs) == 1 else _comparison(runs),
        *sections,
        *(_samples(run, len(runs) > 1) for run in runs),
        *(_setup(run, len(runs) > 1) for run in runs),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(names)}: training report</title><style>{_style()}</style></head>\n<body><main>"
        + "\n".join(part for part in parts if part)
        + "</main></body></html>\n"
    )


def _subtitle(runs: list[Run]) -> str:
    if len(runs) > 1:
        return f"Training report of {len(runs)} runs"
    run = runs[0]
    message = run.status.get("message")
    return f"Training report. {str(run.status.get('status')).capitalize()}{f': {message}' if message else ''}."


def _tiles(run: Run) -> str:
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in figures(run).items()
    )
    return f'<dl class="tiles">{tiles}</dl>'


def _comparison(runs: list[Run]) -> str:
    heads = ["", *(_key(i) + escape(run.label) for i, run in enumerate(runs))]
    found = [figures(run) for run in runs]
    rows = [["status", *(str(run.status.get("status")) for run in runs)]]
    rows += [[name, *(of_run[name] for of_run in found)] for name in found[0]]
    result = _table(heads, rows)
    differing = []
    for all_of in ([run.config for run in runs], [run.surroundings for run in runs]):
        for key in dict.fromkeys(key for one in all_of for key in one):
            # As text, since a list or an object has no hash for the set.
            values = [_text(one.get(key)) for one in all_of]
            # checkpoint.dir always differs: two runs cannot share a folder.
            if len(set(values)) > 1 and key != "checkpoint.dir":
                differing.append([key, *values])
    different = _table(heads, differing) if differing else "<p>Nothing but their folders.</p>"
    return f"<section><h2>Results</h2>{result}</section><section><h2>What differs</h2>{different}</section>"


def _samples(run: Run, named: bool) -> str:
    """The texts that the model generated at each validation, the newest first."""
    rows = [
        f"<h3>step {line['step']:,}</h3>"
        + "".join(
            f'<p class="sample"><b>{escape(sample["prompt"])}</b>{escape(sample["text"])}</p>'
            for sample in line["samples"]
        )
        for line in reversed(run.validations)
        if line.get("samples")
    ]
    if not rows:
        return ""
    older = f"<details><summary>earlier</summary>{''.join(rows[1:])}</details>" if rows[1:] else ""
    return f"<section><h2>Samples{_of(run, named)}</h2>{rows[0]}{older}</section>"


def _setup(run: Run, named: bool) -> str:
    surroundings = _table([], [[key, _text(value)] for key, value in run.surroundings.items()])
    config = escape(json.dumps(run.description.get("config", {}), indent=2))
    return (
        f"<section><h2>Setup{_of(run, named)}</h2>{surroundings}"
        f"<details><summary>Configuration</summary><pre>{config}</pre></details></section>"
    )


def _of(run: Run, named: bool) -> str:
    return f" of {escape(run.label)}" if named else ""


def _figure(chart: Chart) -> str:
    keys = "".join(f"<span>{_key(line.color)}{escape(line.label)}</span> " for line in legend(chart))
    keys = f'<small class="keys">{keys}</small>' if len(legend(chart)) > 1 else ""
    note = f"<small>{escape(chart.note)}</small>" if chart.note else ""
    return f"<figure><figcaption>{escape(chart.title)}{keys}{note}</figcaption>{svg(chart)}</figure>"


def _key(color: int) -> str:
    return f'<span class="key c{color % len(SERIES)}"></span>'


def _table(heads: list[str], rows: list[list[str]]) -> str:
    """heads are HTML, rows are text."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def _style() -> str:
    fixed = Path(__file__).with_name("report.css").read_text("utf-8")
    keys = "".join(f".c{i} {{ background: var(--series-{i}); }}\n" for i in range(len(SERIES)))
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {css(dark=True)} }} }}\n"
    return f"{fixed}:root {{ {css(dark=False)} }}\n{dark}{keys}"
