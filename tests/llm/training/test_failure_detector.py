"""A rank that ends: the others notice wherever they wait, say so in one line, and leave what was saved."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from running import environment, read_losses, start_two

from llm.config import load_config
from llm.errors import UserError
from llm.model import checkpoint
from llm.training import failure_detector, run_folder
from llm.training.failure_detector import FailureDetector
from llm.training.run_folder import RunFolder

WriteConfig = Callable[..., Path]
Llm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> "queue.Queue[int]":
    """The exit codes with which processes would have been ended."""
    codes: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(failure_detector, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(failure_detector.os, "_exit", codes.put)
    return codes


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, ended: "queue.Queue[int]") -> Iterator[list[FailureDetector]]:
    """Rank 0, 1 and 2 of three, all in this process."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    port: queue.Queue[int] = queue.Queue()

    def tell(value: int | None) -> int:
        if value is not None:
            port.put(value)
            port.put(value)
        return port.get(timeout=10) if value is None else value

    made: dict[int, FailureDetector] = {}

    def make(rank: int) -> None:
        made[rank] = FailureDetector(SimpleNamespace(rank=rank, size=3, broadcast=tell))  # type: ignore[arg-type]

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    yield [made[rank] for rank in range(3)]
    for detector in made.values():
        with detector:
            pass  # its thread need not end this process any more
        for connection in detector.connections:
            connection.close()


def test_who_waits_in_a_call_that_never_returns_is_ended_after_saying_why(
    ranks: list[FailureDetector], ended: "queue.Queue[int]", capfd: pytest.CaptureFixture[str]
) -> None:
    told: queue.Queue[tuple[int, str]] = queue.Queue()
    ranks[0].on_lost = lambda rank, what: told.put((rank, what))
    (connection,) = ranks[2].connections
    connection.shutdown(2)  # as the system does for a process that is killed
    rank, what = told.get(timeout=10)
    assert rank == 2
    assert what.startswith("rank 2 ended without a word: it was killed, or crashed; start again")
    assert [ended.get(timeout=10) for _ in ranks] == [1, 1, 1]
    assert f"error on rank 0: {what}" in capfd.readouterr().err


def test_who_fails_says_why_to_all_and_who_leaves_in_time_is_not_ended(
    ranks: list[FailureDetector], ended: "queue.Queue[int]"
) -> None:
    noted: list[int] = []

    def note(rank: int, what: str) -> None:
        time.sleep(0.3)  # it must come to its end even so
        noted.append(rank)

    ranks[0].on_lost = note
    with pytest.raises(ValueError, match="no such\nthing"), ranks[1]:
        raise ValueError("no such\nthing")
    expected = "rank 1 failed: ValueError: no such thing; start again"
    with pytest.raises(UserError, match=expected) as caught, ranks[0], ranks[0].attributing():
        raise RuntimeError("Connection closed by peer")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert noted == [1]
    with pytest.raises(UserError, match="rank 0 failed: rank 1 failed: ValueError"), ranks[2], ranks[2].attributing():
        raise RuntimeError("Connection closed by peer")
    time.sleep(0.5)
    assert ended.empty()


def test_goodbyes_are_no_loss_and_own_failures_stay_what_they_are(
    ranks: list[FailureDetector], ended: "queue.Queue[int]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_detector, "ATTRIBUTION_SECONDS", 0.3)
    with ranks[1], ranks[2]:
        pass
    with pytest.raises(RuntimeError, match="own"), ranks[0], ranks[0].attributing():
        raise RuntimeError("own")
    assert ended.empty()


def test_a_peers_end_and_the_failure_that_it_causes_are_noted_one_after_the_other(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(load_config(write_config()), [], None, {}, print)
    atomic_text, writing = run_folder.atomic_text, threading.Lock()
    both = threading.Barrier(2)

    def write(path: Path, text: str) -> None:
        assert writing.acquire(blocking=False), "both write the same temporary file"
        time.sleep(0.1)
        atomic_text(path, text)
        writing.release()

    def fail(message: str) -> None:
        both.wait(10)
        folder.fail(message)

    monkeypatch.setattr(run_folder, "atomic_text", write)
    with ThreadPoolExecutor() as threads:
        list(threads.map(fail, ["rank 1 ended", "UserError: rank 1 ended"]))
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "failed"


def kill_one_of_two(write_config: WriteConfig, run: Path, victim: int, launcher: list[str] | None) -> tuple[int, str]:
    """Kills a rank once a checkpoint is there; returns the exit code and stderr of what is left."""
    config = write_config(
        train__total_tokens=40_000 * 512,
        checkpoint__every_steps=20,
        # The rate does not depend on where the run ends.
        schedule__kind="wsd",
        schedule__decay_tokens=0,
    )
    train = ["-m", "llm", "train", "--config", str(config)]
    run.mkdir()
    with open(run.parent / "stderr", "w+") as stderr:
        if launcher is None:
            processes = start_two([sys.executable, *train], stderr=stderr)
            waited = processes[1 - victim]
        else:
            port = str(20_000 + os.getpid() % 20_000)
            command = [*launcher, "--master_port", port, "--module", *train[1:]]
            env = environment() | {"DS_ACCELERATOR": "cpu"}
            waited = psutil.Popen(command, env=env, stderr=stderr, stdout=subprocess.DEVNULL)
            processes = [waited]
        try:
            deadline = time.monotonic() + 180
            while not checkpoint.saved(run):
                assert all(process.poll() is None for process in processes)
                assert time.monotonic() < deadline
                time.sleep(0.02)
            if launcher is None:
                found = processes[victim]
            else:
                found = next(c for c in waited.children(recursive=True) if c.environ().get("RANK") == str(victim))
            found.send_signal(signal.SIGKILL)
            code = waited.wait(60)
        finally:
            for process in processes:
                for child in [*process.children(recursive=True), process] if process.is_running() else []:
                    child.kill()
        stderr.seek(0)
        return code, stderr.read()


@pytest.mark.parametrize(
    ("victim", "launched"),
    [(1, False), pytest.param(0, False, marks=pytest.mark.slow), pytest.param(1, True, marks=pytest.mark.slow)],
)
def test_a_killed_rank_ends_the_run_within_a_minute(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, victim: int, launched: bool
) -> None:
    run = tmp_path / "run"
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2"] if launched else None
    code, err = kill_one_of_two(write_config, run, victim, launcher)
    assert code != 0
    what = f"rank {victim} ended without a word: it was killed, or crashed"
    assert len([line for line in err.splitlines() if line.startswith("error") and what in line]) == 1
    assert "Traceback" not in err
    status: dict[str, Any] = json.loads((run / "status.json").read_text())
    assert status["status"] == "failed"
    assert what in status["message"]
    assert not list(run.glob(".step-*"))
    step = checkpoint.read_state(checkpoint.locate(run))[0].step

    whole = tmp_path / "whole"
    for folder in (run, whole):
        end = [f"train.total_tokens={(step + 3) * 512}", f"checkpoint.dir={folder}"]
        code, _, err = llm_here("train", "--config", tmp_path / "config.json", *end)
        assert code == 0, err
    # Both ranks' losses were added up in another order than here.
    assert read_losses(run) == pytest.approx(read_losses(whole), abs=1e-5)
    assert len(read_losses(run)) == step + 3
