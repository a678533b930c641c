"""Reads the folders of runs: metrics with the training time, and the figures of a summary."""

import itertools
import json
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from llm.display import tell
from llm.errors import UserError, visible
from llm.metrics import engineering, percent, read_metrics

TASKS = "tasks"
"""In a line about train.eval_tasks: {"task/metric": value}."""
BY_SOURCE = "val_loss_by_source"
"""In a line about validation: {name of a source: nats per token on its text}."""


@dataclass(frozen=True)
class Expected:
    """The validation loss that was predicted for the end of a run, in nats per token."""

    loss: float
    low: float
    high: float

    @property
    def range(self) -> str:
        digits = 2 if self.high - self.low >= 0.02 else 4
        return f"{self.low:.{digits}f} to {self.high:.{digits}f}"


@dataclass(frozen=True)
class Run:
    """The contents of a run's folder."""

    label: str
    path: Path
    steps: list[dict[str, Any]]  # lines of metrics.jsonl about training, each with "seconds" of training up to it
    validations: list[dict[str, Any]]  # lines about validation, likewise
    description: dict[str, Any]  # run.json
    status: dict[str, Any]  # status.json
    tasks: list[dict[str, Any]] = field(default_factory=list)  # lines about train.eval_tasks, likewise

    @property
    def config(self) -> dict[str, Any]:
        """Returns the config as {"section.key": value}."""
        return dict(_flatten(self.description.get("config", {})))

    @property
    def surroundings(self) -> dict[str, Any]:
        elsewhere = ("config", "versions", "expected", "rules")
        rest = {key: value for key, value in self.description.items() if key not in elsewhere}
        return rest | self.description.get("versions", {})

    @property
    def expected(self) -> Expected | None:
        """Raises UserError if run.json has anything but three numbers."""
        found = self.description.get("expected")
        try:
            return Expected(*(float(found[key]) for key in ("loss", "low", "high"))) if found else None
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.path / 'run.json'}: expected: needs the numbers loss, low and high; correct or remove it"
            ) from None

    @property
    def total_tokens(self) -> int:
        """Tokens at the end of the run by its config; if unknown, tokens of the newest line."""
        return int(self.config.get("train.total_tokens", self.last["tokens"]))

    @property
    def end_loss(self) -> float | None:
        """The validation loss at the end of the run; None if it has not ended."""
        newest = self.validations[-1] if self.validations else {"tokens": -1}
        return newest["val_loss"] if newest["tokens"] >= self.total_tokens else None

    @property
    def last(self) -> dict[str, Any]:
        """The newest line."""
        return (self.validations + self.steps)[-1]


