"""`llm doctor` under a launcher: one table of all ranks, and what one rank has that the others do not."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from running import environment, result_of, torchrun

from llm.tools.doctor_node import Finding
from llm.tools.doctor_ranks import Rank, compare, judge_pairs, matrix, table


def rank(**measured: float) -> Rank:
    usual = {"matmul": 1e14, "copy": 1e12, "write": 1e9, "memory": 1e11, "shm": 1e10, "clock": 0.0}
    return Rank("node-with-a-long-name", "NVIDIA H100 80GB HBM3", {"torch": "2.13"}, ["a"], {**usual, **measured}, [])


def told(*ranks: Rank) -> dict[str, Finding]:
    return {finding.part: finding for finding in compare(list(ranks))}


def test_equal_ranks_have_no_outliers():
    ranks = [rank(matmul=1e14 * (1 + n / 100)) for n in range(12)]
    assert told(*ranks) == {}
    lines = list(table(ranks))
    assert len(lines) == 2 + 12
    assert max(map(len, lines)) <= 80
    assert not any("*" in line for line in lines)


def test_a_slow_rank_is_marked():
    ranks = [rank(), rank(matmul=0.7e14), rank(), rank(clock=-3.5)]
    found = told(*ranks)
    assert found["outlier"].text == "matmul of rank 1: 70 TFLOP/s, 70% of the median (below 80%)"
    assert found["clock"].text == "clock of rank 3 differs from rank 0's by -3.5 s"
    assert {one.level for one in found.values()} == {"warning"}
    lines = list(table(ranks))[2:]
    assert [line.count("*") for line in lines] == [0, 1, 0, 1]
    assert "70*" in lines[1]
    assert "-3500*" in lines[3]
    assert told(rank(matmul=0.7e14), rank())["outlier"].text.startswith("matmul of rank 0"), "of two the slower one"


def test_other_versions_or_data_falsify_a_run():
    odd = rank()
    odd.versions, odd.data = {"torch": "2.12"}, ["b"]
    found = told(rank(), rank(), odd)
    assert found["versions"].text == "torch is 2.12 on rank 2 and not everywhere"
    assert found["data"].text == "other shards than the rest, or none, on rank 2"
    assert {one.level for one in found.values()} == {"wrong"}


def test_links_are_held_against_their_peak():
    h100 = [rank() for _ in range(3)]
    pairs = {(0, 1): (1e-5, 400e9), (0, 2): (1e-5, 390e9), (1, 2): (1e-5, 20e9)}
    (found,) = judge_pairs(pairs, h100, "nccl")
    assert found.level == "warning"
    assert "least 20 between 1 and 2 (4% of its link's 450)" in found.text
    fine = pairs | {(1, 2): (1e-5, 380e9)}
    assert next(judge_pairs(fine, h100, "nccl")).level == "fine"
    others = [rank(network=50e9) for _ in range(3)]
    for number, each in enumerate(others):
        each.host = f"node-{number}"
    slow = dict.fromkeys(pairs, (1e-05, 20000000000.0))
    (found,) = judge_pairs(slow, others, "nccl")
    assert "(40% of its link's 50)" in found.text
    assert found.level == "warning", "also where all pairs are as slow"
    lines = list(matrix(fine, 3, "nccl"))
    assert lines[2].split() == ["0", "-", "400", "390"]
    assert lines[3].split() == ["1", "10", "-", "380"]
    many = {(low, high): (1e-5, 1e9 * (low + high)) for low in range(20) for high in range(low + 1, 20)}
    assert len(list(matrix(many, 20, "nccl"))) == 9
    assert max(map(len, matrix({**pairs}, 8, "nccl"))) <= 80


@pytest.mark.slow
def test_two_healthy_ranks(tmp_path, write_config):
    config = write_config()
    done = torchrun(2, "llm", "doctor", "--config", config, "--seconds", "1", "--json")
    result = result_of(done)
    assert result["failed"] == []
    assert f"shared      {tmp_path}/run is the same folder on all 2 ranks; rename, links and locks work" in done.stderr
    assert len(result["ranks"]) == 2
    gloo = result["network"]["gloo"]
    assert gloo["all_reduce"]["bytes_per_second"] > 1e6
    assert [pair["ranks"] for pair in gloo["pairs"]] == [[0, 1]]
    assert done.stdout.count("{") == done.stdout.count("}")
    assert not list(tmp_path.glob(".llm-doctor-*"))


def two_ranks(*arguments: object, folders: tuple[Path, Path], script: str = "") -> list[psutil.Popen]:
    """`llm doctor` as two ranks, each in a folder of its own. script: Python that rank 1 runs first."""
    joined = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 20_000)}
    joined |= {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    started = []
    for number, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        main = f"import sys; from llm.cli import main; {script if number else ''}\nsys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", main, "doctor", *map(str, arguments)]
        own = {"RANK": str(number), "LOCAL_RANK": str(number)}
        options = {"cwd": folder, "env": environment() | joined | own, "text": True}
        started.append(psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options))
    return started


@pytest.mark.slow
def test_finds_a_folder_that_is_not_shared(tmp_path):
    ranks = two_ranks("--seconds", 0.2, "--json", folders=(tmp_path / "a", tmp_path / "b"))
    (out, err), (out_1, err_1) = (each.communicate() for each in ranks)
    assert [each.returncode for each in ranks] == [1, 1]
    assert json.loads(out)["failed"] == ["shared"]
    assert "shared      WRONG: artifacts/checkpoints is not rank 0's folder on rank 1" in err
    assert "mount one file system at this path on every node" in err
    assert (out_1, err_1) == ("", ""), "rank 0 speaks for all"


@pytest.mark.slow
def test_finds_a_skewed_clock(tmp_path):
    script = "import time; real = time.time; time.time = lambda: real() + 7"
    ranks = two_ranks("--seconds", 0.2, "--json", folders=(tmp_path, tmp_path), script=script)
    (out, err), _ = (each.communicate() for each in ranks)
    assert [each.returncode for each in ranks] == [0, 0]
    result = json.loads(out)
    assert result["ranks"][1]["measured"]["clock"] == pytest.approx(7, abs=0.5)
    assert "clock" in result["warnings"]
    assert "clock of rank 1 differs from rank 0's by +7.0 s" in err


@pytest.mark.slow
def test_finds_a_slow_rank(tmp_path):
    """Rank 1 is stopped for nine tenths of the time, as by a limit of its control group."""
    ranks = two_ranks("--seconds", 8, "--json", folders=(tmp_path, tmp_path))
    before = []
    for line in ranks[0].stderr:
        before.append(line)
        if line.startswith("data "):  # the last before the rates
            break
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
        while ranks[1].poll() is None:
            ranks[1].suspend()
            time.sleep(0.18)
            ranks[1].resume()
            time.sleep(0.02)
    (out, err), _ = (each.communicate() for each in ranks)
    assert [each.returncode for each in ranks] == [0, 0]
    assert "outlier" in json.loads(out)["warnings"]
    assert "outlier     WARNING: matmul of rank 1" in err, before
