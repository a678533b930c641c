"""Sends metrics to TensorBoard, Weights & Biases and CSV files, with DeepSpeed's monitors."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from llm.config import Config
from llm.errors import UserError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def check_installed(kinds: Sequence[str]) -> None:
    """Raises UserError for a monitor with a missing package, at the start of a run, so that the user can install it."""
    for kind in kinds:
        try:
            # Imported, not only looked up, because a package may be there but lack another one. csv is part of Python.
            importlib.import_module(PACKAGES.get(kind, "csv"))
        except ImportError as error:
            raise UserError(
                f"train.monitor: {kind} needs a package ({error}): pip install {PACKAGES[kind]}, or leave it out"
            ) from None


class Monitor:
    """A metrics backend. If it fails, at its start or later, it shows one line and is disabled; the run continues.

    Args:
        kind: "tensorboard", "wandb" or "csv".
        config: the resolved config, which W&B gets. The files are in the subfolder `kind` of its checkpoint.dir; W&B
            has its own places.
        say: shows a line to the user.
    """

    def __init__(self, kind: str, config: Config, say: Callable[[str], None]) -> None:
        self._kind, self._say = kind, say
        self._write: Callable[[list[tuple[str, float, int]]], None] | None = None
        files = {"enabled": True, "output_path": config.checkpoint.dir, "job_name": kind}
        sections: dict[str, dict[str, Any]] = {
            "tensorboard": {"tensorboard": files},
            "wandb": {"wandb": {"enabled": True, "project": os.environ.get("WANDB_PROJECT", "llm-from-scratch")}},
            "csv": {"csv_monitor": files},
        }
        try:
            # stdout is for results, but backends print.
            with contextlib.redirect_stdout(sys.stderr):
                from deepspeed.monitor.config import get_monitor_config
                from deepspeed.monitor.monitor import MonitorMaster

                self._write = MonitorMaster(get_monitor_config(sections[kind])).write_events
                if kind == "wandb":  # DeepSpeed starts W&B's run without one
                    importlib.import_module("wandb").config.update(config.model_dump(), allow_val_change=True)
        # Each backend raises its own kinds of errors, and none of them may end the run.
        except Exception as error:
            self._give_up(error)

    def write(self, line: dict[str, Any]) -> None:
        """Sends the numbers of a line of metrics.jsonl as train/KEY, validation/KEY or tasks/KEY at the line's step."""
        if self._write is None:
            return
        group = "validation" if "val_loss" in line else "tasks" if "tasks" in line else "train"
        # Without null, such as an unknown MFU, and lists, such as samples and outliers.
        numbers = {
            key: value
            for key, value in {**line, **line.get("tasks", {})}.items()
            if isinstance(value, int | float) and key != "step"
        }
        try:
            with contextlib.redirect_stdout(sys.stderr):
                self._write([(f"{group}/{key}", value, line["step"]) for key, value in numbers.items()])
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._write = None
        self._say(f"monitor     {self._kind} failed and is left out from here on: {type(error).__name__}: {error}")
