"""Training: the plan, the loop, the step, validation, and the run's folder."""

import contextlib
import gc
import json
import math
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from llm import checkpoint, metrics
from llm.checkpoint import DataState, TrainState
from llm.config import Config, DataConfig
from llm.display import Display
from llm.engine import Engine, World, start, stop
from llm.errors import UserError
from llm.mixture import PERIOD, Mixture, mix
from llm.model import Transformer, check_backend, initial_value
from llm.optim import learning_rate
from llm.peers import Peers
from llm.plan import Plan, make_plan
from llm.run_folder import RunFolder, finished_result, mark_failed
from llm.shards import ORDER_VERSION, Batch, Loader, read_manifest
from llm.stopping import OUT_OF_TIME, StopRequest
from llm.tokenizer import load_tokenizer

PREFETCH = 4
"""Batches the loader keeps ready; a batch stays valid until PREFETCH - 1 more were asked for."""
SAVE_SECONDS = 20
"""How long a save that is being written is waited for when another rank has ended."""


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
    try:
        with Peers(world) as peers, peers.attributing():
            result = inputs.finished or (make_run or Run)(inputs, world, peers).loop()
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory is full; lower train.micro_batch or set train.activation_checkpointing=true "
            f"({str(error).splitlines()[0]})"
        ) from None
    stop()
    return result


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
    data = _read_data(config.data)
    config = _resolve(config, data)
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
        self.train_rows = self._loader("train", position=self.state.data.position)
        self.engine = _build_engine(config, world, self.plan, self.source)
        self.meter = _Meter(self.plan.tokens_per_step)
        self.display = Display("training", config.train.total_tokens, self.state.tokens, silent=world.rank > 0)
        self.saver = checkpoint.Saver(config, self.tokenizer, self.display.line, world)
        self.folder: RunFolder | None = None  # rank 0's
        self.stop = StopRequest(world, Path(config.checkpoint.dir), config.train.max_minutes)
        world.first_rank_only(self._open_folder)
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
            _frozen_garbage(),
            self.peers.attributing(),
        ):
            self._report_plan()
            batches = _on_device(self.train_rows, self.world.device)
            if self.state.step == 0:
                self.validate()
            done, stopped = self.complete, ""
            while not done:
                loss, lr, norm = self.step(batches)
                stopped = "" if self.complete else self.stop.agreed()
                done = self.complete or bool(stopped)
                if done or self.state.step % config.log_every_steps == 0:
                    self._report_step(loss, lr, norm)
                hurried = stopped not in ("", OUT_OF_TIME)  # whoever sends a signal soon sends SIGKILL
                if not hurried and (done or self.state.step % config.eval_every_steps == 0):
                    self.validate()
                if done or self.state.step % self.config.checkpoint.every_steps == 0:
                    self.save()
            self.saver.finish(self.world)
            self._report_sources("done", self.state.data.position)
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

    def step(self, batches: Iterator[Batch]) -> tuple[torch.Tensor, float, float]:
        """One optimizer step over the global batch, in micro-batches.

        Returns this rank's summed NLL divided by the step's targets (fp32 scalar on the device; the sum over the
        ranks is the loss), the learning rate, and the gradient's norm before clipping.
        """
        plan, position, scale = self.plan, self.state.data.position, self.engine.loss_scale
        # Known before the first micro-batch, so that each can be weighted by the labels of the whole step.
        targets = self.train_rows.targets(position, plan.rows_per_step)
        lr = learning_rate(self.state.tokens, self.config)
        loss = torch.zeros((), device=self.world.device)
        for micro in range(plan.accumulation):
            with self.meter.waiting():
                batch = next(batches)
            loss += self.engine.backward(batch._asdict(), targets) / max(targets, 1)
            norm = self.engine.step(lr if micro == plan.accumulation - 1 else None)
        skipped, overflows = self.state.skipped, self.state.overflows
        if not math.isfinite(norm):
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
        return loss, lr, norm

    def _on_nonfinite(self, samples: str, skipped: int) -> None:
        """The optimizer has left the step out: weights and moments are those of the step before. Ends the run or not.

        Raises UserError where the run ends, after saving those.
        """
        what = f"step {self.state.step + 1}: the loss or its gradient is not finite ({samples})"
        if self.config.train.on_nonfinite == "skip" and skipped <= self.config.train.max_skips:
            self.display.line(f"{what}; left out, {skipped} of at most {self.config.train.max_skips}")
            return
        if self.state.step > 0 and self.state.step % self.config.checkpoint.every_steps:
            self.save()
        self.saver.finish(self.world)
        limit = "" if skipped == 1 else f", as {skipped - 1} steps before it were"
        raise UserError(
            f"{what}{limit}; step {self.state.step} is saved: go on from it with a lower optimizer.lr, with "
            "train.precision=fp32, or leave such steps out with train.on_nonfinite=skip"
        )

    def validate(self) -> None:
        """Scores the validation rows on all ranks, each with the same number of batches, and logs the result."""
        rows, limit = self.data.rows("val", self.plan.seq_len), self.config.train.eval_tokens
        end = rows if limit is None else min(rows, math.ceil(limit / self.plan.seq_len))
        token_bytes = torch.from_numpy(self.tokenizer.token_bytes()).to(self.world.device)
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        self.engine.module.eval()
        with torch.no_grad(), self._loader("val", position=0, end=end) as loader:
            for batch in _on_device(loader, self.world.device):
                if self.stop.agreed() not in ("", OUT_OF_TIME):
                    return
                losses = self.engine.module(**batch._asdict(), reduction="none")
                sums += metrics.score_sums(losses, batch.labels, token_bytes, self.tokenizer.eos_id)
        self.engine.module.train()
        score = metrics.score_from_sums(self.world.sum(sums))
        line = {
            "step": self.state.step,
            "tokens": self.state.tokens,
            "val_loss": score.nll_per_token,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
        }
        self.state = replace(self.state, val_loss=score.nll_per_token)
        self._write_metrics(line)
        self.display.line(
            f"step {self.state.step:>6}  validation: loss {score.nll_per_token:.4f}"
            f"  perplexity {score.perplexity:.2f}  bits/byte {score.bits_per_byte:.4f}  ({score.tokens:,} targets)"
        )
        self.meter.skip()

    def save(self) -> None:
        self.state = replace(self.state, loss_scaler=self.engine.read_loss_scaler())
        self.saver.save(self.engine, self.state)
        self.meter.skip()

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
        self.folder = RunFolder(self.config, self.state.step if here else None, hardware)

    def _loss_scale(self) -> dict[str, float]:
        scale = self.engine.loss_scale
        return {} if scale is None else {"loss_scale": scale, "overflow_steps": self.state.overflows}

    def _write_metrics(self, line: dict[str, Any]) -> None:
        if self.folder is not None:
            self.folder.write_metrics(line)

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

    def _loader(self, split: Literal["train", "val"], *, position: int, end: int | None = None) -> Loader:
        training = split == "train"
        return Loader(
            self.data,
            split,
            seq_len=self.plan.seq_len,
            seed=self.config.train.seed if training else 0,
            global_batch=self.plan.rows_per_step if training else self.plan.micro_batch * self.world.size,
            micro_batch=self.plan.micro_batch,
            rank=self.world.rank,
            world_size=self.world.size,
            position=position,
            # So that a part of the validation rows is a part of every source's.
            shuffle=training or len(self.data.sources) > 1,
            end=end,
            threads=self.config.data.loader_threads,
            prefetch=PREFETCH,
            io=self.config.data.io,
            pin_memory=self.world.device.type == "cuda",
        )

    def _report_plan(self) -> None:
        """What will be computed, on what, and for how long."""
        config, world = self.config, self.world
        train_tokens = self.train_rows.rows * self.plan.seq_len
        unused = self.data.unused_tokens("train", self.plan.seq_len)
        precision = world.precision + ("" if world.dtype == torch.float32 else " with fp32 masters")
        self.display.line(
            f"data        {train_tokens:,} tokens in {self.train_rows.rows:,} rows of {self.plan.seq_len} from "
            f"{self.data.name}; {unused:,} tokens after the shards' last rows are unused"
        )
        self._report_sources("planned", math.ceil(config.train.total_tokens / self.plan.seq_len))
        mixture = len(self.data.sources) > 1  # each source has epochs of its own
        for line in self.plan.describe(config.train.total_tokens, None if mixture else train_tokens):
            self.display.line(line)
        offloaded = ", optimizer on the host" if config.deepspeed.offload == "cpu" else ""
        self.display.line(f"precision   {precision}, ZeRO {config.deepspeed.zero_stage}{offloaded}")
        if self.source is not None:
            self.display.line(f"resumed     at step {self.state.step}, {self.state.tokens:,} tokens")
            for change in _changed_settings(checkpoint.read_state(self.source)[1], config):
                self.display.line(f"changed     {change}")

    def _report_sources(self, when: str, positions: int) -> None:
        """Each source's share of a mixture, and how often a run of so many rows goes through it."""
        if len(self.data.sources) == 1:
            return
        epochs = self.data.epochs(positions, self.plan.seq_len)
        for source, count, times in zip(self.data.sources, self.data.counts, epochs, strict=True):
            self.display.line(
                f"source      {count}/{PERIOD} ({100 * count / PERIOD:.2f} %) of the rows from {source.path}: "
                f"{times:.2f} epochs {when}"
            )

    def _report_step(self, loss: torch.Tensor, lr: float, norm: float) -> None:
        window = self.meter.window()
        line = {
            "step": self.state.step,
            "tokens": self.state.tokens,
            "loss": float(self.world.sum(loss)),
            "lr": lr,
            "grad_norm": norm,
            "skipped_steps": self.state.skipped,
            **self._loss_scale(),
            **window,
            "mfu": self.plan.mfu(window["tokens_per_second"]),
            "matmul_fraction": self.plan.matmul_fraction(window["tokens_per_second"]),
            "memory": metrics.peak_memory_bytes(self.world.device),
        }
        self._write_metrics(line)
        text = (
            f"step {line['step']:>6}  loss {line['loss']:.4f}  lr {lr:.2e}  grad norm {norm:.2f}  "
            f"{line['tokens_per_second']:,.0f} tokens/s  {line['step_ms']:,.0f} ms"
            f"  data {line['data_wait_ms']:.1f} ms  MFU {_percent(line['mfu'])}"
            f"  {_percent(line['matmul_fraction'])} of matmul"
        )
        self.display.line(text)
        self.display.update(self.state.tokens, f"loss {line['loss']:.3f}")


