"""Writes checkpoints: complete or absent, without pickle, each one a Hugging Face model folder.

checkpoint.dir/
    step-00001000/
        model.safetensors               fp32 masters under Hugging Face's names, true vocabulary
        config.json, tokenizer.model    all that a model needs besides its weights
        tokenizer.json, tokenizer_config.json   the tokenizer for other programs
        optimizer-exp_avg.safetensors, optimizer-exp_avg_sq.safetensors, optimizer-step.safetensors
                                        AdamW's moments and update counts, under the same names; of matrices that
                                        Muon updates there is optimizer-momentum_buffer.safetensors instead
        state.json                      step, tokens, position in the data, our config
    latest -> step-00001000             replaced by rename once the folder is complete
    best -> step-00001000               the one of least validation loss, of those saved right after a validation

With the schedule "wsd" the checkpoint where the decay begins is kept, too: a longer run goes on from it.

A save gathers the tensors and copies them to rank 0's host. A thread then writes them while training continues. If they
exceed checkpoint.gather_bytes, each rank gets and writes some of the parameters, in files with an index
(llm/model/tensor_files.py). Both layouts can be read on any number of ranks.
"""

import contextlib
import datetime
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from llm.atomic import atomic_directory, atomic_text, sync_directory, sync_file
from llm.config import CheckpointConfig, Config
from llm.data.tokenizer import Tokenizer
from llm.errors import UserError
from llm.model.checkpoint import (
    FORMAT_VERSION,
    OPTIMIZER_STEP,
    STATE_FILE,
    TrainState,
    read_state,
    read_tensors,
    read_weights,
    saved,
)
from llm.model.hf import hf_names, to_hf
from llm.model.hf_folder import write_hf_files
from llm.model.tensor_files import open_tensors, part_file, write_index
from llm.model.transformer import parameter_count, parameter_shapes
from llm.training.engine import Engine
from llm.training.optim import all_moments, decay_begins, moments
from llm.world import World

BYTES_PER_PARAMETER = 12
"""The bytes of a checkpoint per parameter: the weight and AdamW's two moments, in fp32."""
WRITING_TIMEOUT = datetime.timedelta(hours=2)
"""Time limit of ranks that write together for the slowest one."""


@dataclass
class Gathered:
    """This rank's part of a checkpoint's tensors, copied to the host."""

    files: dict[str, dict[str, torch.Tensor]]
    """{file stem: {Hugging Face name: tensor}} of the tensors that this rank writes."""
    parts: dict[str, dict[str, int]]
    """{file stem: {Hugging Face name: rank that writes it}} of all tensors."""
    sizes: dict[str, int]
    """{file stem: bytes} of all tensors."""


