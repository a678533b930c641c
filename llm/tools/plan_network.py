"""What the processes of a run send each other in a step, and how long it takes."""

import math
from dataclasses import dataclass

import torch

from llm.config import Config
from llm.hardware import Hardware
from llm.model.transformer import parameter_shapes
from llm.training.engine import run_stage
from llm.training.memory import LIVE_PARAMETERS, partition_length
from llm.training.muon import moved_elements, shared_batches
from llm.training.optim import matrix_shapes


@dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors that one process gives to collectives in a step, without the scalars of norm and loss.

    Counted in runs of two processes at each stage.
    """

    all_reduce: int
    reduce_scatter: int
    all_gather: int
    all_to_all: int = 0
    """What a process sends of matrices that belong to others, and of theirs back (Muon): of the one that sends most."""

    @property
    def total(self) -> int:
        return self.all_reduce + self.reduce_scatter + self.all_gather + self.all_to_all

    def sent(self, processes: int) -> float:
        """Returns the bytes that one process sends if the collectives are rings."""
        others = (processes - 1) / processes
        return others * (2 * self.all_reduce + self.reduce_scatter + self.all_gather) + self.all_to_all


def traffic(config: Config, stage: int, processes: int, dtype: torch.dtype, micro_batches: int) -> Traffic:
    """Returns what a process sends in a step of this many micro-batches.

    Stages 0 and 1 reduce the gradients once a step, 2 and 3 those of each micro-batch, all in fp32. With
    train.same_bits recursive halving and doubling send as many bytes as rings do. From stage 1 on the
    updated weights are gathered in the run's dtype: once, or at stage 3 with more than LIVE_PARAMETERS weights in each
    forward and backward pass.
    """
    if processes == 1:
        return Traffic(0, 0, 0)
    stage = run_stage(stage, config.deepspeed.offload, processes, dtype)
    parameters = sum(shape.numel() for shape in parameter_shapes(config.model).values())
    gradients, weights = 4 * parameters, dtype.itemsize * parameters
    if config.train.same_bits:
        # Halves of the gradient as in a ring, then the rest of it or the updated weights; all fp32.
        if stage == 0:
            return Traffic(gradients, 0, _gathered_directions(config, processes, dtype))
        return Traffic(0, gradients, gradients, _exchanged(config, processes))
    passes = 1 if parameters <= LIVE_PARAMETERS else 2 * micro_batches
    match stage:
        case 0:
            return Traffic(gradients, 0, _gathered_directions(config, processes, dtype))
        case 1:
            return Traffic(gradients, 0, weights, _exchanged(config, processes))
        case 2:
            return Traffic(micro_batches * gradients, 0, weights, _exchanged(config, processes))
        case _:
            return Traffic(0, micro_batches * gradients, passes * weights)


def _gathered_directions(config: Config, processes: int, dtype: torch.dtype) -> int:
    """Returns the bytes that Muon gathers at stage 0: each process orthogonalises a share of the matrices."""
    if config.optimizer.kind != "muon":
        return 0
    batches = shared_batches(matrix_shapes(config.model), processes, 1 if config.train.same_bits else None)
    return sum(
        # The last shares are filled up, so that all are alike.
        dtype.itemsize * math.prod(shape) * processes * math.ceil(count / processes)
        for shape, count in batches
    )


def _exchanged(config: Config, processes: int) -> int:
    """Returns the bytes that a process sends so that whole matrices meet at stages 1 and 2, and go back."""
    if config.optimizer.kind != "muon":
        return 0
    matrices = matrix_shapes(config.model)
    elements = sum(map(math.prod, matrices))
    moved = moved_elements(matrices, partition_length(elements, processes, same_bits=config.train.same_bits), processes)
    return 4 * max(sum(moved[rank]) + sum(of[rank] for of in moved) for rank in range(processes))


@dataclass(frozen=True)
class Link:
    """The slowest connection of a ring of processes."""

    name: str
    bytes_per_second: float


def slowest_link(hardware: Hardware, processes: int, node_gpus: int, network_gbs: float) -> Link:
    """Returns the machine's own link, or the network where the processes are on several machines and it is slower.

    network_gbs: of each process, in 10^9 bytes/s, one direction.
    """
    if processes <= node_gpus or hardware.link_gbs <= network_gbs:
        return Link(hardware.link, 1e9 * hardware.link_gbs)
    return Link("network", 1e9 * network_gbs)


def communication_seconds(traffic: Traffic, processes: int, link: Link) -> float:
    """Returns the time at the link's peak rate."""
    return traffic.sent(processes) / link.bytes_per_second
