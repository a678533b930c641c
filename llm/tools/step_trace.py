"""Reads a trace of training steps from torch's profiler: how long each phase and each kind of op took."""

import contextlib
import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import record_function

import kernels
from kernels.dispatch import OPS
from llm.training.meter import PHASES

KINDS = {"rms_norm": "norm", "add_rms_norm": "norm", "linear_cross_entropy": "cross-entropy"}
"""{op: name under which it is shown}. Two ops share one name."""
MARK = "llm."
"""Prefix of the names that we put into a trace."""
_MATMULS = ("aten::linear", "aten::matmul", "aten::mm", "aten::addmm", "aten::bmm", "mkldnn")

Table = dict[tuple[str, str], float]
"""{(phase, kind or operator): milliseconds}"""


@contextlib.contextmanager
def marked_ops() -> Iterator[None]:
    """Inside this block, a trace has the name of every call of the model's ops."""
    originals = {name: getattr(kernels, name) for name in OPS}

    def marked(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            with record_function(f"{MARK}{name}"):
                return originals[name](*arguments, **options)

        return call

    try:
        for name in OPS:
            # The model looks up its ops in the module at each call, so a new attribute has effect at once.
            setattr(kernels, name, marked(name))
        yield
    # Later code in this process must not mark its ops.
    finally:
        for name, original in originals.items():
            setattr(kernels, name, original)


def marked_phase(name: str) -> contextlib.AbstractContextManager[Any]:
    return record_function(f"{MARK}{name}")


class Attribution:
    """Finds the phase and the kind of work of each event in a trace.

    The phase is the innermost one that was active when the host started the event. The kind comes from the op around
    the event, from the op whose backward it is (autograd gives both the same number), or from its name.

    Args:
        events: from torch.profiler.profile.events(), recorded with marked_ops and marked phases.
        on_device: count the device's time that the host's events caused, not the host's time.
    """

    def __init__(self, events: Iterable[Any], *, on_device: bool) -> None:
        self._events = [event for event in events if event.device_type == DeviceType.CPU]
        self._on_device = on_device
        self._phases = {
            phase: sorted((e.time_range.start, e.time_range.end) for e in self._events if e.name == MARK + phase)
            for phase in PHASES
        }
        self._kind_of_number = self._number_kinds()

    def _number_kinds(self) -> dict[int, str | None]:
        """{number: forward event}. Of events with the same number, autograd differentiates the one that began last."""
        kinds: dict[int, str | None] = {}
        for event in sorted(self._events, key=lambda event: event.time_range.start):
            # -1 means that autograd does not record the op.
            if event.sequence_nr >= 0 and self._phase(event) == "forward":
                kinds[event.sequence_nr] = self._op_around(event)
        return kinds

    def milliseconds(self) -> tuple[Table, dict[tuple[str, str], tuple[float, int]]]:
        """Returns (ms by phase and kind, (ms, calls) by phase and operator name), without events outside of phases."""
        kinds: Table = defaultdict(float)
        names: dict[tuple[str, str], tuple[float, int]] = {}
        for event in self._events:
            # Self time, because the total time of an event includes the events inside it.
            taken = (event.self_device_time_total if self._on_device else event.self_cpu_time_total) / 1e3
            phase = self._phase(event)
            if phase is None or taken <= 0:
                continue
            kinds[phase, self._kind(event, phase)] += taken
            # A mark is not an operator, but its own time counts for its kind.
            if not event.name.startswith(MARK):
                before, calls = names.get((phase, event.name), (0.0, 0))
                names[phase, event.name] = before + taken, calls + 1
        return dict(kinds), names

    def our_kernels(self) -> float:
        """Returns the device's milliseconds in kernels that this project's ops launched."""
        ours = [e for e in self._events if any(a.name.startswith("llm::") for a in _chain(e))]
        return sum(event.self_device_time_total for event in ours) / 1e3

    def _phase(self, event: Any) -> str | None:
        begin = event.time_range.start
        for phase in reversed(PHASES):  # communication is inside the others
            spans = self._phases[phase]
            # inf, to find the last span that begins at `begin` or before, whenever it ends.
            index = bisect_right(spans, (begin, float("inf"))) - 1
            if index >= 0 and begin <= spans[index][1]:
                return phase
        return None

    def _kind(self, event: Any, phase: str) -> str:
        if phase in ("optimizer", "communication"):
            return phase
        # Checked first, because activation checkpointing runs marked ops in the backward phase too.
        op = self._op_around(event)
        if op is not None:
            return op
        chain = list(_chain(event))
        if phase == "backward":
            for ancestor in chain:
                kind = self._kind_of_number.get(ancestor.sequence_nr) if ancestor.sequence_nr >= 0 else None
                if kind is not None:
                    return kind
        if any(ancestor.name.startswith(_MATMULS) for ancestor in chain):
            return "matmul"
        return "embedding" if any("embedding" in ancestor.name for ancestor in chain) else "other"

    @staticmethod
    def _op_around(event: Any) -> str | None:
        # From the inside out, because the innermost op does the work.
        for ancestor in _chain(event):
            name = ancestor.name.removeprefix(MARK)
            if ancestor.name.startswith(MARK) and name in OPS:
                return KINDS.get(name, name)
        return None


def _chain(event: Any) -> Iterator[Any]:
    """Yields the event and the events around it, from the inside out."""
    while event is not None:
        yield event
        event = event.cpu_parent


def device_busy(events: Iterable[Any]) -> tuple[float, float]:
    """Returns (ms in which the device computed, ms from its first kernel to its last)."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        # The profiler shows marks on the device's time line too; they would count as busy time.
        if event.device_type == DeviceType.CUDA and not event.name.startswith(MARK)
    )
    busy, end = 0.0, float("-inf")
    # Kernels of several streams overlap, so their union counts, not their sum.
    for begin, stop in spans:
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return busy / 1e3, (end - spans[0][0]) / 1e3 if spans else 0.0


def memory_timeline(trace: Path, *, on_device: bool) -> tuple[list[float], list[float]]:
    """Yields (ms since the first, allocated bytes above the minimum) at each change of torch's allocator.

    trace: a gzipped JSON file.
    """
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("name") == "[memory]"]
    # The trace holds c10::DeviceType: CPU is 0, CUDA 1.
    kind = 1 if on_device else 0
    changes = sorted(
        ((event["ts"], event["args"]["Bytes"]) for event in events if event["args"]["Device Type"] == kind),
        key=lambda change: change[0],
    )
    if not changes:
        return [], []
    held = list(accumulate(float(amount) for _, amount in changes))  # negative if earlier memory is freed
    return [(at - changes[0][0]) / 1e3 for at, _ in changes], [amount - min(0.0, *held) for amount in held]
