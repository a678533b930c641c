"""Reads the folders of runs: their metrics, with the time that training took, and the figures of a summary."""

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.metrics import percent, read_metrics


@dataclass(frozen=True)
class Run:
    """The contents of a run's folder."""

    label: str
    path: Path
    steps: list[dict[str, Any]]  # lines of metrics.jsonl about training, each with "seconds" of training up to it
    validations: list[dict[str, Any]]  # lines about validation, likewise
    description: dict[str, Any]  # run.json
    status: dict[str, Any]  # status.json

    @property
    def config(self) -> dict[str, Any]:
        """Flat: {"section.key": value}."""
        return dict(_flatten(self.description.get("config", {})))

    @property
    def surroundings(self) -> dict[str, Any]:
        rest = {key: value for key, value in self.description.items() if key not in ("config", "versions")}
        return rest | self.description.get("versions", {})

    @property
    def last(self) -> dict[str, Any]:
        """The newest line."""
        return (self.validations + self.steps)[-1]


def read_runs(run_dirs: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Raises UserError for a folder without a run, or one that is named twice."""
    paths = [Path(path) for path in run_dirs]
    return [_read_run(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def _read_run(path: Path, label: str) -> Run:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a run's, the checkpoint.dir of its config")
    steps, validations = read_lines(path / "metrics.jsonl")
    return Run(label, path, steps, validations, _read_json(path / "run.json"), _read_json(path / "status.json"))


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Reads the lines of a metrics.jsonl about training and those about validation.

    Each gets "seconds", the time that the steps up to it took.

    Raises UserError where there is no such file or no such line.
    """
    try:
        lines = read_metrics(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: no such file; `llm train` writes it into a run's folder, the checkpoint.dir of its config"
        ) from None
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
    return steps, validations


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; name a run's folder, the checkpoint.dir of its config") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); remove the folder or restore the file") from None
    return content


def _labels(paths: list[Path]) -> list[str]:
    """The shortest distinct ends of the paths."""
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
    """The steps, logged or not, at which a metric ("loss", "grad_norm") was far above the steps before."""
    return [entry for line in run.steps for entry in line.get("outliers", []) if entry["metric"] == metric]


def figures(run: Run) -> dict[str, str]:
    """The numbers of a summary, by their titles."""
    validated = run.validations[-1] if run.validations else {}
    last = run.last
    best = min((line["val_loss"] for line in run.validations if line["val_loss"] is not None), default=None)
    unit, scale = time_unit(last["seconds"])
    newest = run.steps[-1] if run.steps else {}
    rare, step_ms = newest.get("data_wait_ms_p99"), _median(run, "step_ms")
    return {
        "validation loss": _number(validated.get("val_loss"), 4),
        "best validation loss": _number(best, 4),
        "bits per byte": _number(validated.get("bits_per_byte"), 4),
        "training loss": _number(last.get("loss"), 4),
        "steps": f"{last['step']:,}",
        "tokens": _engineering(last["tokens"]),
        "training time": f"{last['seconds'] / scale:.3g} {unit}",
        "tokens/s, median": _number(_median(run, "tokens_per_second"), 0),
        "tokens/s, whole run": _number(newest.get("tokens_per_second_run"), 0),
        "MFU, median": percent(_median(run, "mfu")),
        "MFU, causal": percent(_median(run, "mfu_causal")),
        "of the matmul rate": percent(_median(run, "matmul_fraction")),
        "data wait, 99 % of steps": "–" if rare is None or not step_ms else f"< {100 * rare / step_ms:.2g} %",
        "validating, saving": f"{100 * _share(run, 'validation_ms'):.2g}, {100 * _share(run, 'save_ms'):.2g} %",
        "outliers, loss and gradient": f"{len(outliers(run, 'loss'))}, {len(outliers(run, 'grad_norm'))}",
    }


def _median(run: Run, key: str) -> float | None:
    values = [value for value in column(run.steps, key) if value is not None]
    # The median, since the first steps, which compile kernels, would distort a mean.
    return statistics.median(values) if values else None


def _share(run: Run, key: str) -> float:
    """The share of one part ("step_ms", "validation_ms", "save_ms") of the time of the whole run."""
    spent = dict.fromkeys(("step_ms", "validation_ms", "save_ms"), 0.0)
    before = 0
    for line in run.steps:
        for name in spent:
            spent[name] += (line["step"] - before) * (line.get(name) or 0.0)
        before = line["step"]
    # Nothing is spent before the first line.
    return spent[key] / max(1e-9, sum(spent.values()))


def time_unit(seconds: float) -> tuple[str, float]:
    """A readable unit for a time, and the seconds in it."""
    return ("h", 3600.0) if seconds > 7200 else ("min", 60.0) if seconds > 120 else ("s", 1.0)


def column(lines: list[dict[str, Any]], key: str, scale: float = 1.0) -> list[float | None]:
    """One metric, times `scale`; None where a line lacks it."""
    return [None if line.get(key) is None else scale * line[key] for line in lines]


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        # An empty section stays as {}, since flattening would make it vanish.
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _engineering(value: float) -> str:
    # There are five units.
    power = min(4, int(math.log10(value) // 3)) if value >= 1000 else 0
    return f"{value / 1000**power:.4g}{['', 'k', 'M', 'G', 'T'][power]}"
