"""Stops a run early: after a signal at any rank, by the clock, or by a file. All ranks agree, save and exit.

The process `deepspeed` does not forward signals. Its child sends SIGTERM to each rank in turn when it gets a signal, so
ranks get it twice if the whole process group was signalled. The child kills the ranks after 30 seconds and returns its
own exit code; status.json says how the run ended.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from llm.interrupts import answering, end_unless
from llm.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOP_FILE = "stop"
OUT_OF_TIME = "train.max_minutes is over"
ON_LOG_FAILED = "on_log has raised an error"
IMPATIENT_SECONDS = 2.0
"""A second SIGINT after at least this time is the user's second Ctrl-C; an earlier one is the first, forwarded by a
launcher.
"""

# The ranks exchange an index into this; the highest one decides.
REASONS = ("", OUT_OF_TIME, f"the file {STOP_FILE} asks for it", ON_LOG_FAILED, *(s.name for s in SIGNALS))


class StopRequest:
    """Collects requests to stop the run.

    Args:
        world: all its ranks must agree.
        run_dir: a file `stop` in it is a request; it is deleted when it has been seen.
        max_minutes: limit from now on; None: no limit.
        say: shows a line to the user. It is called from a thread, too.
        last: called in that thread before the process is ended because a second Ctrl-C did not.
    """

    def __init__(
        self,
        world: World,
        run_dir: Path,
        max_minutes: float | None,
        say: Callable[[str], None] = print,
        last: Callable[[], None] = lambda: None,
    ) -> None:
        self._world, self._say, self._last = world, say, last
        self.find_folder: Callable[[], Path] = lambda: run_dir
        """Returns the run's folder, which may be renamed during the run."""
        # Asked for while nothing ran. The one that cannot be deleted must not end every run, either.
        self._ignored = self._take_file() if world.rank == 0 else None
        if self._ignored is not None:
            say(f"{self._file}: is from before this start and stops nothing")
        # monotonic, because an adjusted clock must not end a run.
        self._end = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._asked = 0  # the strongest request of all ranks at the last agreement
        self._own = 0  # of this process, by `ask`
        # Only the signal handler writes these, because it may interrupt `agreed` anywhere.
        self._signalled = 0
        self._interrupted = math.inf  # the time of the first SIGINT
        # Of the thread that answers: whether it has, and the time of the first SIGINT.
        self._answered, self._answered_interrupt = False, math.inf

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals inside the block. Launchers repeat a signal, so a repeated one changes nothing.

        Only a SIGINT after IMPATIENT_SECONDS has its effect from before the block. In another thread than the main one,
        which alone may handle signals, there are none.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        self._before, self._left = before, threading.Event()
        try:
            with answering(self._answer):
                try:
                    yield
                finally:
                    self._left.set()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def ask(self, reason: str) -> None:
        """Asks for a stop for one of REASONS. On any rank."""
        self._own = max(self._own, REASONS.index(reason))

    def agreed(self) -> str:
        """Returns why the run must stop, the same on every rank; empty: it continues. Collective."""
        asked = max(self._asked, self._signalled, self._own)
        if self._end is not None and time.monotonic() >= self._end:
            asked = max(asked, 1)
        # Only one rank looks, because on a shared file system the others may see the file later or not at all.
        if self._world.rank == 0 and self._take_file() not in (None, self._ignored):
            asked = max(asked, 2)
        # A signal may reach only one rank; if it stopped alone, the others would wait in a collective.
        self._asked = self._world.agree(asked)
        return REASONS[self._asked]

    @property
    def _file(self) -> Path:
        return self.find_folder() / STOP_FILE

    def _take_file(self) -> tuple[int, int] | None:
        """Deletes the file and returns what tells it from another one (inode, time); None: there is none."""
        try:
            found = self._file.lstat()
        except OSError:
            return None
        # A folder, or a file in a folder where others' files cannot be deleted.
        with contextlib.suppress(OSError):
            self._file.unlink()
        return found.st_ino, found.st_mtime_ns

    def _answer(self, number: int) -> None:
        """Tells the user what a signal does. In a thread, because a step may take minutes."""
        now = time.monotonic()
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            self._answered_interrupt = min(self._answered_interrupt, now)
        if not self._answered:
            self._answered = True
            self._say(
                f"{name}: the run finishes this step, saves and stops; Ctrl-C again, after "
                f"{IMPATIENT_SECONDS:g} s or more, ends it without that"
            )
        elif number == signal.SIGINT and now - self._answered_interrupt >= IMPATIENT_SECONDS:
            self._say(f"{name} again: the run ends without a save; start again to go on from the last checkpoint")
            end_unless(self._left, self._last)

    def _take(self, number: int, frame: FrameType | None) -> None:
        # A handler runs between any two instructions of the main thread, so it only sets a value; `agreed` acts.
        self._signalled = max(self._signalled, REASONS.index(signal.Signals(number).name))
        if number == signal.SIGINT:
            now = time.monotonic()
            self._interrupted = min(self._interrupted, now)
            if now - self._interrupted >= IMPATIENT_SECONDS:
                # Raises the signal again for the handler from before the block, which ends the run.
                signal.signal(number, self._before[signal.SIGINT])
                signal.raise_signal(number)
