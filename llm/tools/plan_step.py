"""The step of a run before it begins: what fits on a machine, and how long it takes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from kernels.work import Work
from llm.config import ActivationCheckpointing, Config
from llm.hardware import Hardware
from llm.model.flops import Flops, flops_per_token, recomputed_work
from llm.model.transformer import parameter_count, parameter_shapes
from llm.tools import roofline
from llm.tools.plan_network import Link, Traffic, communication_seconds, slowest_link, traffic
from llm.tools.roofline import Rates
from llm.training.memory import (
    AUTO_MICRO_BATCH_TOKENS,
    Activations,
    Device,
    State,
    activation_bytes,
    largest_micro_batch,
    state_bytes,
)
from llm.training.optim import moments

USABLE = 0.9
"""The fraction of a device's memory that a plan fills; the rest is for context, libraries and fragmentation."""
HOST_LINK = 16e9
"""Bytes/s assumed between a GPU and the host, in one direction, where no datasheet tells: PCIe 3 with 16 lanes."""
HOST_MEMORY = 20e9
"""Bytes/s, read plus written, assumed of the host's memory in an offloaded update: about one channel of DDR4."""


@dataclass(frozen=True)
class Choice:
    """A ZeRO stage, where the optimizer is, and what is recomputed; with what it needs."""

    stage: int
    offload: bool
    checkpointing: ActivationCheckpointing
    micro_batch: int
    """The largest that fits; 0: none."""
    memory: int
    """Bytes of a process at that micro-batch, or at 1."""
    seconds: float
    """Of a step."""

    def __str__(self) -> str:
        offload = " deepspeed.offload=cpu" if self.offload else ""
        return (
            f"deepspeed.zero_stage={self.stage}{offload} train.activation_checkpointing={self.checkpointing} "
            f"train.micro_batch={self.micro_batch}"
        )


@dataclass(frozen=True)
class Machine:
    """One device, and what connects it to others."""

    device: Device
    dtype: torch.dtype
    hardware: Hardware | None
    """None: not in hardware.json, such as a CPU."""
    rates: Rates
    source: str
    """Of the rates."""
    mfu: float | None
    """The fraction of the rate of products that training reaches; None: each op at its own share (roofline.py)."""
    memory: float
    """Bytes that a plan may fill; infinite: unknown."""
    node_gpus: int
    network_gbs: float

    @property
    def host_link(self) -> float:
        """Bytes/s between the device and the host, in one direction."""
        return HOST_LINK if self.hardware is None else 1e9 * self.hardware.host_gbs

    def link(self, processes: int) -> Link | None:
        if self.hardware is None or processes == 1:
            return None
        return slowest_link(self.hardware, processes, self.node_gpus, self.network_gbs)


