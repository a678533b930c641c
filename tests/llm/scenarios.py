"""Training runs that share one launch: python scenarios.py OUTPUT, under deepspeed with any number of processes.

OUTPUT/scenarios.json lists them: {"name": ..., "config": a config tree, "die_after": a step or null, "resume": as
--resume}.
Each run's folder is its checkpoint.dir; the tests read what it holds.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from llm import engine, metrics
from llm.config import parse_config
from llm.train import Run, _find_inputs


class Died(Exception):
    """Stands for a kill: nothing is saved."""


def run(scenario: dict, world: engine.World) -> None:
    config = parse_config(scenario["config"], scenario["name"])
    training = Run(world.first_rank_only(lambda: _find_inputs(config, scenario["resume"])), world)
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


def main() -> None:
    output = Path(sys.argv[-1])
    scenarios = json.loads((output / "scenarios.json").read_text())
    # A processor without fp16 computes it all the same, and slowly; DeepSpeed would refuse it.
    accelerator = engine.import_deepspeed(torch.device("cpu")).get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    metrics.measure_matmul_flops = lambda *arguments: 1e9  # losses are compared, not speeds
    world = engine.start(parse_config(scenarios[0]["config"], "first"))
    for scenario in scenarios:
        run(scenario, replace(world, dtype=engine.DTYPES[scenario["config"]["train"]["precision"]]))
    world.barrier()
    engine.stop()


if __name__ == "__main__":
    main()