class Saver:
    """Writes a run's checkpoints while it trains. Making one is collective.

    Args:
        config: the resolved config of the run.
        tokenizer: copied into each checkpoint.
        say: shows a line to the user; called from another thread.
        world: each of its ranks writes a part of a checkpoint above checkpoint.gather_bytes.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, say: Callable[[str], None], world: World) -> None:
        self._config, self._tokenizer, self._say = config, tokenizer, say
        self._run_dir = Path(config.checkpoint.dir)
        self._writing: threading.Thread | None = None
        self._failure: str | None = None
        # The next save uses the tensors of the last one again, because clearing new pages takes longer than the copy.
        self._memory: dict[str, dict[str, torch.Tensor]] = {}
        self._rank = world.rank
        total = BYTES_PER_PARAMETER * parameter_count(config.model)
        self._parts = world.size if total > config.checkpoint.gather_bytes else 1
        # The writing threads need a process group of their own, because training uses the others meanwhile.
        self._writers = dist.new_group(backend="gloo", timeout=WRITING_TIMEOUT) if self._parts > 1 else None

    def save(self, engine: Engine, state: TrainState, *, delete: bool = True) -> None:
        """Starts to write checkpoint.dir/step-NNNNNNNN; returns when the tensors are on the host. Collective.

        It first waits for an unfinished save, because there is memory for only one.

        delete: whether to call `delete_old` when this checkpoint is complete.
        """
        self.close()
        state = replace(state, loss_scaler=engine.read_loss_scaler())
        gathered = gather(engine, self._config, self._parts, self._memory)
        self._memory = gathered.files
        if self._rank < self._parts:
            # Not a daemon, so Python waits for it at exit, and the save is completed.
            self._writing = threading.Thread(target=self._write, args=(gathered, state, delete), name="checkpoint")
            self._writing.start()

    def finish(self, world: World) -> None:
        """Waits for the last save. Raises UserError on every rank if it failed. Collective."""

        def last() -> None:
            self.close()
            if self._failure is not None:
                raise UserError(self._failure)

        world.first_rank_only(last)

    def close(self, seconds: float | None = None) -> None:
        """Waits for the last save, with a time limit, whether or not it succeeds. From any thread."""
        if self._writing is not None:
            self._writing.join(seconds)

    @property
    def is_writing(self) -> bool:
        return self._writing is not None and self._writing.is_alive()

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of this step. One that exists is complete."""
        return self._path(step).exists()

    def write_state(self, state: TrainState) -> None:
        """Replaces state.json of the checkpoint of this step, whose validation came after it was saved. Rank 0 only."""
        path = self._path(state.step)
        # The config in it stays, with which the checkpoint was made.
        described = json.loads((path / STATE_FILE).read_text("utf-8")) | asdict(state)
        atomic_text(path / STATE_FILE, json.dumps(described, indent=2) + "\n")
        if _is_best(self._run_dir, state):
            _point(self._run_dir / "best", path.name)

    def _path(self, step: int) -> Path:
        return self._run_dir / f"step-{step:08d}"

    def _write(self, gathered: Gathered, state: TrainState, delete: bool) -> None:
        path = self._path(state.step)
        try:
            if self._writers is None:
                write_checkpoint(path, gathered.files, self._config, state, self._tokenizer)
            else:
                self._write_together(path, gathered, state)
            if self._rank > 0:
                return
            # After the folder is complete: `latest` never names an incomplete one.
            _point(self._run_dir / "latest", path.name)
        except (OSError, SafetensorError, UserError) as error:
            self._failure = f"{path}: the checkpoint could not be written: {error}; older ones are untouched"
            self._say(self._failure)
            return
        # A later success replaces a failure: only the last save decides how the run ends.
        self._failure = None
        self._say(f"saved {path}")
        try:
            # Before the deletion, which keeps the folder that `best` names.
            if _is_best(self._run_dir, state):
                _point(self._run_dir / "best", path.name)
            if delete:
                delete_old(self._run_dir, self._config.checkpoint)
        except OSError as error:
            self._say(f"old checkpoints could not be deleted: {error}")

    def _write_together(self, path: Path, gathered: Gathered, state: TrainState) -> None:
        """Writes the folder on rank 0 and a part of the tensors on each rank; complete if all succeed, else absent."""
        with contextlib.ExitStack() as finished:
            first = self._rank == 0
            folder = path.with_name(f".{path.name}.tmp")

            def begin() -> None:
                if first:
                    finished.enter_context(atomic_directory(path))
                    write_description(folder, self._config, state, self._tokenizer)

            def write_mine() -> None:
                for file in _write_tensors(folder, gathered.files, self._rank, self._parts):
                    sync_file(file)

            def end() -> None:
                if first:
                    for stem, parts in gathered.parts.items():
                        files = {name: part_file(stem, part, self._parts) for name, part in parts.items()}
                        write_index(folder, stem, files, gathered.sizes[stem])
                    # The rename happens here, inside `_all_do`, so that its failure reaches every rank.
                    finished.pop_all().close()

            # Each step waits for all ranks: the folder exists before they write, and is renamed after all have written.
            for part in (begin, write_mine, end):
                self._all_do(part)

    def _all_do(self, part: Callable[[], None]) -> None:
        """Calls part() on every rank and returns when all have finished. If one fails, all raise its error."""
        failure = None
        try:
            part()
        except (OSError, SafetensorError, UserError) as error:
            failure = str(error)
        # Errors are exchanged as values, because the others would wait for a rank that left by an exception.
        failures: list[str | None] = [None] * self._parts
        try:
            dist.all_gather_object(failures, failure, group=self._writers)
        except RuntimeError as error:
            raise OSError(f"another rank has ended ({str(error).splitlines()[0]})") from None
        for rank, failed in enumerate(failures):
            if failed is not None:
                raise OSError(f"rank {rank}: {failed}")


