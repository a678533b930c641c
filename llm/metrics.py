"""Numbers of a run: outliers, the sums for perplexity, and metrics.jsonl. Reading them does not need torch."""

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.atomic import atomic_file
from llm.errors import UserError

if TYPE_CHECKING:
    import pandas
    import torch

METRICS_FILE = "metrics.jsonl"


def percent(fraction: float | None) -> str:
    """Formats a fraction; None is a figure that is unknown on this machine."""
    return "unknown" if fraction is None else f"{100 * fraction:.1f} %"


def engineering(value: float) -> str:
    """A count for people: 1234567 is 1.235M."""
    # There are five units.
    power = min(4, int(math.log10(value) // 3)) if value >= 1000 else 0
    return f"{value / 1000**power:.4g}{['', 'k', 'M', 'G', 'T'][power]}"


OUTLIER_WINDOW = 128
"""A step is compared with this many steps before it, at least with a quarter of that number."""
OUTLIER_DEVIATIONS = 6.0


class Outliers:
    """Finds the steps at which a metric is far above its values in the OUTLIER_WINDOW steps before.

    Far: more than OUTLIER_DEVIATIONS median absolute deviations, scaled to a normal distribution's standard deviation
    (Leys et al. 2013), above the median. Neither is moved by a few outliers in the window, as mean and variance are.
    """

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=OUTLIER_WINDOW)

    def deviations(self, value: float) -> float | None:
        """Returns how many deviations the next value is above the window, or None if that is not far."""
        # NaN cannot be ordered, so one in the window would make its medians wrong.
        if not math.isfinite(value):
            return None
        far: float | None = None
        if len(self._window) >= OUTLIER_WINDOW // 4:
            median = statistics.median(self._window)
            # 1.4826 is 1 / (75 % quantile of the normal distribution).
            deviation = 1.4826 * statistics.median(abs(past - median) for past in self._window)
            z = (value - median) / max(deviation, 1e-3 * abs(median), 1e-12)  # a constant metric has deviation 0
            far = z if z > OUTLIER_DEVIATIONS else None
        # Outliers enter the window too, so a metric that stays at a new level is soon no outlier any more.
        self._window.append(value)
        return far


@dataclass(frozen=True)
class Score:
    """The sums for perplexity and bits per byte. The scores of parts of a text can be added."""

    nll: float
    """Negative log-likelihood in nats over all targets, each document's EOS included."""
    tokens: int
    """Number of targets in `nll`."""
    text_nll: float
    """`nll` without the EOS targets."""
    text_bytes: int
    """Raw bytes of the text that `text_nll` is the cost of."""

    @property
    def log_likelihood(self) -> float:
        """The natural logarithm of the text's probability, from its beginning on and without its end (EOS)."""
        return -self.text_nll

    @property
    def nll_per_token(self) -> float:
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        # math.exp raises OverflowError above 709.
        return math.exp(self.nll_per_token) if self.nll_per_token < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits for the text's tokens divided by its raw bytes; comparable between tokenizers."""
        return self.text_nll / math.log(2) / self.text_bytes if self.text_bytes else math.nan


ADDED_AT_ONCE = 2**14
"""torch adds so few numbers in one thread: the number of threads changes no bit."""


def exact_sum(values: list[float]) -> float:
    """Returns the correctly rounded sum, which no order of the values changes; NaN or inf if one of them is."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def score_sums(
    losses: "torch.Tensor", labels: "torch.Tensor", token_bytes: "torch.Tensor", eos_id: int
) -> "torch.Tensor":
    """Returns the four sums of a Score for each sequence, as fp64 [B, 4].

    losses: [B, S] fp32, the NLL of each label; labels: [B, S] int64, -100 for no label; token_bytes: [V] int32
    or fp32, raw bytes of each token id, 0 for BOS and EOS.
    """
    import torch

    valid = labels >= 0
    text = valid & (labels != eos_id)
    nll = losses.double()
    zero = torch.zeros((), dtype=torch.float64, device=losses.device)
    of_tokens = (
        # where instead of a product with the mask, because 0 * inf is NaN.
        torch.where(valid, nll, zero),
        valid.double(),
        torch.where(text, nll, zero),
        # clamp, because -100 is not an index; where then drops the value.
        torch.where(text, token_bytes[labels.clamp(min=0)].double(), zero),
    )
    sums = [sum(part.sum(dim=1) for part in values.split(ADDED_AT_ONCE, dim=1)) for values in of_tokens]
    return torch.stack(sums, dim=1)


def score_from_sums(sums: "torch.Tensor") -> Score:
    """sums: fp64 [sequences, 4] of `score_sums`. Their order changes no bit of the result."""
    nll, tokens, text_nll, text_bytes = map(exact_sum, sums.T.tolist())
    return Score(nll, int(tokens), text_nll, round(text_bytes))


MEASURED = {
    *("tokens_per_second", "tokens_per_second_run", "step_ms", "data_wait_ms", "data_wait_ms_max", "data_wait_ms_p99"),
    *("forward_ms", "backward_ms", "optimizer_ms", "communication_ms", "validation_ms", "save_ms"),
    *("mfu", "mfu_causal", "matmul_fraction", "matmul_fraction_causal", "memory", "tasks_seconds", "tasks_share"),
}
"""The metrics of a machine and not of a run: times, and what follows from them."""
MAX_METRIC = 1e300
"""No metric reaches it; a damaged line may hold any number."""


class MetricsLog:
    """metrics.jsonl: one JSON object per line, written at once, so that a killed run keeps its measurements.

    A line that cannot be written, for example on a full disk, is kept and written before the next one.
    """

    def __init__(self, path: Path, *, keep_through_step: int | None) -> None:
        """Keeps the lines up to a step (a resumed run cuts the lines after its checkpoint) and appends.

        None: keeps nothing.
        """
        kept = b""
        if keep_through_step is not None and path.exists():
            # Damaged lines stay as they are: whoever can read them may do so.
            *whole, last = path.read_bytes().split(b"\n")
            lines = [(raw, parse_line(raw)) for raw in whole]
            # A kill may have cut the last line off, or only its newline.
            lines += [(last, line)] if (line := parse_line(last)) is not None else []
            kept = b"".join(raw + b"\n" for raw, line in lines if line is None or line["step"] <= keep_through_step)
        # Not truncated in place, so that a kill during this write keeps all old lines.
        with atomic_file(path) as file:
            file.write(kept)
        self._path = path
        # Not opened for appending, because pwrite would ignore the offset. Unbuffered, so a kill loses no line.
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 (lives as long as the run)
        self._end = path.stat().st_size
        self._unwritten: deque[bytes] = deque()

    def write(self, line: dict[str, Any]) -> None:
        """Writes a line. Raises OSError if the line must wait."""
        self._unwritten.append((to_json(line) + "\n").encode())
        self.flush()

    def flush(self) -> None:
        """Writes the waiting lines. Raises OSError if they must still wait."""
        try:
            while self._unwritten:
                line = self._unwritten[0]
                written = 0
                while written < len(line):  # overwrites half a line that a failure has left
                    written += os.pwrite(self._file.fileno(), line[written:], self._end + written)
                self._end += len(line)
                self._unwritten.popleft()
        except OSError as error:
            # An error of pwrite has no file name, but the message needs one.
            error.filename = str(self._path)
            raise

    def close(self) -> None:
        """Closes the file. Raises OSError if lines could not be written."""
        with self._file:
            self.flush()


def read_metrics(run: str | os.PathLike[str], say: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """Reads the lines of metrics.jsonl as records, without damaged ones and an incomplete last line of a killed run.

    A record of a logged step has "loss", one of a validation "val_loss"; both have "step" and "tokens". The run may be
    in progress.

    run: a run's folder, or the file. say: shows a line about the damaged ones.

    Raises UserError if there is no such file.
    """
    path = Path(run)
    if path.is_dir():
        path = path / METRICS_FILE
    try:
        raws = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: no such file; `llm train` writes it into a run's folder, the checkpoint.dir of its config"
        ) from None
    lines = [parse_line(raw) for raw in raws]
    # The last one is empty, or was cut off by a kill.
    damaged = [n for n, (raw, line) in enumerate(zip(raws, lines, strict=True), 1) if raw and line is None]
    damaged = [number for number in damaged if number < len(raws)]
    if damaged and say is not None:
        say(f"{path}: {len(damaged)} damaged lines are left out, the first is line {damaged[0]}")
    return [line for line in lines if line is not None]


def read_frame(run: str | os.PathLike[str]) -> "pandas.DataFrame":
    """Returns the records of `read_metrics` as a pandas frame: one row each; a value that a record lacks is NaN.

    Raises UserError if pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise UserError(f"read_frame needs pandas ({error}): pip install pandas, or take read_metrics") from None
    return pandas.DataFrame(read_metrics(run))


def parse_line(raw: bytes) -> dict[str, Any] | None:
    """Returns a line of metrics.jsonl; None if it is damaged."""
    try:
        line = json.loads(raw)
    # json.loads raises RecursionError for deep nesting.
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or any(type(line.get(name, 0)) is not int for name in ("step", "tokens")):
        return None
    return line if "step" in line and all(_is_metric(name, value) for name, value in line.items()) else None


def _is_metric(name: str, value: Any) -> bool:
    if name == "samples":
        return isinstance(value, list) and all(_has(entry, str, "prompt", "text") for entry in value)
    if name == "outliers":
        numbers = ("step", "tokens", "value", "deviations")
        return isinstance(value, list) and all(
            _has(entry, str, "metric") and _has(entry, float, *numbers) for entry in value
        )
    if name in ("val_loss_by_source", "tasks"):
        return _has(value, float, *value) if isinstance(value, dict) else False
    return value is None or _is_number(value)


def _has(entry: Any, kind: type, *keys: str) -> bool:
    """Whether an object has values of a kind under these keys; float: numbers, or null for one that is not finite."""
    if not isinstance(entry, dict) or not set(keys) <= set(entry):
        return False
    if kind is float:
        return all(entry[key] is None or _is_number(entry[key]) for key in keys)
    return all(isinstance(entry[key], kind) for key in keys)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_METRIC


def to_json(value: dict[str, Any]) -> str:
    """Returns one line of JSON. A number that is not finite becomes null, because JSON has no such numbers."""

    def finite(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {key: finite(inner) for key, inner in entry.items()}
        if isinstance(entry, list | tuple):
            return [finite(inner) for inner in entry]
        return None if isinstance(entry, float) and not math.isfinite(entry) else entry

    # allow_nan=False: by default Python writes NaN, which JSON does not have.
    return json.dumps(finite(value), allow_nan=False)
