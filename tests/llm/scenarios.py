"""Training runs that share one launch: python scenarios.py OUTPUT, under deepspeed with any number of processes.

OUTPUT/scenarios.json lists them: {"name": ..., "config": a config tree, "die_after": a step or null, "resume": as
--resume}.
Each run's folder is its checkpoint.dir; the tests read what it holds.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from llm import engine
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
    world = engine.start(parse_config(scenarios[0]["config"], "first"))
    for scenario in scenarios:
        world = engine.World(
            world.rank, world.local_rank, world.size, world.device, scenario["config"]["train"]["precision"] == "bf16"
        )
        run(scenario, world)
    world.barrier()
    engine.stop()


if __name__ == "__main__":
    main()
