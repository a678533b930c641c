"""Training: the plan, the loop, the step, validation, and the run's folder."""

import contextlib
import gc
import json
import math
import platform
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from llm import checkpoint, metrics
from llm.checkpoint import DataState, TrainState
from llm.config import Config, DataConfig
from llm.decode import greedy
from llm.display import Display
from llm.engine import Engine, Update, World, start, stop
from llm.errors import UserError
from llm.meter import Meter
from llm.mixture import Mixture, mix
from llm.model import Transformer, check_backend, initial_value
from llm.monitor import Monitor, check_installed
from llm.optim import learning_rate
from llm.peers import Peers
from llm.plan import Plan, make_plan
from llm.run_folder import RunFolder, finished_result, mark_failed
from llm.run_log import RunLog
from llm.shards import ORDER_VERSION, Batch, Loader, read_manifest
from llm.stopping import OUT_OF_TIME, StopRequest
from llm.tokenizer import load_tokenizer

PREFETCH = 4
"""Batches the loader keeps ready; a batch stays valid until PREFETCH - 1 more were asked for."""
SAVE_SECONDS = 20
"""How long a save that is being written is waited for when another rank has ended."""

SAMPLE_TOKENS = 32


def train(
    config: Config, resume: str = "auto", make_run: "Callable[[Inputs, World, Peers], Run] | None" = None
) -> dict[str, Any]:
    """Trains to train.total_tokens, or until train.max_minutes; returns the result that `llm train --json` prints.

    resume: "auto" goes on from the newest checkpoint in checkpoint.dir if there is one; "never" begins anew and refuses
    a folder that holds a run; any other value is the checkpoint to go on from.
    make_run: a subclass of Run that does something otherwise.

    Raises UserError for anything in config, data or checkpoint that the user can put right.
    """
    world = start(config)
    check_backend(world.device)
    inputs = world.first_rank_only(lambda: _find_inputs(config, resume))
    with full_memory_explained(), Peers(world) as peers, peers.attributing():
        result = inputs.finished or (make_run or Run)(inputs, world, peers).loop()
    stop()
    return result


