"""How the benchmarks measure time: device time on a GPU, wall time on a CPU, with interleaved variants.

On a GPU, a sample is one replay of a CUDA graph with several calls on different inputs. Together the inputs are larger
than twice the L2 cache, so that each call reads its inputs from memory; results stay alive, so that each call writes to
its own memory. If a call cannot be captured (because it waits for the device), a sample is the time between two events
around eager calls, and the table shows that method. The limits of the machine are those of the faster method. The time
of a call on the host is measured separately.
"""

import math
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from llm.device_rates import synchronize

Call = Callable[[], Any]

WARMUP_SECONDS = {"cuda": 0.2, "cpu": 0.02}  # a GPU starts with a low clock rate
REPLAY_SECONDS = 5e-4  # least time of a replay, so that the gap of microseconds between two is negligible
MAX_CALLS = 64  # calls per replay
LIMIT_CALLS = {"cuda": 4, "cpu": 1}  # per sample of a limit, of milliseconds each
HOST_CALLS = 10  # so few that they fit into the device's queue and do not block the host


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    samples: tuple[float, ...]
    method: str  # "graph", "events" or "clock"

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, math.floor(share * len(ordered)))]


@dataclass(frozen=True)
class Limits:
    """Rates measured on this machine."""

    copy: float  # bytes/s, read plus written, of a copy in the device's memory
    matmul: float  # FLOP/s of a square matrix product

    def bound(self, moved: float, flops: float) -> str:
        """Returns "copy" or "matmul": the limit that takes longer."""
        return "copy" if moved / self.copy >= flops / self.matmul else "matmul"


def wall_seconds(call: Call, device: torch.device) -> float:
    """Seconds per call, including the device's part."""
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


def cache_bytes(device: torch.device) -> int:
    """Returns the size of the last-level cache of the device; 0 on a CPU, where inputs are not rotated."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def input_sets(set_bytes: int, device: torch.device) -> int:
    """Returns the number of input sets of this size to rotate through."""
    return min(MAX_CALLS, max(1, math.ceil(2 * cache_bytes(device) / max(1, set_bytes))))


def calls_a_replay(sets: int, least_seconds: float, device: torch.device) -> int:
    """Returns the calls per replay, a multiple of `sets`, if a call takes at least `least_seconds`."""
    if device.type != "cuda":
        return sets
    rounds = math.ceil(REPLAY_SECONDS / max(1e-9, sets * least_seconds))
    return sets * max(1, min(rounds, MAX_CALLS // sets))


def interleaved(
    variants: Mapping[str, Sequence[Call]], device: torch.device, *, samples: int, capture: bool = True
) -> dict[str, Timing | Exception]:
    """Times the variants, one sample of each in turn, so that clock rate and temperature affect all equally.

    Args:
        variants: {name: calls of one replay}: the same function on different inputs.
        samples: number of samples per variant.
        capture: on a GPU, time replays of a graph if a call can be captured; otherwise eager calls between events.

    Returns {name: time of one call, or the exception of the variant}.
    """
    found: dict[str, Timing | Exception] = {}
    replays: dict[str, tuple[Call, str]] = {}
    for name, calls in variants.items():
        try:
            replays[name] = _replay(calls, device, capture)
        except Exception as error:  # any exception of a variant is the reason in the table
            found[name] = error
    end = time.perf_counter() + WARMUP_SECONDS[device.type]
    while replays and time.perf_counter() < end:
        for replay, _ in replays.values():
            replay()
        synchronize(device)
    clock = _device_clock if device.type == "cuda" else _wall_clock
    taken = clock({name: replay for name, (replay, _) in replays.items()}, samples)
    for name, (_, method) in replays.items():
        found[name] = Timing(tuple(seconds / len(variants[name]) for seconds in taken[name]), method)
    return found


def _wall_clock(replays: Mapping[str, Call], samples: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(samples):
        for name, replay in replays.items():
            begin = time.perf_counter()
            replay()
            taken[name].append(time.perf_counter() - begin)
    return taken


def _device_clock(replays: Mapping[str, Call], samples: int) -> dict[str, list[float]]:
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in replays}
    for _ in range(samples):
        for name, replay in replays.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) / 1e3 for begin, end in pairs] for name, pairs in events.items()}


def _replay(calls: Sequence[Call], device: torch.device, capture: bool) -> tuple[Call, str]:
    """Returns a function that repeats the calls, and the method: "graph", "events" or "clock"."""

    def eager() -> None:
        for call in calls:
            call()

    eager()  # compiles kernels and fills caches
    if device.type != "cuda":
        return eager, "clock"
    if capture and not _waits(calls[0]):
        try:
            return _captured(calls), "graph"
        except RuntimeError:
            torch.cuda.synchronize()
    return eager, "events"


def _waits(call: Call) -> bool:
    """Whether the call waits for the device, for example for a value. Then its capture in a graph would fail."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _captured(calls: Sequence[Call]) -> Call:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # libraries make handles and workspaces per stream
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [call() for call in calls]

    def replay(alive: Any = results) -> None:
        graph.replay()

    return replay


def host_seconds(call: Call, device: torch.device) -> float | None:
    """Returns seconds until an eager call returns on the host; None on a CPU, where that is the whole time."""
    if device.type != "cuda":
        return None
    taken: list[float] = []
    end = time.perf_counter() + 0.3
    while len(taken) < 5 and (not taken or time.perf_counter() < end):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        taken.append((time.perf_counter() - begin) / HOST_CALLS)
    torch.cuda.synchronize(device)
    return statistics.median(taken)


def peak_memory(call: Call, device: torch.device) -> tuple[int, int] | None:
    """Returns (peak, results): the most bytes that a call allocates, and the bytes of its results.

    None on a CPU, where torch does not count them.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = call()
    peak = torch.cuda.max_memory_allocated(device) - before
    kept = torch.cuda.memory_allocated(device) - before
    del results
    return peak, kept


def measure_limits(device: torch.device, dtype: torch.dtype, *, samples: int) -> Limits:
    """Measures the machine's copy rate and matmul rate in `dtype`.

    On a GPU each is the faster of a graph's replays and eager calls: in a graph torch's copy is a memcpy node, which
    reached 2.6 TB/s on an H200 where the eager call reached 4.2.
    """
    numbers = (2**30 if device.type == "cuda" else 2**25) // dtype.itemsize
    size = 8192 if device.type == "cuda" else 512
    source, (a, b) = (
        torch.randn(numbers, device=device, dtype=dtype),
        torch.randn(2, size, size, device=device).to(dtype),
    )
    target, product = torch.empty_like(source), torch.empty_like(a)
    # Several calls a sample, so that a gap before the first one is negligible.
    calls: dict[str, list[Call]] = {
        "copy": [lambda: target.copy_(source)] * LIMIT_CALLS[device.type],
        "matmul": [lambda: torch.mm(a, b, out=product)] * LIMIT_CALLS[device.type],
    }
    seconds: dict[str, float] = {}
    for capture in (True, False) if device.type == "cuda" else (False,):
        for name, timing in interleaved(calls, device, samples=samples, capture=capture).items():
            if isinstance(timing, Exception):
                raise timing
            seconds[name] = min(timing.median, seconds.get(name, math.inf))
    return Limits(copy=2 * source.nbytes / seconds["copy"], matmul=2 * size**3 / seconds["matmul"])


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def clocks() -> str | None:
    """Returns the current clocks, power and temperature from nvidia-smi; None if there is no nvidia-smi."""
    query = "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None
