"""Tests and measures on a GPU: `make gpu-check PART=day-one|kernels|train|decode|plan`, in at most 8 minutes.

It needs no package index and no virtual environment: packages that the host lacks may lie as wheels in .whl/
(`make wheels DIR=.whl ONLY=missing`), and are installed for this call alone. `day-one` measures a little of everything
(benchmarks/day_one.py). The other parts build the extension in place if they need it, run their tests marked `gpu`,
then measure one thing more closely. Results go to $OUT, else artifacts/gpu-check: PART.json for machines, PART.txt for
people. They name the commit; for a copy of the tree whose .git is missing or of another commit, LLM_COMMIT states it.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.day_one import SECONDS, day_one
from llm.atomic import atomic_text

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 8
TEST_SECONDS = 210


class Check:
    """One run: its clock, its folder and its results."""

    def __init__(self, part: str, output: Path, *, config: str, device: str) -> None:
        self.part, self.output, self.config, self.device = part, output, config, device
        self.found: dict[str, Any] = {"part": part}
        self.lines: list[str] = []
        self.passed = True
        self._end = time.monotonic() + 60 * MINUTES - 15  # 15 seconds are reserved for the end

    def run(self, name: str, command: Sequence[str], *, at_most: float) -> int:
        """Runs a command in the repository; a time-out counts as failed. Returns the exit code."""
        print(f"\n$ {' '.join(command)}", flush=True)
        limit = max(1.0, min(at_most, self.left()))
        begin = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(
                process.pid, signal.SIGKILL
            )  # with its children: one that stays on the GPU would slow down the next measurement
            process.wait()
            code = 124
        self.found.setdefault("commands", []).append(
            {"name": name, "command": list(command), "exit_code": code, "seconds": time.monotonic() - begin}
        )
        return code

    def left(self) -> float:
        return self._end - time.monotonic()

    def say(self, text: str) -> None:
        self.lines.append(text)
        print(text, flush=True)

    def fail(self, text: str) -> None:
        self.passed = False
        self.say(f"FAILED: {text}")

    def write(self) -> None:
        self.found["passed"] = self.passed
        atomic_text(self.output / f"{self.part}.json", json.dumps(self.found, indent=2) + "\n")
        atomic_text(self.output / f"{self.part}.txt", "\n".join(self.lines) + "\n")


def build(check: Check) -> None:
    if check.run("build", ["setup.py", "-q", "build_ext", "--inplace"], at_most=180):
        check.fail("the extension does not build: see above")


def gpu_tests(check: Check, paths: Sequence[str]) -> None:
    if find_spec("pytest") is None:
        check.fail("pytest is not installed here: the tests marked gpu did not run")
        return
    command = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *paths]
    if find_spec("hypothesis") is None:
        left_out = _importing("hypothesis", paths)
        command += [f"--ignore={path}" for path in left_out]
        check.say(f"hypothesis is not installed here; its tests are left out: {', '.join(left_out) or 'none'}")
    if find_spec("xdist") is not None:  # a test of a kernel is mostly compilation, on one core
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    code = check.run("tests", command, at_most=TEST_SECONDS)
    if code not in (0, 5):  # 5: no test has this mark
        reason = f"not done in {TEST_SECONDS} s" if code == 124 else f"pytest's exit code {code}"
        check.fail(f"the tests marked gpu ({reason}): see above")


def _importing(module: str, paths: Sequence[str]) -> list[str]:
    """Returns the test files under the paths that import a module."""
    pattern = re.compile(rf"^(import|from) {module}\b", re.MULTILINE)
    below = (ROOT / path for path in paths if not path.startswith("-"))
    files = (file for path in below for file in ([path] if path.is_file() else sorted(path.rglob("*.py"))))
    return [str(file.relative_to(ROOT)) for file in files if pattern.search(file.read_text())]


def train(check: Check) -> None:
    """Measures training steps of a config at several micro-batches."""
    from benchmarks.bench_train import table

    results: list[dict[str, Any]] = []

    def measure(micro_batch: int) -> None:
        file = check.output / f"train-{micro_batch}.json"
        file.unlink(missing_ok=True)
        command = ["-m", "benchmarks.bench_train", "--config", check.config, "--micro_batch", str(micro_batch)]
        command += ["--documents", "whole", "512", "--steps", "30", "--seconds", "25"]
        command += ["--output", str(file), f"train.device={check.device}"]
        name = f"micro-batch {micro_batch}"
        code = check.run(name, command, at_most=150)
        if code or not file.is_file():
            check.say(f"{name}: {'out of time' if code == 124 else 'failed, see above'} (exit code {code})")
        else:
            results.extend(json.loads(file.read_text()))  # a list, because two kinds of documents were asked for

    for micro_batch in (8, 16, 32):
        if check.left() > 45:
            measure(micro_batch)
    if not results:
        check.fail("no training step was measured")
        return
    check.found["train"] = results
    check.say(table(results))


def kernels(check: Check) -> None:
    """Compares the bits of ten runs; then runs the benchmark, the most important cases first, in the time left."""
    bits, folder = check.output / "determinism.json", check.output / "bench"
    for old in (bits, folder / "kernels.json", folder / "kernels.txt"):
        old.unlink(missing_ok=True)
    command = ["-m", "benchmarks.determinism", "--device", check.device, "--output", str(bits)]
    code = check.run("determinism", command, at_most=90)
    if bits.is_file():
        check.found["determinism"] = json.loads(bits.read_text())
    if code:
        check.fail(f"the same bits in ten runs (exit code {code}): see above")
    command = ["-m", "benchmarks.bench_kernels", "--device", check.device, "--output", str(folder)]
    # A case takes up to a minute, most of it for torch.compile.
    command += ["--seconds", str(int(check.left() - 60))]
    if check.device == "cpu":
        command += ["--variants", "ours|F[.]", "--samples", "3"]
    code = check.run("benchmark", command, at_most=check.left())
    if code:
        check.fail("the benchmark " + ("ran out of time" if code == 124 else f"(exit code {code}): see above"))
    if (folder / "kernels.json").is_file():
        check.found["benchmark"] = json.loads((folder / "kernels.json").read_text())
        check.lines.append((folder / "kernels.txt").read_text())


def decode(check: Check) -> None:
    """Compares decoding in bf16 with transformers, if installed, and with the speed of memory."""
    from benchmarks.bench_generate import table

    results: list[dict[str, Any]] = []
    names, sizes = ["125m", "1.3b"], ["--batch_sizes", "1", "16", "--rounds", "3"]
    if check.device == "cpu":
        names, sizes = ["tiny"], ["--batch_sizes", "1", "--rounds", "1", "--prompt_tokens", "4", "--new_tokens", "4"]
    for name in names:
        file = check.output / f"decode-{name}.json"
        file.unlink(missing_ok=True)
        command = ["-m", "benchmarks.bench_generate", "--configs", name, "--precisions", "bf16", *sizes]
        code = check.run(name, [*command, "--device", check.device, "--output", str(file)], at_most=check.left())
        if code or not file.is_file():
            check.fail(f"decoding {name}: {'out of time' if code == 124 else 'see above'} (exit code {code})")
        else:
            results.append(json.loads(file.read_text()))
            check.say(table(results[-1]))
    check.found["decode"] = results


def plan(check: Check) -> None:
    """Compares the memory that `llm plan` predicts with the allocator's peak in training steps."""
    from llm.config_file import load_config
    from llm.tools.plan import forecast

    seq_len = load_config(check.config).model.max_seq_len
    found = check.found["plan"] = []
    common = [f"train.device={check.device}", "train.global_batch_tokens=65536"]
    for checkpointing, micro_batch in (("none", 4), ("none", 8), ("selective", 8), ("full", 8)):
        file = check.output / "plan-measured.json"
        file.unlink(missing_ok=True)
        chosen = ["--checkpointing", checkpointing, "--micro_batch", str(micro_batch), "--vocab_size", "32000"]
        chosen += ["--documents", "whole", "--seq_len", str(seq_len)]
        command = ["-m", "benchmarks.bench_train", "--config", check.config, *chosen]
        command += ["--steps", "2", "--warmup", "1", "--seconds", "20", "--output", str(file), *common]
        name = f"{checkpointing}, micro-batch {micro_batch}"
        if check.run(name, command, at_most=90) or not file.is_file():
            check.fail(f"{name}: not measured, see above")
            continue
        keys: dict[str, Any] = {"model.vocab_size": 32000, "data.seq_len": seq_len, "train.micro_batch": micro_batch}
        keys |= {"train.activation_checkpointing": checkpointing}
        overrides = [*common, *(f"{key}={value}" for key, value in keys.items())]
        predicted = forecast(check.config, overrides, say=lambda line: None)["memory_bytes"]
        measured = json.loads(file.read_text())["memory_bytes"]
        found.append({"name": name, "predicted": predicted, "measured": measured})
        share = predicted / measured
        line = f"{name}: {predicted / 1e9:.2f} GB planned, {measured / 1e9:.2f} measured ({share:.2f} of it)"
        # Only on a GPU, because on a CPU the measured memory includes all of the Python process.
        (check.say if check.device == "cpu" or 0.85 < share < 1.2 else check.fail)(line)


