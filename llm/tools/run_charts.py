"""The charts of one or several runs."""

import math
from dataclasses import replace
from typing import Any

from llm.errors import visible
from llm.metrics import OUTLIER_DEVIATIONS, OUTLIER_WINDOW, engineering, percent
from llm.tools.charts import Band, Chart, Line
from llm.tools.history import BY_SOURCE, TASKS, Run, column, outliers, smoothed, time_unit

TOKENS = "tokens trained on"


def charts(runs: list[Run]) -> dict[str, list[Chart]]:
    """The charts by the headings of their sections; a chart of which no run has a value is left out."""
    named = len(runs) > 1
    percent = {"scale": 100.0, "from_zero": True}
    sections = {
        "Learning": [
            loss_chart(runs, over="tokens"),
            loss_chart(runs, over="seconds"),
            _validation(runs, "bits_per_byte", "Validation, bits per byte", "bits per byte"),
            *_by_source(runs),
            *_of_tasks(runs),
            _over_tokens(runs, "learning_rate", "Learning rate", "learning rate", "lr", from_zero=True),
            _gradient_norm(runs),
        ],
        "Speed": [
            _over_tokens(
                runs,
                "tokens_per_second",
                "Throughput",
                "tokens/s",
                "tokens_per_second",
                from_zero=True,
                faint="tokens_per_second_run",
                note="Faint: of the whole run so far, validation and saves included.",
            ),
            _over_tokens(
                runs,
                "mfu",
                "MFU",
                "%",
                "mfu",
                **percent,
                faint="mfu_causal",
                note="6N + 12 L d T FLOPs a token over the device's datasheet peak. Faint: causal attention, half.",
            ),
            _over_tokens(
                runs,
                "matmul_fraction",
                "Share of this machine's matmul rate",
                "%",
                "matmul_fraction",
                **percent,
                faint="matmul_fraction_causal",
                note="The same FLOPs over the rate of a matrix product measured when the run began. Faint: causal.",
            ),
            *(_step_time(run, number if named else 0) for number, run in enumerate(runs, 1)),
            _over_tokens(
                runs,
                "memory",
                "Peak memory",
                "bytes",
                "memory",
                from_zero=True,
                note="Of the GPU's allocator, or of the process on a CPU; on rank 0.",
            ),
        ],
    }
    end = max(line["tokens"] for run in runs for line in (*run.steps, *run.validations))
    drawn = {}
    for heading, of_section in sections.items():
        # A metric that this machine or version lacks, such as the MFU of an unknown device, is None in every line.
        known = [replace(chart, lines=tuple(line for line in chart.lines if _has_values(line))) for chart in of_section]
        # Charts over tokens have the same axis, so that one can look from one to the next.
        drawn[heading] = [
            replace(chart, x_end=max(chart.x_end, end if chart.x_label == TOKENS else 0), lines=_marked(chart))
            for chart in known
            if chart.lines
        ]
    return drawn


def _has_values(line: Line) -> bool:
    return any(value is not None for value in line.y)


def _marked(chart: Chart) -> tuple[Line, ...]:
    """Its lines, those with the values of an earlier one marked as copies, in the legend too."""
    if chart.stacked:
        return chart.lines
    marked: list[Line] = []
    for line in chart.lines:
        originals = [other for other in marked if other.style == line.style != "rings" and _shared(other, line)]
        if originals:
            first = originals[0]
            shared = _shared(first, line)
            until = "" if shared == list(first.x) == list(line.x) else f" up to {engineering(shared[-1])}"
            label = f"{line.label} (identical to {first.hint or first.label}{until})" if line.label else ""
            line = replace(line, label=label, hint=line.label if line.hint is None else line.hint, copy=len(originals))
        marked.append(line)
    return tuple(marked)


def _shared(one: Line, other: Line) -> list[float]:
    """Every x that both have, if their values there are equal and few others are; else nothing."""
    values = dict(zip(one.x, one.y, strict=True))
    shared = [x for x in other.x if x in values]
    equal = all(values[x] == y for x, y in zip(other.x, other.y, strict=True) if x in values)
    # Not the whole of the shorter line: a run that was stopped has a last point of its own. But more than one of
    # several points, since runs with the same seed have the first validation in common.
    shorter = min(len(one.x), len(other.x))
    return shared if equal and len(shared) >= min(shorter, max(2, shorter / 2)) else []


# Validation has the colour after the training loss's where a run is alone, and several runs have one each.


def _validation_color(runs: list[Run], number: int) -> int:
    return number if len(runs) > 1 else 1


def _label(runs: list[Run], run: Run) -> str:
    """A run's name in a legend."""
    return run.label if len(runs) > 1 else ""


