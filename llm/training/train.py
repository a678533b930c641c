"""Training: the loop, the step, validation, and what a run saves and returns."""

import contextlib
import gc
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from llm import device_rates
from llm.config import Config
from llm.data.manifest import MANIFEST_NAME
from llm.data.shards import Batch
from llm.data.tokenizer import tokenizer_of
from llm.display import Display
from llm.errors import UserError
from llm.model import checkpoint, checkpoint_path
from llm.model.transformer import check_backend
from llm.training import sanity, saving
from llm.training.after_save import LIMIT_MINUTES
from llm.training.batch_plan import choose_micro_batch, make_plan, ways_out_of_memory
from llm.training.checkpoint_folders import best_checkpoint
from llm.training.engine import limit_collectives, start, stop
from llm.training.failure_detector import FailureDetector
from llm.training.first_update import FirstUpdate
from llm.training.meter import TASKS, Meter
from llm.training.monitor import Monitor
from llm.training.nonfinite import NonFiniteGuard
from llm.training.optim import decay_begins, learning_rate, own_rates
from llm.training.resolve import check_data
from llm.training.run_folder import RunFolder, describe_finished, how_to_go_on, mark_failed, no_better_loss
from llm.training.run_log import RunLog
from llm.training.setup import (
    RunSetup,
    build_engine,
    copy_data,
    data_state,
    find_setup,
    naming_a_good_checkpoint,
    on_device,
    open_loader,
)
from llm.training.stopping import ON_LOG_FAILED, OUT_OF_TIME, StopRequest
from llm.training.task_scores import load_tasks, score_tasks
from llm.training.validation import continue_prompts, score_validation
from llm.world import World, device_name, oom_as_user_error

SAVE_SECONDS = 20
"""Seconds that a run waits for an unfinished checkpoint if it ends because another rank has ended."""
LOG_FILE = "log.txt"
"""What the terminal showed, in the run's folder; each start of the run adds to it."""


OnLog = Callable[[dict[str, Any]], object]


def train(config: Config, resume: str = "auto", *, on_log: OnLog | None = None, quiet: bool = False) -> dict[str, Any]:
    """Trains to train.total_tokens, or until train.max_minutes; returns the result that `llm train --json` prints.

    A process may train several times, one run after the other. Each is as in a process of its own.

    Args:
        resume: "auto" continues from the newest checkpoint in checkpoint.dir, if there is one; "never" starts a new run
            and refuses a folder that holds a run; any other value is the path of the checkpoint to continue from.
        on_log: called on rank 0 with each record of metrics.jsonl when it is written: of logged steps and validations.
            If it raises an error, the run finishes its step, saves and stops; then `train` raises the error.
        quiet: show nothing on stderr; log.txt in the run's folder has all lines.

    Raises UserError for everything in config, data or checkpoint that the user can correct.
    """
    if not isinstance(config, Config):
        raise UserError(f"train takes a Config, not a {type(config).__name__}: llm.load_config(FILE) makes one")
    try:
        with _in_group(config) as world:
            result, error = _train(config, resume, world, on_log, quiet)
    except (UserError, KeyboardInterrupt) as failure:
        # A notebook keeps the last traceback, and with its frames the model in memory.
        _clear_frames(failure)
        raise
    finally:
        gc.collect()  # DeepSpeed's engine refers to itself
        device_rates.free_cached_memory()
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def _in_group(config: Config) -> Iterator[World]:
    """Joins the processes of the run inside the block."""
    world = start(config)
    try:
        yield world
    except BaseException:
        # Others may be gone, and leaving the group would wait for them; here the next start leaves it.
        if world.size == 1:
            stop()
        raise
    stop()


