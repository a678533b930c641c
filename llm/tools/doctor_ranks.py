"""What `llm doctor` checks between the processes of a launcher: clocks, collectives, every pair, and one table."""

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llm import device_rates
from llm.errors import ReportedByRank0, UserError
from llm.hardware import recognised
from llm.rendezvous import Place, form_group
from llm.tools.doctor_folders import ranks_in_words
from llm.tools.doctor_node import Finding

PATIENCE_SECONDS = 120
"""How long a rank may take longer than the first one with its own checks."""
SMALL, LARGE, LARGE_GPU = 8, 8 * 2**20, 256 * 2**20
"""Bytes of a message: of one that only latency delays, and of one that only bandwidth does."""
EXCHANGES, MOST_LARGE = 20, 20
SECONDS = 0.5
"""Large messages are repeated for so long."""
SKEW_SECONDS = 1.0
OUTLIER, FAR_OUTLIER, DISK_OUTLIER, LINK_PEAK = 0.8, 0.5, 0.25, 0.5
"""Warnings: a rank's rates, memory and disk (which ranks of a host share) against the median of all; a link's rate
against its peak, or the median."""
MATRIX_RANKS = 8
"""Up to so many ranks the table of pairs is whole: 80 columns hold no more."""


@dataclass
class Rank:
    """What one rank has found. measured: numbers by the names of COLUMNS; None: unknown."""

    host: str = field(default_factory=platform.node)
    device: str = "CPU"
    versions: dict[str, str | None] = field(default_factory=dict)
    data: list[str] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


COLUMNS = {
    "matmul": ("matmul", "TFLOP/s", 1e12, OUTLIER),
    "copy": ("copy", "GB/s", 1e9, OUTLIER),
    "write": ("disk", "MB/s", 1e6, DISK_OUTLIER),
    "memory": ("memory", "GB", 1e9, FAR_OUTLIER),
    "shm": ("shm", "GB", 1e9, FAR_OUTLIER),
}
"""{name in Rank.measured: (title, unit, its size, the fraction of the median below which a value is an outlier)}"""


