"""The processes of a run: rank and size, the device and dtype each computes in, and how they find each other."""

import contextlib
import glob
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from kernels.dispatch import cpu_has_bf16
from llm.config import Config
from llm.errors import UserError

T = TypeVar("T")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the names that train.precision and --precision give them."""


@dataclass(frozen=True)
class World:
    """This process among all: rank of size, and the device and the dtype that it computes in."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    control: Any = None
    """The process group for what is not tensors of the model: on the host, so that asking never waits for a GPU."""

    @property
    def precision(self) -> str:
        """The dtype's name in `DTYPES`."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds a tensor up over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: int) -> int:
        """The largest of the ranks' values, on every rank."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def first_rank_only(self, compute: Callable[[], T]) -> T:
        """What rank 0 computes, on every rank: one view of the file system, and one voice where that is an error.

        Raises rank 0's exception there, and a UserError without words on the others.
        """
        outcome: tuple[T | None, bool] = (None, False)
        failure: Exception | None = None
        if self.rank == 0:
            try:
                outcome = (compute(), True)
            except (UserError, OSError) as error:
                failure = error
        value, done = self.broadcast(outcome)
        if not done:
            raise failure or UserError("")
        return cast(T, value)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def join(device: str, dtype: torch.dtype) -> World:
    """As `start`, without deepspeed: for what trains nothing. device: "auto", "cpu" or "cuda"."""
    fill_environment()
    rank, local_rank, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    own = pick_device(device, local_rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if size > 1:
        with meeting():
            dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    return World(rank, local_rank, size, own, dtype)


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    try:
        yield
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the processes cannot meet at {where} ({error}); give the launcher another port") from None


def stop() -> None:
    """Leaves the process group, so that no rank exits while another still talks to it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(wanted: str, local_rank: int = 0, way_out: str = "--device cpu") -> torch.device:
    """`auto` is this rank's GPU where there is one; an NVIDIA device that torch cannot use is an error.

    way_out: what the caller's user types to compute on the CPU instead.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(f"local rank {local_rank} has no GPU of its own: {count} visible; start {count} processes")
        return torch.device("cuda", local_rank)
    if wanted == "cuda" or _has_nvidia_device():
        why = (
            "this torch is a CPU build: run `make setup` again"
            if torch.version.cuda is None
            else f"the driver does not serve CUDA {torch.version.cuda}: see nvidia-smi"
        )
        raise UserError(f"torch {torch.__version__} cannot use an NVIDIA device ({why}); or take the CPU: {way_out}")
    return torch.device("cpu")


def _has_nvidia_device() -> bool:
    """Whether the driver shows a device (under WSL2 it shows only its tool) that the user has not hidden."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and bool(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/usr/lib/wsl/lib/nvidia-smi"))


def pick_dtype(config: Config, device: torch.device) -> torch.dtype:
    """What train.precision means on the device. Raises UserError for bf16 on a GPU without it."""
    precision = config.train.precision
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        precision = "bf16" if (has_bf16 if device.type == "cuda" else cpu_has_bf16()) else "fp32"
    if precision == "bf16" and not has_bf16:
        raise UserError(f"train.precision=bf16: {torch.cuda.get_device_name(device)} has no bf16; use fp16 or fp32")
    return DTYPES[precision]


@contextlib.contextmanager
def oom_as_user_error(way_out: str) -> Iterator[None]:
    """Turns a GPU's full memory into a UserError that tells the way out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is full; {way_out} ({str(error).splitlines()[0]})") from None


def fill_environment() -> None:
    """The five variables torch.distributed needs: a launcher's, else from srun's, else a world of one."""
    env = os.environ
    # Of Slurm's variables those of a step are srun's alone: the script of an sbatch job sees the others too.
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
        one_each = torch.cuda.device_count() == 1  # srun --gpus-per-task=1 shows each task its own GPU alone
        env["LOCAL_RANK"] = "0" if one_each else env["SLURM_LOCALID"]
        if "MASTER_ADDR" not in env:
            nodes = ["scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]]
            env["MASTER_ADDR"] = subprocess.run(nodes, capture_output=True, text=True, check=True).stdout.split()[0]
        env.setdefault("MASTER_PORT", str(20_000 + int(env["SLURM_JOB_ID"]) % 10_000))
    if "RANK" not in env:
        # Port 0: the system picks a free one, and nobody else has to know it.
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
