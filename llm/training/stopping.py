"""Stopping a run before its end: a signal at any rank, the clock, or a file; all ranks agree, save and leave.

Of deepspeed's launcher, `deepspeed` passes no signal on, and its child answers one with SIGTERM to each rank in turn, a
second one where the whole process group was signalled. It kills after 30 seconds and returns an exit code of its own:
what became of a run stands in its status.json.
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
"""A SIGINT so long after the first is a user's second Ctrl-C; a sooner one is the first, which a launcher passes on."""

# What ranks tell each other is an index into this; the highest wins.
REASONS = ("", OUT_OF_TIME, f"the file {STOP_FILE} asks for it", *(s.name for s in SIGNALS))


class StopRequest:
    """Listens for requests to stop while it is entered.

    Args:
        world: whose ranks have to agree.
        run_dir: where a file named `stop` asks for it; it is deleted once seen.
        max_minutes: from now; None: no limit.
    """

    def __init__(self, world: World, run_dir: Path, max_minutes: float | None) -> None:
        self._world, self._file = world, run_dir / STOP_FILE
        self._end = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._asked = 0  # by any rank, as last agreed
        # Written by the handler alone, which may come in the midst of agreeing.
        self._signalled = 0
        self._interrupted = math.inf  # when the first SIGINT came

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals. Repeats change nothing, but SIGINT after IMPATIENT_SECONDS does what it did before."""
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        self._before = before
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self) -> str:
        """Why the run is to stop, the same on every rank; empty: it goes on. Collective."""
        asked = max(self._asked, self._signalled)
        if self._end is not None and time.monotonic() >= self._end:
            asked = max(asked, 1)
        if self._world.rank == 0 and self._file.exists():
            self._file.unlink(missing_ok=True)
            asked = max(asked, 2)
        self._asked = self._world.agree(asked)
        return REASONS[self._asked]

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._signalled = max(self._signalled, REASONS.index(signal.Signals(number).name))
        if number == signal.SIGINT:
            now = time.monotonic()
            self._interrupted = min(self._interrupted, now)
            if now - self._interrupted >= IMPATIENT_SECONDS:
                signal.signal(number, self._before[signal.SIGINT])
                signal.raise_signal(number)