class Ranks:
    """The processes of a launcher. Making one, and every method, is collective."""

    def __init__(self, place: Place, device: torch.device) -> None:
        """device: this rank's; NCCL is tried if every rank has a GPU."""
        self.rank, self.size, self.device = place.rank, place.size, device
        # gloo is the default group, so that what is said about NCCL never depends on it.
        form_group(place, torch.device("cpu"))
        all_on_gpus = all(self.gather(device.type == "cuda"))
        if all_on_gpus:
            torch.cuda.set_device(device)
        # NCCL refuses two ranks on one GPU.
        self.backends: dict[str, tuple[Any, torch.device]] = {"gloo": (dist.group.WORLD, torch.device("cpu"))}
        if all_on_gpus:
            self.backends["nccl"] = (dist.new_group(backend="nccl"), device)

    def wait(self) -> None:
        """Waits for all ranks. Raises UserError on rank 0 if one does not come."""
        try:
            dist.monitored_barrier(timeout=timedelta(seconds=PATIENCE_SECONDS), wait_all_ranks=True)
        except RuntimeError as error:
            if self.rank > 0:
                raise ReportedByRank0("rank 0 prints why") from None
            reason = str(error).splitlines()[0]
            raise UserError(
                f"a rank did not end its checks within {PATIENCE_SECONDS} seconds: it hangs, or its disk does not "
                f"answer ({reason}); run llm doctor on its node alone"
            ) from None

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks."""
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def clock_offset(self, clock: Callable[[], float]) -> float:
        """Returns the seconds by which this rank's clock is ahead of rank 0's (Cristian 1989: half of a round trip)."""
        offset, shortest = 0.0, float("inf")
        for other in range(1, self.size):
            for _ in range(EXCHANGES):
                if self.rank == 0:
                    dist.recv(torch.zeros(1), other)
                    dist.send(torch.tensor([clock()], dtype=torch.float64), other)
                elif self.rank == other:
                    theirs, begin = torch.zeros(1, dtype=torch.float64), clock()
                    dist.send(torch.zeros(1), 0)
                    dist.recv(theirs, 0)
                    end = clock()
                    if end - begin < shortest:
                        offset, shortest = (begin + end) / 2 - float(theirs), end - begin
        return offset

    def all_reduce(self, backend: str) -> tuple[float, float]:
        """Returns the seconds of a small all-reduce, and the bytes/s that each rank sends in a large one, as a ring."""
        group, device = self.backends[backend]

        def reduce(tensor: torch.Tensor) -> None:
            dist.all_reduce(tensor, group=group)

        small, large = self._seconds(reduce, backend, SMALL), self._seconds(reduce, backend, self._large(device))
        return small, 2 * (self.size - 1) / self.size * self._large(device) / large

    def _seconds(self, call: Callable[[torch.Tensor], None], backend: str, nbytes: int) -> float:
        """Returns the mean seconds of a call with a tensor of so many bytes."""
        _, device = self.backends[backend]
        tensor = torch.zeros(nbytes // 4, device=device)
        # The first call opens connections, the second tells how often there is time for another.
        for _ in range(2):
            passed = _timed(lambda: call(tensor), device)
        count = max(1, min(EXCHANGES, int(SECONDS / max(self.gather(passed)))))
        begin = time.perf_counter()
        for _ in range(count):
            call(tensor)
        device_rates.synchronize(device)
        return (time.perf_counter() - begin) / count

    def pairs(self, backend: str) -> dict[tuple[int, int], tuple[float, float]]:
        """Returns {(rank, other): (seconds of a small message, bytes/s of large ones)}, on every rank.

        Half of the ranks send at the same time, each to another one, until each pair was there (the circle method).
        """
        found: dict[tuple[int, int], tuple[float, float]] = {}
        players = list(range(self.size + self.size % 2))  # with an odd number one rank waits in each round
        for _ in range(len(players) - 1):
            rounds = [(players[i], players[-1 - i]) for i in range(len(players) // 2)]
            for pair in rounds:
                low, high = sorted(pair)
                if high < self.size and self.rank in pair:
                    measured = self._message(backend, low, high)
                    if self.rank == low:
                        found[low, high] = measured
            self.gather(None)
            players.insert(1, players.pop())
        return {pair: value for each in self.gather(found) for pair, value in each.items()}

    def _message(self, backend: str, low: int, high: int) -> tuple[float, float]:
        group, device = self.backends[backend]
        small, large = (torch.zeros(size // 4, device=device) for size in (SMALL, self._large(device)))

        def there(tensor: torch.Tensor, count: int) -> None:
            for _ in range(count):
                dist.send(tensor, high, group) if self.rank == low else dist.recv(tensor, low, group)

        def back() -> None:
            dist.send(small, low, group) if self.rank == high else dist.recv(small, high, group)

        def exchange(tensor: torch.Tensor, count: int) -> None:
            there(tensor, count)
            back()

        exchange(large, 1)  # opens the connection
        round_trip = min(_timed(lambda: exchange(small, 1), device) for _ in range(EXCHANGES))
        once = _timed(lambda: exchange(large, 1), device)
        # Both sides need the same count.
        count = torch.tensor([max(1, min(MOST_LARGE, int(SECONDS / once)))], device=device, dtype=torch.float32)
        dist.send(count, high, group) if self.rank == low else dist.recv(count, low, group)
        seconds = _timed(lambda: exchange(large, int(count)), device) - round_trip / 2
        return round_trip / 2, int(count) * large.nbytes / max(seconds, 1e-9)

    @staticmethod
    def _large(device: torch.device) -> int:
        return LARGE_GPU if device.type == "cuda" else LARGE


def _timed(call: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    call()
    device_rates.synchronize(device)
    return time.perf_counter() - begin


def link_peak(one: Rank, other: Rank, backend: str) -> float | None:
    """Returns the bytes/s of the link between two ranks by datasheet or driver; None: not known."""
    if one.host == other.host:
        known = recognised(one.device) if backend == "nccl" else None
        return None if known is None else 1e9 * known.link_gbs
    rates = [rank.measured.get("network") for rank in (one, other)]
    return None if None in rates else min(rate for rate in rates if rate is not None)


def network_peak() -> float | None:
    """Returns the bytes/s of this host's fastest network device, as its driver tells; None: it does not."""
    fastest = 0.0
    for path in Path("/sys/class/infiniband").glob("*/ports/*/rate"):  # such as "400 Gb/sec (4X NDR)"
        fastest = max(fastest, 1e9 / 8 * _number(path))
    for path in Path("/sys/class/net").glob("*/speed"):
        fastest = max(fastest, 1e6 / 8 * _number(path))
    return fastest or None


def _number(path: Path) -> float:
    try:
        return float(path.read_text("ascii").split()[0])
    except (OSError, ValueError, IndexError):  # a device that is down has no speed
        return 0.0


def compare(ranks: list[Rank]) -> Iterator[Finding]:
    """Yields what one rank has that the others do not: versions, data, clock, and rates far below the median."""
    for package in ranks[0].versions:
        found = [rank.versions.get(package) for rank in ranks]
        if len(set(found)) > 1:
            odd = _unlike_most(found)
            text = f"{package} is {found[odd[0]]} on {ranks_in_words(odd)} and not everywhere"
            yield Finding("versions", text, "wrong", "install the same versions on every node (constraints.txt)")
    hashes = [tuple(rank.data) for rank in ranks]
    if len(set(hashes)) > 1:
        odd = _unlike_most(hashes)
        mend = "copy the folder of shards to every node, or put it on a file system that all share"
        yield Finding("data", f"other shards than the rest, or none, on {ranks_in_words(odd)}", "wrong", mend)
    for number, rank in enumerate(ranks):
        if abs(skew := rank.measured.get("clock", 0.0)) > SKEW_SECONDS:
            mend = "start a time service on its node: chronyc tracking, timedatectl"
            text = f"clock of rank {number} differs from rank 0's by {skew:+.1f} s"
            yield Finding("clock", text, "warning", mend)
    for name, (title, unit, size, fraction) in COLUMNS.items():
        median = _median(ranks, name)
        if slow := [n for n, rank in enumerate(ranks) if is_outlier(rank, name, median)]:
            least = min(ranks[n].measured[name] for n in slow)
            text = (
                f"{title} of {ranks_in_words(slow)}: {least / size:.4g} {unit}, {least / median:.0%} of the median "
                f"(below {fraction:.0%})"
            )
            yield Finding("outlier", text, "warning", _MEND[name])


