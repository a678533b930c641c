"""Writes checkpoints: complete or absent, without pickle, each one a Hugging Face model folder.

checkpoint.dir/
    step-00001000/
        model.safetensors               fp32 masters under Hugging Face's names, true vocabulary
        config.json, tokenizer.model    all that a model needs besides its weights
        tokenizer.json, tokenizer_config.json   the tokenizer for other programs
        optimizer-exp_avg.safetensors, optimizer-exp_avg_sq.safetensors, optimizer-step.safetensors
                                        AdamW's moments and update counts, under the same names; of matrices that
                                        Muon updates there is optimizer-momentum_buffer.safetensors instead
        state.json                      step, tokens, position in the data, our config, checksums of all files
    latest -> step-00001000             replaced by rename once the folder is complete
    best -> step-00001000               the one of least validation loss, of those saved right after a validation

Where the file system has no symbolic links, `latest` and `best` are files that hold the name.

With the schedule "wsd" the checkpoint where the decay begins is kept, too: a longer run goes on from it.

A save gathers the tensors and copies them to rank 0's host (llm/training/gathering.py). A thread then writes them while
training continues. If they exceed checkpoint.gather_bytes, each rank gets and writes some of the parameters, in files
with an index (llm/model/tensor_files.py). Both layouts can be read on any number of ranks.
"""

import contextlib
import datetime
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from llm.atomic import atomic_directory, sync_file
from llm.config import Config
from llm.data.tokenizer import Tokenizer
from llm.errors import DamagedCheckpoint, UserError
from llm.model import checksums
from llm.model.checkpoint import (
    OPTIMIZER_STEP,
    TrainState,
    read_checksums,
    read_state,
    read_tensors,
    read_weights,
    write_state,
)
from llm.model.checkpoint_path import FORMAT_VERSION, STATE_FILE
from llm.model.checksums import Checksums
from llm.model.hf import hf_names
from llm.model.hf_folder import write_hf_files
from llm.model.tensor_files import open_tensors, part_file, save_tensors, write_index
from llm.model.transformer import parameter_count
from llm.training.after_save import AfterSave
from llm.training.checkpoint_folders import delete_old, is_best, point, set_aside
from llm.training.engine import Engine
from llm.training.gathering import Gathered, Tensors, copy_stream, gather
from llm.training.optim import all_moments, moments
from llm.world import World

T = TypeVar("T")

BYTES_PER_PARAMETER = 12
"""The bytes of a checkpoint per parameter: the weight and AdamW's two moments, in fp32."""
WRITING_TIMEOUT = datetime.timedelta(hours=2)
"""Time limit of ranks that write together for the slowest one."""


