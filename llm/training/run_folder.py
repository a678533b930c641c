"""A run's folder, checkpoint.dir: the run's description (run.json), its status (status.json) and its metrics.

Only rank 0 has one.
"""

import contextlib
import fcntl
import json
import os
import platform
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from llm import __version__
from llm.atomic import atomic_text
from llm.config import Config
from llm.errors import UserError
from llm.metrics import MetricsLog, read_metrics
from llm.training import saving

Status = Literal["running", "complete", "stopped", "failed"]


class RunFolder:
    """Locks the folder while the run lasts, so that a second run in it is refused.

    Args:
        config: the run's, resolved.
        resumed_step: the step of the checkpoint in this folder that the run resumes from; metrics past it are cut.
            None: the run begins here, and so do its metrics.
        about: entries for run.json, such as the number of parameters and of processes.
        say: shows a line to the user.
    """

    def __init__(
        self, config: Config, resumed_step: int | None, about: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        self.path, self._say = Path(config.checkpoint.dir), say
        self.path.mkdir(parents=True, exist_ok=True)
        # flock, not a lock file: the kernel releases it however the process ends.
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(
                f"{self.path}: another run writes here; wait for it or set another checkpoint.dir"
            ) from None
        # Only with the lock: before it, these could be another run's save in progress.
        saving.delete_leftovers(self.path)
        started = None if resumed_step is None else _read_started(self.path)
        described = _description(config, {"started": started or _now(), **about})
        atomic_text(self.path / "run.json", json.dumps(described, indent=2) + "\n")
        _write_status(self.path, "running")
        self._log = MetricsLog(self.path / "metrics.jsonl", keep_through_step=resumed_step)
        self._waiting = False  # whether it has lines that could not be written yet
        self._failing = threading.Lock()

    def write_metrics(self, line: dict[str, Any]) -> None:
        """Writes a line. One that a full disk does not take is written with a later one; the run continues."""
        try:
            self._log.write(line)
            self._waiting = False
        except OSError as error:
            # Once, not for every line while the disk is full.
            if not self._waiting:
                self._say(f"{error.filename}: cannot be written ({error.strerror}); its lines are kept until it can be")
            self._waiting = True

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns all lines. Raises OSError where some cannot be written."""
        self._log.flush()
        return read_metrics(self.path / "metrics.jsonl")

    def finish(self, result: dict[str, Any], stopped: str) -> None:
        """Writes the final status. stopped: why the run was stopped early; empty: it is complete."""
        _write_status(self.path, "stopped" if stopped else "complete", result=result, message=stopped or None)

    def fail(self, message: str) -> None:
        """Writes the status `failed`. From any thread: the failure detector's may write while the main thread fails."""
        # Both would write the same temporary file.
        with self._failing:
            _write_status(self.path, "failed", message=message)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # First, so that lines that waited for space on the disk are tried once more whatever ended the run.
        with self._log_os_errors():
            self._log.close()
        if error is not None:
            with self._log_os_errors():
                self.fail(f"{type(error).__name__}: {error}")
        # Last: until here a new run could not write the same files.
        os.close(self._lock)

    @contextlib.contextmanager
    def _log_os_errors(self) -> Iterator[None]:
        """Shows an OSError instead of raising it, which would hide the error that ended the run."""
        try:
            yield
        except OSError as error:
            self._say(f"{error.filename}: could not be written ({error.strerror})")


def _write_status(
    path: Path, status: Status, *, result: dict[str, Any] | None = None, message: str | None = None
) -> None:
    described = {"status": status, "result": result, "message": message}
    try:
        atomic_text(path / "status.json", json.dumps(described) + "\n")
    except OSError as error:
        error.filename = str(path / "status.json")  # an error of write() does not have it
        raise


def mark_failed(path: Path, message: str) -> None:
    """Marks the run failed when rank 0 has ended before it could. Does nothing if another run has the folder by now."""
    held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Rank 0 may have written its own, more exact status.
        if json.loads((path / "status.json").read_text("utf-8"))["status"] == "running":
            _write_status(path, "failed", message=message)
    # BlockingIOError: another run has the lock. The others: a damaged status.json, which has nothing to mark.
    except (BlockingIOError, ValueError, KeyError, TypeError):
        return
    finally:
        os.close(held)


def finished_result(path: Path) -> dict[str, Any] | None:
    """Returns the result of a complete run, None for any other."""
    try:
        status = json.loads((path / "status.json").read_text("utf-8"))
        result: dict[str, Any] | None = status["result"] if status["status"] == "complete" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result


def _description(config: Config, about: dict[str, Any]) -> dict[str, Any]:
    """Returns all that one needs, besides the shards, to repeat the run."""
    packages = ("torch", "deepspeed", "numpy", "safetensors", "sentencepiece")
    versions = {"llm-from-scratch": __version__, "python": platform.python_version()}
    return {
        "config": config.model_dump(),
        "versions": versions | {package: version(package) for package in packages},
        "commit": _commit(),
        **about,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_started(path: Path) -> str | None:
    """When the run that is resumed began; None if its run.json does not tell."""
    try:
        started: str | None = json.loads((path / "run.json").read_text("utf-8")).get("started")
    except (OSError, ValueError, AttributeError):
        return None
    return started


def _commit() -> str | None:
    """Returns the source's git commit, marked `-dirty` where files differ from it; None if it is not a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed somewhere inside another repository, perhaps
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:
        return None
