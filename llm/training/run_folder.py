"""A run's folder, checkpoint.dir: the run's description (run.json), its status (status.json) and its metrics.

Only rank 0 has one.
"""

import contextlib
import itertools
import json
import platform
import re
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from llm.atomic import atomic_text
from llm.config import Config
from llm.config_file import changed_settings
from llm.errors import DamagedCheckpoint, UserError
from llm.locks import locked
from llm.metrics import MetricsLog, read_metrics
from llm.model import checkpoint, checkpoint_path
from llm.model.checkpoint import TrainState
from llm.model.checkpoint_path import STEP_NAME, step_of
from llm.training.checkpoint_folders import (
    begins_decay,
    best_checkpoint,
    delete_leftovers,
    delete_old,
    point_if_other,
    tidy,
)
from llm.training.rules import Followed
from llm.version import __version__, source_commit

Status = Literal["running", "complete", "stopped", "failed"]
BUSY = "another run writes here; wait for it or set another checkpoint.dir"
FAILED_SAVES = 10
"""Lines about failed saves in status.json."""


class RunFolder:
    """A context manager, which keeps the folder's lock until the end, so that a second run in it is an error.

    Args:
        config: the resolved config of the run.
        followed: the settings from rules. A resumed run has none: run.json keeps the old ones.
        resumed_step: the step of the checkpoint in this folder that the run resumes from; later metrics are cut.
            None: run and metrics start here.
        source: the checkpoint that the run resumes from, also one of another folder.
        found: the newest checkpoint of this folder when the run was set up; another run may have made one since.
        about: entries for run.json, such as the number of parameters and of processes.
        say: shows a line to the user.
    """

    def __init__(
        self,
        config: Config,
        followed: Sequence[Followed],
        resumed_step: int | None,
        about: dict[str, Any],
        say: Callable[[str], None],
        source: Path | None = None,
        found: Path | None = None,
    ) -> None:
        run_dir, self._say = Path(config.checkpoint.dir), say
        run_dir.mkdir(parents=True, exist_ok=True)
        self._failed_saves: list[str] = []
        self._status: Status = "running"
        with contextlib.ExitStack() as held:
            self._lock = held.enter_context(locked(run_dir, BUSY))
            # Without the lock, another run may have trained on since this one was set up.
            if newest_or_none(run_dir) != found:
                raise UserError(f"{run_dir}: another run has just written here; start again")
            self._open(config, followed, resumed_step, about, source)
            self._held = held.pop_all()

    def _open(
        self,
        config: Config,
        followed: Sequence[Followed],
        resumed_step: int | None,
        about: dict[str, Any],
        source: Path | None,
    ) -> None:
        # Only with the lock, because before it these could belong to a save of another run.
        delete_leftovers(self.path)
        tidy(self.path, self._say)
        later = [p for p in checkpoint_path.saved(self.path) if resumed_step is not None and step_of(p) > resumed_step]
        if later:
            self._keep_later(later)
        here = resumed_step is not None
        if here and source is not None and (self.path / source.name).is_dir() and re.fullmatch(STEP_NAME, source.name):
            # Where --resume has named it; a start after a kill then goes on from it, too.
            point_if_other(self.path / "latest", source.name)
        if resumed_step is not None:
            # A kill may have come before a save could do it.
            with self._log_os_errors():
                delete_old(self.path, config.checkpoint, resumed_step, self._say)
        # From another folder's checkpoint, the settings are still those that followed there.
        begun = source.parent if source is not None and not here else self.path
        before = _read_description(begun) if here or source is not None else {}
        kept = {
            "started": (before.get("started") if here else None) or _now(),
            "rules": {setting.key: asdict(setting) for setting in followed} or before.get("rules", {}),
            **({"expected": before["expected"]} if "expected" in before else {}),
        }
        atomic_text(self.path / "run.json", json.dumps(_description(config, kept | about), indent=2) + "\n")
        _write_status(self.path, "running")
        self._log = MetricsLog(self.path / "metrics.jsonl", keep_through_step=resumed_step)
        self._waiting = False  # whether it has lines that could not be written yet
        self._failing = threading.Lock()

    @property
    def path(self) -> Path:
        """The folder, also after it was renamed. Raises FileNotFoundError if it was deleted."""
        return self._lock.path

    def where(self) -> Path:
        """As `path`; a function."""
        return self.path

    def _keep_later(self, later: Sequence[Path]) -> None:
        """Keeps what a run that goes back has made since: its metrics would be cut."""
        log = self.path / "metrics.jsonl"
        if log.exists():
            kept = next(p for n in itertools.count(1) if not (p := self.path / f"metrics.before-{n}.jsonl").exists())
            shutil.copyfile(log, kept)
            self._say(
                f"goes back, before {', '.join(path.name for path in later)}: they stay where they are, and the "
                f"metrics until now in {kept.name}"
            )

    def note_failed_save(self, failure: str) -> None:
        """Repeats in status.json that a checkpoint could not be written. From any thread."""
        with self._failing:
            self._failed_saves = [*self._failed_saves, failure][-FAILED_SAVES:]
            if self._status == "running":
                with self._log_os_errors():
                    _write_status(self.path, "running", failed_saves=self._failed_saves)

    def write_metrics(self, line: dict[str, Any]) -> None:
        """Writes a line. If the disk is full, the run continues, and the line is written with a later one."""
        try:
            self._log.write(line)
            self._waiting = False
        except OSError as error:
            # Shown once, not for every line while the disk is full.
            if not self._waiting:
                self._say(f"{error.filename}: cannot be written ({error.strerror}); its lines are kept until it can be")
            self._waiting = True

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns all lines. Raises OSError if some cannot be written."""
        self._log.flush()
        return read_metrics(self.path / "metrics.jsonl")  # its damaged lines were shown at the start

    def finish(self, result: dict[str, Any], stopped: str, ended: str = "") -> None:
        """Writes the final status.

        stopped: why the run was stopped early and can continue later; empty: it is complete. ended: why it is complete
        before train.total_tokens.
        """
        with self._failing:
            self._status = "stopped" if stopped else "complete"
            message = stopped or ended or None
            _write_status(self.path, self._status, result=result, message=message, failed_saves=self._failed_saves)

    def fail(self, message: str) -> None:
        """Writes the status `failed`. From any thread: the failure detector may write while the main thread fails."""
        # Both would use the same temporary file.
        with self._failing:
            self._status = "failed"
            _write_status(self.path, "failed", message=message, failed_saves=self._failed_saves)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # First, so that waiting lines are tried once more, whatever the reason for the end is.
        with self._log_os_errors():
            self._log.close()
        if error is not None:
            with self._log_os_errors():
                self.fail(f"{type(error).__name__}: {error}")
        # Last, so that until now no other run could write the same files.
        self._held.close()

    @contextlib.contextmanager
    def _log_os_errors(self) -> Iterator[None]:
        """Shows an OSError instead of raising it, which would hide the error that ended the run."""
        try:
            yield
        except OSError as error:
            self._say(f"{error.filename}: could not be written ({error.strerror})")


def _write_status(
    path: Path,
    status: Status,
    *,
    result: dict[str, Any] | None = None,
    message: str | None = None,
    failed_saves: Sequence[str] = (),
) -> None:
    described: dict[str, Any] = {"status": status, "result": result, "message": message}
    # The last lines about checkpoints that could not be written.
    described |= {"failed_saves": list(failed_saves)} if failed_saves else {}
    try:
        atomic_text(path / "status.json", json.dumps(described) + "\n")
    except OSError as error:
        error.filename = str(path / "status.json")  # an error of write() does not have it
        raise


def mark_failed(path: Path, message: str, *, hangs: bool) -> None:
    """Marks the run as failed if rank 0 has ended before it could. Does nothing if another run has the folder now.

    hangs: rank 0 hangs, and has not ended. Then it has the lock itself.
    """
    try:
        with contextlib.nullcontext() if hangs else locked(path, BUSY, patient=False):
            # Rank 0 may have written a more exact status.
            if json.loads((path / "status.json").read_text("utf-8"))["status"] == "running":
                _write_status(path, "failed", message=message)
    # UserError: another run has the lock. Other errors: status.json is damaged and cannot be marked.
    except (UserError, ValueError, KeyError, TypeError):
        return


def newest_or_none(run_dir: Path) -> Path | None:
    """Returns the checkpoint that `latest` stands for; None if there is none, or a damaged one."""
    try:
        return checkpoint_path.newest(run_dir)
    except DamagedCheckpoint:
        return None


def finished_result(path: Path) -> dict[str, Any] | None:
    """Returns the result of a complete run, None for any other. Its paths are those that the folder has now."""
    try:
        status = json.loads((path / "status.json").read_text("utf-8"))
        if status["status"] != "complete" or status["result"] is None:
            return None
        result = dict(status["result"])
        for key, folder in {"checkpoint": path.resolve(), "best": path}.items():
            if result.get(key) is not None and (here := folder / Path(result[key]).name).is_dir():
                result[key] = str(here)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result


def describe_finished(config: Config, state: TrainState, source: Path | None) -> Iterator[str]:
    """Yields lines about a run that is started again and has nothing to do. source: its newest checkpoint."""
    assert source is not None
    line = f"nothing to train: {config.checkpoint.dir} is complete at step {state.step}, {state.tokens:,} tokens"
    if changed := list(changed_settings(checkpoint.read_state(source)[1], config)):
        line += f"; these settings are not those it ended with, and change nothing: {', '.join(changed)}"
    yield line
    if not no_better_loss(config, state):
        yield "a higher train.total_tokens goes on from its last checkpoint"
    yield from how_to_go_on(config, state)


def how_to_go_on(config: Config, state: TrainState) -> Iterator[str]:
    """Yields a line if a complete run can continue in another way than from its last checkpoint."""
    run_dir = Path(config.checkpoint.dir)
    if ended := no_better_loss(config, state):
        yield f"{ended}; a higher train.stop_patience, or null, goes on"
        return
    if level := [path for path in checkpoint_path.saved(run_dir) if begins_decay(path)]:
        yield (
            "to train longer at the level rate, as if the decay had not begun, add to the command: "
            f"--resume {shlex.quote(str(level[-1]))} {shlex.quote(f'checkpoint.dir={run_dir}-longer')} "
            f"train.total_tokens={2 * state.tokens}"
        )


def no_better_loss(config: Config, state: TrainState) -> str:
    """Returns a line if the run ends because of train.stop_patience, with the best checkpoint; else empty."""
    if not state.out_of_patience(config.train) or state.tokens >= config.train.horizon:
        return ""
    run_dir = Path(config.checkpoint.dir)
    best = best_checkpoint(run_dir)
    named = "" if best is None else f"; the best is {run_dir / best.name}"
    return f"stopped: no better validation loss for {state.worse_validations} validations{named}"


def _description(config: Config, about: dict[str, Any]) -> dict[str, Any]:
    """Returns all that is needed to repeat the run, apart from the shards."""
    packages = ("torch", "deepspeed", "numpy", "safetensors", "sentencepiece")
    versions = {"llm-from-scratch": __version__, "python": platform.python_version()}
    return {
        "config": config.model_dump(),
        "versions": versions | {package: version(package) for package in packages},
        "commit": source_commit(),
        **about,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_description(path: Path) -> dict[str, Any]:
    """Returns the run.json of the resumed run; {} if it cannot be read."""
    try:
        described = json.loads((path / "run.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return described if isinstance(described, dict) else {}
