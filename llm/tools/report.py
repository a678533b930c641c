"""`llm report`: draws one or several runs as a page and as pictures."""

import json
import os
from collections.abc import Sequence
from html import escape as escape_html
from pathlib import Path
from typing import Any

from llm.atomic import atomic_file, atomic_text
from llm.display import tell
from llm.errors import visible
from llm.locks import locked
from llm.tools.charts import SERIES, Chart, css, legend, png, svg
from llm.tools.history import Run, about, best_of, figures, read_lines, read_runs
from llm.tools.run_charts import charts, loss_chart


def report(
    run_dirs: Sequence[str | os.PathLike[str]], out_dir: str | os.PathLike[str] | None = None, *, show: bool = False
) -> dict[str, Any]:
    """Writes report.html, which needs no other file and no network, and its charts as PNG.

    Args:
        run_dirs: folders of runs (checkpoint.dir); several are drawn in the same charts, with a table of differences.
        out_dir: None: `report` in the first run's folder.
        show: print the path of the page.

    Returns report (the page), pictures, and runs (their names in it). Raises UserError for a folder without a run.
    """
    runs = read_runs(run_dirs)
    out = Path(out_dir) if out_dir is not None else runs[0].path / "report"
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, "another report is writing here"):
        pictures, page = _write(runs, out)
    if show:
        tell(page)
    return {"report": str(page), "pictures": [str(path) for path in pictures], "runs": [run.label for run in runs]}


def _write(runs: list[Run], out: Path) -> tuple[list[Path], Path]:
    """Writes the pictures and the page; returns their paths."""
    pictures: list[Path] = []
    sections = []
    for heading, drawn in charts(runs).items():
        for chart in drawn:
            pictures.append(out / f"{chart.name}.png")
            with atomic_file(pictures[-1]) as file:
                file.write(png(chart))
        elements = "".join(_figure(chart) for chart in drawn)
        if drawn:
            sections.append(f'<section><h2>{heading}</h2><div class="charts">{elements}</div></section>')
    page = out / "report.html"
    atomic_text(page, _page(runs, sections))
    return pictures, page


def escape(text: str) -> str:
    """Returns a text as HTML, with control characters as escapes."""
    return escape_html(visible(text))


