"""`llm eval --tasks`: runs tasks of lm-evaluation-harness on a checkpoint (the optional extra `eval`).

A checkpoint is a Hugging Face model folder, so the harness's Hugging Face backend can run it. `CheckpointLM` adds what
that backend lacks: a BOS before every text, as in training, and the processes of any launcher.
"""

import contextlib
import difflib
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm.data.tokenizer import load_tokenizer
from llm.errors import UserError, visible
from llm.inference.evaluate import BATCH_SIZE
from llm.model.checkpoint import check_files, read_tokenizer
from llm.model.checkpoint_path import locate
from llm.model.hf_tokenizer import FILES
from llm.rendezvous import leave_group
from llm.world import DTYPES, World, join, oom_as_user_error

# Set before huggingface_hub is imported, because it reads this on import.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
try:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import Group, Task
    from tokenizers.processors import TemplateProcessing
    from tqdm.std import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
except ImportError as error:
    raise UserError(
        f"tasks need lm-evaluation-harness ({error}): pip install 'lm-eval>=0.4.13' transformers accelerate"
    ) from None


def evaluate_tasks(
    ckpt: str | os.PathLike[str],
    tasks: Sequence[str],
    *,
    tok: str | os.PathLike[str] | None = None,
    include_path: str | os.PathLike[str] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    device: str = "auto",
    precision: str = "fp32",
    show: bool = False,
) -> dict[str, Any]:
    """Runs tasks of the harness, in all processes that a launcher started.

    Args:
        tasks: names of tasks, from `lm_eval ls tasks` or from the task .yaml files in the folder `include_path`; one
            string may hold several names, separated by commas.
        num_fewshot: examples before each question; None: as many as each task defines.
        limit: documents per task; None: all.
        show: print the results as a table.

    Returns results, {task: {"metric,filter": value}}, versions, n-shot and n-samples of the harness; empty on ranks
    other than 0. Raises UserError for a task that is unknown or fails, and for a batch that does not fit into a GPU.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    world = join(device, DTYPES[precision])
    names = [name for text in tasks for name in text.split(",") if name]
    manager = find_tasks(names, include_path, "--tasks", "--include_path")
    # Only rank 0 checks, so that an error is printed once.
    folder = world.first_rank_only(lambda: _check_folder(ckpt, tok))
    # The harness prints while it runs, but stdout is for the result.
    with contextlib.redirect_stdout(sys.stderr), oom_as_user_error("lower --batch_size"):
        model = CheckpointLM(folder, world, batch_size=batch_size)
        named = f"--tasks {','.join(names)}"
        found = _run(model, names, named, num_fewshot=num_fewshot, limit=limit, task_manager=manager)
    leave_group()
    # simple_evaluate returns nothing on ranks other than 0.
    if found is None:
        return {}
    if show:
        _print_table(found)
    # The harness also returns its configuration and environment, which are long and not results.
    return {key: found[key] for key in ("results", "versions", "n-shot", "n-samples")}


def _run(model: "CheckpointLM", tasks: Sequence[Any], named: str, **options: Any) -> dict[str, Any] | None:
    """Runs tasks; returns what the harness returns: None on ranks other than 0.

    named: the option and the tasks, for errors.
    """
    failure = ""
    try:
        found: dict[str, Any] | None = simple_evaluate(model, tasks=list(tasks), log_samples=False, **options)
        return found
    # These already have a message, or oom_as_user_error adds it.
    except (UserError, torch.OutOfMemoryError, CutShort):
        raise
    except Exception as error:  # of any kind, because tasks download data and contain code of their own
        failure = f"{named}: {type(error).__name__}: {error}"
    gc.collect()  # otherwise the harness's progress bar ends later and overwrites the error
    raise UserError(failure)


class CutShort(Exception):
    """What `CheckpointLM.check` raises to end an evaluation."""


class LoadedTasks:
    """Tasks of train.eval_tasks with their documents, which are read once, so that no later failure ends a run.

    Raises UserError for a task that is unknown or cannot be loaded.
    """

    def __init__(self, names: Sequence[str], include_path: str | None, limit: int | None) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._manager = find_tasks(names, include_path, "train.eval_tasks", "train.eval_tasks_path")
            self._limit = limit
            self._tasks: dict[str, list[Task | Group]] = {}
            for name in names:
                try:
                    found = self._manager.load([name])
                except Exception as error:  # of any kind, as above
                    raise UserError(f"train.eval_tasks {name}: {type(error).__name__}: {error}") from None
                # A group has its tasks; a tag is only a list of them.
                group = found["groups"].get(name)
                self._tasks[name] = list(found["tasks"].values()) if group is None else [group]

    def scores(self, model: "CheckpointLM", stop: Callable[[], bool]) -> dict[str, float] | None:
        """Runs each task in turn. Returns {"task/metric": value}; None: it was cut short; {} on ranks other than 0.

        There are no standard errors, because the harness computes some in processes that it forks from this one.

        stop: whether to end before the next task. Collective.
        """
        values: dict[str, float] = {}
        with contextlib.redirect_stdout(sys.stderr), _without_bars():
            for name, tasks in self._tasks.items():
                if stop():
                    return None
                try:
                    found = _run(
                        model,
                        tasks,
                        f"train.eval_tasks {name}",
                        limit=self._limit,
                        task_manager=self._manager,
                        bootstrap_iters=0,
                    )
                except CutShort:
                    return None
                for task, metrics in ({} if found is None else found["results"]).items():
                    for key, value in metrics.items():
                        metric, comma, kind = key.partition(",")
                        if comma and isinstance(value, int | float):
                            values[f"{task}/{metric if kind == 'none' else key}"] = float(value)
        return values


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Shows no bars of the harness inside the block. It cannot be told so: not all of them have a switch."""
    create = tqdm.__init__

    def create_disabled(bar: tqdm, *arguments: Any, **options: Any) -> None:
        create(bar, *arguments, **{**options, "disable": True})

    tqdm.__init__ = create_disabled
    try:
        yield
    finally:
        tqdm.__init__ = create


