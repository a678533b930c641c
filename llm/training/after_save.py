"""checkpoint.after_save: a command of the user's that runs after each completed save, such as an upload.

The shell runs it in the background, on rank 0, one at a time, with the checkpoint's folder in a variable. It never ends
a run: a failure is shown and counted.
"""

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from llm import launchers

VARIABLE = "LLM_CHECKPOINT"
"""The environment variable that has the absolute path of the checkpoint's folder."""
LIMIT_MINUTES = 30.0
"""How long a run that has ended waits for the last command."""
SHOWN_BYTES = 400
"""Of the end of a failed command's output."""


class AfterSave:
    """Runs a command for one checkpoint after another. A context manager, which ends what still runs.

    Args:
        command: None: there is none.
        say: shows a line to the user; called from another thread.
        on_failure: called there with a line about each failure.
    """

    def __init__(self, command: str | None, say: Callable[[str], None], on_failure: Callable[[str], None]) -> None:
        self._command, self._say, self._on_failure = command, say, on_failure
        self._lock = threading.Lock()
        self._running: Path | None = None
        self._next: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._left = False
        self.failures = 0
        """How many commands have failed since the start of the run."""

    def start(self, folder: Path) -> None:
        """Runs the command for a checkpoint, once the one before has ended.

        If saves come faster than the command ends, those between are left out, with a line: else their folders, which
        must stay, would fill the disk.
        """
        if self._command is None:
            return
        folder = Path(os.path.realpath(folder))
        with self._lock:
            if self._running is not None:
                if self._next is not None:
                    self._say(f"after_save  {self._next.name} is left out: the command takes longer than a save")
                self._next = folder
                return
            self._running = folder
        # A daemon: an error of the run must not wait for an upload.
        threading.Thread(target=self._work, name="after_save", daemon=True).start()

    @property
    def names(self) -> set[str]:
        """The names of the folders that the command reads, or will."""
        with self._lock:
            return {folder.name for folder in (self._running, self._next) if folder is not None}

    def leave(self) -> None:
        """Ends the command if it still runs, and names the checkpoints that it has not done."""
        with self._lock:
            left = [each for each in (self._running, self._next) if each is not None and not self._left]
            self._left, self._next = True, None
            if self._process is not None:
                os.killpg(self._process.pid, signal.SIGTERM)
        if left:
            named = " and ".join(str(folder) for folder in left)
            self._say(f"after_save  not done for {named}: the run waits no longer; run the command yourself")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()

    def _work(self) -> None:
        while (folder := self._running) is not None:
            begin = time.monotonic()
            problem = self._run(folder)
            seconds = time.monotonic() - begin
            if self._left:  # which has told it
                return
            if problem:
                self.failures += 1
                line = f"{folder}: {problem}; the run goes on"
                self._say(line)
                self._on_failure(line)
            else:
                self._say(f"after_save  {folder.name} done in {seconds:,.0f} s")
            with self._lock:
                self._running, self._next = self._next, None

    def _run(self, folder: Path) -> str:
        """Returns what went wrong; empty: nothing."""
        assert self._command is not None
        environment = launchers.without_ranks() | {VARIABLE: str(folder)}
        with tempfile.TemporaryFile() as output:
            try:
                with self._lock:
                    if self._left:
                        return ""
                    self._process = subprocess.Popen(
                        self._command,
                        shell=True,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # a Ctrl-C is for the run, which finishes and waits
                    )
                code = self._process.wait()
            except OSError as error:
                return f"checkpoint.after_save cannot start ({error.strerror})"
            finally:
                with self._lock:
                    self._process = None
            output.seek(max(0, output.seek(0, os.SEEK_END) - SHOWN_BYTES))
            said = " ".join(output.read().decode(errors="replace").split())
        return f"checkpoint.after_save ended with {code}" + (f": {said}" if said else "") if code else ""
