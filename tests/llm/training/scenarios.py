"""Runs training scenarios one after another: python scenarios.py FOLDER, under deepspeed with any number of processes.

FOLDER/scenarios.json lists them, each with the fields of `Scenario`. A run's folder is its checkpoint.dir. Besides the
program's own files it gets

    sequences-STEP-RANK.json  {position: sha256 of the sequence's token ids} of the sequences that entered the model,
                              by a run that began at STEP
    held-STEP-WHEN.json       {name: sha256} of all weights and moments that the engine holds at STEP, and the
                              optimizer's update counts. WHEN: the run "began", "saved", is about to be "poisoned", has
                              "failed"
    failed-RANK.json          {"error": the message, "step": the step before} of a run that ended with an error
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist

from llm import device_rates
from llm.config_file import parse_config
from llm.data.object_store import read_data
from llm.data.shards import Batch
from llm.errors import UserError
from llm.model import tensor_files
from llm.model.hf import to_hf
from llm.training import engine
from llm.training.failure_detector import FailureDetector
from llm.training.optim import moments
from llm.training.setup import find_setup
from llm.training.train import Run
from llm.world import DTYPES, World


@dataclass(frozen=True)
class Scenario:
    """A training run, and what happens to it."""

    config: dict[str, Any]
    """As in a config file."""
    resume: str = "auto"
    """As --resume."""
    die_after: int | None = None
    """The run is killed after this step, without a save."""
    poison: dict[str, Any] | None = None
    """{"rank", "step", "what"}: on one rank, at one step, the "loss" is NaN, or the "gradient" of one parameter is inf.
    """
    full_disk: dict[str, Any] | None = None
    """{"rank", "step"}: one rank finds no space for the checkpoint of one step."""


class Died(BaseException):
    """Stands for a kill: nothing of the program catches it."""


class WatchedRun(Run):
    """A run with the scenario's accidents, which writes the files that the tests read."""

    def __init__(self, scenario: Scenario, world: World, detector: FailureDetector) -> None:
        config = parse_config(scenario.config, "scenario")
        setup = world.first_rank_only(lambda: find_setup(config, read_data(config.data), scenario.resume))
        super().__init__(setup, world, detector)
        self.scenario = scenario
        self.began = self.state.step
        self.sequences: dict[int, str] = {}
        self.write_held("began")
        save = self.saver.save

        def write_held_and_save(*arguments, **options):
            self.write_held("saved")
            save(*arguments, **options)

        self.saver.save = write_held_and_save
        if scenario.poison is not None and world.rank == scenario.poison["rank"]:
            self.add_poison(scenario.poison["what"])

    def step(self, batches: Iterator[Batch]) -> None:
        if self.state.step == self.scenario.die_after:
            raise Died
        if self.poisoned:
            self.write_held("poisoned")
        super().step(self.with_sequences_noted(batches))

    def with_sequences_noted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Passes the micro-batches of a step on, and notes their sequences by position."""
        plan, begin = self.plan, self.state.data.position
        for micro_batch, batch in zip(range(plan.accumulation), batches, strict=False):
            first = (micro_batch * self.world.size + self.world.rank) * plan.micro_batch
            for slot, sequence in enumerate(
                batch.input_ids[: max(plan.sequences_per_step - first, 0)], first
            ):  # the rest: empty
                self.sequences[begin + slot] = hashlib.sha256(sequence.numpy().tobytes()).hexdigest()
            yield batch

    @property
    def poisoned(self) -> bool:
        """Whether the step that is next or under way is the poisoned one."""
        return self.scenario.poison is not None and self.state.step + 1 == self.scenario.poison["step"]

    def add_poison(self, what: str) -> None:
        if what == "loss":
            self.engine.module.lm_head.register_forward_hook(
                lambda module, inputs, loss: loss * math.nan if self.poisoned else loss
            )
        else:
            self.engine.parameters["norm.weight"].register_hook(
                lambda gradient: gradient * math.inf if self.poisoned else gradient
            )

    def write_held(self, when: str) -> None:
        """Hashes weights and moments, read through the engine. Collective."""
        held: dict[str, object] = {"updates": self.update_counts()}
        for name in self.engine.parameters:
            kinds = moments(name, self.config.optimizer)
            values = {"weight": self.engine.read_parameter(name)}
            values |= {kind: self.engine.read_moment(name, kind) for kind in kinds}
            for kind, value in values.items():
                parts = to_hf(self.config.model, name, value).values()  # without the vocabulary's padding
                raw = b"".join(part.detach().contiguous().numpy().tobytes() for part in parts)
                held[f"{name} {kind}"] = hashlib.sha256(raw).hexdigest()
        if self.world.rank == 0:
            self.write(f"held-{self.state.step}-{when}.json", held)

    def update_counts(self) -> list[float]:
        """The different update counts in the optimizer's state, of every group on every rank. Collective."""
        mine = {float(state["step"]) for state in self.engine.optimizer.state.values() if "step" in state}
        all_ranks: list[set[float]] = [set()] * self.world.size
        dist.all_gather_object(all_ranks, mine)
        return sorted(set.union(*all_ranks))

    def write(self, name: str, tree: dict) -> None:
        (Path(self.config.checkpoint.dir) / name).write_text(json.dumps(tree))


@contextlib.contextmanager
def full_disk(world: World, rank: int, step: int) -> Iterator[None]:
    save_file = tensor_files.save_file

    def save_or_fail(tensors, file, metadata):
        if world.rank == rank and file.parent.name == f".step-{step:08d}.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, file, metadata)

    with mock.patch.object(tensor_files, "save_file", save_or_fail):
        yield


def play(scenario: Scenario, world: World, detector: FailureDetector) -> None:
    run = WatchedRun(scenario, world, detector)
    try:
        with full_disk(world, **scenario.full_disk) if scenario.full_disk else contextlib.nullcontext():
            run.loop()
    except Died:
        pass
    except UserError as error:
        if scenario.poison is None:
            raise
        run.write_held("failed")
        run.write(f"failed-{world.rank}.json", {"error": str(error), "step": run.state.step})
    run.write(f"sequences-{run.began}-{world.rank}.json", run.sequences)


def main() -> None:
    scenarios = [Scenario(**tree) for tree in json.loads((Path(sys.argv[-1]) / "scenarios.json").read_text())]
    # A processor without fp16 computes it all the same, though slowly; DeepSpeed would refuse it.
    accelerator = engine.import_deepspeed(torch.device("cpu")).get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    device_rates.measure_matmul_flops = lambda *arguments: 1e9  # losses are compared, not speeds
    world = engine.start(parse_config(scenarios[0].config, "first"))
    with FailureDetector(world, 10, Path(sys.argv[-1])) as detector:
        for scenario in scenarios:
            play(scenario, replace(world, dtype=DTYPES[scenario.config["train"]["precision"]]), detector)
        world.barrier()
        engine.stop()


if __name__ == "__main__":
    main()
