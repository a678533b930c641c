"""Sets up a training run: completes the config from the data, and makes the engine and the batches."""

import contextlib
import json
import os
import shlex
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch

from llm.config import Config
from llm.data.mixture import Mixture
from llm.data.object_store import copy
from llm.data.shards import ORDER_VERSION, Batch, Loader, sequence_at
from llm.data.tokenizer import tokenizer_of
from llm.display import Display
from llm.errors import DamagedCheckpoint, UserError
from llm.model import checkpoint, checkpoint_path
from llm.model.checkpoint import DataState, TrainState
from llm.model.transformer import Transformer, initial_value
from llm.training import saving
from llm.training.batch_plan import Plan
from llm.training.engine import Engine
from llm.training.expected_loss import Expected, expect_from
from llm.training.monitor import check_installed
from llm.training.resolve import as_begun, resolve
from llm.training.rules import Followed
from llm.training.run_folder import finished_result, newest_or_none
from llm.world import World

PREFETCH = 4
"""Batches that the loader keeps ready. A batch stays valid until PREFETCH - 1 more have been taken."""
VALIDATION_SEED = 0
"""Runs of any seed validate on the same sequences, so that their losses compare."""


@dataclass(frozen=True)
class RunSetup:
    """The inputs of a run. Rank 0 finds them and sends them to the others, so that all have the same."""

    config: Config
    data: Mixture
    state: TrainState
    source: Path | None
    """The checkpoint that the run resumes from."""
    followed: list[Followed]
    """The settings that followed from rules; none where the run resumes, which keeps those of its first start."""
    expected: Expected | None
    """The loss at the end; None where it is unknown or run.json has it already."""
    finished: dict[str, Any] | None
    """The result if the run is already complete, so that starting it again costs nothing."""
    here: bool
    """Whether the source is in the run's own folder, so that the run and its metrics go on."""
    found: Path | None
    """The newest checkpoint of the run's folder."""


def copy_data(config: Config, data: Mixture, world: World) -> None:
    """Copies data of an object store to each node, by one process of it; returns when all nodes have them. Collective.

    Raises UserError on the rank that could not, ReportedByRank0 on the others.
    """
    if not any(source.url for source in data.sources):
        return
    stop = threading.Event()
    # Where a launcher hides the other GPUs every process has number 0; then the lock of the copy lets one do it.
    mine = world.local_rank == 0
    with Display("copying", 1, silent=world.rank > 0) as display, ThreadPoolExecutor(1) as thread:
        copying = thread.submit(copy, data.sources, config.data, display, stop) if mine else None
        try:
            # In a thread, because the others would wait in a collective for longer than its limit.
            world.wait_for_all(lambda: copying is None or (copying.done() and copying.result() is None))
        finally:
            stop.set()


def find_setup(config: Config, data: Mixture, resume: str) -> RunSetup:
    """Finds the checkpoint, and checks that data and checkpoint fit the config. resume: see `train`."""
    run_dir = Path(config.checkpoint.dir)
    found = newest_or_none(run_dir)
    source, here = _find_checkpoint(run_dir, resume)
    saved = None if source is None else checkpoint.read_state(source)
    if source is not None and saved is not None:
        config = as_begun(config, saved[1], source)
    config, followed = resolve(config, data, begun=saved is not None)
    _check_sample_prompts(config, data)
    check_installed(config.train.monitor)
    if source is None or saved is None:
        if config.train.init_from is not None:
            _check_init_from(config.train.init_from, config, data)
        state = TrainState(0, 0, data_state(config, data, position=0))
        # The law knows nothing of weights that have learned before.
        expected = expect_from(config, data) if config.train.init_from is None else None
        return RunSetup(config, data, state, None, followed, expected, None, False, found)
    state = _resumed_state(source, saved, config, data)
    # A complete run whose train.total_tokens or train.stop_patience was raised since has more to do.
    finished = finished_result(run_dir) if state.is_complete(config.train) else None
    moved = config.train.horizon != saved[1].train.horizon and config.train.init_from is None
    expected = expect_from(config, data) if moved and finished is None else None
    return RunSetup(config, data, state, source, followed, expected, finished, here, found)


