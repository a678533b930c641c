"""Reads what a launcher told this process: its rank, how many processes there are, and where rank 0 is.

torchrun, deepspeed and Kubernetes set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. mpirun and srun have variables of
their own, which `fill_environment` translates to these, so that the rest of the program (and DeepSpeed) reads only
these. Nothing here imports torch.
"""

import os
import re
import sys
import zlib

from llm.errors import UserError

LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # OpenMPI
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),  # MVAPICH
    ("PMI_RANK", "PMI_SIZE"),  # MPICH, Intel MPI, Cray
    # Only srun sets the variables of a step. An sbatch script sees the other ones, but it is one process.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)
"""(rank, number of processes) of each launcher; the first pair that is set counts, as mpirun may run in a SLURM job."""
LOCAL_RANKS = (
    *("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
)
"""The number of a process on its host."""
ON_THIS_HOST = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
"""The number of mpirun's processes on this host."""
DEFAULT_PORT = 29500
"""The port of torchrun and deepspeed, where nothing in the environment gives each job a port of its own."""


def rank() -> int:
    """This process's rank, once the environment is filled."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes, once the environment is filled."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


def without_ranks() -> dict[str, str]:
    """Returns the environment of a command that this process starts, and that is none of the launcher's processes."""
    theirs = {name for pair in LAUNCHERS for name in pair} | {*LOCAL_RANKS, *ON_THIS_HOST, "PMIX_RANK"}
    return {name: value for name, value in os.environ.items() if name not in theirs | {"MASTER_ADDR", "MASTER_PORT"}}


def speaks() -> bool:
    """Whether this process prints an error that all processes of its host meet: the first does, as far as is known."""
    number = next((os.environ[name] for name in LOCAL_RANKS if name in os.environ), "0")
    return world_size() == 1 or rank() == 0 or number == "0"


def address() -> str:
    """HOST:PORT at which rank 0 is found, once the environment is filled."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def fill_environment() -> None:
    """Sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from any launcher's variables; nothing for one process.

    Raises UserError if the variables contradict each other, or do not say where rank 0 is.
    """
    env = os.environ
    pair = next((pair for pair in LAUNCHERS if pair[0] in env and (pair[1] in env or pair[0] == "RANK")), None)
    if pair is None:
        if "PMIX_RANK" in env and "SLURM_PROCID" not in env:
            # PMIx has no variable for the number of processes.
            pair = ("PMIX_RANK", "WORLD_SIZE")
        elif env.get("WORLD_SIZE", "1") != "1":
            print(f"WORLD_SIZE={env['WORLD_SIZE']} without RANK: this process works alone", file=sys.stderr, flush=True)
    if pair is None:
        return
    number, size = (_number(name, pair) for name in pair)
    if not 0 <= number < size:
        raise UserError(f"{pair[0]}={number} is not below {pair[1]}={size}; see the launcher, or unset both")
    if "LOCAL_RANK" in env:
        _number("LOCAL_RANK", pair)
    if size == 1 and pair[0] != "RANK":
        return
    env["RANK"], env["WORLD_SIZE"] = str(number), str(size)
    if size > 1:
        env.setdefault("MASTER_ADDR", _find_rank_0(pair[0], size))
        env.setdefault("MASTER_PORT", str(_port()))
        _number("MASTER_PORT", pair)


def _number(name: str, pair: tuple[str, str]) -> int:
    if name not in os.environ:
        raise UserError(f"{pair[0]} is set and {name} is not; set both, as a launcher does, or unset {pair[0]}")
    try:
        return int(os.environ[name])
    except ValueError:
        raise UserError(f"{name}={os.environ[name]} is no number; see the launcher, or unset it") from None


def _find_rank_0(variable: str, size: int) -> str:
    """Returns the host of rank 0 as far as the variables tell it: by default this one."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST"))
    if nodes is not None:
        # SLURM abbreviates the list, as in node[01-04,07],other. By default the first node has rank 0.
        first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
        assert first is not None  # it also matches nothing
        return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())
    here = next((int(os.environ[name]) for name in ON_THIS_HOST if os.environ.get(name, "").isdecimal()), size)
    if here < size:
        raise UserError(
            f"{variable} counts {size} processes, {here} of them on this host: tell all where rank 0 is, such as with "
            "mpirun -x MASTER_ADDR=HOST (MPICH: -genv MASTER_ADDR HOST)"
        )
    return "127.0.0.1"


def _port() -> int:
    """Returns a port that all processes of the job derive without communication, where jobs have names."""
    env = os.environ
    if "SLURM_JOB_ID" in env:
        job = f"{env['SLURM_JOB_ID']}.{env.get('SLURM_STEP_ID', '0')}"
    else:
        job = env.get("PMIX_NAMESPACE", env.get("OMPI_MCA_ess_base_jobid", ""))
    # Below Linux's ephemeral ports (from 32,768).
    return 20_000 + zlib.crc32(job.encode()) % 10_000 if job else DEFAULT_PORT
