"""`make fuzz`: damages files of every format and reads them; prints the counts, and fails if a reader does not hold.

python -m tests.fuzz --seconds 600              every target, in equal shares of the time
python -m tests.fuzz jsonl shard --inputs 1000  two of them
python -m tests.fuzz jsonl --number 1234        one input again, in this process
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from . import data_targets, run_targets
from .harness import Files, run

TARGETS = {target.name: target for target in [*data_targets.TARGETS, *run_targets.TARGETS]}
KEPT = Path("build/fuzz")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split(":")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=600, help="time for all targets together")
    parser.add_argument(
        "--inputs", type=int, help="inputs per target (default: 100,000, or 10,000 for others' formats)"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--number", type=int, help="read this input of the target here, and show its error")
    options = parser.parse_args()
    if unknown := set(options.targets) - TARGETS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: no such target; one of {', '.join(TARGETS)}")
    chosen = [TARGETS[name] for name in options.targets or TARGETS]
    # Memory, because most of the time would go to the file system.
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    failed = False
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=base) as name:
        folder = Path(name)
        if options.number is not None:
            print("read" if Files(chosen[0], folder / "one").read(options.number) else "refused")
            return 0
        print(f"{'target':<12}{'inputs':>9}{'read':>9}{'refused':>9}{'failed':>8}{'seconds':>9}{'slowest':>9}")
        end = time.monotonic() + options.seconds
        for left, target in zip(range(len(chosen), 0, -1), chosen, strict=True):
            (folder / target.name).mkdir()
            begun = time.monotonic()
            share = (end - begun) / left
            result = run(
                target, folder / target.name, seconds=share, inputs=options.inputs, workers=max(1, options.workers)
            )
            print(
                f"{target.name:<12}{result.inputs:>9,}{result.read:>9,}{result.refused:>9,}{len(result.failures):>8}"
                f"{time.monotonic() - begun:>9.1f}{result.slowest:>9.2f}",
                flush=True,
            )
            for failure in result.failures:
                print(failure, file=sys.stderr)
            if result.failures:
                failed = True
                shutil.copytree(folder / target.name / "failures", KEPT / target.name, dirs_exist_ok=True)
                print(f"the inputs that failed are in {KEPT / target.name}", file=sys.stderr)
            shutil.rmtree(folder / target.name)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
