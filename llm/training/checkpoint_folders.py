"""The checkpoints in a run's folder: which are kept and deleted, and what `latest` and `best` name.

llm/model/checkpoint.py finds and reads them, and llm/training/saving.py writes them.
"""

import contextlib
import errno
import itertools
import math
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from llm.atomic import sync_directory, sync_file
from llm.config import CheckpointConfig
from llm.errors import UserError
from llm.model.checkpoint import TrainState, read_checksums, read_state
from llm.model.checkpoint_path import STATE_FILE, STEP_NAME, named_by, saved, step_of
from llm.model.checksums import Checksums
from llm.training.optim import decay_begins

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What symlink fails with on file systems without symbolic links."""


def set_aside(path: Path, sums: Checksums | None, say: Callable[[str], None]) -> None:
    """Renames a checkpoint that another is about to replace, where a run has gone back to an earlier one.

    sums: the checksums of the new one. An equal one is not kept: a run that was killed before it could set `latest`
    makes the same again.
    """
    if not os.path.lexists(path):
        return
    with contextlib.suppress(UserError, OSError):
        before = read_checksums(path)
        if before is not None and sums is not None and before.tensors == sums.tensors:
            return
    kept = next(name for n in itertools.count(1) if not (name := path.with_name(f"{path.name}.before-{n}")).exists())
    os.rename(path, kept)
    say(f"{path}: was there already, from before the run went back; it is kept as {kept.name}")


def point(link: Path, name: str) -> None:
    """Makes `link` name a checkpoint of its folder."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        # Relative, so that the run's folder can be moved.
        temporary.symlink_to(name)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        temporary.write_text(name + "\n")
        sync_file(temporary)
    # A symlink cannot be changed in place; with the rename there is always one.
    os.replace(temporary, link)
    sync_directory(link.parent)


def point_if_other(link: Path, name: str) -> None:
    """As `point`; changes nothing where the link names the checkpoint already, also in another way."""
    named = named_by(link)
    if named is None or not named.is_dir() or not os.path.samefile(named, link.parent / name):
        point(link, name)


def best_checkpoint(run_dir: Path) -> Path | None:
    """Returns the checkpoint of least validation loss, of those saved right after a validation; None: there is none."""
    named = named_by(run_dir / "best") or run_dir / "best"
    return named if (named / STATE_FILE).is_file() else None


def is_best(run_dir: Path, state: TrainState) -> bool:
    """Whether the validation loss of a state is less than that of the checkpoint that `best` names."""
    if state.val_loss is None or not math.isfinite(state.val_loss):
        return False
    # None also if `best` points to a deleted folder.
    path = best_checkpoint(run_dir)
    try:
        before = None if path is None else read_state(path)[0].val_loss
    except UserError:  # a damaged one is no better
        return True
    return before is None or state.val_loss < before


def delete_old(
    run_dir: Path, config: CheckpointConfig, step: int, say: Callable[[str], None], in_use: Collection[str] = ()
) -> None:
    """Deletes checkpoints, except the newest keep_last, every keep_every_steps-th, and with keep_best the best.

    Those after `step`, the newest of this run, are from before it went back, and stay. The one where the decay of "wsd"
    begins stays, too, since a longer run goes on from it, and so do those in use, which the next call deletes.
    A folder is renamed first, so that a kill in the middle leaves none that looks complete.
    """
    kept = best_checkpoint(run_dir) if config.keep_best else None
    ours = [path for path in saved(run_dir) if step_of(path) <= step]
    for path in ours[: -config.keep_last]:
        if config.keep_every_steps is not None and step_of(path) % config.keep_every_steps == 0:
            continue
        if (kept is not None and path.name == kept.name) or begins_decay(path):
            continue
        if path.name in in_use:
            continue
        doomed = path.with_name(f".{path.name}.deleted")
        if path.is_symlink():
            say(f"{path}: the link is deleted, but not {os.readlink(path)}, which is outside of the run's folder")
        os.rename(path, doomed)
        delete(doomed)
    # exists() follows the link: without keep_best its folder may have been deleted.
    if best_checkpoint(run_dir) is None and not (run_dir / "best").is_dir():
        (run_dir / "best").unlink(missing_ok=True)


def delete(path: Path) -> None:
    """Deletes a folder, or a link to one without the folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tidy(run_dir: Path, say: Callable[[str], None]) -> None:
    """Makes links of `latest` and `best` where they are folders: a copy of the run that followed its links.

    Such a folder becomes its step's where there is none, and is deleted where it equals the one that is there.
    """
    for link in (run_dir / "latest", run_dir / "best"):
        if not link.is_dir() or link.is_symlink():
            continue
        try:
            path = run_dir / f"step-{read_state(link)[0].step:08d}"
        except UserError:
            path = link.with_name(f"{link.name}.damaged")
        if not os.path.lexists(path):
            os.rename(link, path)
        elif contents(path) == contents(link):
            shutil.rmtree(link)
        else:
            path = next(p for n in itertools.count(1) if not (p := link.with_name(f"{link.name}.copy-{n}")).exists())
            os.rename(link, path)
        if re.fullmatch(STEP_NAME, path.name):
            point(link, path.name)
        say(f"{link}: was a folder, as in a copy that followed the links; its checkpoint is {path}")


def contents(path: Path) -> tuple[str, dict[str, int]]:
    """Returns a checkpoint's state.json, which has the checksums, and the sizes of all its files."""
    state = path / STATE_FILE
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    return state.read_text("utf-8", errors="replace") if state.is_file() else "", sizes


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
        delete(path)
