"""Every launcher's variables are read as its ranks; what contradicts itself is one line."""

import os

import pytest

from llm import launchers
from llm.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {*NAMES, *os.environ}:
        if name in NAMES or name.startswith(("SLURM_", "OMPI_", "PMI", "MV2_", "MPI_")):
            monkeypatch.setenv(name, "unset after the test")
            monkeypatch.delenv(name)


def read(monkeypatch: pytest.MonkeyPatch, text: str) -> list[str | None]:
    for pair in text.split():
        name, _, value = pair.partition("=")
        monkeypatch.setenv(name, value)
    launchers.fill_environment()
    return [os.environ.get(name) for name in NAMES]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ("", [None, None, None, None, None]),
        # Kubernetes' PyTorchJob
        ("RANK=1 WORLD_SIZE=4 MASTER_ADDR=pod-0 MASTER_PORT=23456", ["1", "4", None, "pod-0", "23456"]),
        ("RANK=0 WORLD_SIZE=1", ["0", "1", None, None, None]),
        ("RANK=1 WORLD_SIZE=2", ["1", "2", None, "127.0.0.1", "29500"]),
        (
            "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_SIZE=2 PMIX_RANK=1",
            ["1", "2", None, "127.0.0.1", "29500"],
        ),
        ("PMI_RANK=3 PMI_SIZE=4 MPI_LOCALNRANKS=4", ["3", "4", None, "127.0.0.1", "29500"]),
        ("PMI_RANK=0 PMI_SIZE=1", [None, None, None, None, None]),
        ("PMIX_RANK=1 WORLD_SIZE=2", ["1", "2", None, "127.0.0.1", "29500"]),
        ("MV2_COMM_WORLD_RANK=0 MV2_COMM_WORLD_SIZE=2 MASTER_ADDR=a", ["0", "2", None, "a", "29500"]),
        # The script of an sbatch job is one process.
        ("SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_JOB_NODELIST=n[1-2]", [None, None, None, None, None]),
    ],
)
def test_the_variables_of_each_launcher(
    monkeypatch: pytest.MonkeyPatch, variables: str, expected: list[str | None]
) -> None:
    assert read(monkeypatch, variables) == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[01-04,07],other", "node01"),
        ("a[3,5]b[10-11],c", "a3b10"),
        ("gpu-a,gpu-b", "gpu-a"),
        ("r1-n[007-010].cluster", "r1-n007.cluster"),
    ],
)
def test_srun_needs_no_scontrol(monkeypatch: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    step = f"SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=8 SLURM_JOB_ID=70001 SLURM_JOB_NODELIST={nodes}"
    rank, size, _, address, port = read(monkeypatch, step)
    assert (rank, size, address) == ("3", "8", first)
    assert 20_000 <= int(port or 0) < 30_000
    monkeypatch.delenv("MASTER_PORT")
    monkeypatch.delenv("RANK")
    assert read(monkeypatch, "SLURM_STEP_ID=1")[4] != port, "two steps may run on one node"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("RANK=0", "RANK is set and WORLD_SIZE is not"),
        ("PMIX_RANK=0", "PMIX_RANK is set and WORLD_SIZE is not"),
        ("RANK=2 WORLD_SIZE=2", "RANK=2 is not below WORLD_SIZE=2"),
        ("RANK=-1 WORLD_SIZE=2", "RANK=-1 is not below"),
        ("RANK=x WORLD_SIZE=2", "RANK=x is no number"),
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=", "LOCAL_RANK= is no number"),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT=x", "MASTER_PORT=x is no number"),
        ("OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_SIZE=4", "mpirun -x MASTER_ADDR=HOST"),
    ],
)
def test_what_cannot_be_is_one_line(monkeypatch: pytest.MonkeyPatch, variables: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(monkeypatch, variables)


def test_a_number_of_processes_without_a_rank_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read(monkeypatch, "WORLD_SIZE=4")[0] is None
    assert capsys.readouterr().err == "WORLD_SIZE=4 without RANK: this process works alone\n"
    assert launchers.world_size() == 1