class Planner:
    """The arithmetic of one config on one kind of machine, for any number of processes."""

    def __init__(self, config: Config, machine: Machine) -> None:
        assert config.data.seq_len is not None
        self.config, self.machine, self.seq_len = config, machine, config.data.seq_len
        self.flops: Flops = flops_per_token(config.model, self.seq_len)
        self.parameters = parameter_count(config.model)
        self._activations: dict[tuple[bool, int, ActivationCheckpointing], Activations] = {}

    def sequences(self, processes: int) -> int:
        """Returns the sequences of a step that one process computes."""
        return math.ceil(self.config.train.batch / self.seq_len / processes)

    def state(self, stage: int, processes: int, *, offload: bool) -> State:
        return state_bytes(self._with(stage, offload), stage, processes, self.machine.dtype, self.machine.device)

    def activations(self, processes: int, micro_batch: int, checkpointing: ActivationCheckpointing) -> Activations:
        # All that matters of the number of processes is whether the weights are fp32 and rounded at each use.
        key = (processes > 1, micro_batch, checkpointing)
        if key not in self._activations:
            config, machine = self.config, self.machine
            changed = config.train.model_copy(update={"activation_checkpointing": checkpointing})
            config = config.model_copy(update={"train": changed})
            self._activations[key] = activation_bytes(
                config,
                processes,
                micro_batch,
                self.seq_len,
                machine.dtype,
                machine.device,
                triton=machine.hardware is None or machine.hardware.triton,
            )
        return self._activations[key]

    def micro_batch(self, state: State, processes: int, checkpointing: ActivationCheckpointing) -> int:
        """Returns the largest micro-batch that fits, up to training's own choice; 0: none."""
        stated = self.config.train.micro_batch
        largest = max(1, AUTO_MICRO_BATCH_TOKENS[self.machine.device] // self.seq_len)
        size = min(self.sequences(processes), largest)

        def activations(size: int) -> Activations:
            return self.activations(processes, size, checkpointing)

        if stated:
            return stated if state.peak(activations(stated)) <= self.machine.memory else 0
        return largest_micro_batch(state, activations, size, self.machine.memory)

    def traffic(self, stage: int, processes: int, micro_batch: int) -> Traffic:
        micro_batches = math.ceil(self.sequences(processes) / micro_batch)
        return traffic(self.config, stage, processes, self.machine.dtype, micro_batches)

    def compute_seconds(self, processes: int, micro_batch: int, checkpointing: ActivationCheckpointing) -> float:
        """Returns the time of a step's forward and backward passes, with the empty slots of its last micro-batch."""
        micro_batches = math.ceil(self.sequences(processes) / micro_batch)
        return micro_batches * self.pass_seconds(micro_batch, checkpointing)

    def pass_seconds(self, micro_batch: int, checkpointing: ActivationCheckpointing) -> float:
        """Returns the time of forward and backward of one micro-batch."""
        machine, model = self.machine, self.config.model
        if machine.mfu is None:
            passes = roofline.passes_work(self.config, micro_batch, machine.dtype, checkpointing)
            return roofline.seconds(passes, machine.rates)
        # MFU uses the usual count (Flops.usual), so the speed must use the same.
        tokens, products = micro_batch * self.seq_len, machine.rates.products * machine.mfu
        pairs = tokens * min(self.seq_len, model.sliding_window or self.seq_len)
        again = sum(recomputed_work(model, tokens, pairs, machine.dtype.itemsize, checkpointing).values(), Work())
        # "selective" repeats no product, so memory limits it.
        repeated = again.flops / products or again.moved / machine.rates.copy
        return tokens * self.flops.usual / products + repeated

    def recomputed(self, micro_batch: int, checkpointing: ActivationCheckpointing) -> float:
        """Returns the time that recomputing takes, as a fraction of the passes of a step that recomputes nothing."""
        return self.pass_seconds(micro_batch, checkpointing) / self.pass_seconds(micro_batch, "none") - 1

    def update_seconds(self, stage: int, processes: int, *, offload: bool) -> float:
        """Returns the time of the optimizer. --mfu has it in its share, unless it runs on the host."""
        machine, config = self.machine, self._with(stage, offload)
        works = roofline.update_work(config, processes, machine.dtype)
        host = 0.0
        if offload:
            del works["optimizer", "update"]
            share = self.parameters / processes
            # Gradients go to the host, weights come back; AdamW reads and writes master, moments and gradient.
            host = share * ((4 + machine.dtype.itemsize) / machine.host_link + 28 / HOST_MEMORY)
        return host + (roofline.seconds(works, machine.rates) if machine.mfu is None else 0.0)

    def network_seconds(self, stage: int, processes: int, micro_batch: int) -> float:
        link = self.machine.link(processes)
        return (
            0.0 if link is None else communication_seconds(self.traffic(stage, processes, micro_batch), processes, link)
        )

    def step_seconds(
        self, stage: int, processes: int, micro_batch: int, checkpointing: ActivationCheckpointing, *, offload: bool
    ) -> float:
        """DeepSpeed overlaps communication and computation at stage 3 alone; the update comes on top."""
        compute = self.compute_seconds(processes, micro_batch, checkpointing)
        network = self.network_seconds(stage, processes, micro_batch)
        update = self.update_seconds(stage, processes, offload=offload)
        return (max(compute, network) if stage == 3 else compute + network) + update

    def choices(self, processes: int) -> Iterator[Choice]:
        """Yields all choices: stages and offload by rows, checkpointing by columns. Stage 3 has no Muon, 0 no fp16.

        With train.same_bits there are stages 0 and 1, without offload.
        """
        exact = self.config.train.same_bits
        first, stages = int(self.machine.dtype == torch.float16), 3 if self.config.optimizer.kind == "muon" else 4
        for stage in range(first, 2 if exact else stages):
            for offload in (False, True) if stage and self.machine.device == "cuda" and not exact else (False,):
                state = self.state(stage, processes, offload=offload)
                for checkpointing in get_args(ActivationCheckpointing):
                    if stage == 3 and checkpointing == "selective":
                        continue  # training refuses it
                    size = self.micro_batch(state, processes, checkpointing)
                    memory = state.peak(self.activations(processes, size or 1, checkpointing))
                    seconds = self.step_seconds(stage, processes, size or 1, checkpointing, offload=offload)
                    yield Choice(stage, offload, checkpointing, size, memory, seconds)

    def recommended(self, choices: Sequence[Choice]) -> Choice | None:
        """Returns the config's own choice, else the first one, within 3 % of the shortest step; None: nothing fits."""
        fitting = [choice for choice in choices if choice.micro_batch]
        shortest = min((choice.seconds for choice in fitting), default=math.inf)
        deepspeed, checkpointing = self.config.deepspeed, self.config.train.activation_checkpointing
        own = (deepspeed.zero_stage, deepspeed.offload == "cpu", checkpointing)
        fitting.sort(key=lambda choice: (choice.stage, choice.offload, choice.checkpointing) != own)
        return next((choice for choice in fitting if choice.seconds <= 1.03 * shortest), None)

    def _with(self, stage: int, offload: bool) -> Config:
        wanted = {"zero_stage": stage, "offload": "cpu" if offload else "none"}
        return self.config.model_copy(update={"deepspeed": self.config.deepspeed.model_copy(update=wanted)})


def saved_bytes(config: Config) -> int:
    """Returns the size of a checkpoint: weights and moments in fp32."""
    shapes = parameter_shapes(config.model)
    return sum(4 * shape.numel() * (1 + len(moments(name, config.optimizer))) for name, shape in shapes.items())


def kept_checkpoints(config: Config) -> int:
    """Returns how many checkpoints a run has at most: with the best one, and the one that is written."""
    return config.checkpoint.keep_last + 1 + config.checkpoint.keep_best


def kept_bytes(config: Config) -> int:
    """Returns the disk that a run's checkpoints need."""
    return kept_checkpoints(config) * saved_bytes(config)
