"""Gives the kernel benchmark's samples to pytest-benchmark, and prints and writes its report at the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_kernels
from benchmarks.bench_kernels import Bench
from benchmarks.cases import Case
from benchmarks.figures import Figure, text_of

BENCH = pytest.StashKey[Bench]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--output", type=Path, default=bench_kernels.OUTPUT, help="folder of the kernel benchmark's report"
    )


class _Clock:
    """Shows pytest-benchmark the samples that were taken before, one a round."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: list[float] = []

    def __call__(self) -> float:
        return self.now

    def advance(self) -> None:
        self.now += self.samples.pop(0)


CLOCK = _Clock()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        case, mode = (item.callspec.params[name] for name in ("case", "mode"))  # type: ignore[attr-defined]
        item.add_marker(pytest.mark.benchmark(timer=CLOCK, group=f"{case}, {mode}"))


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Callable[[Case], list[Figure]]:
    """The figures of a case, measured once, of all its variants that are selected."""
    device = bench_kernels.default_device()
    bench = request.config.stash[BENCH] = Bench(device, bench_kernels.SAMPLES[device.type])
    selected: dict[str, set[str]] = {}
    for item in request.session.items:
        params = item.callspec.params  # type: ignore[attr-defined]
        selected.setdefault(str(params["case"]), set()).add(params["variant"])
    found: dict[str, list[Figure]] = {}

    def measure(case: Case) -> list[Figure]:
        if str(case) not in found:
            found[str(case)] = bench.run(case, selected[str(case)].__contains__)
        return found[str(case)]

    return measure


@pytest.fixture
def report(benchmark: Any, figures: Callable[[Case], list[Figure]]) -> Callable[[Case, str, str], None]:
    """Hands one figure to pytest-benchmark; a rival that cannot run is skipped with its reason."""

    def hand_over(case: Case, mode: str, variant: str) -> None:
        figure = next(f for f in figures(case) if (f.mode, f.variant) == (mode, variant))
        assert not figure.failed, figure
        if figure.seconds is None:
            pytest.skip(str(figure.reason))
        CLOCK.samples = list(figure.samples)
        benchmark.extra_info.update(figure.entry())
        benchmark.pedantic(CLOCK.advance, rounds=len(figure.samples))

    return hand_over


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if BENCH in config.stash:
        terminalreporter.write_line(text_of(config.stash[BENCH].report))
        config.stash[BENCH].finish(config.getoption("--output"))
