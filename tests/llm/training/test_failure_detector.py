"""A rank that ends: the others notice wherever they wait, say so in one line, and leave what was saved."""

import contextlib
import json
import os
import queue
import signal
import socket
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

from llm.config_file import load_config
from llm.errors import UserError
from llm.model import checkpoint, checkpoint_path
from llm.training import failure_detector, peers, run_folder
from llm.training.failure_detector import FailureDetector
from llm.training.run_folder import RunFolder

WriteConfig = Callable[..., Path]
Llm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> "queue.Queue[int]":
    """The exit codes with which processes would have been ended."""
    monkeypatch.setattr(failure_detector, "GRACE_SECONDS", 0.2)
    return queue.Queue()


@pytest.fixture
def ranks(
    monkeypatch: pytest.MonkeyPatch, ended: "queue.Queue[int]", tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[list[FailureDetector]]:
    """Rank 0, 1 and 2 of three, all in this process; a parameter is train.hang_minutes."""
    minutes = getattr(request, "param", 10.0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    told: queue.Queue[tuple[int, bytes]] = queue.Queue()

    def tell(value: tuple[int, bytes] | None) -> tuple[int, bytes]:
        if value is not None:
            told.put(value)
            told.put(value)
        return told.get(timeout=10) if value is None else value

    def make(rank: int) -> FailureDetector:
        world: Any = SimpleNamespace(rank=rank, size=3, broadcast=tell)
        return FailureDetector(world, minutes, tmp_path, end_process=ended.put)

    with ThreadPoolExecutor() as threads:
        made = list(threads.map(make, range(3)))
    yield made
    for detector in made:
        with detector:
            pass  # its thread need not wait any more
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
    with pytest.raises(UserError) as caught, ranks[2], ranks[2].attributing():
        raise RuntimeError("Connection closed by peer")
    assert str(caught.value).startswith("rank 1 failed: ValueError"), "rank 0 only passes it on"
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


@pytest.mark.slow  # with a limit of seconds, because on a busy machine a rank is silent for one
@pytest.mark.parametrize("ranks", [0.05], indirect=True)
def test_a_rank_that_answers_and_waits_for_its_disk_hangs_and_one_that_computes_does_not(
    ranks: list[FailureDetector], ended: "queue.Queue[int]", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(failure_detector, "_transferred_bytes", lambda: 0)
    told: queue.Queue[tuple[int, str]] = queue.Queue()
    for detector in ranks:
        detector.where = lambda: (7, "backward")
        detector.on_lost = lambda rank, what: told.put((rank, what))
    with pytest.raises(queue.Empty):
        told.get(timeout=4)  # longer than the limit of 3 s
    ranks[2].where = lambda: (7, "data")
    for _ in ranks:
        rank, what = told.get(timeout=10)
        assert rank == 2
        assert "rank 2 hangs: it waits for its disk for 0.05 minutes (train.hang_minutes), last seen after" in what
        assert "step 7, in data" in what
    assert [ended.get(timeout=10) for _ in ranks] == [1, 1, 1]
    stacks = (tmp_path / "hang.txt").read_text()
    assert stacks.count("most recent call first") >= 3
    assert all(f"rank {rank}, after step 7" in stacks for rank in range(3))


@pytest.mark.slow  # with a limit of seconds, because on a busy machine a rank is silent for one
@pytest.mark.parametrize("ranks", [0.05], indirect=True)
def test_a_rank_without_a_sign_of_life_hangs_and_one_that_ends_well_does_not(
    ranks: list[FailureDetector], ended: "queue.Queue[int]", monkeypatch: pytest.MonkeyPatch
) -> None:
    told: queue.Queue[tuple[int, str]] = queue.Queue()
    ranks[0].on_lost = lambda rank, what: told.put((rank, what))
    with ranks[1]:
        pass
    monkeypatch.setattr(ranks[1], "_send", lambda *_: None)
    with pytest.raises(queue.Empty):
        told.get(timeout=4)
    monkeypatch.setattr(ranks[2], "_send", lambda *_: None)
    rank, what = told.get(timeout=10)
    assert (rank, "it gives no sign of life" in what) == (2, True)
    assert ended.get(timeout=10) == 1


def test_strangers_take_no_ranks_place_and_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "MAX_STRANGERS", 2)
    told: queue.Queue[tuple[int, bytes]] = queue.Queue()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(peers.connect, 0, 3, "127.0.0.1", told.put)
        port, secret = told.get(timeout=10)
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for stranger in strangers[:5]:
            stranger.close()
        wrong_proof = b"\0\0\0\1" + bytes(peers.ANSWER_BYTES - 4)
        words = (b"GET / HTTP/1.1\r\n\r\n", wrong_proof, wrong_proof + b"x")
        for stranger, word in zip(strangers[5:], words, strict=False):
            with contextlib.suppress(OSError):  # the oldest are closed
                stranger.sendall(word)
        others = list(threads.map(lambda rank: peers.connect(rank, 3, "127.0.0.1", lambda _: (port, secret)), (1, 2)))
        connections = first.result(10)
    assert sorted(connections.values()) == [1, 2]
    for (end, rank), other in zip(sorted(connections.items(), key=lambda item: item[1]), others, strict=True):
        end.sendall(bytes([rank]))
        (mine,) = other
        assert mine.recv(10) == bytes([rank])
        assert other[mine] == 0
    for connection in (*strangers, *connections, *(mine for other in others for mine in other)):
        connection.close()


def test_a_rank_takes_nothing_else_for_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "CONNECT_SECONDS", 0)
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as threads:
        address = server.getsockname()
        joining = threads.submit(peers.connect, 1, 2, address[0], lambda _: (address[1], b"secret"))
        impostor, _ = server.accept()
        with impostor:
            impostor.sendall(bytes(peers.CHALLENGE_BYTES))
            impostor.recv(100)
            impostor.sendall(bytes(peers.PROOF_BYTES))
            with pytest.raises(ConnectionError, match="what answers there is not rank 0"):
                joining.result(10)


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
            while not checkpoint_path.saved(run):
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
    step = checkpoint.read_state(checkpoint_path.locate(run))[0].step

    whole = tmp_path / "whole"
    for folder in (run, whole):
        end = [f"train.total_tokens={(step + 3) * 512}", f"checkpoint.dir={folder}"]
        code, _, err = llm_here("train", "--config", tmp_path / "config.json", *end)
        assert code == 0, err
    # Both ranks' losses were added up in another order than here.
    assert read_losses(run) == pytest.approx(read_losses(whole), abs=1e-5)
    assert len(read_losses(run)) == step + 3
