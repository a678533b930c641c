"""Compares the kernels with other implementations, as fractions of the limits of this machine.

    python -m benchmarks.bench_kernels [--cases REGEX] [--variants REGEX] [--seconds N] [--output FOLDER]
    python -m pytest benchmarks/bench_kernels.py [-k "attention and not compile"] [--benchmark-autosave]

Both measure the same (benchmarks/timing.py), print the tables and write them with kernels.json and kernels.png; the
second also has pytest-benchmark's own table, storage and comparison. They run on an NVIDIA GPU in bf16, else on the
CPU in fp32 at small sizes, where the figures only show that the program works. Each variant is compared with the
reference implementation in the same run.
"""

import argparse
import gc
import json
import math
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.cases import DOCUMENT_MEDIAN, DOCUMENT_SIGMA, MODES, Case, cases, check, draw_behind, results
from benchmarks.figures import Figure, heading, picture, table_of, text_of
from benchmarks.rivals import CannotRun, variants
from benchmarks.timing import Limits, Timing
from kernels.parity import disagreements
from llm import device_rates
from llm.atomic import atomic_text
from llm.version import source_commit

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "artifacts" / "bench"
SAMPLES = {"cuda": 100, "cpu": 10}


def measure(
    case: Case, mode: str, limits: Limits, *, samples: int, wanted: Callable[[str], object] = bool
) -> list[Figure]:
    """Checks and times the selected variants of a case, interleaved."""
    device, work = case.device, case.work(mode)
    figure = partial(
        Figure,
        *(case.op, case.name, mode),
        moved_bytes=work.moved,
        flops=work.flops,
        bound=limits.bound(work.moved, work.flops),
    )
    sets = timing.input_sets(sum(x.nbytes for x in case.draw(0)), device)
    least = work.seconds(limits.copy, limits.matmul)
    inputs = [(case.draw(seed), draw_behind(case, sets + seed)) for seed in range(sets)]
    found: dict[str, Figure] = {}
    known: dict[str, dict[str, Any]] = {}
    calls: dict[str, list[timing.Call]] = {}
    for name, build in variants(case, mode).items():
        if not wanted(name):
            continue
        try:
            parity = quietly(partial(check, case, build, mode))
            made = [partial(results, build(case.extras), mode, *each) for each in inputs]
            known[name] = {
                "agrees": all(x.agrees for x in parity),
                "error": max(x.rmse for x in parity),
                "host_seconds": timing.host_seconds(made[0], device),
                **_memory(made[0], device),
            }
        except Exception as error:  # any exception of another implementation is the reason in the table
            found[name] = figure(name, **_reason(error))
            continue
        calls[name] = made * (timing.calls_a_replay(sets, least, device) // sets)
    for name, taken in timing.interleaved(calls, device, samples=samples).items():
        if isinstance(taken, Timing):
            found[name] = figure(
                name,
                samples=taken.samples,
                method=taken.method,
                seconds=taken.median,
                p20=taken.quantile(0.2),
                p80=taken.quantile(0.8),
                fraction=least / taken.median,
                **known[name],
            )
        else:
            found[name] = figure(name, **_reason(taken))
    return [found[name] for name in variants(case, mode) if name in found]


def _memory(call: timing.Call, device: torch.device) -> dict[str, int]:
    measured = timing.peak_memory(call, device)
    return {} if measured is None else {"peak_bytes": measured[0], "temporary_bytes": measured[0] - measured[1]}


def quietly(call: Callable[[], Any]) -> Any:
    """Runs a call. If it raises, its warnings become part of the reason."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            return call()
        except CannotRun:
            raise
        except Exception as error:
            if given:
                error.add_note("; ".join(dict.fromkeys(str(warning.message).split("\n")[0] for warning in given)))
            raise


def _reason(error: Exception) -> dict[str, Any]:
    """Returns why a variant has no figure, in one line, and whether that is an error."""
    if isinstance(error, CannotRun):
        return {"reason": str(error)}
    lines = [*str(error).strip().splitlines()[:1], *getattr(error, "__notes__", [])]
    return {"reason": f"{type(error).__name__}: {' '.join(lines)}", "raised": True}


def backward_of(case: Case, forward: Sequence[Figure], both: Sequence[Figure], limits: Limits) -> list[Figure]:
    """Computes the time of backward as a difference, for ops whose forward computes no gradient."""
    if case.op in ("cross_entropy", "linear_cross_entropy"):
        return []
    work = case.backward
    forward_seconds = {f.variant: f.seconds for f in forward if f.seconds is not None}
    return [
        Figure(
            *(case.op, case.name, "backward", f.variant),
            method="difference",
            seconds=f.seconds - forward_seconds[f.variant],
            moved_bytes=work.moved,
            flops=work.flops,
            bound=limits.bound(work.moved, work.flops),
            fraction=work.seconds(limits.copy, limits.matmul) / (f.seconds - forward_seconds[f.variant]),
            agrees=f.agrees,
            error=f.error,
        )
        for f in both
        if f.seconds is not None and f.seconds > forward_seconds.get(f.variant, math.inf)
    ]


class Bench:
    """One run: the limits of this machine, and the report."""

    def __init__(self, device: torch.device, samples: int) -> None:
        self.device, self.samples = device, samples
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.limits = timing.measure_limits(device, dtype, samples=samples)
        self.report: dict[str, Any] = {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "commit": source_commit(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
            "versions": {"python": platform.python_version()}
            | {name: timing.installed_version(name) for name in ("torch", "triton", "liger-kernel")}
            | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
            "dtype": str(dtype).removeprefix("torch."),
            "copy_bytes_per_second": self.limits.copy,
            "matmul_flops": self.limits.matmul,
            "cache_bytes": timing.cache_bytes(device),
            "documents": {"lengths": "log-normal", "median": DOCUMENT_MEDIAN, "sigma": DOCUMENT_SIGMA, "seed": 0},
            "clocks": [timing.clocks()],
            "figures": [],
        }

    def run(self, case: Case, wanted: Callable[[str], object] = bool, *, end: float = math.inf) -> list[Figure]:
        """Measures the selected variants of a case in every mode and reports them. No mode begins after `end`."""
        by_mode: dict[str, list[Figure]] = {}
        for mode in MODES:
            if time.monotonic() > end:
                by_mode[mode] = [Figure(case.op, case.name, mode, "all", reason="not run: the time was over")]
            else:
                by_mode[mode] = measure(case, mode, self.limits, samples=self.samples, wanted=wanted)
            tidy()
        by_mode["backward"] = backward_of(case, *by_mode.values(), self.limits)
        for figures in filter(None, by_mode.values()):
            print(table_of(figures), flush=True)
        figures = [f for group in by_mode.values() for f in group]
        self.report["figures"] += figures
        return figures

    def save(self, folder: Path) -> None:
        """Writes kernels.json and kernels.txt, after every case, so that a stopped run keeps its results."""
        self.report["clocks"][1:] = [timing.clocks()]
        entries = [f.entry() for f in self.report["figures"]]
        atomic_text(folder / "kernels.json", json.dumps({**self.report, "figures": entries}, indent=1) + "\n")
        atomic_text(folder / "kernels.txt", text_of(self.report) + "\n")

    def finish(self, folder: Path) -> int:
        """Writes all results. Returns 1 if one of our variants is wrong or raises, else 0."""
        self.save(folder)
        written = "kernels.json, kernels.txt"
        if find_spec("matplotlib"):
            picture(self.report, folder / "kernels.png")
            print(f"\n{folder}: {written}, kernels.png")
        else:
            print(f"\n{folder}: {written}; no kernels.png: matplotlib is not installed")
        failed = [f for f in self.report["figures"] if f.failed]
        for f in failed:
            print(f"FAILED: {f.op} {f.case}, {f.mode}, {f.variant}: {f.reason or f'relative error {f.error:.1e}'}")
        return 1 if failed else 0


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tidy() -> None:
    """Frees compiled code and memory of the last case."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    parser.add_argument("--cases", type=re.compile, default=re.compile(""), help='e.g. "attention.*x128|rope"')
    parser.add_argument("--variants", type=re.compile, default=re.compile(""), help='e.g. "ours|SDPA"')
    parser.add_argument("--samples", type=int, help=f"of each variant (default {SAMPLES})")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after so many seconds")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default %(default)s")
    options = parser.parse_args(arguments)
    device = torch.device(options.device) if options.device else default_device()
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"error: torch {torch.__version__} finds no NVIDIA GPU that it can use; --device cpu", file=sys.stderr)
        return 1
    end = time.monotonic() + options.seconds
    bench = Bench(device, options.samples or SAMPLES[device.type])
    print(heading(bench.report), flush=True)
    for case in cases(device):
        if options.cases.search(str(case)):
            bench.run(case, options.variants.search, end=end)
            bench.save(options.output)
    return bench.finish(options.output)


def pytest_generate_tests(metafunc: Any) -> None:
    device = default_device()
    listed = [(case, mode, name) for case in cases(device) for mode in MODES for name in variants(case, mode)]
    names = [f"{case}, {mode}, {variant}" for case, mode, variant in listed]
    metafunc.parametrize(("case", "mode", "variant"), listed, ids=names)


def test_kernel(benchmark: Any, case: Case, mode: str, variant: str) -> None:
    """Times one variant with pytest-benchmark, which can store and compare results: wall time of an eager call."""
    import pytest

    try:
        parity = quietly(partial(check, case, variants(case, mode)[variant], mode))
    except CannotRun as error:
        pytest.skip(str(error))
    assert all(result.agrees for result in parity) or not variant.startswith("ours"), disagreements(parity)
    function, inputs = variants(case, mode)[variant](case.extras), (case.draw(0), draw_behind(case, 1))

    def call() -> None:
        results(function, mode, *inputs)
        device_rates.synchronize(case.device)

    benchmark.group = f"{case}, {mode}"
    benchmark.extra_info.update(vars(case.work(mode)))
    benchmark.pedantic(call, rounds=SAMPLES[case.device.type], warmup_rounds=3)


if __name__ == "__main__":
    sys.exit(main())
