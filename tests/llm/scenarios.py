"""Training runs that share one launch: python scenarios.py OUTPUT, under deepspeed with any number of processes.

OUTPUT/scenarios.json lists them: {"name": ..., "config": a config tree, "die_after": a step or null, "resume": as
--resume}.
Each run's folder is its checkpoint.dir; the tests read what it holds. Beside what the program writes there are
    rows-STEP-RANK.json     {position: sha256 of the row's token ids}, as they entered the model from that step on
    carried-STEP-began.json, carried-STEP-saved.json    {name: sha256} of all that the engine holds at that step
"""

import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from llm import engine, metrics
from llm.config import parse_config
from llm.model import to_hf
from llm.optim import moments
from llm.peers import Peers
from llm.train import Run, _find_inputs


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


def write_carried(training: Run, when: str) -> None:
    """Weights, moments and update counts, read through the engine. Collective."""
    held = training.engine
    found = {"updates": str(held.read_optimizer_steps())}
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


def run(scenario: dict, world: engine.World, peers: Peers) -> None:
    config = parse_config(scenario["config"], scenario["name"])
    training = Run(world.first_rank_only(lambda: _find_inputs(config, scenario["resume"])), world, peers)
    began = training.state.step
    write_carried(training, "began")
    rows = record_rows(training)
    save = training.save

    def save_and_tell():
        write_carried(training, "saved")
        save()

    training.save = save_and_tell
    die_after = scenario["die_after"]
    if die_after is not None:
        step = training.step

        def step_or_die(*arguments):
            if training.state.step == die_after:
                raise Died
            return step(*arguments)

        training.step = step_or_die
    try:
        training.loop()
    except Died:
        assert die_after is not None
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
        run(scenario, replace(world, dtype=engine.DTYPES[scenario["config"]["train"]["precision"]]), peers)
    world.barrier()
    with peers:
        engine.stop()


if __name__ == "__main__":
    main()
