"""Training runs that share one launch: python scenarios.py OUTPUT, under deepspeed with any number of processes.

OUTPUT/scenarios.json lists them: {"name": ..., "config": a config tree, "resume": as --resume, "die_after": a step or
null, "poison": the arguments of `poison` or null, "full_disk": those of `full_disk` or null}.
Each run's folder is its checkpoint.dir; the tests read what it holds. Beside what the program writes there are
    rows-STEP-RANK.json     {position: sha256 of the row's token ids}, as they entered the model from that step on
    carried-STEP-WHEN.json  {name: sha256} of all that the engine holds at that step, and the optimizer's step counts:
                            as it "began", "saved", was about to be "poisoned", and "failed"
    failed-RANK.json        {"error": what ended the run, "step": the step it was at}
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist

from llm import metrics
from llm.config import parse_config
from llm.errors import UserError
from llm.model.hf import to_hf
from llm.training import engine, saving
from llm.training.failure_detector import Peers
from llm.training.optim import moments
from llm.training.setup import find_inputs
from llm.training.train import Run
from llm.world import DTYPES, World, stop


class Died(BaseException):
    """Stands for a kill: nothing is saved."""


def record_rows(training: Run) -> dict[int, str]:
    """Fills the dictionary it returns with the rows that this rank's model is given."""
    rows: dict[int, str] = {}
    backward, plan, world = training.engine.backward, training.plan, training.world
    calls = 0

    def recording(inputs, targets):
        nonlocal calls
        slot = (calls % plan.accumulation * world.size + world.rank) * plan.micro_batch
        for row in inputs["input_ids"][: max(plan.rows_per_step - slot, 0)]:  # what follows is empty
            rows[training.state.data.position + slot] = hashlib.sha256(row.numpy().tobytes()).hexdigest()
            slot += 1
        calls += 1
        return backward(inputs, targets)

    training.engine.backward = recording
    return rows


def update_counts(held: engine.Engine) -> list[float]:
    """The different step counts among the optimizer's states of every group on every rank. Collective."""
    mine = {float(state["step"]) for state in held.optimizer.state.values() if "step" in state}
    all_ranks: list[set[float]] = [set()] * held.world.size
    dist.all_gather_object(all_ranks, mine)
    return sorted(set.union(*all_ranks))


def write_carried(training: Run, when: str) -> None:
    """Weights, moments and update counts, read through the engine. Collective."""
    held = training.engine
    found: dict[str, object] = {"updates": update_counts(held)}
    for name in held.parameters:
        kinds = moments(name, training.config.optimizer)
        values = {"weight": held.read_parameter(name)} | {kind: held.read_moment(name, kind) for kind in kinds}
        for kind, value in values.items():
            parts = to_hf(training.config.model, name, value).values()  # without the vocabulary's padding
            raw = b"".join(part.detach().contiguous().numpy().tobytes() for part in parts)
            found[f"{name} {kind}"] = hashlib.sha256(raw).hexdigest()
    write(training, f"carried-{training.state.step}-{when}.json", found, by=0)


def write(training: Run, name: str, tree: dict, by: int) -> None:
    if training.world.rank == by:
        (Path(training.config.checkpoint.dir) / name).write_text(json.dumps(tree))


def poison(training: Run, rank: int, step: int, what: str) -> None:
    """At one step of one rank: the "loss" is NaN, or it is finite and the "gradient" of one parameter alone is not."""
    if training.world.rank != rank:
        return

    def times(value: torch.Tensor, factor: float) -> torch.Tensor:
        return value * factor if training.state.step + 1 == step else value

    if what == "loss":
        training.engine.module.lm_head.register_forward_hook(lambda module, inputs, loss: times(loss, math.nan))
    else:
        training.engine.parameters["norm.weight"].register_hook(lambda gradient: times(gradient, math.inf))


@contextlib.contextmanager
def full_disk(training: Run, rank: int, step: int) -> Iterator[None]:
    """One rank finds no space for the checkpoint of one step."""
    save_file = saving.save_file

    def save_or_fail(tensors, file, metadata):
        if training.world.rank == rank and file.parent.name == f".step-{step:08d}.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, file, metadata)

    with mock.patch.object(saving, "save_file", save_or_fail):
        yield


def run(scenario: dict, world: World, peers: Peers) -> None:
    config = parse_config(scenario["config"], scenario["name"])
    training = Run(world.first_rank_only(lambda: find_inputs(config, scenario["resume"])), world, peers)
    began = training.state.step
    write_carried(training, "began")
    rows = record_rows(training)
    save = training.save

    def save_and_tell(**options):
        write_carried(training, "saved")
        save(**options)

    training.save = save_and_tell
    step, die_after, poisoned, filled = training.step, scenario["die_after"], scenario["poison"], scenario["full_disk"]

    def watched_step(*arguments):
        if training.state.step == die_after:
            raise Died
        if poisoned is not None and training.state.step + 1 == poisoned["step"]:
            write_carried(training, "poisoned")
        return step(*arguments)

    training.step = watched_step
    if poisoned is not None:
        poison(training, **poisoned)
    try:
        with contextlib.nullcontext() if filled is None else full_disk(training, **filled):
            training.loop()
    except Died:
        pass
    except UserError as error:
        if poisoned is None:
            raise
        write_carried(training, "failed")
        failed = {"error": str(error), "step": training.state.step}
        write(training, f"failed-{world.rank}.json", failed, by=world.rank)
    write(training, f"rows-{began}-{world.rank}.json", rows, by=world.rank)


def main() -> None:
    output = Path(sys.argv[-1])
    scenarios = json.loads((output / "scenarios.json").read_text())
    # A processor without fp16 computes it all the same, and slowly; DeepSpeed would refuse it.
    accelerator = engine.import_deepspeed(torch.device("cpu")).get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    metrics.measure_matmul_flops = lambda *arguments: 1e9  # losses are compared, not speeds
    world = engine.start(parse_config(scenarios[0]["config"], "first"))
    peers = Peers(world)
    for scenario in scenarios:
        run(scenario, replace(world, dtype=DTYPES[scenario["config"]["train"]["precision"]]), peers)
    world.barrier()
    with peers:
        stop()


if __name__ == "__main__":
    main()
