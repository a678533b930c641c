"""What a training run begins from: the config filled in from the data, the checkpoint, the engine and the batches."""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from llm.config import Config, DataConfig
from llm.data.manifest import read_manifest
from llm.data.mixture import Mixture, mix
from llm.data.shards import ORDER_VERSION, Batch, Loader
from llm.data.tokenizer import load_tokenizer
from llm.errors import UserError
from llm.model import checkpoint
from llm.model.checkpoint import DataState, TrainState
from llm.model.transformer import Transformer, initial_value
from llm.training import saving
from llm.training.batch_plan import Plan
from llm.training.engine import Engine
from llm.training.monitor import check_installed
from llm.training.run_folder import finished_result
from llm.world import World

PREFETCH = 4
"""Batches the loader keeps ready; a batch stays valid until PREFETCH - 1 more were asked for."""


@dataclass(frozen=True)
class Inputs:
    """What a run begins from. Rank 0 finds it and tells the others, so that all begin from the same."""

    config: Config
    data: Mixture
    state: TrainState
    source: Path | None
    """The checkpoint to go on from."""
    finished: dict[str, Any] | None
    """The result of a run that is complete already, so that asking for it again costs nothing."""


def find_inputs(config: Config, resume: str) -> Inputs:
    data = read_data(config.data)
    config = resolve(config, data)
    _check_sample_prompts(config, data)
    check_installed(config.train.monitor)
    run_dir = Path(config.checkpoint.dir)
    source = _find_checkpoint(run_dir, resume)
    if source is None:
        if config.train.init_from is not None:
            _check_init_from(config.train.init_from, config, data)
        return Inputs(config, data, TrainState(0, 0, _data_state(config, data, position=0)), None, None)
    state = _resumed_state(source, config, data)
    finished = finished_result(run_dir) if state.tokens >= config.train.total_tokens else None
    return Inputs(config, data, state, source, finished)


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
    """This rank's rows of a split: of training in the run's order, of validation each once."""
    training = split == "train"
    return Loader(
        data,
        split,
        seq_len=plan.seq_len,
        seed=config.train.seed if training else 0,
        global_batch=plan.rows_per_step if training else plan.micro_batch * world.size,
        micro_batch=plan.micro_batch,
        rank=world.rank,
        world_size=world.size,
        position=position,
        # So that a part of the validation rows is a part of every source's.
        shuffle=training or len(data.sources) > 1,
        end=end,
        threads=config.data.loader_threads,
        prefetch=PREFETCH,
        pin_memory=world.device.type == "cuda",
    )


def read_data(config: DataConfig) -> Mixture:
    if config.sources is None:
        assert config.path is not None
        return mix([read_manifest(config.path)], [1.0])
    return mix([read_manifest(source.path) for source in config.sources], [source.weight for source in config.sources])


def resolve(config: Config, data: Mixture) -> Config:
    """Fills in what the data decide: the vocabulary and the row length."""
    stated, vocab_size = config.model.vocab_size, data.sources[0].vocab_size
    if stated is not None and stated != vocab_size:
        raise UserError(
            f"model.vocab_size {stated} does not match the {vocab_size} of {data.name}; "
            "leave it null to take the data's"
        )
    prepared = {source.seq_len for source in data.sources}
    if config.data.seq_len is None and len(prepared) > 1:
        raise UserError(
            f"data.sources were prepared for rows of {sorted(prepared)} tokens; set data.seq_len to one length"
        )
    seq_len = config.data.seq_len or prepared.pop()
    if seq_len > config.model.max_seq_len:
        raise UserError(
            f"{data.name} was prepared for rows of {seq_len} tokens, above model.max_seq_len "
            f"{config.model.max_seq_len}; set data.seq_len={config.model.max_seq_len} or raise model.max_seq_len"
        )
    return with_shape(config, vocab_size, seq_len)


def with_shape(config: Config, vocab_size: int, seq_len: int) -> Config:
    """The config for data of this vocabulary and row length."""
    if config.train.global_batch_tokens % seq_len:
        nearest = max(1, round(config.train.global_batch_tokens / seq_len)) * seq_len
        raise UserError(
            f"train.global_batch_tokens {config.train.global_batch_tokens} is not a multiple of the row length "
            f"{seq_len}; the nearest is {nearest}"
        )
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"vocab_size": vocab_size}),
            "data": config.data.model_copy(update={"seq_len": seq_len}),
        }
    )