def _print_table(found: dict[str, Any]) -> None:
    """Prints the scores of each task in 80 columns, the arrow to the better side; the harness's own table is wider."""
    table = Table(box=None, pad_edge=False)
    table.add_column("task", overflow="fold", ratio=1)
    table.add_column("shots", justify="right")
    table.add_column("metric", overflow="fold", max_width=24)
    for name in ("value", "stderr"):
        table.add_column(name, justify="right", no_wrap=True)
    for task, scores in found["results"].items():
        for key, value in scores.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            better = {True: "↑", False: "↓"}.get(found.get("higher_is_better", {}).get(task, {}).get(metric), " ")
            named = visible(metric if kind == "none" else f"{metric} ({kind})")
            cells = (value, scores.get(f"{metric}_stderr,{kind}"))
            shown = (f"{cell:.4f}" if isinstance(cell, int | float) else "" for cell in cells)
            # A Text, because rich would read brackets in a str as markup.
            table.add_row(Text(visible(task)), str(found["n-shot"].get(task, "")), Text(f"{better} {named}"), *shown)
    Console(highlight=False, width=80).print(table)


def _check_folder(ckpt: str | os.PathLike[str], tok: str | os.PathLike[str] | None) -> Path:
    """Returns the checkpoint's folder. Raises UserError if the harness cannot use its tokenizer."""
    folder = locate(ckpt)
    tokenizer = read_tokenizer(folder)
    check_files(folder, ("config.json", *FILES))  # the harness reads these
    if tok is not None and load_tokenizer(tok).sha256 != tokenizer.sha256:
        raise UserError(f"{tok}: not the tokenizer that {ckpt} was trained with; leave --tok out to use its own")
    if not tokenizer.for_transformers:
        raise UserError(f"{tokenizer.path}: transformers cannot read it; --tasks cannot use it, --input can")
    return folder


def find_tasks(
    tasks: Sequence[str], include_path: str | os.PathLike[str] | None, named: str, path_named: str
) -> TaskManager:
    """Returns the harness's manager of these tasks. Raises UserError for an unknown one.

    named, path_named: the names of the options that the tasks and include_path come from, for errors.
    """
    if include_path is not None and not os.path.isdir(include_path):
        raise UserError(f"{path_named} {include_path}: no such folder")
    # Indexing the thousands of tasks of the harness takes many seconds, so the user's own folder comes first.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=1)
            hint = f"the nearest is {near[0]}; " if near else ""
            raise UserError(f"{named} {task}: no such task; {hint}`lm_eval ls tasks` lists them")
    return manager


class CheckpointLM(HFLM):
    """The harness's Hugging Face backend on a checkpoint folder.

    model: of transformers, with the weights; None: those of the folder.
    """

    check: Callable[[], None] = staticmethod(lambda: None)
    """Called before each batch of scores; it may raise CutShort."""

    def __init__(self, folder: Path, world: World, *, batch_size: int, model: Any = None) -> None:
        # The backend could load the folder itself, but would then expect `accelerate launch` to start the ranks. With
        # a model as its argument it warns that it does neither.
        logger = logging.getLogger("lm_eval.models.huggingface")
        level = logger.level
        logger.setLevel(logging.ERROR)
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=world.dtype)
        model.to(world.device)
        ours = load_tokenizer(folder)
        # For a Qwen2, AutoTokenizer takes a class of its own, whatever the folder names, and would make other ids. For
        # a Llama it takes the folder's.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=LlamaConfig(), split_special_tokens=not ours.special_in_text
        )
        # The tokenizer itself may put nothing, or another token, before a text.
        bos_id = ours.bos_id
        tokenizer.bos_token = None  # otherwise a batch whose first text begins with "<s>" gets no BOS
        bos = tokenizer.convert_ids_to_tokens(bos_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, bos_id)]
        )
        super().__init__(
            model,
            tokenizer=tokenizer,
            add_bos_token=True,
            prefix_token_id=bos_id,
            batch_size=batch_size,
            logits_cache=False,  # it makes lm-eval 0.4.13 score wrong tokens if two requests differ only in their split
        )
        logger.setLevel(level)
        # After super().__init__, which sets rank 0 of 1 if it gets a model.
        self._world, self._rank, self._world_size = world, world.rank, world.size

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """BOS comes first unless add_special_tokens is False, even if a text begins with the characters "<s>"."""
        with_bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        ids: list[int] = super().tok_encode(string, with_bos, **options)
        return ids

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The harness adds a BOS to each text here; a BOS from the tokenizer would be scored as part of the text."""
        self.add_bos_token = False
        sums: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        self.add_bos_token = True
        return sums

    def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **options: Any) -> list[tuple[float, bool]]:
        # The harness only asserts this, without a message for the user.
        for _, _, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens does not fit into the model's {self.max_length} "
                    "(model.max_seq_len); this task needs a model with a longer context"
                )
        scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *arguments, **options)
        return scores

    def _model_call(self, *arguments: Any, **options: Any) -> torch.Tensor:
        self.check()
        logits: torch.Tensor = super()._model_call(*arguments, **options)
        return logits

    # Collectives over the ranks, which share the requests.

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world_size == 1:
            return tensor
        parts = [torch.zeros_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def barrier(self) -> None:
        self._world.barrier()
