"""`llm compare`: says from which step on two runs differ, in which number and which tensor first, and by how much."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from llm.config_file import changed_settings
from llm.errors import UserError
from llm.metrics import MEASURED, read_metrics
from llm.model.checkpoint import read_checksums, read_state
from llm.model.checkpoint_path import saved, step_of
from llm.model.hf import hf_names
from llm.model.tensor_files import index_file, open_tensors, read_index, utf8_path
from llm.model.transformer import parameter_shapes
from llm.tools.first_checks import check_compare

NOT_OF_THE_RUN = {*MEASURED, "outliers", "step"}
"""Times, and outliers, which are found among the steps since a start."""

Metrics = dict[int, dict[str, Any]]


def compare(run_a: str, run_b: str, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Compares the numbers of metrics.jsonl and the tensors of the checkpoints at the steps that both runs have.

    Args:
        run_a, run_b: the runs' folders.
        say: called with each line to show.

    Returns what `llm compare --json` prints; `failed` says from which step on they differ. Raises UserError if they
    have no step in common, or a folder holds no run.
    """
    check_compare(run_a, run_b)
    runs = Path(run_a), Path(run_b)
    metrics_a, metrics_b = map(_metrics, runs)
    checkpoints_a, checkpoints_b = ({step_of(path): path for path in saved(run)} for run in runs)
    logged, kept = sorted(metrics_a.keys() & metrics_b.keys()), sorted(checkpoints_a.keys() & checkpoints_b.keys())
    if not logged and not kept:
        raise UserError(f"{run_a} and {run_b} have neither a logged step nor a checkpoint in common")
    if kept:
        for change in changed_settings(*(read_state(of[kept[0]])[1] for of in (checkpoints_a, checkpoints_b))):
            say(f"setting     {change}")
    number = next((found for step in logged if (found := _number(step, metrics_a[step], metrics_b[step]))), None)
    say(f"metrics     {_said(number, logged, 'logged steps')}")
    tensor = next((found for step in kept if (found := _tensor(step, checkpoints_a[step], checkpoints_b[step]))), None)
    say(f"tensors     {_said(tensor, kept, 'checkpoints')}")
    first = min((found["step"] for found in (number, tensor) if found), default=None)
    return {
        "same": first is None,
        "step": first,
        "metric": number,
        "tensor": tensor,
        "steps": len(logged),
        "checkpoints": len(kept),
        "failed": [] if first is None else [f"the runs differ from step {first} on"],
    }


def _metrics(run: Path) -> Metrics:
    """Returns {step: numbers} of training and validation, if the run has any."""
    steps: Metrics = {}
    path = run / "metrics.jsonl"
    for line in read_metrics(path) if path.is_file() else []:
        steps.setdefault(line["step"], {}).update(line)
    return steps


def _number(step: int, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the first number in which a step differs."""
    for name in a:
        if name in b and name not in NOT_OF_THE_RUN and a[name] != b[name]:
            numbers = all(isinstance(value, int | float) for value in (a[name], b[name]))
            difference = abs(a[name] - b[name]) if numbers else None
            return {"step": step, "name": name, "a": a[name], "b": b[name], "difference": difference}
    return None


def _tensor(step: int, a: Path, b: Path) -> dict[str, Any] | None:
    """Returns the first tensor in which two checkpoints differ: weights in the model's order, then moments.

    Tensors with equal checksums are not read.
    """
    names_a, names_b = map(_tensors, (a, b))
    sums_a, sums_b = map(read_checksums, (a, b))
    first, differ = None, 0
    # Opened once, because a file's header is read at each opening.
    with ExitStack() as opened:
        readers: dict[str, list[Callable[[str], torch.Tensor]]] = {}
        for stem, name in names_a:
            if (stem, name) not in names_b:
                return {"step": step, "name": name, "file": stem, "difference": None, "elements": None}
            if sums_a and sums_b and sums_a.tensors[stem][name] == sums_b.tensors[stem][name]:
                continue
            if first is not None and sums_a and sums_b:
                differ += 1
                continue
            if stem not in readers:
                readers[stem] = [
                    opened.enter_context(open_tensors(path, stem, sums=sums))
                    for path, sums in ((a, sums_a), (b, sums_b))
                ]
            values = [get(name) for get in readers[stem]]
            if values[0].shape == values[1].shape and not _bits_differ(*values).any():
                continue
            differ += 1
            first = first or {"step": step, "file": stem, "name": name, **_difference(*values)}
    return None if first is None else {**first, "tensors": differ, "of": len(names_a)}


def _tensors(path: Path) -> list[tuple[str, str]]:
    """Returns (stem of the file, name) of every tensor of a checkpoint."""
    model = [name for ours in parameter_shapes(read_state(path)[1].model) for name in hf_names(ours)]
    names: dict[str, set[str]] = {}
    for index in path.glob(index_file("*")):
        names[index.name.removesuffix(index_file(""))] = set(read_index(index))
    for file in path.glob("*.safetensors"):
        if "-of-" not in file.stem:
            with utf8_path(file) as readable, safe_open(readable, framework="pt") as tensors:
                names[file.stem] = set(tensors.keys())
    # "model" comes before "optimizer-...".
    return [(stem, name) for stem in sorted(names) for name in model if name in names[stem]]


def _bits_differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.reshape(-1).view(torch.int32) != b.reshape(-1).view(torch.int32)


def _difference(a: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
    if a.shape != b.shape:
        return {"difference": None, "largest": None, "elements": None, "size": a.numel()}
    return {
        "difference": float((a.double() - b.double()).abs().max()),
        "largest": float(a.abs().max()),
        "elements": int(_bits_differ(a, b).sum()),
        "size": a.numel(),
    }


def _said(found: dict[str, Any] | None, common: list[int], what: str) -> str:
    if not common:
        return f"no {what} in common"
    if found is None:
        return f"the same bits at all {len(common):,} {what} in common, up to step {common[-1]:,}"
    before = sum(step < found["step"] for step in common)
    where = f"differ at step {found['step']:,}, after {before:,} equal {what}: "
    if "file" not in found:
        by = "" if found["difference"] is None else f", by {found['difference']:.3g}"
        return f"{where}{found['name']} {json.dumps(found['a'])} and {json.dumps(found['b'])}{by}"
    if found["difference"] is None:
        return f"{where}{found['file']} {found['name']} is in one of them, or of another shape"
    return (
        f"{where}{found['file']} {found['name']} by up to {found['difference']:.3g} (its largest is "
        f"{found['largest']:.3g}), in {found['elements']:,} of {found['size']:,} elements; "
        f"{found['tensors']:,} of {found['of']:,} tensors differ there"
    )
