"""The harness of `make fuzz` finds each kind of failure, and every reader holds for its first inputs."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz import data_targets, harness, run_targets
from fuzz.harness import Files, Target, run

from llm.errors import UserError


def a_file(folder: Path) -> list[Path]:
    (folder / "a").write_bytes(bytes(range(8)))
    return [folder / "a"]


def refuse(path: Path) -> None:
    raise UserError(f"{path}: is damaged")


def two_lines(path: Path) -> None:
    raise UserError(f"{path}: is\ndamaged")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (refuse, None),
        (two_lines, "more than one line"),
        (lambda path: 1 / 0, "ZeroDivisionError"),
        (lambda path: os.kill(os.getpid(), signal.SIGKILL), "ends the process with status 9"),
        (lambda path: time.sleep(60), "hangs"),
        (lambda path: all(zero == 0 for zero in iter(int, 1)), "hangs"),
        (lambda path: bytearray(1 << 32), "MemoryError"),
    ],
)
def test_each_kind_of_failure_is_found_and_the_rest_is_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: Callable[[Path], object], said: str | None
) -> None:
    def read(path: Path) -> None:
        if path.read_bytes() == b"bad":
            bad(path)

    # On a busy machine a reader that does not hang may wait for a second.
    monkeypatch.setattr(harness, "HANG_SECONDS", 0.3)
    monkeypatch.setattr(harness, "WAITS_SECONDS", 1 if said == "hangs" else 60)
    target = Target("t", a_file, read, lambda chance, valid, other: b"bad" if chance.random() < 0.1 else valid)
    count = sum(Files(target, tmp_path / "count").damaged(i)[1] == b"bad" for i in range(12))
    assert count > 0
    result = run(target, tmp_path, seconds=30, inputs=12, workers=2)
    assert (result.inputs, result.read) == (12, 12 - count)
    assert (result.refused, len(result.failures)) == ((count, 0) if said is None else (0, count))
    assert all(said and said in failure for failure in result.failures)


def test_a_reader_that_refuses_a_valid_file_fails(tmp_path: Path) -> None:
    result = run(Target("t", a_file, refuse, lambda chance, valid, other: valid), tmp_path, seconds=30, inputs=4)
    assert "a valid file is refused" in result.failures[0]


@pytest.mark.parametrize("target", [*data_targets.TARGETS, *run_targets.TARGETS], ids=lambda target: target.name)
def test_the_first_inputs_are_read_or_refused(tmp_path: Path, target: Target) -> None:
    files = Files(target, tmp_path)
    assert len({files.damaged(i)[1] for i in range(100)}) > 60
    outcomes = [files.read(i) for i in range(100)]
    assert any(outcomes)
    assert not all(outcomes)
