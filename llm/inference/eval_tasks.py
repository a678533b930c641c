"""`llm eval --tasks`: a checkpoint under lm-evaluation-harness (the optional extra `eval`).

The harness asks for log-likelihoods and continuations of texts; `Adapter` answers with our model, tokenizer and
windows. A text begins with BOS, as documents did in training; what is scored is the text, without BOS and EOS.
"""

import contextlib
import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.data.tokenizer import Tokenizer
from llm.display import Display
from llm.errors import UserError
from llm.inference.decode import Sampling, generate_batch
from llm.inference.evaluate import batches, stack
from llm.model.checkpoint import load_model, locate
from llm.model.transformer import Transformer
from llm.world import DTYPES, World, join, oom_as_user_error, stop

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError as error:
    raise UserError(f"--tasks needs lm-evaluation-harness ({error}): pip install 'lm-eval>=0.4.13'") from None

MAX_NEW_TOKENS = 256  # the harness's own default

Request = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation) as text, which nothing here reads, and the ids of both."""


def evaluate_tasks(
    ckpt: str | os.PathLike[str],
    tasks: Sequence[str],
    *,
    tok: str | os.PathLike[str] | None = None,
    include_path: str | os.PathLike[str] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    precision: str = "fp32",
) -> dict[str, Any]:
    """Runs tasks of the harness, in every process that a launcher started.

    Args:
        tasks: names, as `lm_eval ls tasks` lists them or as files in `include_path` (a folder of task .yaml) give them.
        num_fewshot: examples before each question; None: what each task says.
        limit: documents a task; None: all.

    Returns results, {task: {"metric,filter": value}}, versions, n-shot and n-samples as the harness gives them; empty
    on ranks other than 0. Raises UserError for a task that is unknown or that the harness cannot load, and for a
    batch that a GPU's memory does not hold.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: must be at least 1")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: must be at least 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"--num_fewshot {num_fewshot}: must be at least 0")
    world = join(device, DTYPES[precision])
    manager = _task_manager(tasks, include_path)
    folder = world.first_rank_only(lambda: locate(ckpt))
    model, tokenizer = load_model(folder, world.device, world.dtype, tok=tok)
    with contextlib.redirect_stdout(sys.stderr), oom_as_user_error("lower --batch_size"):
        found = simple_evaluate(
            Adapter(model, tokenizer, batch_size=batch_size, world=world),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    stop()
    return {key: found[key] for key in ("results", "versions", "n-shot", "n-samples")} if found else {}


def print_table(result: dict[str, Any]) -> None:
    """Shows what `evaluate_tasks` returned, as the harness does."""
    print(make_table(result))


class _TaskManager(TaskManager):
    """Says in one line which task cannot be loaded, and why."""

    def load(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().load(*arguments, **options)
        except Exception as error:  # of any kind: tasks bring code of their own
            raise UserError(f"--tasks: cannot be loaded: {type(error).__name__}: {error}") from error


def _task_manager(tasks: Sequence[str], include_path: str | os.PathLike[str] | None) -> _TaskManager:
    """Of the user's own folder alone where that will do: indexing the thousands that come along takes a while."""
    if include_path is not None and not os.path.isdir(include_path):
        raise UserError(f"--include_path {include_path}: no such folder")
    manager = _TaskManager(include_path=include_path, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = _TaskManager(include_path=include_path)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=1)
            hint = f"the nearest is {near[0]}; " if near else ""
            raise UserError(f"--tasks {task}: no such task; {hint}`lm_eval ls tasks` lists them")
    return manager


class Adapter(TemplateLM):
    """Our model as the harness sees it."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, batch_size: int = 8, world: World | None = None
    ) -> None:
        super().__init__()
        self._model = model
        self._tokenizer = tokenizer
        self._device = model.embed_tokens.weight.device
        self._world = world or World(0, 0, 1, self._device, torch.float32)
        self._rank, self._world_size = self._world.rank, self._world.size
        self.batch_size = batch_size
        self.max_length = model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        bos = [] if add_special_tokens is False else [self._tokenizer.bos_id]
        return bos + self._tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text after BOS; long ones in windows of the model's context."""
        windows: list[Request] = []
        counts = []
        for request in requests:
            ids = self._tokenizer.encode(request.args[0])
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            pairs = [make_disjoint_window(window) for window in rolling]
            windows += [(("", ""), context, continuation) for context, continuation in pairs]
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is what greedy decoding gives."""
        sums = torch.zeros(len(requests), dtype=torch.float64, device=self._device)
        greedy = torch.ones(len(requests), dtype=torch.bool, device=self._device)
        windows = []
        shortened = 0
        for number, (_text, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens does not fit into the model's {self.max_length} "
                    "(model.max_seq_len); this task needs a model with a longer context"
                )
            inputs = (context + continuation)[:-1]
            shortened += len(inputs) > self.max_length
            windows.append((number, inputs[-self.max_length :], continuation))
        with self._display("scoring", len(requests), shortened) as display:
            for batch in batches(windows, self.max_length, self.batch_size):
                ids, labels, doc_start, numbers = stack(batch, self._device)
                valid = labels >= 0
                log_probability = self._model(ids, doc_start=doc_start)[valid].float().log_softmax(-1)
                targets, owners = labels[valid], numbers[valid]
                sums.index_add_(0, owners, log_probability.gather(1, targets[:, None])[:, 0].double())
                greedy[owners[log_probability.argmax(-1) != targets]] = False
                display.update(batch[-1].documents[-1], "scoring")
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to a stop string, the end of the document, or as many tokens as asked for."""
        prompts, stops = [], []
        alike: dict[tuple[int, Sampling], list[int]] = {}  # requests that can be generated side by side
        shortened = 0
        for number, request in enumerate(requests):
            context, asked = request.args
            until, new_tokens, sampling = self._understand(asked)
            room = self.max_length - new_tokens
            ids = self.tok_encode(context)
            shortened += len(ids) > room
            prompts.append(ids[-room:])
            stops.append(until)
            alike.setdefault((new_tokens, sampling), []).append(number)
        texts = [""] * len(requests)
        done = 0
        with self._display("generating", len(requests), shortened) as display:
            for (new_tokens, sampling), numbers in alike.items():
                numbers.sort(key=lambda number: len(prompts[number]))
                for begin in range(0, len(numbers), self.batch_size):
                    batch = numbers[begin : begin + self.batch_size]
                    continued = self._continue(
                        [prompts[number] for number in batch], [stops[number] for number in batch], new_tokens, sampling
                    )
                    for number, text in zip(batch, continued, strict=True):
                        texts[number] = text
                    done += len(batch)
                    display.update(done, "generating")
        return texts

    def _understand(self, asked: dict[str, Any]) -> tuple[list[str], int, Sampling]:
        """(stop strings, new tokens at most, sampling) of a task's generation_kwargs."""
        options = dict(normalize_gen_kwargs(asked, MAX_NEW_TOKENS))
        until = [text for text in options.pop("until") if text]
        new_tokens = options.pop("max_gen_toks")
        if not options.pop("do_sample"):
            options["temperature"] = 0.0
        if unknown := options.keys() - {known.name for known in fields(Sampling)}:
            raise UserError(
                f"the task generates with {', '.join(sorted(unknown))}, which this program does not offer; take it out "
                "of the task's generation_kwargs"
            )
        if new_tokens >= self.max_length:
            raise UserError(
                f"the task asks for {new_tokens} new tokens and the model holds {self.max_length} "
                "(model.max_seq_len); give the task a smaller max_gen_toks"
            )
        return until, new_tokens, Sampling(**options)

    def _continue(
        self, prompts: list[list[int]], stops: list[list[str]], new_tokens: int, sampling: Sampling
    ) -> list[str]:
        tokens: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        finished: set[int] = set()
        for token in generate_batch(
            self._model,
            prompts,
            max_new_tokens=new_tokens,
            sampling=sampling,
            eos_id=self._tokenizer.eos_id,
            finished=finished,
        ):
            tokens[token.row].append(token.id)
            text = self._tokenizer.decode(tokens[token.row])
            ends = [text.find(stop) for stop in stops[token.row] if stop in text]
            texts[token.row] = text[: min(ends, default=len(text))]
            if ends:
                finished.add(token.row)
        return texts

    def _display(self, title: str, total: int, shortened: int) -> Display:
        display = Display(title, total, silent=self.rank > 0)
        if shortened:
            display.line(
                f"{shortened:,} of {total:,} contexts are too long for the model's {self.max_length} tokens and lose "
                "their beginning"
            )
        return display

    # What the harness needs of other processes.

    def all_gather(self, tensor: Tensor) -> Tensor:
        if self._world.size == 1:
            return tensor
        parts = [torch.zeros_like(tensor) for _ in range(self._world.size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        if self._world.size == 1:
            return [obj]
        gathered: list[Any] | None = [None] * self._world.size if self.rank == dst else None
        dist.gather_object(obj, gathered, dst=dst)
        return gathered

    def barrier(self) -> None:
        self._world.barrier()
