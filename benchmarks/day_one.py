"""The first measurements on a GPU: `make gpu-check PART=day-one`, one call of at most eight minutes.

Every step is a process with a limit of its own: one that fails or hangs stops nothing, and none takes the time that
later ones need, because it gets what is left less the shares of those after it. After each step its result is on disk
under $OUT, so a call that is cut short keeps what it had: day-one.json (all results), day-one.txt (the table of rows
with what is accepted and aimed at), kernels.json and kernels.txt, log.txt (all output) and tests.txt (a line for each
test that fails). Rivals that need torch.compile come last, because compiling them takes longest.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from llm.atomic import atomic_text
from llm.version import source_commit

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 8 * 60 - 10
"""Of the whole call; ten seconds remain for the table."""

END_GRACE = 5
"""Seconds between SIGINT, at which a step writes what it has, and SIGKILL."""

BENCH_SECONDS = 25
"""Of the kernel benchmark beyond its --seconds: imports, limits, the case that began last, the picture."""

MICRO_BATCH = 16

STDOUT = "-"


@dataclass(frozen=True)
class Step:
    """A process of this Python: its arguments, its seconds, and where it leaves its result, JSON."""

    name: str
    share: float  # what it takes on an H200 with 16 cores, and END_GRACE; kept for it until its turn
    seconds: float  # the most that it may take
    command: tuple[str, ...]
    result: str | None = None  # a file in the scratch folder, or STDOUT for the last line of its stdout
    stdout: str | None = None  # a file in the output folder


def steps(config: str, device: str, scratch: Path) -> Iterator[Step]:
    """Yields the steps in their order: what decides most comes first, so that it is never what has no time left."""
    training = ("-m", "benchmarks.bench_train", "--steps", "10", "--warmup", "2", "--seconds", "12")

    def train(
        name: str, share: float, seconds: float, config: str, micro_batch: int, documents: str, *changes: str
    ) -> Step:
        chosen = ("--config", config, "--micro_batch", str(micro_batch), "--documents", documents)
        output = ("--output", str(scratch / f"{name}.json"), f"train.device={device}", *changes)
        return Step(name, share, seconds, (*training, *chosen, *output), f"{name}.json")

    bench = ("-m", "benchmarks.bench_kernels", "--device", device, "--samples", "30", "--seconds", "{left}")
    # At a micro-batch of 8 it needs 48 GB.
    large = str(Path(config).parent / "1.3b.json")
    # --json leaves nothing but the result on stdout.
    yield Step("doctor", 20, 75, ("-m", "llm", "doctor", "--kernels", "--config", config, "--json"), STDOUT)
    yield train("train", 25, 70, config, MICRO_BATCH, "whole")
    keys = {"train.micro_batch": MICRO_BATCH, "train.device": device, "model.vocab_size": 32_000}
    plan = ("-m", "llm", "plan", "--config", config, "--gpus", "1", "--json")
    yield Step("plan", 10, 20, (*plan, *(f"{key}={value}" for key, value in keys.items())), STDOUT)
    fast = ("--variants", "triton|in place|SDPA|F[.]|Liger|varlen", "--output", str(scratch / "bench"))
    yield Step("kernels", 75, 110, (*bench, *fast), "bench/kernels.json")
    # A step of the default batch would take 9 seconds.
    yield train("train-1.3b", 48, 75, large, 8, "whole", "train.global_batch_tokens=131072")
    decode = ("--configs", "125m", "1.3b", "--precisions", "bf16", "--batch_sizes", "1", "--rounds", "2")
    output = ("--device", device, "--output", str(scratch / "decode.json"))
    yield Step("decode", 60, 95, ("-m", "benchmarks.bench_generate", *decode, *output), "decode.json")
    yield train("train-documents", 22, 45, config, MICRO_BATCH, "512")
    # On 12 processes, because a test of a kernel is mostly its compilation.
    tests = ("tests/kernels", "tests/test_on_gpu.py", "tests/llm/inference")
    workers = ("-n", str(min(12, os.cpu_count() or 1)), "--tb=line", "-p", "no:cacheprovider")
    yield Step("tests", 85, 130, ("-m", "pytest", "-q", "-m", "gpu", *workers, *tests), stdout="tests.txt")
    profile = ("--config", config, "--steps", "4", "--out_dir", str(scratch / "profile"), "--json")
    changes = (f"train.device={device}", f"train.micro_batch={MICRO_BATCH}", "train.global_batch_tokens=65536")
    yield Step("profile", 42, 50, ("-m", "llm", "profile", *profile, *changes), STDOUT)
    yield train("train-32", 22, 45, config, 2 * MICRO_BATCH, "whole")
    compiled = ("--variants", "triton|in place|torch.compile", "--output", str(scratch / "compiled"))
    # All that is left. The sum of the shares leaves a minute for steps that take longer than they did.
    yield Step("compiled rivals", 0, SECONDS, (*bench, *compiled), "compiled/kernels.json")


Results = dict[str, Any]
"""{name of a step: its result, as parsed from JSON}"""


@dataclass(frozen=True)
class Row:
    """A line of the table. `measured` takes all results and raises LookupError where its step left none."""

    name: str
    unit: str
    accept: float
    aim: float
    measured: Callable[[Results], float]
    limit: Callable[[Results], float] | None = None  # the physical limit, in the row's unit
    case: tuple[str, str, str] | None = None  # (op, case, mode) of the kernel benchmark, which also measured rivals


def figures(results: Results, step: str, case: tuple[str, str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns (the fastest of our kernels for a case, the other implementations) as one benchmark measured them."""
    listed = [each for each in results[step]["figures"] if (each["op"], each["case"], each["mode"]) == case]
    # Plain torch, our fallback, is neither: for attention it is one of torch's own kernels.
    timed = [each for each in listed if each["seconds"] and each["variant"] != "ours (torch)"]
    ours = [each for each in timed if each["variant"].startswith("ours")]
    if not ours:
        raise LookupError(", ".join(case))
    return min(ours, key=lambda each: float(each["seconds"])), [each for each in timed if each not in ours]