class Part(NamedTuple):
    measure: Callable[[Check], None]
    tests: Sequence[str]  # arguments of pytest
    needs_extension: bool


PARTS = {
    "train": Part(train, ["tests", "--ignore=tests/kernels"], needs_extension=True),
    "plan": Part(plan, ["tests/llm/tools/test_plan.py"], needs_extension=True),
    "decode": Part(decode, ["tests/llm/inference/test_decode.py"], needs_extension=True),
    "kernels": Part(kernels, ["tests/kernels", "tests/benchmarks/test_bench_kernels.py"], needs_extension=False),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["day-one", *PARTS])
    parser.add_argument("--config", default="configs/125m.json")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to test this command")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole of day-one (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print(f"error: torch {torch.__version__} finds no NVIDIA GPU that it can use", file=sys.stderr)
            return 1
    output = Path(os.environ.get("OUT") or ROOT / "artifacts" / "gpu-check")
    with tempfile.TemporaryDirectory(prefix="site-") as site:
        install_wheels(Path(site))
        if options.part == "day-one":
            return day_one(output, options.config, options.device, options.seconds)
        return _one(options, output)


def install_wheels(site: Path) -> None:
    """Installs the wheels of .whl/ into a folder, for this process and the ones that it starts."""
    wheels = sorted(str(path) for path in (ROOT / ".whl").glob("*.whl"))
    if not wheels:
        return
    flags = ("-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir")
    done = subprocess.run([sys.executable, "-m", "pip", "install", *flags, "--target", str(site), *wheels])
    if done.returncode:
        print("the wheels of .whl/ could not be installed (see above): going on without them", file=sys.stderr)
        return
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))


def _one(options: argparse.Namespace, output: Path) -> int:
    check = Check(options.part, output, config=options.config, device=options.device)
    part = PARTS[options.part]
    if part.needs_extension:
        build(check)
    if check.passed:
        gpu_tests(check, part.tests)
        try:
            part.measure(check)
        except Exception as error:  # what was measured before is written
            traceback.print_exc()
            check.fail(f"{type(error).__name__}: {error}")
    check.write()
    print(f"\n{output / options.part}.json and .txt: {'passed' if check.passed else 'failed'}")
    return 0 if check.passed else 1


if __name__ == "__main__":
    sys.exit(main())