def _check_sample_prompts(config: Config, data: Mixture) -> None:
    tokenizer, longest = load_tokenizer(data.sources[0].path), config.model.max_seq_len
    for prompt in config.train.sample_prompts:
        tokens = 1 + len(tokenizer.encode(prompt))
        if tokens >= longest:
            raise UserError(
                f"train.sample_prompts: {prompt[:20]!r}... is {tokens} tokens long and the model holds {longest} "
                "(model.max_seq_len): shorten it"
            )


def build_engine(config: Config, world: World, plan: Plan, source: Path | None) -> Engine:
    def build() -> Transformer:
        checkpointing = config.train.activation_checkpointing
        model = Transformer(config.model, activation_checkpointing=checkpointing, compute_dtype=world.dtype)
        if config.train.compile:
            model.compile_blocks(fullgraph=config.deepspeed.zero_stage < 3)
        return model

    engine = Engine(build, config, world, plan.micro_batch, plan.accumulation)
    if source is not None:
        saving.restore(engine, source, config)
        return engine
    if config.train.init_from is not None:
        weights = checkpoint.read_weights(checkpoint.locate(config.train.init_from), config.model)
    else:
        seed = config.train.seed
        weights = ((name, initial_value(config.model, name, seed)) for name in engine.parameters)
    for name, value in weights:
        engine.write_parameter(name, value)
    return engine


def _data_state(config: Config, data: Mixture, position: int) -> DataState:
    assert config.data.seq_len is not None
    return DataState(data.dataset_hash, config.data.seq_len, config.train.seed, ORDER_VERSION, position)


def _resumed_state(source: Path, config: Config, data: Mixture) -> TrainState:
    """The checkpoint's state. Raises UserError where the model or the data are not those it was trained with."""
    state, saved = checkpoint.read_state(source)
    now = asdict(_data_state(config, data, state.data.position)) | config.model.model_dump()
    then = asdict(state.data) | saved.model.model_dump()
    now["optimizer.kind"], then["optimizer.kind"] = config.optimizer.kind, saved.optimizer.kind
    changed = [f"{key}: {then[key]} -> {now[key]}" for key in now if now[key] != then.get(key)]
    if changed:
        raise UserError(
            f"{source} cannot go on with another model, other data or another optimizer ({', '.join(changed)}); "
            "use another checkpoint.dir, or train.init_from to start from its weights"
        )
    return state


def _find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that --resume means. Raises UserError where a run's later checkpoints would be in the way."""
    newest = checkpoint.locate(run_dir) if checkpoint.saved(run_dir) else None
    if resume == "auto" or (newest is None and resume == "never"):
        return newest
    source = checkpoint.locate(resume) if resume != "never" else None
    if newest is not None and source != newest:
        raise UserError(f"--resume {resume}: {run_dir} already holds a run; set another checkpoint.dir or delete it")
    return source


def _check_init_from(init_from: str, config: Config, data: Mixture) -> None:
    """Weights mean something in the model and for the tokens they were trained with only."""
    source = checkpoint.locate(init_from)
    if load_tokenizer(source / "tokenizer.model").sha256 != data.sources[0].tokenizer_sha256:
        raise UserError(f"train.init_from {init_from}: was trained with another tokenizer than that of {data.name}")
    theirs, ours = checkpoint.read_state(source)[1].model.model_dump(), config.model.model_dump()
    differences = [
        f"model.{key} {json.dumps(theirs[key])}, here {json.dumps(value)}"
        for key, value in ours.items()
        if key != "max_seq_len" and theirs[key] != value
    ]
    if differences:
        raise UserError(f"train.init_from {init_from}: is of another model ({'; '.join(differences)}); set its values")


def on_device(loader: Loader, device: torch.device) -> Iterator[Batch]:
    """Moves batches to the device; on a GPU the copies from pinned memory run beside the computation.

    The loader reuses a batch's memory PREFETCH - 1 batches later, so its copy must have ended by then.
    """
    if device.type != "cuda":
        yield from loader
        return
    beside = torch.cuda.Stream(device)
    copies: deque[torch.cuda.Event] = deque()
    for batch in loader:
        with torch.cuda.stream(beside):
            moved = Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))
            copies.append(beside.record_event())
        computing = torch.cuda.current_stream(device)
        computing.wait_event(copies[-1])
        for tensor in moved:
            tensor.record_stream(computing)  # else its memory could be given to a later copy while it is still read
        if len(copies) == PREFETCH - 1:
            copies.popleft().synchronize()
        yield moved