class Saver:
    """Writes a run's checkpoints while it trains. Making one is collective.

    Args:
        config: the resolved config of the run.
        tokenizer: written into each checkpoint.
        say: shows a line to the user; called from another thread.
        world: each of its ranks writes a part of a checkpoint above checkpoint.gather_bytes.
    """

    on_failure: Callable[[str], None] = staticmethod(lambda failure: None)
    """Called on rank 0, in another thread, with a line about each save, and each checkpoint.after_save, that failed."""
    find_folder: Callable[[], Path]
    """Returns the run's folder, which may be renamed during the run."""

    def __init__(self, config: Config, tokenizer: Tokenizer, say: Callable[[str], None], world: World) -> None:
        self._config, self._tokenizer, self._say = config, tokenizer, say
        self.find_folder = lambda: Path(config.checkpoint.dir)
        self._writing: threading.Thread | None = None
        self._failure: str | None = None
        self.after_save = AfterSave(config.checkpoint.after_save, say, lambda failure: self.on_failure(failure))
        self.made: set[int] = set()
        """The steps of this run's checkpoints that this process has made, or goes on from."""
        # The next save uses the tensors of the last one again, because clearing new pages takes longer than the copy.
        self._memory: Tensors = {}
        self._copies = copy_stream(world.device, say)
        self._rank = world.rank
        total = BYTES_PER_PARAMETER * parameter_count(config.model)
        self._parts = world.size if total > config.checkpoint.gather_bytes else 1
        # The writing threads need a process group of their own, because training uses the others meanwhile.
        self._writers = dist.new_group(backend="gloo", timeout=WRITING_TIMEOUT) if self._parts > 1 else None

    def save(self, engine: Engine, state: TrainState, *, delete: bool = True) -> None:
        """Starts to write checkpoint.dir/step-NNNNNNNN, with the tensors as they are now. Collective.

        It returns when they are on the host, or a GPU is to copy them there before the engine's next update. It first
        waits for an unfinished save, because there is memory for only one.

        delete: whether to call `delete_old` when this checkpoint is complete.
        """
        self.close()
        state = replace(state, loss_scaler=engine.read_loss_scaler())
        gathered = gather(engine, self._config, self._parts, self._memory, self._copies)
        self._memory = gathered.files
        if self._rank < self._parts:
            # Not a daemon, so Python waits for it at exit, and the save is completed.
            self._writing = threading.Thread(target=self._write, args=(gathered, state, delete), name="checkpoint")
            self._writing.start()

    def finish(self, world: World, step: int | None = None) -> None:
        """Waits for the last save. Raises UserError on every rank if it failed. Collective.

        step: of the checkpoint that must be there.
        """

        def last() -> None:
            self.close()
            if self._failure is not None:
                raise UserError(self._failure)
            if step is not None and not self.has(step):
                raise UserError(f"{self._path(step)}: the last checkpoint of this run is gone; start again to go on")

        world.first_rank_only(last)

    def close(self, seconds: float | None = None) -> None:
        """Waits for the last save, with a time limit, whether or not it succeeds. From any thread."""
        if self._writing is not None:
            self._writing.join(seconds)

    @property
    def is_writing(self) -> bool:
        return self._writing is not None and self._writing.is_alive()

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of this step. One that exists is complete.

        One from before the run went back to an earlier step does not count.
        """
        return step in self.made and (self._path(step) / STATE_FILE).is_file()

    def write_state(self, state: TrainState) -> None:
        """Replaces state.json of the checkpoint of this step, whose validation came after it was saved. Rank 0 only."""
        path = self._path(state.step)
        # The config in it stays, with which the checkpoint was made.
        write_state(path, asdict(state))
        if is_best(path.parent, state):
            point(path.parent / "best", path.name)

    def _path(self, step: int) -> Path:
        return self.find_folder() / f"step-{step:08d}"

    def _write(self, gathered: Gathered, state: TrainState, delete: bool) -> None:
        path = Path(self._config.checkpoint.dir, f"step-{state.step:08d}")
        # Any error is a failed save: a thread that ended by an exception would be forgotten.
        try:
            if self._writers is None:
                path = self._path(state.step)
                gathered.wait()
                write_checkpoint(path, gathered.files, self._config, state, self._tokenizer, self._say)
            else:
                path = self._write_together(gathered, state)
        except Exception as error:
            self._fail(f"{path}: the checkpoint could not be written: {_reason(error)}; older ones are untouched")
            return
        if self._rank > 0:
            return
        self.made.add(state.step)
        run_dir = path.parent
        try:
            # After the folder is complete: `latest` never names an incomplete one.
            point(run_dir / "latest", path.name)
        except Exception as error:
            self._fail(f"{run_dir / 'latest'}: cannot be set to {path.name}, which is complete: {_reason(error)}")
            return
        # A later success replaces a failure: only the last save decides how the run ends.
        self._failure = None
        self._say(f"saved {path}")
        try:
            # Before the deletion, which keeps the folder that `best` names.
            if is_best(run_dir, state):
                point(run_dir / "best", path.name)
            self.after_save.start(path)
            if delete:
                self.delete_old(state.step)
        except Exception as error:
            self._say(f"old checkpoints could not be deleted: {_reason(error)}")

    def delete_old(self, step: int) -> None:
        """Deletes checkpoints before `step` as the config says; those that checkpoint.after_save reads stay."""
        delete_old(self.find_folder(), self._config.checkpoint, step, self._say, self.after_save.names)

    def _fail(self, failure: str) -> None:
        self._failure = failure
        if self._rank == 0:
            self._say(failure)
            self.on_failure(failure)

    def _write_together(self, gathered: Gathered, state: TrainState) -> Path:
        """Writes the folder on rank 0 and a part of the tensors on each rank; complete if all succeed, else absent.

        Returns the folder.
        """
        with contextlib.ExitStack() as finished:
            first = self._rank == 0

            def begin() -> tuple[Path, Path] | None:
                if not first:
                    return None
                path = self._path(state.step)
                folder = finished.enter_context(atomic_directory(path, last=STATE_FILE))
                write_hf_files(folder, self._config.model, self._tokenizer)
                return path, folder

            def write_mine() -> Checksums:
                gathered.wait()
                sums = write_all_tensors(folder, gathered.files, self._rank, self._parts)
                for name in sums.files:
                    sync_file(folder / name)
                return sums

            def end() -> None:
                if first:
                    for stem, parts in gathered.parts.items():
                        files = {name: part_file(stem, part, self._parts) for name, part in parts.items()}
                        write_index(folder, stem, files, gathered.sizes[stem])
                    for other in others:
                        sums.add(other)
                    write_description(folder, self._config, state, self._tokenizer, sums)
                    set_aside(path, sums, self._say)
                    # The rename happens here, inside `_all_do`, so that its failure reaches every rank.
                    finished.pop_all().close()

            # Each step waits for all ranks: the folder exists before they write, and is renamed after all have written.
            begun = self._all_do(begin)[0]
            assert begun is not None
            path, folder = begun
            sums, *others = self._all_do(write_mine)
            self._all_do(end)
            return path

    def _all_do(self, part: Callable[[], T]) -> list[T]:
        """Calls part() on every rank; returns all results when all have finished. If one fails, all raise its error."""
        outcome: tuple[T | None, str | None]
        try:
            outcome = part(), None
        except Exception as error:
            outcome = None, _reason(error)
        # Errors are exchanged as values, because the others would wait for a rank that left by an exception.
        outcomes: list[Any] = [None] * self._parts
        try:
            dist.all_gather_object(outcomes, outcome, group=self._writers)
        except RuntimeError as error:
            raise OSError(f"another rank has ended ({str(error).splitlines()[0]})") from None
        for rank, (_, failed) in enumerate(outcomes):
            if failed is not None:
                raise OSError(f"rank {rank}: {failed}")
        return [result for result, _ in outcomes]


def _reason(error: Exception) -> str:
    """Returns what an error says, with its class where that is not obvious."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def write_checkpoint(
    path: Path,
    tensors: Tensors,
    config: Config,
    state: TrainState,
    tokenizer: Tokenizer,
    say: Callable[[str], None] | None = None,
) -> None:
    """Writes a checkpoint. say: shows a line about one that is there already, which is kept; None: it is replaced."""
    with atomic_directory(path, last=STATE_FILE) as folder:
        sums = write_files(folder, tensors, config, state, tokenizer)
        if say is not None:
            set_aside(path, sums, say)