class _Meter:
    """Wall-clock time of training steps; validation and saving do not count."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._last = time.perf_counter()
        self._steps, self._seconds = 0, 0.0
        self._waits = [0.0]  # for the data, of each step

    def skip(self) -> None:
        """What happened since the last step is not training."""
        self._last = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waits[-1] += time.perf_counter() - start

    def count_step(self) -> None:
        """Called after the gradient's norm has come to the host, so a GPU has finished the step but for its update."""
        now = time.perf_counter()
        self._seconds += now - self._last
        self._last = now
        self._steps += 1
        self._waits.append(0.0)

    def window(self) -> dict[str, float]:
        """Means over the steps since the last call, and the longest wait for data of one."""
        steps, seconds, waits = self._steps, self._seconds, self._waits[:-1]
        self._steps, self._seconds, self._waits = 0, 0.0, self._waits[-1:]
        return {
            "tokens_per_second": steps * self._tokens_per_step / seconds,
            "step_ms": 1e3 * seconds / steps,
            "data_wait_ms": 1e3 * sum(waits) / steps,
            "data_wait_ms_max": 1e3 * max(waits),
        }


def _read_data(config: DataConfig) -> Mixture:
    if config.sources is None:
        assert config.path is not None
        return mix([read_manifest(config.path)], [1.0])
    return mix([read_manifest(source.path) for source in config.sources], [source.weight for source in config.sources])


def _resolve(config: Config, data: Mixture) -> Config:
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


def _build_engine(config: Config, world: World, plan: Plan, source: Path | None) -> Engine:
    def build() -> Transformer:
        checkpointing = config.train.activation_checkpointing
        model = Transformer(config.model, activation_checkpointing=checkpointing, compute_dtype=world.dtype)
        if config.train.compile:
            for layer in model.layers:
                layer.compile()
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


def _changed_settings(before: Config, now: Config) -> Iterator[str]:
    """What a resumed run does otherwise than the one that saved its checkpoint."""
    for section, keys in now.model_dump().items():
        old = getattr(before, section).model_dump()
        for key, value in keys.items():
            if old[key] != value:
                yield f"{section}.{key}: {json.dumps(old[key])} -> {json.dumps(value)}"


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


def _percent(fraction: float | None) -> str:
    return "unknown" if fraction is None else f"{100 * fraction:.1f} %"


def _on_device(loader: Loader, device: torch.device) -> Iterator[Batch]:
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
