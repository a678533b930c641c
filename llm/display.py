"""Progress on stderr while a command runs: a live bar on a terminal, plain lines in a log."""

import contextlib
import sys
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llm.errors import visible


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
            TextColumn("{task.percentage:>5.1f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=silent or not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, completed=int(completed))

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

    def update(self, completed: float, title: str | None = None) -> None:
        """title: None keeps the one before."""
        self._bar.update(self._task, completed=completed, description=None if title is None else visible(title))

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
