"""The processes of a run: rank and size, the device and dtype of each, and what they exchange."""

import contextlib
import glob
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from kernels.dispatch import cpu_has_bf16
from llm.config import Config
from llm.errors import ReportedByRank0, UserError
from llm.rendezvous import form_group, meet

T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""{name in train.precision and --precision: dtype}"""
PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}
POLL_SECONDS = 0.2
"""Between two exchanges of ranks that wait for a long work of one of them."""


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of processes, and the device and dtype of this process."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    control: Any = None
    """A process group on the host for small values, so that their exchange never waits for a GPU."""

    @property
    def precision(self) -> str:
        """Returns the dtype's name in `DTYPES`."""
        return PRECISIONS[self.dtype]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: int) -> int:
        """Returns the largest of the ranks' values on every rank."""
        if self.size == 1:
            return value
        # On the host, because `control` (on a CPU: the default group) is gloo.
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's value on every rank."""
        if self.size == 1:
            return value
        values = [value]
        # NCCL moves only GPU memory: the pickled value would be copied to this rank's device and back.
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def first_rank_only(self, compute: Callable[[], T]) -> T:
        """Calls compute() on rank 0 and returns its result on every rank.

        All ranks then agree on the state of the file system, and an error is printed once: rank 0 raises its own, the
        other ranks raise ReportedByRank0.
        """
        # The flag distinguishes a failure from a compute() that returns None.
        outcome: tuple[T | None, bool] = (None, False)
        failure: Exception | None = None
        if self.rank == 0:
            try:
                outcome = (compute(), True)
            except (UserError, OSError) as error:
                failure = error
        value, done = self.broadcast(outcome)
        if not done:
            raise failure or ReportedByRank0("rank 0 prints why")
        return cast(T, value)

    def wait_for_all(self, done: Callable[[], bool]) -> None:
        """Returns when done() is true on every rank. However long that takes, no collective reaches its time limit.

        If done() raises on a rank, this rank raises its error, and the others ReportedByRank0. Collective.
        """
        failure: Exception | None = None
        while True:
            try:
                state = 0 if done() else 1
            except (UserError, OSError) as error:
                state, failure = 2, error
            agreed = self.agree(state)
            if agreed == 2:
                raise failure or ReportedByRank0("another rank prints why")
            if agreed == 0:
                return
            time.sleep(POLL_SECONDS)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def join(device: str, dtype: torch.dtype) -> World:
    """Joins the processes that a launcher started, without deepspeed, for evaluation.

    device: "auto", "cpu" or "cuda".
    """
    place = meet()
    own = pick_device(device, place.local_rank)
    if own.type == "cuda":
        # NCCL and tensors on plain "cuda" use the current device, which is otherwise GPU 0 on every rank.
        torch.cuda.set_device(own)
    control = form_group(place, own)
    return World(place.rank, place.local_rank, place.size, own, dtype, control)


def pick_device(wanted: str, local_rank: int = 0, way_out: str = "--device cpu") -> torch.device:
    """Chooses the device: "auto" is this rank's GPU if there is one, else the CPU.

    A machine with an NVIDIA device that torch cannot use is an error, because a silent fall-back to the CPU would cost
    a user hours.

    way_out: how the user can compute on the CPU instead, for the error message.
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


def device_name(device: torch.device) -> str:
    """The model of the GPU, or that of the processor with the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    # An ARM Linux does not list a model.
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model or platform.machine()}, {cores} {'core' if cores == 1 else 'cores'}"


def _has_nvidia_device() -> bool:
    """Whether there is an NVIDIA device that the user has not hidden. Under WSL2 only the driver's tool shows it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and bool(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/usr/lib/wsl/lib/nvidia-smi"))


def pick_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Returns the dtype for train.precision on this device. Raises UserError for bf16 on a GPU without it."""
    # By default torch also counts GPUs that only emulate bf16.
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    precision: str = config.train.precision
    if precision == "auto":
        if device.type == "cpu":
            # A CPU without bf16 instructions can compute in bf16, but through fp32, so auto gains nothing there.
            precision = auto_precision(config, bf16=cpu_has_bf16(), fp16=False)
        else:
            # Volta has the first tensor cores. Older GPUs compute fp16 slowly, or no faster than fp32.
            fp16 = torch.cuda.get_device_capability(device) >= (7, 0)
            precision = auto_precision(config, bf16=has_bf16, fp16=fp16)
    if precision == "bf16" and not has_bf16:
        raise UserError(f"train.precision=bf16: {torch.cuda.get_device_name(device)} has no bf16; use fp16 or fp32")
    return DTYPES[precision]


def auto_precision(config: Config, *, bf16: bool, fp16: bool) -> str:
    """Returns what train.precision=auto means on a device, a key of DTYPES.

    bf16, fp16: whether the device multiplies them faster than fp32. fp16 needs a scaled loss, which ZeRO stage 0 lacks.
    """
    if bf16:
        return "bf16"
    return "fp16" if fp16 and config.deepspeed.zero_stage > 0 else "fp32"


@contextlib.contextmanager
def oom_as_user_error(way_out: str | Callable[[], str]) -> Iterator[None]:
    """Turns an out-of-memory error of a GPU or the host into a UserError that says what to do.

    way_out: or a function that returns it, called after the error.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        of_gpu, message = isinstance(error, torch.OutOfMemoryError), str(error).splitlines()
        # torch has no class of its own for these: no memory for a tensor, and a tensor of more than 2^63 bytes.
        known = re.search("can't allocate memory|[Ss]torage size calculation overflowed", str(error))
        if not (of_gpu or known or isinstance(error, MemoryError)):
            raise
        what = "the GPU's memory is full" if of_gpu else "this machine's memory is full"
        help_ = way_out if isinstance(way_out, str) else way_out()
        raise UserError(f"{what}; {help_}" + (f" ({message[0]})" if message else "")) from None