def loss_curve(metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draws training and validation loss over tokens from a metrics.jsonl into a PNG.

    Raises UserError if there is no such file or no step in it.
    """
    steps, validations, _ = read_lines(Path(metrics_path))
    picture = png(loss_chart([Run("", Path(), steps, validations, {}, {})], over="tokens"))
    with atomic_file(png_path) as file:
        file.write(picture)


# The page.


def _page(runs: list[Run], sections: list[str]) -> str:
    names = ", ".join(run.label for run in runs)
    parts = [
        f"<header><h1>{escape(names)}</h1><p>{escape(_subtitle(runs))}</p></header>",
        _about(runs[0]) + _tiles(runs[0]) if len(runs) == 1 else _comparison(runs),
        *sections,
        *(_samples(run, len(runs) > 1) for run in runs),
        _setup(runs),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(names)}: training report</title><style>{_style()}</style></head>\n<body><main>"
        + "\n".join(part for part in parts if part)
        + f"</main><script>{_file('report.js')}</script></body></html>\n"
    )


def _subtitle(runs: list[Run]) -> str:
    if len(runs) > 1:
        return f"Training report of {len(runs)} runs"
    run = runs[0]
    message = run.status.get("message")
    return f"Training report. {str(run.status.get('status')).capitalize()}{f': {message}' if message else ''}."


def _about(run: Run) -> str:
    return _list("about", {title: text for title, text in about(run).items() if text and title != "status"})


def _tiles(run: Run) -> str:
    return _list("tiles", {title: figure.text for title, figure in figures(run).items()})


def _list(name: str, entries: dict[str, str]) -> str:
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in entries.items())
    return f'<dl class="{name}">{items}</dl>'


BEST = "Bold: the best of a row, the lowest where it has ↓, the highest where it has ↑."
OTHER_DATA = "Losses have no best, since the runs read different data."


def _comparison(runs: list[Run]) -> str:
    heads = ["", *(_key(i) + escape(run.label) for i, run in enumerate(runs))]
    described = [about(run) for run in runs]
    rows = [[title, *(one[title] or "–" for one in described)] for title in described[0]]
    rows = [row for row in rows if set(row[1:]) != {"–"}]
    same_data = len({_text(run.config.get("data.path") or run.config.get("data.sources")) for run in runs}) == 1
    found = [figures(run) for run in runs]
    best: dict[str, set[str]] = {}
    for title in dict.fromkeys(title for one in found for title in one):
        row = [one.get(title) for one in found]
        kind = next(figure for figure in row if figure is not None)
        arrow = {"low": "\u00a0↓", "high": "\u00a0↑", None: ""}[kind.better]
        rows.append([title + arrow, *("–" if figure is None else figure.text for figure in row)])
        best[title + arrow] = best_of(row) if same_data or not kind.of_data else set()
    result = _table(heads, rows, best)
    result += f"<p class=note>{BEST}{'' if same_data else ' ' + OTHER_DATA}</p>"
    differing = []
    for all_of in ([run.config for run in runs], [run.surroundings for run in runs]):
        for key in dict.fromkeys(key for one in all_of for key in one):
            # As text, because a list or an object has no hash for the set.
            values = [_text(one.get(key)) for one in all_of]
            # These always differ: two runs cannot share a folder.
            if len(set(values)) > 1 and key not in ("checkpoint.dir", "started"):
                differing.append([key, *values])
    different = _table(heads, differing) if differing else "<p>Nothing but their folders.</p>"
    return f"<section><h2>Results</h2>{result}</section><section><h2>What differs</h2>{different}</section>"


def _samples(run: Run, named: bool) -> str:
    """Formats the texts that the model generated at each validation, newest first."""
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


def _setup(runs: list[Run]) -> str:
    parts = []
    for run in runs:
        rows = [[key, _text(value)] for key, value in run.surroundings.items()]
        for key, setting in run.description.get("rules", {}).items():
            rows.append([f"{key}, by rule", f"{setting['value']}: {setting['rule']}"])
        surroundings = _table([], rows)
        config = f"<pre>{escape(json.dumps(run.description.get('config', {}), indent=2))}</pre>"
        parts.append(
            f"{surroundings}<details><summary>Configuration</summary>{config}</details>"
            if len(runs) == 1
            else f"<details><summary>{escape(run.label)}</summary>{surroundings}{config}</details>"
        )
    return f"<section><h2>Setup</h2>{''.join(parts)}</section>"


def _of(run: Run, named: bool) -> str:
    return f" of {escape(run.label)}" if named else ""


def _figure(chart: Chart) -> str:
    keys = "".join(f"<span>{_key(line.color)}{escape(line.label)}</span> " for line in legend(chart))
    keys = f'<small class="keys">{keys}</small>' if keys else ""
    note = f"<small>{escape(chart.note)}</small>" if chart.note else ""
    caption = f"<figcaption>{escape(chart.title)}{keys}</figcaption>"
    return f'<figure>{caption}<div class="plot">{svg(chart)}</div>{note}</figure>'


def _key(color: int) -> str:
    return f'<span class="key c{color % len(SERIES)}"></span>'


def _table(heads: list[str], rows: list[list[str]], best: dict[str, set[str]] | None = None) -> str:
    """heads: HTML; rows: text. best: {first cell of a row: cells to mark}."""
    best = best or {}
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{' class=best' if cell in best.get(row[0], ()) else ''}>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def _style() -> str:
    keys = "".join(f".c{i} {{ background: var(--series-{i}); }}\n" for i in range(len(SERIES)))
    dark = f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {css(dark=True)} }} }}\n"
    return f"{_file('report.css')}:root {{ {css(dark=False)} }}\n{dark}{keys}"


def _file(name: str) -> str:
    """Reads a file next to this one."""
    return Path(__file__).with_name(name).read_text("utf-8")
