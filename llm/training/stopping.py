"""Stops a run early: after a signal at any rank, by the clock, or by a file. All ranks agree, save and exit.

The process `deepspeed` does not forward signals. Its child sends SIGTERM to each rank in turn when it gets a signal, so
ranks get it twice if the whole process group was signalled. The child kills the ranks after 30 seconds and returns its
own exit code; status.json says how the run ended.
"""

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from llm.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOP_FILE = "stop"
OUT_OF_TIME = "train.max_minutes is over"
IMPATIENT_SECONDS = 2.0
"""A second SIGINT after at least this time is the user's second Ctrl-C; an earlier one is the first, forwarded by a
launcher.
"""

# The ranks exchange an index into this; the highest one decides.
REASONS = ("", OUT_OF_TIME, f"the file {STOP_FILE} asks for it", *(s.name for s in SIGNALS))


class StopRequest:
    """Collects requests to stop the run.

    Args:
        world: all its ranks must agree.
        run_dir: a file `stop` in it is a request; it is deleted when it has been seen.
        max_minutes: limit from now on; None: no limit.
    """

    def __init__(self, world: World, run_dir: Path, max_minutes: float | None) -> None:
        self._world, self._file = world, run_dir / STOP_FILE
        # monotonic, because an adjusted clock must not end a run.
        self._end = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._asked = 0  # the strongest request of all ranks at the last agreement
        # Only the signal handler writes these, because it may interrupt `agreed` anywhere.
        self._signalled = 0
        self._interrupted = math.inf  # the time of the first SIGINT

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals inside the block. Launchers repeat a signal, so a repeated one changes nothing.

        Only a SIGINT after IMPATIENT_SECONDS has its effect from before the block.
        """
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        self._before = before
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self) -> str:
        """Returns why the run must stop, the same on every rank; empty: it continues. Collective."""
        asked = max(self._asked, self._signalled)
        if self._end is not None and time.monotonic() >= self._end:
            asked = max(asked, 1)
        # Only one rank looks, because on a shared file system the others may see the file later or not at all.
        if self._world.rank == 0 and self._file.exists():
            self._file.unlink(missing_ok=True)
            asked = max(asked, 2)
        # A signal may reach only one rank; if it stopped alone, the others would wait in a collective.
        self._asked = self._world.agree(asked)
        return REASONS[self._asked]

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
