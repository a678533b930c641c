"""Progress on stderr while a command runs: a live bar on a terminal, plain lines in a log."""

import contextlib
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from llm.errors import visible

MOST_BEFORE_LOG = 100
"""Lines that are kept for a log that is opened later."""


def tell(text: object = "", file: TextIO | None = None) -> None:
    """Prints a text for people, with control characters as escapes. file: None is stdout."""
    print(visible(str(text)), file=file, flush=True)


class Display:
    """Shows lines and, on a terminal, a bar with an ETA below them. On ranks other than 0 it shows nothing."""

    def __init__(self, title: str, total: float, completed: float = 0.0, *, silent: bool = False) -> None:
        # stderr, because stdout is for results. soft_wrap: otherwise rich breaks lines at the terminal's width.
        self._console = Console(stderr=True, quiet=silent, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            _Percentage(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=silent or not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, completed=int(completed))
        self._log: TextIO | None = None
        self._before_log: list[str] = []  # lines that were shown before there was a log

    def log_to(self, path: Path) -> None:
        """Also writes each line into a file from now on, after what the file holds; those shown before come first."""
        try:
            # Line by line, so that a killed run has them. It stays open, because the folder may be renamed.
            self._log = open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
        except OSError:
            return
        before, self._before_log = self._before_log, []
        for line in (f"--- {datetime.now(UTC).isoformat(timespec='seconds')}", *before):
            self._write_log(line)

    def _write_log(self, text: str) -> None:
        with contextlib.suppress(OSError):
            if self._log is not None:
                self._log.write(f"{text}\n")
            elif len(self._before_log) < MOST_BEFORE_LOG:  # not all lines of a display without a log
                self._before_log.append(text)

    def line(self, text: str) -> None:
        """Shows a line. Ignores a full disk and a closed pipe, because they must not end a run."""
        # A name with a newline must not look like another line.
        text = visible(text).replace("\n", "\\n")
        with contextlib.suppress(OSError):
            if self._console.is_terminal:
                # markup=False, because rich reads brackets as markup. Rich also keeps the line above the bar.
                self._console.print(text, markup=False)
            elif not self._console.quiet:  # not with rich, which repeats later what it could not write
                print(f"{text}\n", end="", file=sys.stderr, flush=True)
        self._write_log(text)

    def update(self, completed: float, title: str | None = None) -> None:
        """title: None keeps the one before."""
        self._bar.update(self._task, completed=completed, description=None if title is None else visible(title))

    def begin(self, title: str, total: float) -> None:
        """Begins the bar again, for another work."""
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(visible(title), total=total)

    def endless(self, title: str) -> None:
        """Shows that work goes on whose end is not known: a moving bar and the time since the beginning."""
        # A new task, because rich takes no end from one that has it.
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(visible(title), total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if error is not None:  # which is printed only after the end of the run
            self._write_log(f"{type(error).__name__}: {visible(' '.join(str(error).split()))}")
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.close()
            self._log = None


class _Percentage(ProgressColumn):
    """How much is done; nothing if the end is not known."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.percentage:>5.1f}%")