def _curve(lines: list[dict[str, Any]], key: str, color: int, *, scale: float = 1.0, **options: Any) -> Line:
    return Line([line["tokens"] for line in lines], column(lines, key, scale), color=color, **options)


def _over_tokens(
    runs: list[Run],
    name: str,
    title: str,
    y_label: str,
    key: str,
    scale: float = 1.0,
    faint: str | None = None,
    **options: Any,
) -> Chart:
    """One metric of the training steps, a line a run. faint: another metric, which is drawn faint."""
    lines = [
        _curve(run.steps, key, number, scale=scale, label=_label(runs, run), hint=_label(runs, run) or title)
        for number, run in enumerate(runs)
    ]
    if faint is not None:
        lines += [
            _curve(run.steps, faint, number, scale=scale, style="faint", hint=f"{_label(runs, run)} (faint)".strip())
            for number, run in enumerate(runs)
        ]
    return Chart(name, title, TOKENS, y_label, tuple(lines), **options)


def _validation(runs: list[Run], key: str, title: str, y_label: str) -> Chart:
    lines = [
        _curve(
            run.validations,
            key,
            _validation_color(runs, number),
            label=_label(runs, run),
            hint=_label(runs, run) or "validation",
            style="dots",
        )
        for number, run in enumerate(runs)
    ]
    return _cut(Chart(key, title, TOKENS, y_label, tuple(lines)))


def _of_tasks(runs: list[Run]) -> list[Chart]:
    """A chart for each metric of train.eval_tasks."""
    names = dict.fromkeys(name for run in runs for line in run.tasks for name in line[TASKS])

    def line(run: Run, name: str, color: int) -> Line:
        measured = [line for line in run.tasks if name in line[TASKS]]
        values = [line[TASKS][name] for line in measured]
        label = _label(runs, run)
        return Line([line["tokens"] for line in measured], values, label, color, "dots", hint=label or visible(name))

    return [
        Chart(
            f"task_{number}",
            f"Task {visible(name)}",
            TOKENS,
            visible(name.rpartition("/")[2]),
            tuple(line(run, name, color) for color, run in enumerate(runs)),
        )
        for number, name in enumerate(names, 1)
    ]


def _by_source(runs: list[Run]) -> list[Chart]:
    """The validation loss on each source of a mixture: in one chart for a run alone, else a chart a source."""
    names = list(dict.fromkeys(name for run in runs for line in run.validations for name in line.get(BY_SOURCE, {})))

    def line(run: Run, source: str, color: int, label: str) -> Line:
        measured = [line for line in run.validations if source in line.get(BY_SOURCE, {})]
        values = [line[BY_SOURCE][source] for line in measured]
        return Line([line["tokens"] for line in measured], values, label, color, "dots")

    title, unit = "Validation loss by source", "loss (nats per token)"
    if len(runs) == 1:
        # 0 is the training loss's colour.
        whole = _curve(runs[0].validations, "val_loss", 1, label="all", style="dots")
        lines = (
            [whole, *(line(runs[0], name, color, visible(name)) for color, name in enumerate(names, 2))]
            if names
            else []
        )
        return [_cut(Chart("loss_by_source", title, TOKENS, unit, tuple(lines)))]
    return [
        _cut(
            Chart(
                f"loss_of_source_{number}",
                f"Validation loss, {visible(name)}",
                TOKENS,
                unit,
                tuple(line(run, name, color, run.label) for color, run in enumerate(runs)),
            )
        )
        for number, name in enumerate(names, 1)
    ]


def loss_chart(runs: list[Run], over: str) -> Chart:
    """Training loss, smoothed and raw, and validation loss over "tokens" or "seconds"."""
    unit, scale = ("", 1.0) if over == "tokens" else time_unit(max(run.last["seconds"] for run in runs))
    alone = len(runs) == 1
    raw: list[Line] = []
    means: list[Line] = []
    validations: list[Line] = []
    for number, run in enumerate(runs):
        x = [line[over] / scale for line in run.steps]
        losses = column(run.steps, "loss")
        means_of_run = smoothed(losses)
        if means_of_run != losses:
            raw.append(Line(x, losses, "", number, "pale", hint="one step" if alone else ""))
        name, style = ("training", "line") if alone else ("", "faint")
        hint = f"{_label(runs, run)} training".strip()
        means.append(Line(x, means_of_run, name, number, style, hint=hint))  # type: ignore[arg-type]
        label = "validation" if alone else run.label
        x = [line[over] / scale for line in run.validations]
        color = _validation_color(runs, number)
        validations.append(Line(x, column(run.validations, "val_loss"), label, color, "dots"))
    notes = [] if alone else ["Dots: validation. Faint: training."]
    if raw:
        notes.append("Training is smoothed; pale: single steps.")
    bands = _bands(runs) if over == "tokens" else ()
    chart = _cut(
        Chart(
            "loss" if over == "tokens" else "loss_over_time",
            "Loss over tokens" if over == "tokens" else "Loss over time",
            TOKENS if over == "tokens" else f"training time ({unit})",
            "loss (nats per token)",
            tuple(line for line in (*raw, *means, *validations) if _has_values(line)),
            note=" ".join(notes),
            bands=bands,
            x_end=max((band.x for band in bands), default=0),
        )
    )
    if over != "tokens":
        return chart
    # After _cut: an outlier must not stretch the axis.
    rings, notes = _rings(runs, "loss"), [chart.note]
    for line in rings:
        above = sum(value > (chart.y_top or math.inf) for value in line.y if value is not None)
        hidden = f", {above} above the chart" if above else ""
        notes.append(f"{'Ring' if len(line.x) == 1 else 'Rings'}: {_count_outliers(rings)}{hidden}.")
    note = "\n".join([" ".join(notes).strip(), *_expectations(runs)]).strip()
    return replace(chart, lines=(*chart.lines, *rings), note=note)