def _kernel(name: str, op: str, case: str, mode: str, unit: str, accept: float, aim: float) -> Row:
    """A row of the kernel benchmark: TFLOP/s, or % of the limit, which is the copy rate for these ops."""

    def measured(results: Results) -> float:
        found, _ = figures(results, "kernels", (op, case, mode))
        speed = found["flops"] / found["seconds"] / 1e12 if unit == "TFLOP/s" else 100 * found["fraction"]
        return float(speed)

    def limit(results: Results) -> float:
        return float(results["kernels"]["matmul_flops"]) / 1e12 if unit == "TFLOP/s" else 100.0

    return Row(name, unit, accept, aim, measured, limit, (op, case, mode))


def _training(name: str, step: str, accept: float, aim: float) -> Row:
    def measured(results: Results) -> float:
        return float(results[step]["tokens_per_second"])

    def limit(results: Results) -> float:
        found = results[step]
        return float(found["matmul_flops"] / found["flops_per_token_causal"])

    return Row(name, "tokens/s", accept, aim, measured, limit)


def _decoding(config: str, accept: float, aim: float) -> Iterator[Row]:
    def line(results: Results) -> dict[str, Any]:
        lines = results["decode"]["lines"]
        return next((each for each in lines if (each["config"], each["batch"]) == (config, 1)), {})

    def ratio(results: Results) -> float:
        found = line(results)["ratio"]
        if found is None:
            raise LookupError("transformers")
        return float(found)

    yield Row(f"decoding {config} batch 1", "% of copy", accept, aim, lambda found: 100 * line(found)["of_limit"])
    yield Row(f"decoding {config} to transformers", "x", 4, 4, ratio)


def _off_by(key: str) -> Callable[[Results], float]:
    """How far `llm plan` is from a measured training step, in percent."""

    def measured(results: Results) -> float:
        return 100 * abs(results["plan"][key] / results["train"][key] - 1)

    return measured


def rows() -> Iterator[Row]:
    """The rows with what is accepted and aimed at on an H200 or H100; shares are of rates measured in the same call."""
    yield _training("training 125m, whole documents", "train", 478e3, 634e3)
    yield _training("training 125m, documents of 512", "train-documents", 560e3, 710e3)
    yield _training("training 1.3b", "train-1.3b", 46e3, 66.5e3)
    narrow, wide = "16x2048 12/4x64 causal", "8x4096 16/8x128 causal"
    for mode, first, second in (("forward", (320, 420), (400, 540)), ("backward", (220, 340), (280, 470))):
        yield _kernel(f"attention {mode} hd64 2k", "attention", narrow, mode, "TFLOP/s", *first)
        yield _kernel(f"attention {mode} hd128 4k", "attention", wide, mode, "TFLOP/s", *second)
    yield _kernel("RMSNorm forward 2,048", "rms_norm", "32768x2048", "forward", "% of copy", 88, 97)
    yield _kernel("RMSNorm forward 768", "rms_norm", "32768x768", "forward", "% of copy", 65, 82)
    yield _kernel("RMSNorm backward 2,048", "rms_norm", "32768x2048", "backward", "% of copy", 70, 88)
    both = "forward+backward"
    for words in (50_304, 32_000):
        name = f"cross-entropy, gradient {words:,}"
        yield _kernel(name, "cross_entropy", f"8192x{words}", both, "% of copy", 65, 88)
    yield _kernel("SwiGLU", "swiglu", "32768x2048 packed", both, "% of copy", 90, 98)
    yield _kernel("RoPE", "rope", "16x2048 6/2x128", both, "% of copy", 90, 98)
    head = "65536x768x32000"
    yield _kernel("linear cross-entropy 125m", "linear_cross_entropy", head, both, "TFLOP/s", 510, 590)
    yield from _decoding("125m", 8, 15)
    yield from _decoding("1.3b", 30, 50)
    yield Row("ops that disagree", "ops", 0, 0, lambda results: len(results["doctor"]["failed"]))
    yield Row("plan: memory off by", "%", 5, 2, _off_by("memory_bytes"))
    yield Row("plan: tokens/s off by", "%", 15, 10, _off_by("tokens_per_second"))