def gather(engine: Engine, config: Config, parts: int, memory: dict[str, dict[str, torch.Tensor]]) -> Gathered:
    """Copies tensors to the host of the rank that writes them: rank 0, or of several ranks one for each parameter.

    memory: the `files` of the previous save, which are overwritten; empty: there was none.
    """
    stems = ["model", *(f"optimizer-{name}" for name in (*all_moments(config.optimizer), OPTIMIZER_STEP))]
    gathered = Gathered({stem: {} for stem in stems}, {stem: {} for stem in stems}, dict.fromkeys(stems, 0))
    writers = _writers({name: math.prod(shape) for name, shape in parameter_shapes(config.model).items()}, parts)
    steps = torch.tensor(engine.read_optimizer_steps())

    def take(stem: str, key: str, value: torch.Tensor, writer: int) -> None:
        gathered.parts[stem][key] = writer
        gathered.sizes[stem] += value.nbytes
        if writer == engine.world.rank:
            # Always a copy, because on a CPU the value may be a view of data that the next step changes.
            held = memory[stem][key] if memory else torch.empty(value.shape, dtype=value.dtype)
            gathered.files[stem][key] = held.copy_(value)

    # Every rank reads every tensor, because reading is collective; only its writer keeps it.
    for name in engine.parameters:
        values = {"model": engine.read_parameter(name)}
        for moment in moments(name, config.optimizer):
            values[f"optimizer-{moment}"] = engine.read_moment(name, moment)
        for stem, value in values.items():
            for key, part in to_hf(config.model, name, value).items():
                take(stem, key, part, writers[name])
        for key in hf_names(name):
            take(f"optimizer-{OPTIMIZER_STEP}", key, steps, writers[name])
    return gathered


def _writers(sizes: dict[str, int], parts: int) -> dict[str, int]:
    """Chooses the rank that writes each parameter: the largest first, each to the rank with the fewest bytes so far."""
    loads, writers = [0] * parts, {}
    # The same on every rank, because sorting is stable: no communication is needed.
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        writers[name] = loads.index(min(loads))
        loads[writers[name]] += sizes[name]
    return writers


def write_checkpoint(
    path: Path,
    tensors: dict[str, dict[str, torch.Tensor]],
    config: Config,
    state: TrainState,
    tokenizer: Tokenizer,
) -> None:
    with atomic_directory(path) as folder:
        write_description(folder, config, state, tokenizer)
        _write_tensors(folder, tensors)


def _write_tensors(
    folder: Path, tensors: dict[str, dict[str, torch.Tensor]], part: int = 0, parts: int = 1
) -> list[Path]:
    """Writes {file stem: {name: tensor}}; returns the files. Raises UserError for a number that is not finite.

    A run that has gone wrong must not replace its last good checkpoint.
    """
    written = []
    for stem, named in tensors.items():
        for name, tensor in named.items():
            if not tensor.isfinite().all():
                raise UserError(f"{name} of {stem} is not finite")
        # A rank may have no tensor of this file, such as one of many ranks that share few parameters.
        if named:
            file = folder / part_file(stem, part, parts)
            # transformers reads the format from this entry.
            save_file(named, file, {"format": "pt"})
            shutil.copymode(folder / "config.json", file)  # safetensors makes files that only their owner can read
            written.append(file)
    return written


