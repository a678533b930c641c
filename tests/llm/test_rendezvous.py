"""Processes that wait for each other say for whom; verbs that write files run in one of them."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from running import environment, run_llm

from llm import rendezvous
from llm.errors import UserError


@pytest.fixture
def of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is rank 0 of two, the other one does not come."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "_found", [])
    monkeypatch.setattr(rendezvous, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(rendezvous, "LIMIT_MINUTES", 1 / 60)


@pytest.mark.parametrize(("rank", "whom"), [("0", "rank 1 of 2"), ("1", "rank 0 (Connection refused)")])
def test_who_is_waited_for_is_said_and_in_the_end_an_error(
    of_two: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], rank: str, whom: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(UserError) as caught:
        rendezvous.meet()
    where = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    line = f"rank {rank} waits for {whom} at {where} (MASTER_ADDR, MASTER_PORT); to work with one process, unset"
    assert capfd.readouterr().err.count(line) == 1
    assert f"{whom} did not come to {where} within" in str(caught.value)


def test_local_ranks_are_counted_where_no_launcher_says_them(of_two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "unset after the test")
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(rendezvous, "LIMIT_MINUTES", 1.0)
    store = rendezvous.find_store()
    monkeypatch.setattr(rendezvous, "find_store", lambda: store)
    monkeypatch.setenv("RANK", "2")
    here = rendezvous._host()
    store.set("hosts", f'["elsewhere", "{here}", "{here}", "{here}"]')
    place = rendezvous.meet()
    assert (place.rank, place.local_rank, place.size) == (2, 1, 4)


def test_rank_0_leaves_without_those_that_do_not_come(of_two: None, capfd: pytest.CaptureFixture[str]) -> None:
    done = threading.Event()
    rendezvous.run_on_rank_0(done.set)
    assert done.is_set()
    assert capfd.readouterr().err == "rank 1 of 2 did not come (WORLD_SIZE=2)\n"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "mpirun's variables"])
def test_verbs_that_write_files_run_in_one_process(random_checkpoint: Path, tmp_path: Path, launcher: str) -> None:
    export = ["export", "--ckpt", str(random_checkpoint), "--out_dir", str(tmp_path / "exported"), "--json"]
    port = str(20_000 + os.getpid() % 10_000)
    module = {"torchrun": "torch.distributed.run", "deepspeed": "deepspeed.launcher.runner"}.get(launcher)
    number = {"torchrun": "--nproc_per_node", "deepspeed": "--num_gpus"}.get(launcher)
    env = environment() | {"DS_ACCELERATOR": "cpu"}
    if module is not None:
        command = [sys.executable, "-m", module, str(number), "2", "--master_port", port]
        command += ["-m" if launcher == "torchrun" else "--module", "llm"]
        ended = [subprocess.run([*command, *export], env=env, capture_output=True, text=True)]
    else:
        mpi = {"OMPI_COMM_WORLD_SIZE": "2", "MASTER_PORT": port}
        ranks = [env | mpi | {"OMPI_COMM_WORLD_RANK": str(rank)} for rank in range(2)]
        command = [sys.executable, "-m", "llm", *export]
        started = [subprocess.Popen(command, env=each, stdout=subprocess.PIPE, text=True) for each in ranks]
        ended = [subprocess.CompletedProcess([], 0, process.communicate()[0], "") for process in started]
        assert [process.returncode for process in started] == [0, 0]
    assert all(process.returncode == 0 for process in ended), ended[0].stderr
    assert sum(process.stdout.count('"out_dir"') for process in ended) == 1
    run_llm("export", "--ckpt", random_checkpoint, "--out_dir", tmp_path / "alone")
    files = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()} == files