LESS_IS_BETTER = ("ops", "%")


def judge(row: Row, results: Results) -> dict[str, Any]:
    """Returns a row's entry for JSON; `measured` is None, with the reason, where it was not measured."""
    entry: dict[str, Any] = {"row": row.name, "unit": row.unit, "accept": row.accept, "aim": row.aim, "measured": None}
    try:
        measured = row.measured(results)
        if row.limit is not None:
            entry["of_limit"] = measured / row.limit(results)
    except LookupError as error:
        return entry | {"verdict": "not measured", "reason": f"no {error} among the results"}
    sign = -1 if row.unit in LESS_IS_BETTER else 1
    better = [limit for limit in ("accept", "aim") if sign * measured >= sign * float(entry[limit])]
    entry |= {"measured": measured, "verdict": "aim" if "aim" in better else "accept" if better else "below"}
    rivals: list[tuple[float, str]] = []
    # Ratios hold within one benchmark, which measured ours and its rivals in turn.
    for step in ("kernels", "compiled rivals") if row.case else ():
        with contextlib.suppress(LookupError):
            ours, others = figures(results, step, row.case)
            rivals += [(each["seconds"] / ours["seconds"], each["variant"]) for each in others]
    if rivals:
        entry["relative_to_best_rival"], entry["best_rival"] = min(rivals)
    return entry


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The table that the call ends with, 80 columns wide."""
    lines = [f"{'row':<31} {'unit':<9} {'measured':>8} {'accept':>8} {'aim':>8} {'limit':>5} {'rival':>5}"]
    for entry in entries:
        numbers = [entry["measured"], entry["accept"], entry["aim"]]
        measured, accept, aim = ["-" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in numbers]
        share = f"{entry['of_limit']:.0%}" if "of_limit" in entry else ""
        rival = f"{entry['relative_to_best_rival']:.2f}" if "relative_to_best_rival" in entry else ""
        line = f"{entry['row']:<31} {entry['unit']:<9} {measured:>8} {accept:>8} {aim:>8} {share:>5} {rival:>5}"
        lines.append(f"{line}{' <' if entry['verdict'] == 'below' else ''}".rstrip())
    lines.append("<: below what is accepted; limit: share of the product or copy rate measured in")
    lines.append("this call; rival: our speed relative to the best other's, 1 is equal")
    return "\n".join(lines)


class Call:
    """One call: its clock, its folder of results, and what has been found so far."""

    def __init__(self, output: Path, scratch: Path, log: TextIO, seconds: float) -> None:
        self.output, self.scratch = output, scratch
        self.results: Results = {}
        self.ran: list[dict[str, Any]] = []
        self._log, self._end = log, time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()

    def say(self, text: str) -> None:
        for stream in (self._log, sys.stdout):
            print(text, file=stream, flush=True)

    def begin(self, command: Sequence[str], stdout: Any = None) -> "subprocess.Popen[bytes]":
        """Starts a process of the repository in a group of its own, with its output in the log."""
        self._log.flush()
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=stdout or self._log,
            stderr=self._log,
            start_new_session=True,
            # A shell lets its background jobs ignore SIGINT, and programs that they start inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def limit(self, step: Step, later: float = 0.0) -> float:
        """Returns the seconds that a step may take, where the steps after it have `later` as the sum of their shares.

        Where not all shares fit into what is left, each becomes smaller by the same factor.
        """
        left = self.left()
        return min(step.seconds, max(left - later, left * step.share / max(1.0, step.share + later)))

    def run(self, step: Step, later: float = 0.0) -> None:
        """Runs a step, and writes its result and everything before it. later: the sum of the shares after it."""
        limit = self.limit(step, later)
        if limit < END_GRACE:
            self.note(step.name, 0, "no time was left")
            return
        command = [part.replace("{left}", str(int(limit) - BENCH_SECONDS)) for part in step.command]
        self.say(f"\n$ python {' '.join(command)}")
        begin = time.monotonic()
        file = self.output / step.stdout if step.stdout else self.scratch / "stdout"
        with open(file, "wb") as stdout:
            code = finish(self.begin(command, stdout), limit)
        outcome = f"over its {limit:.0f} seconds" if code is None else f"exit code {code}"
        if step.result is None:
            self.note(step.name, time.monotonic() - begin, outcome)
            return
        if step.result != STDOUT:
            self.say(file.read_text("utf-8", errors="replace"))
            file = self.scratch / step.result
        try:
            self.results[step.name] = _result(file)
        except (OSError, ValueError, IndexError):
            outcome += ", no result"
        self.note(step.name, time.monotonic() - begin, outcome)

    def note(self, name: str, seconds: float, outcome: str) -> None:
        """Records how a step ended, and writes all files."""
        self.say(f"{name}: {outcome}, {seconds:.0f} s")
        self.ran.append({"step": name, "seconds": seconds, "outcome": outcome})
        self.write()

    def write(self) -> None:
        entries = [judge(row, self.results) for row in rows()]
        found = {"steps": self.ran, "rows": entries, **{k: v for k, v in self.results.items() if k != "kernels"}}
        atomic_text(self.output / "day-one.json", json.dumps(found, indent=1) + "\n")
        ended = "\n".join(f"{x['step']:<16} {x['seconds']:>4.0f} s  {x['outcome']}" for x in self.ran)
        atomic_text(self.output / "day-one.txt", f"{ended}\n\n{table(entries)}\n")
        for file in ("kernels.json", "kernels.txt"):
            if (self.scratch / "bench" / file).exists():
                shutil.copyfile(self.scratch / "bench" / file, self.output / file)


def finish(process: "subprocess.Popen[bytes]", seconds: float) -> int | None:
    """Waits for a process; asks it to end after `seconds`, then ends its group. Returns its code; None: it was late."""
    try:
        return process.wait(max(0.0, seconds - END_GRACE))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_GRACE)
    # A child that stays on the GPU would slow down what is measured next.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return None


def _result(file: Path) -> Any:
    """Parses a result: a JSON file, or the last line of a stdout."""
    text = file.read_text("utf-8")
    return json.loads(text if file.suffix == ".json" else text.strip().splitlines()[-1])


def machine() -> dict[str, Any]:
    """The commit, the versions, the driver and the clocks; a part that cannot be read is missing."""
    program = (
        "import json, torch, triton; print(json.dumps([torch.__version__, triton.__version__, torch.version.cuda]))"
    )
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu", "--format=csv"]
    found: dict[str, Any] = {"commit": source_commit(), "python": sys.version.split()[0]}
    for key, command in (("torch, triton, CUDA", [sys.executable, "-c", program]), ("nvidia-smi", query)):
        try:
            found[key] = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip().splitlines()
        except (OSError, subprocess.TimeoutExpired):
            continue
    return found


def day_one(output: Path, config: str, device: str, seconds: float = SECONDS) -> int:
    """Runs everything and ends with the table. Returns 1 where a step failed or a row is below what is accepted."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "log.txt", "w", encoding="utf-8") as log, tempfile.TemporaryDirectory() as folder:
        call = Call(output, Path(folder), log, seconds)
        call.results["machine"] = machine()
        call.say(json.dumps(call.results["machine"], indent=1))
        build_begin = time.monotonic()
        build = call.begin(("setup.py", "-q", "build_ext", "--inplace"))
        listed = list(steps(config, device, call.scratch))
        for place, step in enumerate(listed):
            if build is not None and step.name in ("decode", "tests"):
                # Decoding and the tests load the extension.
                code = finish(build, min(60.0, call.left()))
                call.note("build", time.monotonic() - build_begin, "late" if code is None else f"exit code {code}")
                build = None
            call.run(step, sum(each.share for each in listed[place + 1 :]))
        call.say("\n" + (output / "day-one.txt").read_text("utf-8"))
        entries = [judge(row, call.results) for row in rows()]
        failed = [x for x in call.ran if x["outcome"] != "exit code 0"]
        return int(bool(failed) or any(entry["verdict"] not in ("aim", "accept") for entry in entries))