def write_files(
    folder: Path,
    tensors: Tensors,
    config: Config,
    state: TrainState,
    tokenizer: Tokenizer,
) -> Checksums:
    """Writes all files of a checkpoint into an empty folder. tensors: {file stem: {Hugging Face name: tensor}}."""
    write_hf_files(folder, config.model, tokenizer)
    sums = write_all_tensors(folder, tensors)
    write_description(folder, config, state, tokenizer, sums)
    return sums


def write_all_tensors(folder: Path, tensors: Tensors, part: int = 0, parts: int = 1) -> Checksums:
    """Writes {file stem: {name: tensor}}; returns their checksums. Raises UserError for a number that is not finite.

    A run that has gone wrong must not replace its last good checkpoint.
    """
    sums = Checksums()
    for stem, named in tensors.items():
        for name, tensor in named.items():
            if not tensor.isfinite().all():
                raise UserError(f"{name} of {stem} is not finite")
        # A rank may have no tensor of this file, such as one of many ranks that share few parameters.
        if named:
            file = folder / part_file(stem, part, parts)
            save_tensors(file, named)
            # Of the tensors in memory, not of those in the file, so that an error of the disk is found too.
            sums.tensors[stem] = {name: checksums.of_tensor(tensor) for name, tensor in named.items()}
            sums.files[file.name] = checksums.of_file(file)
    return sums


def write_description(folder: Path, config: Config, state: TrainState, tokenizer: Tokenizer, sums: Checksums) -> None:
    """Writes state.json, the last file of a checkpoint. sums: those of its tensors; the other files' are added."""
    for file in sorted(folder.iterdir()):
        if file.name not in sums.files:
            sums.files[file.name] = checksums.of_file(file)
    described = {
        "format_version": FORMAT_VERSION,
        **asdict(state),
        "tokenizer_sha256": tokenizer.sha256,
        "config": config.model_dump(),
    }
    write_state(folder, described, sums)


def _read_optimizer_steps(path: Path, names: Iterable[str]) -> float:
    """Reads how many updates the optimizer has made: one number, though it is stored for every parameter."""
    stem = f"optimizer-{OPTIMIZER_STEP}"
    with open_tensors(path, stem, 0, read_checksums(path)) as get:
        counts = {key: get(key) for name in names for key in hf_names(name)}
    for key, count in counts.items():
        if count.ndim:
            raise DamagedCheckpoint(f"{path}: {stem} has {list(count.shape)} counts for {key}, not one")
    different = sorted({float(count) for count in counts.values()})
    if len(different) > 1:
        raise DamagedCheckpoint(f"{path}: {stem} has from {different[0]:g} to {different[-1]:g} updates")
    return different[0]


def restore(engine: Engine, path: Path, config: Config) -> None:
    """Loads masters, moments, counts and loss scale into an engine of any world size and ZeRO stage. Collective.

    Raises UserError for contents that no run saves: another shape or dtype, a number that is not finite, a negative
    count or second moment.
    """
    # One tensor at a time, so that no host needs memory for the whole model.
    for name, value in read_weights(path, config.model):
        engine.write_parameter(name, value)
    engine.write_optimizer_steps(_read_optimizer_steps(path, engine.parameters))
    for moment in all_moments(config.optimizer):
        names = [name for name in engine.parameters if moment in moments(name, config.optimizer)]
        least = 0.0 if moment == "exp_avg_sq" else -math.inf  # because AdamW takes its square root
        for name, value in read_tensors(path, f"optimizer-{moment}", config.model, names, least):
            engine.write_moment(name, moment, value)
    scaler = read_state(path)[0].loss_scaler
    if scaler is not None:
        try:
            engine.write_loss_scaler(scaler)
        except KeyError as error:
            raise DamagedCheckpoint(f"{path / STATE_FILE}: damaged (loss_scaler has no {error})") from None