def write_description(folder: Path, config: Config, state: TrainState, tokenizer: Tokenizer) -> None:
    """Writes a checkpoint's files but for its tensors."""
    write_hf_files(folder, config.model, tokenizer)
    described = {
        "format_version": FORMAT_VERSION,
        **asdict(state),
        "tokenizer_sha256": tokenizer.sha256,
        "config": config.model_dump(),
    }
    (folder / STATE_FILE).write_text(json.dumps(described, indent=2) + "\n")


def _point(link: Path, name: str) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    # Relative, so that the run's folder can be moved.
    temporary.symlink_to(name)
    # A symlink cannot be changed in place; with the rename there is always one.
    os.replace(temporary, link)
    sync_directory(link.parent)


def best(run_dir: Path) -> Path | None:
    """Returns the checkpoint of least validation loss, of those saved right after a validation; None: there is none."""
    return (run_dir / "best").resolve() if (run_dir / "best" / STATE_FILE).is_file() else None


def _is_best(run_dir: Path, state: TrainState) -> bool:
    if state.val_loss is None or not math.isfinite(state.val_loss):
        return False
    # Also if `best` points to a deleted folder.
    if not (run_dir / "best" / STATE_FILE).is_file():
        return True
    best, _ = read_state(run_dir / "best")
    return best.val_loss is None or state.val_loss < best.val_loss


def delete_old(run_dir: Path, config: CheckpointConfig) -> None:
    """Deletes checkpoints, except the newest keep_last, every keep_every_steps-th, and with keep_best the best.

    The one where the decay of "wsd" begins stays, too, since a longer run goes on from it.
    A folder is renamed first, so that a kill in the middle leaves none that looks complete.
    """
    best = (run_dir / "best").resolve() if config.keep_best else None
    for path in saved(run_dir)[: -config.keep_last]:
        step = int(path.name.removeprefix("step-"))
        if path.resolve() == best or (config.keep_every_steps is not None and step % config.keep_every_steps == 0):
            continue
        if begins_decay(path):
            continue
        doomed = path.with_name(f".{path.name}.deleted")
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    # exists() follows the link: without keep_best its folder may have been deleted.
    if not (run_dir / "best").exists():
        (run_dir / "best").unlink(missing_ok=True)


def begins_decay(path: Path) -> bool:
    """Whether a checkpoint is the one from which a longer run with the schedule "wsd" goes on at the level rate."""
    try:
        state, config = read_state(path)
    except UserError:  # damaged: nothing goes on from it
        return False
    return decay_begins(state.tokens, config)


def delete_leftovers(run_dir: Path) -> None:
    """Removes the remains of a kill during a save or a deletion."""
    for path in run_dir.glob(".step-*"):
        shutil.rmtree(path)


def _read_optimizer_steps(path: Path, names: Iterable[str]) -> float:
    """Reads how many updates the optimizer has made: one number, though it is stored for every parameter."""
    stem = f"optimizer-{OPTIMIZER_STEP}"
    with open_tensors(path, stem, least=0) as get:
        counts = {key: get(key) for name in names for key in hf_names(name)}
    for key, count in counts.items():
        if count.ndim:
            raise UserError(f"{path}: {stem} has {list(count.shape)} counts for {key}, not one; use another checkpoint")
    different = sorted({float(count) for count in counts.values()})
    if len(different) > 1:
        raise UserError(
            f"{path}: {stem} has from {different[0]:g} to {different[-1]:g} updates; use another checkpoint"
        )
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
            raise UserError(
                f"{path / STATE_FILE}: damaged (loss_scaler has no {error}); use another checkpoint"
            ) from None