def open_loader(
    config: Config,
    data: Mixture,
    plan: Plan,
    world: World,
    split: Literal["train", "val"],
    *,
    position: int = 0,
    end: int | None = None,
) -> Loader:
    """Opens this rank's sequences of a split: for training in the order of the run, for validation each once."""
    training = split == "train"
    return Loader(
        data,
        split,
        seq_len=plan.seq_len,
        seed=config.train.seed if training else VALIDATION_SEED,
        global_batch=plan.sequences_per_step if training else plan.micro_batch * world.size,
        micro_batch=plan.micro_batch,
        rank=world.rank,
        world_size=world.size,
        position=position,
        # Validation may score a part of the sequences; shuffled, it has sequences of every source of a mixture.
        shuffle=training or len(data.sources) > 1,
        end=end,
        threads=config.data.loader_threads,
        prefetch=PREFETCH,
        pin_memory=world.device.type == "cuda",
    )


def _check_sample_prompts(config: Config, data: Mixture) -> None:
    tokenizer, longest = tokenizer_of(data.sources[0]), config.model.max_seq_len
    for prompt in config.train.sample_prompts:
        # BOS comes first, and one position must remain for a new token.
        tokens = 1 + len(tokenizer.encode(prompt))
        if tokens >= longest:
            raise UserError(
                f"train.sample_prompts: {prompt[:20]!r}... is {tokens} tokens long and the model holds {longest} "
                "(model.max_seq_len): shorten it"
            )


def build_engine(config: Config, world: World, plan: Plan, source: Path | None) -> Engine:
    """Makes the engine with the state of checkpoint `source`; None: weights of train.init_from, or initial ones."""

    def build() -> Transformer:
        checkpointing = config.train.activation_checkpointing
        return Transformer(config.model, activation_checkpointing=checkpointing, compute_dtype=world.dtype)

    engine = Engine(build, config, world, plan.micro_batch, plan.accumulation)
    if source is not None:
        saving.restore(engine, source, config)
        return engine
    if config.train.init_from is not None:
        weights = checkpoint.read_weights(checkpoint_path.locate(config.train.init_from), config.model)
    else:
        seed = config.train.seed
        # Each value depends only on model, name and seed, so it is the same at every ZeRO stage and on every rank.
        weights = ((name, initial_value(config.model, name, seed)) for name in engine.parameters)
    for name, value in weights:
        engine.write_parameter(name, value)
    return engine


