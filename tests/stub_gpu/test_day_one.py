"""`make gpu-check PART=day-one` rehearsed on the stub: whatever fails or hangs, the other steps leave their results.

The steps that must succeed have no limit that a slow processor could meet. Where kernels are compared with a reference
they disagree, because nothing is computed, and the tests marked gpu fail. Any other exception is a fault.
"""

import importlib.metadata
import json
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from stub_gpu.rehearsal import exceptions, run, tiny_configs

import bootstrap
from benchmarks.day_one import rows, steps, table

pytestmark = [pytest.mark.stub_gpu, pytest.mark.slow, pytest.mark.timeout(3600)]

# `limits`: {a step's name: seconds}; `programs`: {a step's name: what it runs instead}.
DAY_ONE = """
import dataclasses, sys
from benchmarks import day_one, gpu_check
made = day_one.steps
def steps(*rest):
    for step in made(*rest):
        program = {programs}.get(step.name)
        command = step.command if program is None else ("-c", program)
        yield dataclasses.replace(step, command=command, seconds={limits}.get(step.name, {seconds}))
day_one.steps = steps
begin = day_one.Call.begin
def begin_afresh(self, command, *rest):
    return begin(self, (*command, "--force") if {builds} and command[0] == "setup.py" else command, *rest)
day_one.Call.begin = begin_afresh
sys.exit(gpu_check.main(["day-one", "--config", {config!r}, "--seconds", "3000"]))
"""
MUST = ("doctor", "plan", "train", "train-documents", "train-1.3b")
"""Steps that succeed on the stub, but for the numbers of doctor."""
NO_LIMIT = MappingProxyType(dict.fromkeys(MUST, 600.0))
"""More seconds than a slow processor needs."""
BY_NUMBERS = {"doctor": "exit code 1", "tests": "exit code 1", "decode": "exit code 1"}
HANGS = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('hung', flush=True); time.sleep(3600)"
FAILS = "raise RuntimeError('out of luck')"


class Rehearsed:
    """A call that has ended: what it wrote."""

    def __init__(
        self,
        folder: Path,
        *,
        seconds: float = 40,
        limits: Mapping[str, float] = NO_LIMIT,
        programs: Mapping[str, str] = MappingProxyType({}),
        python: Path = Path(sys.executable),
        compiler: str | None = None,
    ) -> None:
        """seconds: of a step that `limits` does not name. compiler: builds the extension again, with this one."""
        out = folder / "out"
        program = DAY_ONE.format(
            seconds=seconds,
            limits=dict(limits),
            programs=dict(programs),
            builds=compiler is not None,
            config=str(tiny_configs(folder)),
        )
        self.printed = run(program, out, python, **({} if compiler is None else {"CC": compiler, "CXX": compiler}))
        self.files = {path.name for path in out.iterdir()}
        self.log = (out / "log.txt").read_text()
        self.text = (out / "day-one.txt").read_text()
        self.found: dict[str, Any] = json.loads((out / "day-one.json").read_text())
        self.outcomes = {step["step"]: step["outcome"] for step in self.found["steps"]}
        self.measured = {row["row"]: row["measured"] for row in self.found["rows"]}

    def check(self) -> None:
        """What holds for every call: all steps in their order, all rows, the table at the end, and few files."""
        listed = [step.name for step in steps("configs/125m.json", "cuda", Path())]
        assert [name for name in self.outcomes if name != "build"] == listed
        assert "build" in self.outcomes
        assert list(self.measured) == [row.name for row in rows()]
        assert self.text in self.printed
        assert table(self.found["rows"]) in self.text
        for line, (name, outcome) in zip(self.text.splitlines(), self.outcomes.items(), strict=False):
            assert line.startswith(name)
            assert line.endswith(outcome)
        assert {"day-one.json", "day-one.txt", "log.txt"} <= self.files
        assert self.files <= {"day-one.json", "day-one.txt", "log.txt", "tests.txt", "kernels.json", "kernels.txt"}