_MEND = {
    "matmul": "every step waits for it: look for other programs (top, nvidia-smi) and heat there, or leave it out",
    "copy": "every step waits for it: look for other programs (top, nvidia-smi) there, or leave the node out",
    "write": "look for other programs that use its disk, or for another mount",
    "memory": "end other programs there",
    "shm": "see /dev/shm there",
}


def _unlike_most(values: list[Any]) -> list[int]:
    usual = max(values, key=values.count)
    return [n for n, value in enumerate(values) if value != usual]


def _median(ranks: list[Rank], name: str) -> float:
    # The higher one, so that of two ranks the slower is the outlier.
    return statistics.median_high([rank.measured.get(name, 0.0) for rank in ranks])


def is_outlier(rank: Rank, name: str, median: float) -> bool:
    return name in rank.measured and rank.measured[name] < COLUMNS[name][3] * median


def table(ranks: list[Rank]) -> Iterator[str]:
    """Yields one line for each rank, within 80 columns; * marks outliers."""
    titles = "".join(f"{title:>9}" for title, *_ in COLUMNS.values())
    yield f"rank {'host':<11}{titles}    clock  device"
    units = "".join(f"{unit:>9}" for _, unit, *_ in COLUMNS.values())
    yield f"{'':16}{units}       ms"
    medians = {name: _median(ranks, name) for name in COLUMNS}
    for number, rank in enumerate(ranks):
        cells = ""
        for name, (_, _, size, _) in COLUMNS.items():
            mark = "*" if is_outlier(rank, name, medians[name]) else " "
            cells += f"{rank.measured[name] / size:>8.4g}{mark}" if name in rank.measured else f"{'-':>8} "
        skew = rank.measured.get("clock", 0.0)
        clock = f"{1e3 * skew:>+8.0f}{'*' if abs(skew) > SKEW_SECONDS else ' '}"
        device = rank.device.removeprefix("NVIDIA ")[:9]
        yield f"{number:>4} {rank.host[:11]:<11}{cells}{clock} {device}".rstrip()


def judge_pairs(
    found: dict[tuple[int, int], tuple[float, float]], ranks: list[Rank], backend: str
) -> Iterator[Finding]:
    """Yields the pairs that are slow: against their link's peak, or where that is not known against the median."""
    rates = {pair: rate for pair, (_, rate) in found.items()}
    median = statistics.median_high(rates.values())
    delay = statistics.median(seconds for seconds, _ in found.values())
    slowest = min(rates, key=lambda pair: rates[pair])
    peak = link_peak(ranks[slowest[0]], ranks[slowest[1]], backend)
    against = "" if peak is None else f" ({rates[slowest] / peak:.0%} of its link's {peak / 1e9:g})"
    text = (
        f"{backend} between pairs: {1e6 * delay:,.0f} us for {SMALL} bytes; {median / 1e9:.3g} GB/s in large messages, "
        f"least {rates[slowest] / 1e9:.3g} between {slowest[0]} and {slowest[1]}{against}"
    )
    slow = (peak is not None and rates[slowest] < LINK_PEAK * peak) or rates[slowest] < FAR_OUTLIER * median
    mend = "nvidia-smi topo -m shows the links; unset NCCL_P2P_DISABLE and NCCL_IB_DISABLE; look for errors of the port"
    yield Finding("network", text, "warning", mend) if slow else Finding("network", text)


def matrix(found: dict[tuple[int, int], tuple[float, float]], size: int, backend: str) -> Iterator[str]:
    """Yields the rate of every pair in GB/s above the diagonal and its delay in us below; of many ranks the slowest."""
    if size > MATRIX_RANKS:
        yield f"the slowest pairs by {backend}"
        for low, high in sorted(found, key=lambda pair: found[pair][1])[:MATRIX_RANKS]:
            seconds, rate = found[low, high]
            yield f"{low:>5} - {high:<5} {rate / 1e9:>8.3g} GB/s {1e6 * seconds:>8,.0f} us"
        return
    yield f"pairs by {backend}: GB/s above the diagonal, us for {SMALL} bytes below"
    yield "rank" + "".join(f"{other:>8}" for other in range(size))
    for rank in range(size):
        cells = ""
        for other in range(size):
            seconds, rate = found.get((min(rank, other), max(rank, other)), (0.0, 0.0))
            cells += (
                f"{'-':>8}" if rank == other else f"{rate / 1e9:>8.3g}" if rank < other else f"{1e6 * seconds:>8,.0f}"
            )
        yield f"{rank:>4}{cells}"
