"""Numbers: device peaks, the measured matmul rate, outliers, the sums behind perplexity, and metrics.jsonl."""

import json
import math
import os
import re
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm.atomic import atomic_text
from llm.errors import UserError

# Dense bf16 tensor-core FLOP/s with fp32 accumulation, from NVIDIA's datasheets. The first name counts whose words the
# device's name contains; a device that is not here has no known peak, and its MFU is unknown.
PEAK_BF16_FLOPS = (
    ("H200", 989.4e12),
    ("GH200", 989.4e12),
    ("H100 PCIe", 756.0e12),
    ("H100 NVL", 835.0e12),
    ("H100", 989.4e12),
    ("B200", 2250.0e12),
    ("A100", 312.0e12),
    ("L40S", 362.0e12),
    ("L4", 121.0e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71.0e12),
)


def peak_flops(device: torch.device) -> float | None:
    """Datasheet bf16 FLOP/s of a known GPU, None for any other device: a guess would make MFU a lie."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # Whole words only: "L4" is in "L40S", and "H200" in "GH200".
    return next((peak for key, peak in PEAK_BF16_FLOPS if re.search(rf"\b{key}\b", name)), None)


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product on this machine: the best of several runs within `seconds`."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    # A product of squares takes size^3 multiplications and as many additions.
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, b), device, seconds)


def measure_copy_bytes(device: torch.device, seconds: float = 0.3) -> float:
    """Bytes/s, read and written, of a copy within the device's memory: the best of several runs within `seconds`."""
    # Written, not empty: Linux maps unwritten pages to one page of zeros, and reads would come from the cache.
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device, seconds)


def _best_seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest of the runs of call() that fit into `seconds`, at least one, after one that warms up."""
    best, end = math.inf, time.perf_counter() + seconds
    # The first call pays once for memory, library handles and the choice of a kernel.
    call()
    while True:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        now = time.perf_counter()
        # The minimum, not the mean: other programs can only make a run slower.
        best = min(best, now - start)
        if now > end:
            return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """High-water mark so far: of the device's allocator on a GPU, of the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    # The kernel's "kB" are units of 1,024 bytes.
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def percent(fraction: float | None) -> str:
    """For people; None is what this machine gives no figure of."""
    return "unknown" if fraction is None else f"{100 * fraction:.1f} %"