def is_expected(name: str, outcome: str) -> bool:
    """Whether a step has succeeded, but for its numbers, or was ended at its limit."""
    late = "late" if name == "build" else "over its"
    return outcome.startswith(("exit code 0", late, BY_NUMBERS.get(name, "exit code 0")))


def test_every_step_runs_or_is_ended_at_its_limit(tmp_path: Path) -> None:
    call = Rehearsed(tmp_path)
    call.check()
    # transformers asks the device whether it has all tokens, and stops before ours or never.
    raised = exceptions(call.log)
    assert all(line.startswith("RuntimeError: The size of tensor a") for line in raised), raised
    assert all(is_expected(*each) for each in call.outcomes.items()), call.outcomes
    assert call.found.keys() >= set(MUST), call.outcomes
    assert call.found["doctor"]["failed"]
    assert call.measured["plan: memory off by"] is not None
    assert "kernels.json" in call.files


def test_a_step_that_hangs_one_that_fails_and_a_build_that_fails_cost_their_rows_alone(tmp_path: Path) -> None:
    programs = {"train": HANGS, "plan": FAILS, "decode": FAILS}
    limits = {**NO_LIMIT, "train": 12.0}
    call = Rehearsed(tmp_path, seconds=12, limits=limits, programs=programs, compiler="/bin/false")
    call.check()
    assert call.outcomes["train"] == "over its 12 seconds, no result"
    assert call.outcomes["plan"] == call.outcomes["decode"] == "exit code 1, no result"
    assert call.outcomes["build"] == "exit code 1"
    assert "hung" in call.log
    assert call.log.count("RuntimeError: out of luck") == 2
    assert "/bin/false" in call.log
    lost = {"training 125m, whole documents", "plan: memory off by", "plan: tokens/s off by"}
    assert all(call.measured[name] is None for name in lost)
    assert {"training 125m, documents of 512", "training 1.3b", "ops that disagree"} <= {
        name for name, value in call.measured.items() if value is not None
    }
    others = {name: outcome for name, outcome in call.outcomes.items() if name not in {*programs, "build"}}
    assert all(is_expected(*each) for each in others.items()), call.outcomes


def bare_python(folder: Path, absent: list[str]) -> Path:
    """Makes an environment with all packages of this one, by links, but those; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    hidden = set()
    for name in absent:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        hidden |= {file.parts[0] for file in files}
    links = folder / "packages"
    links.mkdir()
    for site in (Path(path) for path in sys.path if path.endswith("site-packages")):
        for entry in site.iterdir():
            if entry.name not in hidden and entry.suffix != ".pth" and not (links / entry.name).exists():
                (links / entry.name).symlink_to(entry)
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
    Path(purelib, "packages.pth").write_text(f"{links}\n")
    return folder / "venv" / "bin" / "python"


def test_a_host_without_deepspeed_measures_training_in_plain_torch(tmp_path: Path) -> None:
    python = bare_python(tmp_path, ["deepspeed", "hjson"])
    call = Rehearsed(tmp_path, seconds=12, python=python)
    call.check()
    assert call.found.keys() >= set(MUST), call.outcomes
    assert call.measured["training 1.3b"] is not None
    assert call.measured["plan: memory off by"] is not None


def test_a_host_with_pytorch_alone_gets_the_table_and_the_reason(tmp_path: Path) -> None:
    """Without the wheels that `make wheels ONLY=missing` fetches."""
    python = bare_python(tmp_path, bootstrap.MISSING)
    call = Rehearsed(tmp_path, seconds=12, limits={**NO_LIMIT, "profile": 600, "kernels": 40}, python=python)
    call.check()
    fail = {name: call.outcomes[name] for name in (*MUST, "profile")}
    assert set(fail.values()) == {"exit code 1, no result"}, call.outcomes
    assert "has no package pydantic" in call.log
    assert "No module named 'pydantic'" in call.log
    assert "kernels.json" in call.files  # the kernels need nothing but PyTorch