def _bands(runs: list[Run]) -> tuple[Band, ...]:
    """The expected validation losses at the ends of the runs that have one."""
    return tuple(
        Band(run.total_tokens, expected.loss, expected.low, expected.high, _validation_color(runs, number))
        for number, run in enumerate(runs)
        if (expected := run.expected)
    )


def _expectations(runs: list[Run]) -> list[str]:
    """A sentence for each run that has an expected loss."""
    sentences = []
    for run in runs:
        if not (expected := run.expected):
            continue
        end, name = run.end_loss, f"{run.label}:" if len(runs) > 1 else ""
        if end is None:
            sentence = f"{_not_at_the_end(run)}expected at the end: {expected.range}."
        elif expected.low <= end <= expected.high:
            sentence = f"the run ended at {end:.4g}, inside the expected {expected.range}."
        else:
            side, edge = ("above", expected.high) if end > expected.high else ("below", expected.low)
            off = 100 * abs(end / edge - 1)
            sentence = f"the run ended at {end:.4g}, {side} the expected {expected.range} by {off:.2g} %."
        sentences.append(f"{name} {sentence}" if name else sentence[0].upper() + sentence[1:])
    return sentences


def _not_at_the_end(run: Run) -> str:
    """The beginning of a sentence about a run that has not reached train.total_tokens."""
    losses = [line["val_loss"] for line in run.validations if line["val_loss"] is not None]
    if not losses:
        return ""
    share = percent(run.last["tokens"] / run.total_tokens)
    if run.status.get("status") == "complete":
        return f"the run ended at {share} of train.total_tokens, with {min(losses):.4g} as the best validation loss; "
    return f"the run is at {losses[-1]:.4g} after {share} of train.total_tokens; "


def _cut(chart: Chart) -> Chart:
    """Ends the axis below a steep beginning that would flatten the rest, and notes where the curve begins."""
    points = [(x, y) for line in chart.lines for x, y in zip(line.x, line.y, strict=True) if y is not None]
    # Without the first twentieth of the run, where a steep beginning would be.
    later = [y for x, y in points if x > 0.05 * max(x for x, _ in points)]
    if len(later) < 3:
        return chart
    highest, lowest = max(y for _, y in points), min(y for _, y in points)
    if max(later) - lowest > (highest - lowest) / 2:
        return chart
    top = max([*later, *(band.high for band in chart.bands)])
    note = f"{chart.note} Begins at {highest:.3g}, above the chart.".strip()
    return replace(chart, y_top=top + 0.1 * (top - lowest), note=note)


def _gradient_norm(runs: list[Run]) -> Chart:
    chart = _over_tokens(runs, "gradient_norm", "Gradient norm, before clipping", "norm", "grad_norm", log_y=True)
    rings = _rings(runs, "grad_norm")
    found = _count_outliers(rings)
    note = (
        f"{found}: more than {OUTLIER_DEVIATIONS:g} deviations above the median of the {OUTLIER_WINDOW} steps before."
    )
    return replace(chart, lines=(*chart.lines, *rings), note=note)


def _rings(runs: list[Run], metric: str) -> list[Line]:
    """Rings around the outliers, also around those of steps that were not logged."""
    found = [entry for run in runs for entry in outliers(run, metric)]
    return [Line([e["tokens"] for e in found], [e["value"] for e in found], style="rings")] if found else []


def _count_outliers(rings: list[Line]) -> str:
    count = sum(len(line.x) for line in rings)
    return "1 outlier" if count == 1 else f"{count or 'No'} outliers"


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
        TOKENS,
        "ms a step",
        tuple(lines),
        note=", ".join(shares) + ".",
        from_zero=True,
        stacked=True,
    )
