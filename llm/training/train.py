"""Training: the plan, the loop, the step, validation, and the run's folder."""

import contextlib
import gc
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llm import metrics
from llm.config import Config
from llm.data.shards import Batch
from llm.data.tokenizer import load_tokenizer
from llm.display import Display
from llm.errors import UserError
from llm.inference.decode import greedy
from llm.model import checkpoint
from llm.model.checkpoint import TrainState
from llm.model.transformer import check_backend
from llm.training import saving
from llm.training.batch_plan import make_plan
from llm.training.engine import Engine, Update, start
from llm.training.failure_detector import Peers
from llm.training.meter import Meter
from llm.training.monitor import Monitor
from llm.training.optim import learning_rate
from llm.training.run_folder import RunFolder, mark_failed
from llm.training.run_log import RunLog
from llm.training.setup import Inputs, build_engine, find_inputs, on_device, open_loader
from llm.training.stopping import OUT_OF_TIME, StopRequest
from llm.world import World, stop

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
    inputs = world.first_rank_only(lambda: find_inputs(config, resume))
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
        self.saver = saving.Saver(config, self.tokenizer, self.display.line, world)
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
        also = {} if scale is None else {"loss_scale": scale, "overflow_steps": self.state.overflows}
        return also | ({"z_loss": float(self.world.sum(self.engine.z_sum))} if self.config.train.z_loss else {})

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


def optimizer_step(
    engine: Engine, meter: Meter, batches: Iterator[Batch], accumulation: int, targets: int, lr: float
) -> tuple[torch.Tensor, Update]:
    """Forward and backward of `accumulation` micro-batches, then the update: (this rank's part of the loss, update)."""
    loss = torch.zeros((), device=engine.world.device)
    engine.z_sum.zero_()
    for micro in range(accumulation):
        with meter.waiting():
            batch = next(batches)
        loss += engine.backward(batch._asdict(), targets) / max(targets, 1)
        update = engine.step(lr if micro == accumulation - 1 else None)
    assert update is not None
    return loss, update


@contextlib.contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Spares collections inside the loop the objects that set-up made, which all stay."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
