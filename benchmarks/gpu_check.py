"""What a GPU has to show: `make gpu-check PART=train PYTHON=python3`, in at most eight minutes.

Needs no package index and no virtual environment: builds the extension in place, runs the tests marked `gpu`, then
measures the part. Results go to $OUT, else artifacts/gpu-check: PART.json for machines, PART.txt for people.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm.atomic import atomic_text

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 8


class Check:
    """One run: its clock, its folder, and what it found."""

    def __init__(self, part: str, output: Path, *, config: str, device: str) -> None:
        self.part, self.output, self.config, self.device = part, output, config, device
        self.found: dict[str, Any] = {"part": part}
        self.lines: list[str] = []
        self.passed = True
        self._end = time.monotonic() + 60 * MINUTES - 15  # seconds kept for the end itself

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
            os.killpg(process.pid, signal.SIGKILL)  # its children too: one left on the GPU bends the next measurement
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


def gpu_tests(check: Check) -> None:
    code = check.run("tests", ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"], at_most=210)
    if code not in (0, 5):  # 5: no test is marked so
        check.fail(f"the tests marked gpu (pytest's exit code {code}): see above")


def train(check: Check) -> None:
    """Training steps of a config at several micro-batches; the fastest once more under torch.compile."""
    from benchmarks.bench_train import table

    results: list[dict[str, Any]] = []

    def measure(micro_batch: int, compiled: bool) -> None:
        file = check.output / f"train-{micro_batch}{'-compiled' if compiled else ''}.json"
        file.unlink(missing_ok=True)
        command = ["-m", "benchmarks.bench_train", "--config", check.config, "--micro_batch", str(micro_batch)]
        command += ["--steps", "30", "--seconds", "25", "--output", str(file), f"train.device={check.device}"]
        name = f"micro-batch {micro_batch}{', compiled' if compiled else ''}"
        code = check.run(name, [*command, f"train.compile={str(compiled).lower()}"], at_most=150)
        if code or not file.is_file():
            check.say(f"{name}: {'out of time' if code == 124 else 'failed, see above'} (exit code {code})")
        else:
            results.append(json.loads(file.read_text()))

    for micro_batch in (8, 16, 32):
        if check.left() > 45:
            measure(micro_batch, compiled=False)
    if results and check.left() > 90:
        best = max(results, key=lambda result: result["tokens_per_second"])
        measure(best["micro_batch"], compiled=True)
    if not results:
        check.fail("no training step was measured")
        return
    check.found["train"] = results
    check.say(table(results))


PARTS: dict[str, Callable[[Check], None]] = {"train": train}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--config", default="configs/125m.json")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try this command itself")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print(f"error: torch {torch.__version__} finds no NVIDIA GPU that it can use", file=sys.stderr)
            return 1
    output = Path(os.environ.get("OUT") or ROOT / "artifacts" / "gpu-check")
    check = Check(options.part, output, config=options.config, device=options.device)
    build(check)
    if check.passed:
        gpu_tests(check)
        PARTS[options.part](check)
    check.write()
    print(f"\n{output / options.part}.json and .txt: {'passed' if check.passed else 'failed'}")
    return 0 if check.passed else 1


if __name__ == "__main__":
    sys.exit(main())