def data_state(config: Config, data: Mixture, position: int) -> DataState:
    """The state of the data of a run that has read all positions below this one."""
    seq_len = config.data.seq_len
    assert seq_len is not None
    read = data.hash_at(position, seq_len, config.train.batch // seq_len)
    return DataState(read, seq_len, config.train.seed, ORDER_VERSION, position)


def validation_sources(data: Mixture, seq_len: int, end: int) -> torch.Tensor:
    """Returns the number of the source of the validation sequence at each position below `end`, int64 [end]."""
    ends = list(accumulate(source.sequences("val", seq_len) for source in data.sources))
    # The order of the loader, of all sources as if they were one.
    return torch.tensor([bisect_right(ends, sequence_at(VALIDATION_SEED, 0, ends[-1], at)) for at in range(end)])


def _resumed_state(source: Path, read: tuple[TrainState, Config], config: Config, data: Mixture) -> TrainState:
    """Returns the checkpoint's state. Raises UserError where it was trained with another model or other data."""
    state, saved = read
    # The checkpoint's own position, because a position may not differ: the run goes on from it.
    now = asdict(data_state(config, data, state.data.position)) | config.model.model_dump()
    then = asdict(state.data) | saved.model.model_dump()
    now["optimizer.kind"], then["optimizer.kind"] = config.optimizer.kind, saved.optimizer.kind
    now["tokenizer"], then["tokenizer"] = data.sources[0].tokenizer_sha256, checkpoint.tokenizer_sha256(source)
    changed = [f"{key}: {then[key]} -> {now[key]}" for key in now if now[key] != then.get(key)]
    if changed:
        staged = (config.data.stages or saved.data.stages) and now["dataset_hash"] != then["dataset_hash"]
        kept = (
            f"; data.stages may only change from token {state.tokens:,} on, and no stage before it may move, as with "
            "another train.global_batch_tokens"
        )
        raise UserError(
            f"{source} cannot go on with another model, other data or another optimizer ({', '.join(changed)}"
            f"{kept if staged else ''}); use another checkpoint.dir, or train.init_from to start from its weights"
        )
    return state


def _find_checkpoint(run_dir: Path, resume: str) -> tuple[Path | None, bool]:
    """Returns the checkpoint for --resume, and whether it is in run_dir, so that the run goes on there.

    Any checkpoint of run_dir will do. Raises UserError if it is another one and run_dir holds a run.
    """
    if resume == "auto":
        source = checkpoint_path.newest(run_dir)
        return source, source is not None
    source = None if resume == "never" else checkpoint_path.locate(resume)
    own = [path for path in checkpoint_path.saved(run_dir) if path.exists()]
    if source is not None and any(os.path.samefile(source, path) for path in own):
        return source, True
    # Checkpoints of the other run would mix with those of this one.
    if checkpoint_path.saved(run_dir) or (run_dir / "latest").exists():
        raise UserError(f"--resume {resume}: {run_dir} already holds a run; set another checkpoint.dir or delete it")
    return source, False


@contextlib.contextmanager
def naming_a_good_checkpoint(run_dir: Path) -> Iterator[None]:
    """Adds to an error about a damaged checkpoint how the run can go on."""
    try:
        yield
    except DamagedCheckpoint as error:
        # Another folder's is train.init_from's; of several ranks, one reads all checkpoints.
        ours = error.what.startswith((f"{run_dir}/", f"{run_dir.resolve()}/"))
        if not ours or os.environ.get("RANK", "0") != "0":
            raise
        good = (path for path in reversed(checkpoint_path.saved(run_dir)) if not checkpoint.verify(path))
        if (path := next(good, None)) is None:
            raise UserError(f"{error.what}; {run_dir} holds no good checkpoint") from None
        raise UserError(
            f"{error.what}; the newest good checkpoint is {path}: to go on from it, add --resume "
            f"{shlex.quote(str(path))} to the command"
        ) from None


def _check_init_from(init_from: str, config: Config, data: Mixture) -> None:
    """Raises UserError if the weights belong to another model or to another tokenizer."""
    source = checkpoint_path.locate(init_from)
    if checkpoint.read_tokenizer(source).sha256 != data.sources[0].tokenizer_sha256:
        raise UserError(f"train.init_from {init_from}: was trained with another tokenizer than that of {data.name}")
    theirs, ours = checkpoint.read_state(source)[1].model.model_dump(), config.model.model_dump()
    differences = [
        f"model.{key} {json.dumps(theirs[key])}, here {json.dumps(value)}"
        for key, value in ours.items()
        # These lengthen a model's context, and a run learns with them. A scaling that the weights have must stay.
        if key != "max_seq_len" and theirs[key] != value and not (key == "rope_scaling" and theirs[key] is None)
    ]
    if differences:
        raise UserError(f"train.init_from {init_from}: is of another model ({'; '.join(differences)}); set its values")


def on_device(loader: Loader, device: torch.device) -> Iterator[Batch]:
    """Moves batches to the device. On a GPU the copies from pinned memory overlap with the computation.

    The loader reuses a batch's memory PREFETCH - 1 batches later, so its copy must have ended by then.
    """
    if device.type != "cuda":
        yield from loader
        return
    copying = torch.cuda.Stream(device)
    copies: deque[torch.cuda.Event] = deque()
    for batch in loader:
        with torch.cuda.stream(copying):
            moved = Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))
            copies.append(copying.record_event())
        computing = torch.cuda.current_stream(device)
        # The computing stream waits, not the host.
        computing.wait_event(copies[-1])
        for tensor in moved:
            tensor.record_stream(computing)  # otherwise a later copy could get this memory while it is still read
        if len(copies) == PREFETCH - 1:
            copies.popleft().synchronize()
        yield moved
