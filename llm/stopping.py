"""Stopping a run before its end: a signal at any rank, the clock, or a file; all ranks agree, save and leave.

The deepspeed launcher passes no signal on, kills after 30 seconds and returns an exit code of its own: what became of a
run stands in its status.json.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from llm.engine import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOP_FILE = "stop"
OUT_OF_TIME = "train.max_minutes is over"

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
        self._asked = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals; a second one of the same kind does what it always did."""
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        self._before = before
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self) -> str:
        """Why the run is to stop, the same on every rank; empty: it goes on. Collective."""
        if self._end is not None and time.monotonic() >= self._end:
            self._asked = max(self._asked, 1)
        if self._world.rank == 0 and self._file.exists():
            self._file.unlink(missing_ok=True)
            self._asked = max(self._asked, 2)
        self._asked = self._world.agree(self._asked)
        return REASONS[self._asked]

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._asked = max(self._asked, REASONS.index(signal.Signals(number).name))
        signal.signal(number, self._before[signal.Signals(number)])
