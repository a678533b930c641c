"""Measures the time of a run: the phases of its steps, with the device's clock, and the time between steps."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

PHASES = ("forward", "backward", "optimizer", "communication")
"""The phases of a step, apart from the wait for data."""
OUTSIDE = ("validation", "save")
"""Work between steps; the time of a step does not include it."""
TASKS = "tasks"
"""Work between steps, too, whose time is written with its results."""
BETWEEN = "the host's part"
"""What is neither a phase nor the wait for data nor outside of steps."""
WAITS = 10_000
"""The number of steps for the 99th percentile of the wait for data."""


class Meter:
    """Means over the steps since the last `window`.

    On a GPU, a phase is the time between events on the computing stream. The events are read once per window, so the
    measurement does not wait for the device. On a CPU, phases are measured with the host's clock, as the wait for data
    on every device.
    """

    def __init__(self, tokens_per_step: int, device: torch.device) -> None:
        self._tokens_per_step = tokens_per_step
        self._device = device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._open: list[str] = []  # the active phases, the innermost last
        self._spans: list[tuple[str, str | None, Any, Any]] = []  # phase, enclosing phase, begin, end
        self._is_outside = False
        self._outside = dict.fromkeys(OUTSIDE, 0.0)
        self.tasks_seconds = 0.0
        """Seconds in `outside(TASKS)` since the start of the run."""
        self._waits: deque[float] = deque([0.0], maxlen=WAITS + 1)  # one per step; the last one is for the current step
        self._steps, self._seconds, self._all_steps = 0, 0.0, 0
        self.start()
        self.doing = "set-up"
        """What the run is doing: "data", one of PHASES or OUTSIDE, or what is between them."""

    def start(self) -> None:
        """Starts the time of the run, without its set-up."""
        self.doing = BETWEEN
        self._last = self._begin = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block as phase `name`; the time is subtracted from the enclosing phase.

        A block on a stream other than the computing one counts for no phase, because it runs at the same time.
        """
        # At ZeRO 3 a validation gathers weights; this communication does not belong to steps.
        if self._is_outside or (self._stream is not None and torch.cuda.current_stream(self._device) != self._stream):
            yield
            return
        begin = self._now()
        self._open.append(name)
        enclosing, self.doing = self.doing, name
        try:
            yield
        finally:
            self.doing = enclosing
            self._open.pop()
            self._spans.append((name, self._open[-1] if self._open else None, begin, self._now()))

    @contextlib.contextmanager
    def outside(self, name: str | None) -> Iterator[None]:
        """Times the block as one of OUTSIDE or TASKS, or not at all if None. The time of steps does not include it."""
        start = time.perf_counter()
        self._is_outside, self.doing = True, name or BETWEEN
        try:
            yield
        finally:
            self._is_outside, self.doing = False, BETWEEN
            # The time of the next step begins here.
            self._last = time.perf_counter()
            if name == TASKS:
                self.tasks_seconds += self._last - start
            elif name is not None:
                self._outside[name] += self._last - start

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Times the block as a wait for data."""
        start, self.doing = time.perf_counter(), "data"
        yield
        self.doing = BETWEEN
        self._waits[-1] += time.perf_counter() - start

    @property
    def seconds(self) -> float:
        """Seconds since the start of the run, without its set-up."""
        return time.perf_counter() - self._begin

    def count_step(self) -> None:
        """Ends a step. The host has checked its gradient, so a GPU has finished everything except the update."""
        now = time.perf_counter()
        self._seconds += now - self._last
        self._last = now
        self._steps += 1
        self._all_steps += 1
        self._waits.append(0.0)

    def window(self) -> dict[str, float]:
        """Returns tokens per second and mean milliseconds per step of the steps since the last call, at least one."""
        steps, seconds = self._steps, self._seconds
        # Without the current step, which is not finished.
        waits = list(self._waits)[:-1]
        recent = waits[-steps:]
        totals = dict.fromkeys(PHASES, 0.0)
        for name, enclosing, begin, end in self._spans:
            taken = self._milliseconds(begin, end)
            totals[name] += taken
            # Communication inside backward counts only as communication.
            if enclosing is not None:
                totals[enclosing] -= taken
        outside = self._outside
        self._steps, self._seconds = 0, 0.0
        self._spans, self._outside = [], dict.fromkeys(OUTSIDE, 0.0)
        return {
            "tokens_per_second": steps * self._tokens_per_step / seconds,
            "tokens_per_second_run": self._all_steps * self._tokens_per_step / self.seconds,
            "step_ms": 1e3 * seconds / steps,
            "data_wait_ms": 1e3 * sum(recent) / len(recent),
            **{f"{name}_ms": total / steps for name, total in totals.items()},
            **{f"{name}_ms": 1e3 * total / steps for name, total in outside.items()},
            "data_wait_ms_max": 1e3 * max(recent),
            "data_wait_ms_p99": 1e3 * float(np.percentile(waits, 99)),
        }

    def _now(self) -> Any:
        """Returns the time on the host, or on a GPU an event, which the device reaches later."""
        if self._stream is None:
            return time.perf_counter()
        # By default torch's events record no time.
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def _milliseconds(self, begin: Any, end: Any) -> float:
        if self._stream is None:
            return 1e3 * float(end - begin)
        end.synchronize()  # does not wait if the loss of the step has already been read
        return float(begin.elapsed_time(end))