def read_runs(run_dirs: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Reads the runs; of several folders, those without a run are passed over, with a line on stderr each.

    Raises UserError for a folder without a run if there is no other, and for one that is given twice.
    """
    given = [Path(path) for path in run_dirs]
    paths = [path for path in given if not path.exists() or (path / "metrics.jsonl").exists()] or given
    for path in given:
        if path not in paths:
            tell(f"{path}: passed over, because it holds no run (no metrics.jsonl)", sys.stderr)
    return [_read_run(path, visible(label)) for path, label in zip(paths, _labels(paths), strict=True)]


def _read_run(path: Path, label: str) -> Run:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a run's, the checkpoint.dir of its config")
    steps, validations, tasks = read_lines(path / "metrics.jsonl")
    description, status = _read_json(path / "run.json", _Description), _read_json(path / "status.json", _Status)
    return Run(label, path, steps, validations, description, status, tasks)


class _Source(BaseModel, strict=True):
    path: str
    weight: float


class _Data(BaseModel, strict=True):
    path: str | None = None
    sources: list[_Source] | None = None


class _Train(BaseModel, strict=True):
    total_tokens: Annotated[int, Field(ge=0, lt=2**62)] = 0


class _Config(BaseModel, strict=True):
    data: _Data = _Data()
    train: _Train = _Train()


class _Rule(BaseModel, strict=True):
    value: Any
    rule: str


class _Description(BaseModel, strict=True):
    """The entries of run.json that a report needs, where it has them; a config of any release has these sections."""

    config: _Config = _Config()
    versions: dict[str, str] = {}
    rules: dict[str, _Rule] = {}
    parameters: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    world_size: int | None = None
    device: str | None = None
    precision: str | None = None
    started: Annotated[str, AfterValidator(datetime.fromisoformat)] | None = None


class _Status(BaseModel, strict=True):
    """The entries of status.json that a report needs."""

    status: str
    message: str | None = None


Lines = list[dict[str, Any]]


def read_lines(path: Path) -> tuple[Lines, Lines, Lines]:
    """Reads the lines of a metrics.jsonl about training, about validation and about tasks.

    Adds "seconds" to each, the time of all steps up to it.

    Raises UserError if there is no such file or no such line.
    """
    lines = [line for line in read_metrics(path, _say) if "tokens" in line]
    seconds, step = 0.0, 0
    timed = []
    for line in lines:
        if line.get("step_ms") is not None:  # a mean over the steps since the last such line
            seconds += (line["step"] - step) * line["step_ms"] / 1e3
            step = line["step"]
        timed.append({**line, "seconds": seconds})
    steps = [line for line in timed if "loss" in line]
    validations = [line for line in timed if "val_loss" in line]
    if not timed or not (steps or validations):
        raise UserError(f"{path}: holds no step yet; `llm train` writes one every train.log_every_steps")
    return steps, validations, [line for line in timed if TASKS in line]


def _say(line: str) -> None:
    tell(line, sys.stderr)


def _read_json(path: Path, kind: type[BaseModel]) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
        content: dict[str, Any] = json.loads(text)
        kind.model_validate_json(text)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; name a run's folder, the checkpoint.dir of its config") from None
    except ValidationError as error:
        wrong = error.errors()[0]
        what = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
    # json.loads raises RecursionError for deep nesting.
    except (ValueError, RecursionError) as error:
        what = str(error)
    else:
        return content
    raise UserError(f"{path}: damaged ({what}); remove the folder or restore the file")


def _labels(paths: list[Path]) -> list[str]:
    """Returns the shortest distinct ends of the paths."""
    parts = [path.resolve().parts for path in paths]
    if len(paths) == 1:
        return ["/".join(parts[0][-2:])]
    if len(set(parts)) < len(parts):
        raise UserError(f"{paths[0]}: a run is named twice; name each once")
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def outliers(run: Run, metric: str) -> list[dict[str, Any]]:
    """Returns the steps, logged or not, at which a metric ("loss", "grad_norm") was far above the earlier steps."""
    return [entry for line in run.steps for entry in line.get("outliers", []) if entry["metric"] == metric]


@dataclass(frozen=True)
class Figure:
    """A number of a summary."""

    text: str
    value: float | None = None
    better: Literal["low", "high"] | None = None  # None: neither is better
    of_data: bool = False  # whether it can be compared only between runs on the same data


def figures(run: Run) -> dict[str, Figure]:
    """Returns {title: number} of a summary."""

    def loss(value: float | None) -> Figure:
        return Figure(_number(value, 4), value, "low", of_data=True)

    def speed(key: str) -> Figure:
        value = _median(run, key)
        return Figure(percent(value), value, "high")

    validated = run.validations[-1] if run.validations else {}
    last = run.last
    best = min((line["val_loss"] for line in run.validations if line["val_loss"] is not None), default=None)
    unit, scale = time_unit(last["seconds"])
    newest = run.steps[-1] if run.steps else {}
    newest_tasks = run.tasks[-1] if run.tasks else {}
    rare, step_ms = newest.get("data_wait_ms_p99"), _median(run, "step_ms")
    waited = None if rare is None or not step_ms else 100 * rare / step_ms
    median, whole = _median(run, "tokens_per_second"), newest.get("tokens_per_second_run")
    expected = run.expected
    return {
        "validation loss": loss(validated.get("val_loss")),
        **{f"validation loss, {name}": loss(value) for name, value in validated.get(BY_SOURCE, {}).items()},
        "best validation loss": loss(best),
        **({"expected validation loss": Figure(expected.range)} if expected else {}),
        "bits per byte": loss(validated.get("bits_per_byte")),
        **{visible(name): Figure(_number(value, 4), value) for name, value in newest_tasks.get(TASKS, {}).items()},
        **({"time of tasks": Figure(percent(newest_tasks.get("tasks_share")))} if newest_tasks else {}),
        "training loss, smoothed": loss(smoothed(column(run.steps, "loss"))[-1] if run.steps else None),
        "steps": Figure(f"{last['step']:,}"),
        "tokens": Figure(engineering(last["tokens"])),
        "training time": Figure(f"{last['seconds'] / scale:.3g} {unit}"),
        "tokens/s, median": Figure(_number(median, 0), median, "high"),
        "tokens/s, whole run": Figure(_number(whole, 0), whole, "high"),
        "MFU, median": speed("mfu"),
        "MFU, causal": speed("mfu_causal"),
        "of the matmul rate": speed("matmul_fraction"),
        "data wait, 99 % of steps": Figure("–" if waited is None else f"< {waited:.2g} %", waited, "low"),
        "validating, saving": Figure(f"{100 * _share(run, 'validation_ms'):.2g}, {100 * _share(run, 'save_ms'):.2g} %"),
        "outliers, loss and gradient": Figure(f"{len(outliers(run, 'loss'))}, {len(outliers(run, 'grad_norm'))}"),
    }


def best_of(row: list[Figure | None]) -> set[str]:
    """Returns the texts of the best figures of several runs; empty if none is better than another."""
    values = [(figure.value, figure.text) for figure in row if figure is not None and figure.value is not None]
    # Runs that look the same in the table are equally good.
    if len({text for _, text in values}) < 2:
        return set()
    (better,) = {figure.better for figure in row if figure is not None}
    if better is None:
        return set()
    return {(min(values) if better == "low" else max(values))[1]}


def about(run: Run) -> dict[str, str]:
    """Returns {title: fact} about model, date, hardware and data; runs of older versions may lack some."""
    described = run.description
    data = described.get("config", {}).get("data", {})
    sources = data.get("sources") or []
    whole = sum(source["weight"] for source in sources)
    parts = [f"{source['path']} ({100 * source['weight'] / whole:.3g} %)" for source in sources]
    size, processes, started = described.get("parameters"), described.get("world_size"), described.get("started")
    several = f"{processes} processes with " if processes and processes > 1 else ""
    return {
        "status": " ".join(str(run.status.get("status")).splitlines()),
        "parameters": "" if size is None else f"{size:,}",
        "started": "" if started is None else f"{datetime.fromisoformat(started).astimezone(UTC):%Y-%m-%d %H:%M} UTC",
        "device": several + (described.get("device") or ""),
        "precision": described.get("precision") or "",
        "data": ", ".join(parts) or data.get("path") or "",
    }


def smoothed(values: Sequence[float | None]) -> list[float | None]:
    """Returns the mean of each value and its neighbours, a twentieth of all on each side; None if there are none.

    There are fewer neighbours at the start, where a loss falls steeply and a wide mean would be too high.
    """
    # Prefix sums, so that the time does not grow with the width.
    sums = list(itertools.accumulate((value or 0.0 for value in values), initial=0.0))
    counts = list(itertools.accumulate((value is not None for value in values), initial=0))
    means: list[float | None] = []
    for i in range(len(values)):
        width = min(i // 4, len(values) // 20)
        low, high = i - width, min(i + width + 1, len(values))
        count = counts[high] - counts[low]
        # A difference of sums is not exactly the one value in it.
        means.append(values[i] if width == 0 else (sums[high] - sums[low]) / count if count else None)
    return means


def _median(run: Run, key: str) -> float | None:
    values = [value for value in column(run.steps, key) if value is not None]
    # The median, because the first steps compile kernels and would distort a mean.
    return statistics.median(values) if values else None


def _share(run: Run, key: str) -> float:
    """Returns the fraction of one part ("step_ms", "validation_ms", "save_ms") in the time of the whole run."""
    spent = dict.fromkeys(("step_ms", "validation_ms", "save_ms"), 0.0)
    before = 0
    for line in run.steps:
        for name in spent:
            spent[name] += (line["step"] - before) * (line.get(name) or 0.0)
        before = line["step"]
    # No time has passed before the first line.
    return spent[key] / max(1e-9, sum(spent.values()))


def time_unit(seconds: float) -> tuple[str, float]:
    """Returns a readable unit for a time, and its seconds."""
    return ("h", 3600.0) if seconds > 7200 else ("min", 60.0) if seconds > 120 else ("s", 1.0)


def column(lines: list[dict[str, Any]], key: str, scale: float = 1.0) -> list[float | None]:
    """Returns one metric times `scale`; None for lines without it."""
    return [None if line.get(key) is None else scale * line[key] for line in lines]


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        # An empty section stays as {}, because flattening would remove it.
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "–"
    # A huge or tiny loss would have too many digits or none.
    usual = digits == 0 or value == 0 or 0.01 <= abs(value) < 1e5
    return f"{value:,.{digits}f}" if usual else f"{value:.{digits}g}"
