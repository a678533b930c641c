"""Scores a run's model on tasks of lm-evaluation-harness (train.eval_tasks), as `llm eval --tasks` scores a checkpoint.

The harness runs transformers' model of the same weights, in the run's precision. While it scores, every rank has a
whole copy of it, also at ZeRO 3, and the ranks share the questions.
"""

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llm import device_rates
from llm.config import Config
from llm.data.tokenizer import Tokenizer
from llm.errors import UserError
from llm.model.hf import to_hf
from llm.model.hf_folder import write_hf_files
from llm.training.engine import Engine
from llm.world import World, oom_as_user_error

if TYPE_CHECKING:
    from llm.inference.eval_tasks import LoadedTasks


def load_tasks(config: Config, world: World) -> "LoadedTasks | None":
    """Loads the tasks of train.eval_tasks, if there are any, before the first step. Collective.

    Raises UserError where the harness is not installed, or for a task that is unknown or cannot be loaded.
    """
    train = config.train
    if not train.eval_tasks:
        return None

    def load() -> "LoadedTasks":
        from llm.inference.eval_tasks import LoadedTasks

        return LoadedTasks(train.eval_tasks, train.eval_tasks_path, train.eval_tasks_limit)

    loaded: list[LoadedTasks] = []
    # Rank 0 first: it alone reports errors, and downloads what the others find in a cache.
    world.first_rank_only(lambda: loaded.append(load()))
    return loaded[0] if loaded else load()


def score_tasks(
    tasks: "LoadedTasks", engine: Engine, config: Config, tokenizer: Tokenizer, stopping: Callable[[], bool]
) -> dict[str, float] | None:
    """Scores the engine's weights. Collective.

    Returns {"task/metric": value}, on ranks other than 0 {}; None: they were cut short.

    stopping: whether the run is asked to stop; collective. It is asked before each task, and by a process that is alone
    also before each batch.

    Raises UserError if a task fails or the memory is full.
    """
    from llm.inference.eval_tasks import BATCH_SIZE, CheckpointLM, CutShort

    world = engine.world

    def check() -> None:
        if world.size == 1 and stopping():
            raise CutShort

    def score(folder: Path) -> dict[str, float] | None:
        write_hf_files(folder, config.model, tokenizer)
        model = CheckpointLM(folder, world, batch_size=BATCH_SIZE, model=_copy(engine, config, folder))
        model.check = check
        return tasks.scores(model, stopping)

    try:
        with tempfile.TemporaryDirectory() as folder, oom_as_user_error("leave out train.eval_tasks"):
            return score(Path(folder))
    finally:
        gc.collect()
        device_rates.free_cached_memory()


@torch.no_grad()
def _copy(engine: Engine, config: Config, folder: Path) -> Any:
    """Returns transformers' model with the engine's weights, in the run's precision on its device. Collective."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with engine.world.device:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=engine.world.dtype)
    parameters = dict(model.named_parameters())
    for name in engine.parameters:
        for key, value in to_hf(config.model, name, engine.read_parameter(name)).items():
            parameters.pop(key).copy_(value)
    if parameters:
        raise UserError(f"transformers' model has parameters that the run's has not: {', '.join(parameters)}")
    return model