def engineering(value: float) -> str:
    """A count for people: 1234567 is 1.235M."""
    # There are five units.
    power = min(4, int(math.log10(value) // 3)) if value >= 1000 else 0
    return f"{value / 1000**power:.4g}{['', 'k', 'M', 'G', 'T'][power]}"


OUTLIER_WINDOW = 128
"""Steps before each one that it is compared with; at least a quarter of them."""
OUTLIER_DEVIATIONS = 6.0


class Outliers:
    """Finds the steps at which a metric stands far above the OUTLIER_WINDOW steps before.

    Far: more than OUTLIER_DEVIATIONS median absolute deviations, scaled to a normal distribution's standard deviation
    (Leys et al. 2013), above the median. Neither is moved by a few outliers in the window, as mean and variance are.
    """

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=OUTLIER_WINDOW)

    def deviations(self, value: float) -> float | None:
        """How many deviations the next step's value stands above those before; None where that is not far."""
        # A NaN has no place in an order, so one in the window would spoil its medians.
        if not math.isfinite(value):
            return None
        far: float | None = None
        if len(self._window) >= OUTLIER_WINDOW // 4:
            median = statistics.median(self._window)
            # 1.4826 is 1 / (the normal distribution's 75 % quantile).
            deviation = 1.4826 * statistics.median(abs(past - median) for past in self._window)
            z = (value - median) / max(deviation, 1e-3 * abs(median), 1e-12)  # of a level metric all else is far
            far = z if z > OUTLIER_DEVIATIONS else None
        # An outlier enters the window, too: a metric that stays at a new level soon stops being reported.
        self._window.append(value)
        return far


@dataclass(frozen=True)
class Score:
    """What perplexity and bits per byte are made of; the sums of a text's parts add up to the whole."""

    nll: float
    """Negative log-likelihood in nats over all targets, each document's EOS included."""
    tokens: int
    """Targets counted in `nll`."""
    text_nll: float
    """The same without the EOS targets."""
    text_bytes: int
    """Raw bytes of the text that `text_nll` pays for."""

    @property
    def nll_per_token(self) -> float:
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        # math.exp raises OverflowError above 709.
        return math.exp(self.nll_per_token) if self.nll_per_token < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable across tokenizers: bits spent on the text's tokens over its raw bytes."""
        return self.text_nll / math.log(2) / self.text_bytes if self.text_bytes else math.nan


def score_sums(losses: torch.Tensor, labels: torch.Tensor, token_bytes: torch.Tensor, eos_id: int) -> torch.Tensor:
    """The four sums of a Score as one fp64 tensor [4], so that batches and ranks can add them up.

    losses: [B, S] fp32, the NLL of each label; labels: [B, S] int64, -100 where there is none; token_bytes: [V] int32,
    raw bytes of each token id, 0 for BOS and EOS.
    """
    valid = labels >= 0
    text = valid & (labels != eos_id)
    # In fp64 the sums of many batches do not depend noticeably on how the batches are split.
    nll = losses.double()
    zero = torch.zeros((), dtype=torch.float64, device=losses.device)
    return torch.stack(
        [
            # where instead of a product with the mask: 0 * inf would be NaN.
            torch.where(valid, nll, zero).sum(),
            valid.sum().double(),
            torch.where(text, nll, zero).sum(),
            # The clamp keeps -100 from being used as an index; where then drops its value.
            torch.where(text, token_bytes[labels.clamp(min=0)].double(), zero).sum(),
        ]
    )


def score_from_sums(sums: torch.Tensor) -> Score:
    nll, tokens, text_nll, text_bytes = sums.tolist()
    return Score(nll, int(tokens), text_nll, int(text_bytes))


class MetricsLog:
    """metrics.jsonl: one JSON object a line, written at once, so that a killed run keeps what it measured.

    A line that cannot be written, on a full disk for one, is kept and written before the next.
    """

    def __init__(self, path: Path, *, keep_through_step: int | None) -> None:
        """Keeps the lines up to a step (those past the checkpoint that a run resumes from are cut) and appends.

        None: keeps nothing.
        """
        keep = keep_through_step is not None and path.exists()
        kept = [line for line in read_metrics(path) if line["step"] <= keep_through_step] if keep else []
        # Not truncated in place: a kill during this write leaves all the old lines.
        atomic_text(path, "".join(to_json(line) + "\n" for line in kept))
        self._path = path
        # Not opened for appending: Linux's pwrite then ignores the offset. Unbuffered: a kill loses no written line.
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 (lives as long as the run)
        self._end = path.stat().st_size
        self._unwritten: deque[bytes] = deque()

    def write(self, line: dict[str, Any]) -> None:
        """Raises OSError where the line has to wait."""
        self._unwritten.append((to_json(line) + "\n").encode())
        self.flush()

    def flush(self) -> None:
        """Writes what waits. Raises OSError where it still has to."""
        try:
            while self._unwritten:
                line = self._unwritten[0]
                written = 0
                while written < len(line):  # half a line that a failure leaves is written over
                    written += os.pwrite(self._file.fileno(), line[written:], self._end + written)
                self._end += len(line)
                self._unwritten.popleft()
        except OSError as error:
            # An error of pwrite has no file name, and the message needs one.
            error.filename = str(self._path)
            raise

    def close(self) -> None:
        """Raises OSError where lines could not be written to the end."""
        with self._file:
            self.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    lines = path.read_text("utf-8").split("\n")
    complete = lines[:-1]  # what stands after the last newline was never finished
    parsed = []
    for number, line in enumerate(complete, 1):
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: damaged ({error.msg}); remove the line or the file") from None
    return parsed


def to_json(value: dict[str, Any]) -> str:
    """One line of JSON; a number that is not finite becomes null, since JSON has none."""

    def finite(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {key: finite(inner) for key, inner in entry.items()}
        if isinstance(entry, list | tuple):
            return [finite(inner) for inner in entry]
        return None if isinstance(entry, float) and not math.isfinite(entry) else entry

    # allow_nan=False: by default Python writes NaN, which JSON does not have.
    return json.dumps(finite(value), allow_nan=False)