def _clear_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _train(
    config: Config, resume: str, world: World, on_log: OnLog | None, quiet: bool
) -> tuple[dict[str, Any], Exception | None]:
    """Returns the result, and the error of on_log."""
    device_rates.reset_peak_memory(world.device)
    check_backend(world.device)
    detector = FailureDetector(world, config.train.hang_minutes, Path(config.checkpoint.dir))
    naming = naming_a_good_checkpoint(Path(config.checkpoint.dir))
    resolved = config
    way_out = lambda: ways_out_of_memory(resolved, world.size, world.device, dtype=world.dtype)  # noqa: E731
    with oom_as_user_error(way_out), detector, detector.attributing(), naming:
        data = world.first_rank_only(lambda: check_data(config, resume))
        copy_data(config, data, world)
        setup = world.first_rank_only(lambda: find_setup(config, data, resume))
        resolved = setup.config
        if setup.finished is None:
            run = Run(setup, world, detector, on_log, quiet)
            return run.loop(), run.on_log_error
        display = Display("training", 1, silent=quiet or world.rank > 0)
        for line in describe_finished(setup.config, setup.state, setup.source):
            display.line(line)
        return setup.finished, None


class Run:
    """The part of one process in a training run. on_log, quiet: see `train`."""

    on_log_error: Exception | None = None
    """What on_log has raised."""

    def __init__(
        self,
        setup: RunSetup,
        world: World,
        detector: FailureDetector,
        on_log: OnLog | None = None,
        quiet: bool = False,
    ) -> None:
        config, data = setup.config, setup.data
        self.config, self.data, self.state, self.world = config, data, setup.state, world
        self.source, self.followed, self.expected = setup.source, setup.followed, setup.expected
        self.resumed = None if self.source is None else checkpoint.read_state(self.source)
        micro_batch = world.first_rank_only(
            lambda: choose_micro_batch(config, world.size, world.device, dtype=world.dtype)
        )
        if config.train.same_bits:
            # The sums depend on it, so the checkpoints hold it, and the run goes on with it.
            settled = config.train.model_copy(update={"micro_batch": micro_batch})
            self.config = config = config.model_copy(update={"train": settled})
        self.plan = make_plan(config, world.size, world.device, dtype=world.dtype, micro_batch=micro_batch)
        self.tokenizer = tokenizer_of(data.sources[0])
        self.tasks = load_tasks(config, world)
        self.train_loader = open_loader(config, data, self.plan, world, "train", position=self.state.data.position)
        self.notes = world.first_rank_only(self._check_sanity)
        self.engine = build_engine(config, world, self.plan, self.source)
        self.checks_update = config.optimizer.kind == "muon"
        self.meter = Meter(self.plan.tokens_per_step, world.device)
        self.display = Display("training", config.train.horizon, self.state.tokens, silent=quiet or world.rank > 0)
        self.saver = saving.Saver(config, self.tokenizer, self.display.line, world)
        self.guard = NonFiniteGuard(
            config.train, self.engine, self.saver, self.plan.sequences_per_step, self.display.line
        )
        self.stop = StopRequest(
            world, Path(config.checkpoint.dir), config.train.max_minutes, self.display.line, self._fail
        )
        self.folder: RunFolder | None = None  # only on rank 0
        self._setup = setup
        self._lost: set[Path] = set()
        world.first_rank_only(self._open_folder)
        if self.folder is not None:
            self.display.log_to(Path(config.checkpoint.dir) / LOG_FILE)
        kinds = config.train.monitor if world.rank == 0 else []
        monitors = [Monitor(kind, config, self.display.line) for kind in kinds]
        self._on_log = on_log if world.rank == 0 else None
        self.log = RunLog(self.plan, world, self.display, self.meter, self.folder, monitors, self._call_on_log)
        self.detector = detector
        detector.on_lost = self._on_lost
        detector.where = lambda: (self.state.step, self.meter.doing)
        limit_collectives(2 * config.train.hang_minutes)  # the detector, which names the rank, comes first

    def loop(self) -> dict[str, Any]:
        """Trains to the end; returns the result on rank 0."""
        config = self.config.train
        with (
            self.folder or contextlib.nullcontext(),
            self.stop.listening(),
            self.display,
            self.train_loader,
            self.saver.after_save,
            contextlib.closing(self.saver),  # inside the folder, which an unfinished save needs
            self.engine.metered(self.meter.phase),
            _frozen_garbage(),
            self.detector.attributing(),  # innermost, so that the folder gets the real cause of an error
        ):
            self.log.show_plan(self.config, self.data, self.resumed, self.followed, self.expected)
            for note in self.notes:
                self.display.line(f"note        {note}")
            self.meter.start()
            batches = on_device(self.train_loader, self.world.device)
            stopped = self._validate_first()
            if not stopped and self._tasks_missing():
                stopped = self.score_tasks()
            done = self.complete or bool(stopped)
            # --resume may name the last checkpoint of another folder; then this folder has no checkpoint yet.
            if done and not self.world.first_rank_only(lambda: self.saver.has(self.state.step)):
                self.save()
            while not done:
                self.step(batches)
                # Before the ranks agree, since on_log may fail, which stops the run.
                if self.state.step % config.log_every_steps == 0:
                    self.log.write_steps()
                # `complete` is the same on all ranks, so all call the collective or none does.
                stopped = "" if self.complete else self.stop.agreed()
                done = self.complete or bool(stopped)
                if done:
                    self.log.write_steps()
                killed_soon = self._stops_at_once(stopped)
                # Validation comes before the save, which compares its loss for `best`.
                if not killed_soon and (done or self.state.validation_due(config)):
                    self.validate()
                    # Where a signal has cut it short the run stops here, so that going on begins with it.
                    stopped = "" if self.complete else self.stop.agreed()
                    done = self.complete or bool(stopped)
                    if done:
                        self.log.write_steps()
                # Always at the end; otherwise the steps since the last save would be lost.
                saves = done or self._saves_now
                if saves:
                    self.save()
                # After the save, because tasks can take long: a kill in them loses nothing that is to be saved.
                if not stopped and self._tasks_due and (stopped := self.score_tasks()):
                    # Going on begins with them, so the run stops at this step.
                    done = True
                    if not saves:
                        self.save()
            # Before the status, because a run whose last save failed is not complete.
            with self.meter.outside("save"):
                self.saver.finish(self.world, self.state.step)
            self.log.show_sources(self.data, "done", self.state.data.position)
            result = self._result(stopped)
            if self.folder is not None:
                self.folder.finish(result, stopped, no_better_loss(self.config, self.state))
                for line in [] if stopped else how_to_go_on(self.config, self.state):
                    self.display.line(line)
            if stopped:
                self.display.line(f"stopped at step {self.state.step}: {stopped}; start again to go on")
            self._wait_for_after_save()
        self.world.barrier()
        return result

    def _wait_for_after_save(self) -> None:
        """Waits until the last checkpoint.after_save has ended, up to a limit or a second Ctrl-C. Collective."""
        if self.config.checkpoint.after_save is None:
            return
        command = self.saver.after_save
        if names := command.names:
            self.display.line(f"waiting     for checkpoint.after_save of {', '.join(sorted(names))}")
        end = time.monotonic() + 60 * LIMIT_MINUTES
        # It comes after the status is written, so it changes nothing about the run.
        with contextlib.suppress(KeyboardInterrupt):
            self.world.wait_for_all(lambda: not command.names or time.monotonic() > end)
        command.leave()
        if self.folder is not None:
            self.saver.delete_old(self.state.step)

    @property
    def complete(self) -> bool:
        """Whether the run has reached train.total_tokens, or has ended by train.stop_patience."""
        return self.state.is_complete(self.config.train)

    @staticmethod
    def _stops_at_once(reason: str) -> bool:
        """Whether the run should save and end without more work: SIGKILL usually follows a signal."""
        return reason not in ("", OUT_OF_TIME)

    @property
    def _saves_now(self) -> bool:
        # With a patience the best checkpoint must exist at the end, so each best one is saved.
        best = self.config.train.stop_patience is not None and self.state.is_best
        kept = best or decay_begins(self.state.tokens, self.config)
        return kept or self.state.step % self.config.checkpoint.every_steps == 0

    def step(self, batches: Iterator[Batch]) -> None:
        """Takes one optimizer step over the global batch, in micro-batches."""
        plan, position = self.plan, self.state.data.position
        self.log.show_stage(self.data, position)
        # All ranks count the labels of the whole step before its first micro-batch, to weight each loss by them.
        with self._reading():
            targets = self.train_loader.targets(position, plan.sequences_per_step)
        lr = learning_rate(self.state.tokens, self.config)
        # On the device, because reading them would make each step wait.
        losses = torch.zeros(plan.accumulation, device=self.world.device)
        for done, batch in enumerate(self._micro_batches(batches)):
            losses[done] = self.engine.backward(batch._asdict(), targets)
            # A step may take minutes.
            self.display.update(self.state.tokens + (done + 1) / plan.accumulation * plan.tokens_per_step)
        # Here and not at the start, so that its copies are not there beside the activations.
        first_update = FirstUpdate(self.engine, self.config) if self.checks_update else None
        norm, applied = self.engine.update(lr)
        self.state = replace(
            self.guard.judge(self.state, losses, applied=applied),
            step=self.state.step + 1,
            tokens=self.state.tokens + plan.tokens_per_step,
            data=data_state(self.config, self.data, position + plan.sequences_per_step),
            # The loss of the last validation does not belong to this step; `validate` sets it.
            val_loss=None,
        )
        self.meter.count_step()
        if applied and first_update is not None:
            with self.meter.outside(None):
                first_update.check(self.state.step)
            self.checks_update = False
        self.log.record(
            self.state,
            sum_over_ranks={"loss": losses}
            | ({"z_loss": self.engine.take_z_loss()} if self.config.train.z_loss else {}),
            lr=lr,
            **own_rates(lr, self.config.optimizer),
            grad_norm=norm,
            skipped_steps=self.state.skipped,
            **self._loss_scale(),
            **({"after_save_failures": self.saver.after_save.failures} if self.config.checkpoint.after_save else {}),
        )

    def _micro_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Reads a step's micro-batches, and yields them in the order in which the engine adds their gradients."""
        waiting: dict[int, Batch] = {}
        read = count()
        for wanted in self.engine.micro_batch_order:
            while wanted not in waiting:
                with self._reading(), self.meter.waiting():
                    number, batch = next(read), next(batches)
                    # The loader writes to its memory again while this one waits.
                    waiting[number] = batch if number == wanted else Batch(*(tensor.clone() for tensor in batch))
            yield waiting.pop(wanted)

    def validate(self) -> None:
        """Scores the validation sequences and logs the result. Each rank scores the same number of batches."""
        with self.meter.outside("validation"), self._reading():
            self.engine.module.eval()
            module, stops = self.engine.module, lambda: self._stops_at_once(self.stop.agreed())
            scores = score_validation(module, self.config, self.data, self.plan, self.world, self.tokenizer, stops)
            samples = [] if scores is None else continue_prompts(module, self.config, self.tokenizer)
            self.engine.module.train()
        if scores is not None:
            score, by_source = scores
            self.state = self.state.validated(score.nll_per_token, self.config.train)
            self.log.write_validation(self.state, score, by_source, samples)

    def _validate_first(self) -> str:
        """Validates before the first step, or after an interrupted validation. Returns why the run must stop."""
        if not self.state.validation_due(self.config.train) or self.state.val_loss is not None:
            return ""
        self.validate()
        if self.state.step == 0:
            return ""
        if self.state.val_loss is None:
            return self.stop.agreed()
        if self.world.first_rank_only(lambda: self.saver.has(self.state.step)):
            self.world.first_rank_only(lambda: self.saver.write_state(self.state))
        elif self._saves_now:
            self.save()
        return ""

    @property
    def _tasks_due(self) -> bool:
        """Whether train.eval_tasks are to score the model after this step."""
        every = self.config.train.eval_tasks_every_steps
        due = self.complete or (every is not None and self.state.step > 0 and self.state.step % every == 0)
        return self.tasks is not None and due

    def _tasks_missing(self) -> bool:
        """Whether they were due after the step of the run's checkpoint, and a stop or a kill has prevented them."""

        def missing() -> bool:
            lines = [] if self.folder is None else self.folder.read_metrics()
            return not any("tasks" in line and line["step"] == self.state.step for line in lines)

        return self._tasks_due and self._setup.here and self.world.first_rank_only(missing)

    def score_tasks(self) -> str:
        """Scores the model by train.eval_tasks and logs the result. Returns why the run must stop.

        A process that is alone goes on where a task fails. Of several, some may wait for the one that failed, so that
        the run ends.
        """
        assert self.tasks is not None
        before = self.meter.tasks_seconds
        try:
            with self.meter.outside(TASKS):
                scores = score_tasks(
                    self.tasks,
                    self.engine,
                    self.config,
                    self.tokenizer,
                    lambda: self._stops_at_once(self.stop.agreed()),
                )
        except UserError as error:
            if self.world.size > 1:
                raise
            self.display.line(f"tasks       failed after step {self.state.step}: {error}; the run goes on")
            return ""
        if scores is None:
            stopped = self.stop.agreed()
            self.display.line(f"tasks       after step {self.state.step} were cut short: {stopped}")
            return "" if self.complete else stopped
        seconds = self.meter.tasks_seconds
        self.log.write_tasks(self.state, scores, seconds - before, seconds / self.meter.seconds)
        return "" if self.complete else self.stop.agreed()

    def save(self) -> None:
        with self.meter.outside("save"):
            if self.world.rank == 0:
                self._tell_lost_data()
            self.saver.save(self.engine, self.state)

    def _tell_lost_data(self) -> None:
        """Shows a line about each source whose folder has gone: the files that are open serve as long as they last."""
        for source in self.data.sources:
            if not (source.path / MANIFEST_NAME).exists() and source.path not in self._lost:
                self._lost.add(source.path)
                self.display.line(f"warning     {source.path}: is gone; the run goes on with the shards that are open")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Saves the steps until now if the data cannot be read any more."""
        try:
            yield
        except UserError:
            # Only alone: other ranks may be inside a collective of the step.
            if self.world.size == 1 and self.state.step > 0 and not self.saver.has(self.state.step):
                self.save()
            raise

    def _on_lost(self, rank: int, what: str) -> None:
        """Writes into status.json that a rank has ended. Called in the detector's thread."""
        if self.folder is not None:
            self.folder.fail(what)
            # The process ends soon after this call, and a nearly complete checkpoint would be lost.
            self.saver.close(SAVE_SECONDS)
        # Only rank 1, so that one rank writes the file.
        elif rank == 0 and self.world.rank == 1:  # rank 0 cannot report its own end
            mark_failed(Path(self.config.checkpoint.dir), what, hangs=self.detector.hangs)

    def _check_sanity(self) -> list[str]:
        before = None if self.resumed is None else self.resumed[1]
        return sanity.check(self.config, self.data, self.plan, before)

    def _open_folder(self) -> None:
        about = {
            "parameters": self.plan.parameters,
            "world_size": self.world.size,
            "device": device_name(self.world.device),
            "precision": self.world.precision,
            **({"expected": asdict(self.expected)} if self.expected else {}),
        }
        # A run from a checkpoint of another folder starts new metrics.
        step = self.state.step if self._setup.here else None
        folder = RunFolder(self.config, self.followed, step, about, self.display.line, self.source, self._setup.found)
        self.folder = folder
        self.saver.find_folder = self.stop.find_folder = folder.where
        self.saver.on_failure = folder.note_failed_save
        if self._setup.here:
            self.saver.made.add(self.state.step)

    def _call_on_log(self, line: dict[str, Any]) -> None:
        if self._on_log is None or self.on_log_error is not None:
            return
        try:
            self._on_log(line)
        except Exception as error:
            self.on_log_error = error
            where = Path(self.config.checkpoint.dir)
            error.add_note(f"raised by on_log; the run in {where} is saved at its last step, and train goes on from it")
            self.stop.ask(ON_LOG_FAILED)

    def _loss_scale(self) -> dict[str, float]:
        scale = self.engine.loss_scale
        return {} if scale is None else {"loss_scale": scale, "overflow_steps": self.state.overflows}

    def _fail(self) -> None:
        """Writes into status.json that the user has ended the run. Called in a thread, before the process is ended."""
        if self.folder is not None:
            self.folder.fail("ended by a second Ctrl-C")

    def _result(self, stopped: str) -> dict[str, Any]:
        """Returns what `llm train --json` prints; {} on other ranks than 0.

        The figures come from metrics.jsonl, because a resumed run may have nothing left to compute.
        """
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
            "checkpoint": str(checkpoint_path.locate(self.folder.path)),
            "stopped": stopped or None,
            "best": None if (best := best_checkpoint(self.folder.path)) is None else str(best),
        }


@contextlib.contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Excludes the objects that exist now from garbage collection inside the block.

    Imports and set-up make very many permanent objects, and each full collection would visit all of them.
    """
    # Collected first, because frozen garbage would stay for ever.
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
