"""Where a run's time goes: the phases of its steps, by the device's own clock, and what happens beside them."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

PHASES = ("forward", "backward", "optimizer", "communication")
"""What a step's time is split into, beside `data_wait`."""
BESIDE = ("validation", "save")
"""What a step's time does not contain."""
WAITS = 10_000
"""Steps over which the 99th percentile of the wait for data is taken."""


class Meter:
    """Means of the steps since the last `window`.

    On a GPU the phases are the time between events on the computing stream, which are read once a window: measuring
    never waits for the device. On a CPU, and for the data, they are the host's clock.
    """

    def __init__(self, tokens_per_step: int, device: torch.device) -> None:
        self._tokens_per_step = tokens_per_step
        self._device = device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._open: list[str] = []
        self._spans: list[tuple[str, str | None, _Mark, _Mark]] = []  # phase, the one around it, begin, end
        self._is_beside = False
        self._beside = dict.fromkeys(BESIDE, 0.0)
        self._waits: deque[float] = deque([0.0], maxlen=WAITS + 1)  # of each step; the last is the one under way
        self._steps, self._seconds, self._all_steps = 0, 0.0, 0
        self.start()

    def start(self) -> None:
        """What happened before is no part of the run."""
        self._last = self._begin = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens within is a step's phase `name`, and not that of the phase around it.

        What runs on a stream of its own, beside the computation, is no phase.
        """
        if self._is_beside or (self._stream is not None and torch.cuda.current_stream(self._device) != self._stream):
            yield
            return
        begin = self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()
            self._spans.append((name, self._open[-1] if self._open else None, begin, self._mark()))

    @contextlib.contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """What happens within, one of BESIDE, is no part of a step."""
        start = time.perf_counter()
        self._is_beside = True
        try:
            yield
        finally:
            self._is_beside = False
            self._last = time.perf_counter()
            self._beside[name] += self._last - start

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """For the data, whose reader works on the host."""
        start = time.perf_counter()
        yield
        self._waits[-1] += time.perf_counter() - start

    def count_step(self) -> None:
        """Called after a step. Its gradient has been checked on the host: a GPU has finished all but the update."""
        now = time.perf_counter()
        self._seconds += now - self._last
        self._last = now
        self._steps += 1
        self._all_steps += 1
        self._waits.append(0.0)

    def window(self) -> dict[str, float]:
        """Of the steps since the last call, at least one: tokens a second, and milliseconds a step as means."""
        steps, seconds = self._steps, self._seconds
        waits = list(self._waits)[:-1]
        recent = waits[-steps:]
        totals = dict.fromkeys(PHASES, 0.0)
        for name, around, begin, end in self._spans:
            taken = _milliseconds(begin, end)
            totals[name] += taken
            if around is not None:
                totals[around] -= taken
        beside = self._beside
        self._steps, self._seconds = 0, 0.0
        self._spans, self._beside = [], dict.fromkeys(BESIDE, 0.0)
        return {
            "tokens_per_second": steps * self._tokens_per_step / seconds,
            "tokens_per_second_run": self._all_steps * self._tokens_per_step / (time.perf_counter() - self._begin),
            "step_ms": 1e3 * seconds / steps,
            "data_wait_ms": 1e3 * sum(recent) / len(recent),
            **{f"{name}_ms": total / steps for name, total in totals.items()},
            **{f"{name}_ms": 1e3 * total / steps for name, total in beside.items()},
            "data_wait_ms_max": 1e3 * max(recent),
            "data_wait_ms_p99": 1e3 * float(np.percentile(waits, 99)),
        }

    def _mark(self) -> "_Mark":
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event


_Mark = float | torch.cuda.Event


def _milliseconds(begin: _Mark, end: _Mark) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float)
        assert isinstance(end, float)
        return 1e3 * (end - begin)
    end.synchronize()  # it has passed already where the step's loss has been read
    return begin.elapsed_time(end)