@contextlib.contextmanager
def full_memory_explained() -> Iterator[None]:
    """Makes a GPU's full memory a UserError that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory is full; lower train.micro_batch or set train.activation_checkpointing=selective or full "
            f"({str(error).splitlines()[0]})"
        ) from None


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


def _find_inputs(config: Config, resume: str) -> Inputs:
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


class Run:
    """One process's part of a training run: everything `loop` needs, set up in this order."""

    def __init__(self, inputs: Inputs, world: World, peers: Peers) -> None:
        config, data = inputs.config, inputs.data
        self.config, self.data, self.state, self.world = config, data, inputs.state, world
        self.source = inputs.source
        self.plan = make_plan(config, world.size, world.device, dtype=world.dtype)
        self.tokenizer = load_tokenizer(data.sources[0].path / "tokenizer.model")
        self.train_rows = open_loader(config, data, self.plan, world, "train", position=self.state.data.position)
        self.engine = build_engine(config, world, self.plan, self.source)
        self.meter = Meter(self.plan.tokens_per_step, world.device)
        self.display = Display("training", config.train.total_tokens, self.state.tokens, silent=world.rank > 0)
        self.saver = checkpoint.Saver(config, self.tokenizer, self.display.line, world)
        self.folder: RunFolder | None = None  # rank 0's
        self.stop = StopRequest(world, Path(config.checkpoint.dir), config.train.max_minutes)
        world.first_rank_only(self._open_folder)
        kinds = config.train.monitor if world.rank == 0 else []
        monitors = [Monitor(kind, Path(config.checkpoint.dir), self.display.line) for kind in kinds]
        self.log = RunLog(self.plan, world, self.display, self.meter, self.folder, monitors)
        self.peers = peers
        peers.on_lost = self._on_lost

    def loop(self) -> dict[str, Any]:
        """Trains to the end; returns the result on rank 0."""
        config = self.config.train
        with (
            self.folder or contextlib.nullcontext(),
            self.stop.listening(),
            self.display,
            self.train_rows,
            contextlib.closing(self.saver),  # within the folder, which a save needs to its end
            self.engine.metered(self.meter.phase),
            _frozen_garbage(),
            self.peers.attributing(),
        ):
            resumed = None if self.source is None else checkpoint.read_state(self.source)
            self.log.show_plan(self.config, self.data, resumed)
            self.meter.start()
            batches = on_device(self.train_rows, self.world.device)
            if self.state.step == 0:
                self.validate()
            done, stopped = self.complete, ""
            while not done:
                loss, lr, norm = self.step(batches)
                self.log.add_step(self.state, loss, lr, norm)
                stopped = "" if self.complete else self.stop.agreed()
                done = self.complete or bool(stopped)
                if done or self.state.step % config.log_every_steps == 0:
                    self.log.write_steps(self._loss_scale())
                hurried = stopped not in ("", OUT_OF_TIME)  # whoever sends a signal soon sends SIGKILL
                if not hurried and (done or self.state.step % config.eval_every_steps == 0):
                    self.validate()
                if done or self.state.step % self.config.checkpoint.every_steps == 0:
                    self.save()
            self.saver.finish(self.world)
            self.log.show_sources(self.data, "done", self.state.data.position)
            result = self._result()
            if self.folder is not None:
                self.folder.finish(result, stopped)
            if stopped:
                self.display.line(f"stopped at step {self.state.step}: {stopped}; start again to go on")
        self.world.barrier()
        return result

    @property
    def complete(self) -> bool:
        """Whether all is trained that the config asks for."""
        return self.state.tokens >= self.config.train.total_tokens

    def step(self, batches: Iterator[Batch]) -> tuple[torch.Tensor, float, torch.Tensor]:
        """One optimizer step over the global batch, in micro-batches.

        Returns this rank's summed NLL divided by the step's targets (fp32 scalar on the device; the sum over the
        ranks is the loss), the learning rate, and the gradient's norm before clipping (fp32 scalar on the device).
        """
        plan, position, scale = self.plan, self.state.data.position, self.engine.loss_scale
        # Known before the first micro-batch, so that each can be weighted by the labels of the whole step.
        targets = self.train_rows.targets(position, plan.rows_per_step)
        lr = learning_rate(self.state.tokens, self.config)
        loss, update = optimizer_step(self.engine, self.meter, batches, plan.accumulation, targets, lr)
        skipped, overflows = self.state.skipped, self.state.overflows
        if not update.applied:
            # Loss scaling finds its scale by overflowing now and then; only below 1 is it the gradient itself.
            if scale is not None and scale > 1 and math.isfinite(self.world.sum(loss.clone())):
                overflows += 1
                self.display.line(
                    f"step {self.state.step + 1}: the gradient overflows at loss scale {scale:.0f}; left out, "
                    f"the next one's is {self.engine.loss_scale:.0f}"
                )
            else:
                skipped += 1
                self._on_nonfinite(f"positions {position} to {position + plan.rows_per_step - 1}", skipped)
        self.state = TrainState(
            self.state.step + 1,
            self.state.tokens + plan.tokens_per_step,
            replace(self.state.data, position=position + plan.rows_per_step),
            skipped,
            overflows=overflows,
        )
        self.meter.count_step()
        return loss, lr, update.norm

    def _on_nonfinite(self, samples: str, skipped: int) -> None:
        """The optimizer has left the step out: weights and moments are those of the step before. Ends the run or not.

        Raises UserError where the run ends, after saving those.
        """
        what = f"step {self.state.step + 1}: the loss or its gradient is not finite ({samples})"
        if self.config.train.on_nonfinite == "skip" and skipped <= self.config.train.max_skips:
            self.display.line(f"{what}; left out, {skipped} of at most {self.config.train.max_skips}")
            return
        self.saver.close()  # it may be writing just that step
        if self.state.step > 0 and not self.world.first_rank_only(lambda: self.saver.has(self.state.step)):
            self.save(delete=False)  # the step before may be where it went wrong
        what += "" if skipped == 1 else f", as {skipped - 1} steps before it were"
        try:
            self.saver.finish(self.world)
        except UserError as error:
            raise UserError(f"{what}; {error}") from None
        again = (
            f"step {self.state.step} is saved: go on from it" if self.state.step > 0 else "it is the first: begin again"
        )
        raise UserError(
            f"{what}; {again} with a lower optimizer.lr, with train.precision=fp32, or leave such steps out with "
            "train.on_nonfinite=skip"
        )

    def validate(self) -> None:
        """Scores the validation rows on all ranks, each with the same number of batches, and logs the result."""
        with self.meter.beside("validation"):
            score = self._score()
            samples = [] if score is None else self._sample()
        if score is not None:
            self.state = replace(self.state, val_loss=score.nll_per_token)
            self.log.write_validation(self.state, score, samples)

    def _score(self) -> metrics.Score | None:
        """None where a signal came between."""
        rows, limit = self.data.rows("val", self.plan.seq_len), self.config.train.eval_tokens
        end = rows if limit is None else min(rows, math.ceil(limit / self.plan.seq_len))
        token_bytes = torch.from_numpy(self.tokenizer.token_bytes()).to(self.world.device)
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        self.engine.module.eval()
        with torch.no_grad(), open_loader(self.config, self.data, self.plan, self.world, "val", end=end) as loader:
            for batch in on_device(loader, self.world.device):
                if self.stop.agreed() not in ("", OUT_OF_TIME):
                    return None
                losses = self.engine.module(**batch._asdict(), reduction="none")
                sums += metrics.score_sums(losses, batch.labels, token_bytes, self.tokenizer.eos_id)
        self.engine.module.train()
        return metrics.score_from_sums(self.world.sum(sums))

    def _sample(self) -> list[dict[str, str]]:
        """What the model writes after train.sample_prompts: greedy, up to SAMPLE_TOKENS tokens, to the document's end.

        Every rank computes the same; a pass over all prompts for each token.
        """
        prompts = self.config.train.sample_prompts
        if not prompts:
            return []
        tokenizer = self.tokenizer
        ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
        room = self.config.model.max_seq_len - max(map(len, ids))
        self.engine.module.eval()
        written = greedy(self.engine.module, ids, min(SAMPLE_TOKENS, room))
        self.engine.module.train()
        ends = [row.index(tokenizer.eos_id) if tokenizer.eos_id in row else len(row) for row in written]
        texts = [tokenizer.decode(row[:end]) for row, end in zip(written, ends, strict=True)]
        return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]

    def save(self, *, delete: bool = True) -> None:
        self.state = replace(self.state, loss_scaler=self.engine.read_loss_scaler())
        with self.meter.beside("save"):
            self.saver.save(self.engine, self.state, delete=delete)

    def _on_lost(self, rank: int, what: str) -> None:
        if self.folder is not None:
            self.folder.fail(what)
            self.saver.close(SAVE_SECONDS)
        elif rank == 0 and self.world.rank == 1:
            mark_failed(Path(self.config.checkpoint.dir), what)

    def _open_folder(self) -> None:
        here = self.source is not None and self.source.parent == Path(self.config.checkpoint.dir).resolve()
        device = self.world.device
        hardware = {
            "world_size": self.world.size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "precision": self.world.precision,
        }
        self.folder = RunFolder(self.config, self.state.step if here else None, hardware, self.display.line)

    def _loss_scale(self) -> dict[str, float]:
        scale = self.engine.loss_scale
        return {} if scale is None else {"loss_scale": scale, "overflow_steps": self.state.overflows}

    def _result(self) -> dict[str, Any]:
        """What `llm train --json` prints, from metrics.jsonl, which outlives a resume; empty on other ranks than 0."""
        if self.folder is None:
            return {}
        lines = self.folder.read_metrics()
        trained: dict[str, Any] = next((line for line in reversed(lines) if "loss" in line), {})
        evaluated: dict[str, Any] = next((line for line in reversed(lines) if "val_loss" in line), {})
        return {
            "step": self.state.step,
            "tokens": self.state.tokens,
            "train_loss": trained.get("loss"),
            "val_loss": evaluated.get("val_loss"),
            "bits_per_byte": evaluated.get("bits_per_byte"),
            "tokens_per_second": trained.get("tokens_per_second"),
            "mfu": trained.get("mfu"),
            "checkpoint": str(checkpoint.locate(self.folder.path)),
        }


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
        io=config.data.io,
        pin_memory=world.device.type == "cuda",
    )


def optimizer_step(
    engine: Engine, meter: Meter, batches: Iterator[Batch], accumulation: int, targets: int, lr: float
) -> tuple[torch.Tensor, Update]:
    """Forward and backward of `accumulation` micro-batches, then the update: (this rank's part of the loss, update)."""
    loss = torch.zeros((), device=engine.world.device)
    for micro in range(accumulation):
        with meter.waiting():
            batch = next(batches)
        loss += engine.backward(batch._asdict(), targets) / max(targets, 1)
        update = engine.step(lr if micro == accumulation - 1 else None)
    assert update is not None
    return loss, update


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
        checkpoint.restore(engine, source, config)
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


@contextlib.contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Spares collections inside the loop the objects that set-up made, which all stay."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
