"""Finds a run's checkpoints, and reads state.json as a tree. Torch is not needed, so a wrong path is an error at once.

llm/model/checkpoint.py reads what is in a checkpoint.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from llm.display import tell
from llm.errors import DamagedCheckpoint, UserError
from llm.model import checksums

# There is no conversion between formats: read_tree rejects every other number.
FORMAT_VERSION = 2
UNCHECKED_VERSION = 1
"""The format of earlier releases, the same without checksums."""
MODEL_FILE = "model.safetensors"
STATE_FILE = "state.json"
MAX_STATE_BYTES = 4 << 20
"""A larger state.json is rejected: no run writes one, and parsing it could take all memory."""

DEFAULT_LAST = 5
STEP_NAME = r"step-\d{8}"
MAX_NAME = 255
UNNAMED = "no checkpoint"

# Checkpoints of earlier releases about whose missing checksums stderr already has a line.
_told: set[Path] = set()


def saved(run_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, oldest first."""
    # Exactly eight digits: an unfinished checkpoint is ".step-NNNNNNNN.tmp" (llm.atomic) and must not match.
    return sorted(run_dir.glob("step-" + "[0-9]" * 8))


def step_of(path: Path) -> int:
    """Returns the step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def named_by(link: Path) -> Path | None:
    """Returns the checkpoint that a link names, or a file in its place (on file systems without links).

    None: there is neither. The path may not exist.
    """
    if link.is_symlink():
        return link.parent / os.readlink(link)
    if not link.is_file():
        return None
    with open(link, errors="replace") as file:
        name = file.read(MAX_NAME).strip()
    # A damaged file must not lead anywhere else.
    return link.parent / (name if re.fullmatch(STEP_NAME, name) else UNNAMED)


def newest(run_dir: Path) -> Path | None:
    """Returns the checkpoint that a run goes on from; None: it has none.

    It is the one that `latest` names, so that a user may go back to an earlier one. Where `latest` is a folder (a copy
    that followed the links), or missing, or names what is not there, it is the newest complete one.

    Raises DamagedCheckpoint if `latest` names a folder that is no checkpoint.
    """
    latest = run_dir / "latest"
    named = named_by(latest)
    if named is not None and named.is_dir():
        if not (named / STATE_FILE).is_file():
            raise DamagedCheckpoint(f"{named / STATE_FILE}: missing")
        return _normal(named)
    folders = saved(run_dir) + ([latest] if latest.is_dir() else [])
    complete = {path: step for path in folders if (step := _complete_step(path)) is not None}
    # max takes the first of equal steps: the step's own folder.
    found = max(complete, key=lambda path: complete[path], default=None)
    if named is not None and found is not None:
        tell_once(latest, f"{latest}: names {named.name}, which is not there; the newest complete one is {found.name}")
    return None if found is None else _normal(found)


def _complete_step(path: Path) -> int | None:
    """Returns the step of a checkpoint all of whose files are there; None for any other folder."""
    try:
        tree = read_tree(path)
        files = tree.get("files", [MODEL_FILE] if (path / MODEL_FILE).is_file() else [f"{MODEL_FILE}.index.json"])
        return int(tree["step"]) if all((path / name).is_file() for name in files) else None
    except (UserError, OSError, KeyError, TypeError, ValueError, OverflowError):
        return None


def _normal(path: Path) -> Path:
    # The last part stays: it may be a link to a checkpoint that was moved to another disk.
    return path.parent.resolve() / path.name


def last_checkpoints(run_dir: Path, last: int | None) -> list[Path]:
    """Returns a run's last checkpoints, oldest first, up to the one that `latest` names.

    Later ones are from before the run went back to it. last: their number; None: all, but at most DEFAULT_LAST. Raises
    UserError for fewer than `last`.
    """
    end = newest(run_dir)
    found = [path for path in saved(run_dir) if end is None or path.name <= end.name]
    last = last or max(1, min(DEFAULT_LAST, len(found)))
    if len(found) < last:
        raise UserError(
            f"{run_dir}: holds {len(found)} checkpoints, not {last}: name the folder of a run that has saved, or give "
            "a lower --last; a run keeps checkpoint.keep_last of them"
        )
    return found[-last:]


def locate(path: str | os.PathLike[str]) -> Path:
    """Returns the checkpoint folder for a path: the path itself, or the latest checkpoint in a run's folder.

    Raises UserError if there is none.
    """
    path = Path(path)
    folder = Path(os.path.abspath(path))
    # Of RUN/latest, the checkpoint itself: a running training may change the link.
    if folder.name in ("latest", "best") and (named := named_by(folder)) is not None:
        folder = Path(os.path.abspath(named))
    if (folder / STATE_FILE).is_file():
        return _normal(folder)
    if (found := newest(folder)) is not None:
        return found
    if path.is_symlink() or path.exists():
        raise UserError(f"{path}: {_what_it_is(path)}")
    raise UserError(f"{path}: no such checkpoint; `llm train` writes them under checkpoint.dir")


def _what_it_is(path: Path) -> str:
    """Says what a path without a checkpoint holds, and what to name or do instead."""
    files = {file.name for file in path.iterdir()} if path.is_dir() else set()
    runs = sorted(child.parent.name for child in path.glob("*/run.json"))
    if "run.json" in files:
        return "a run that has no checkpoint yet (checkpoint.every_steps; status.json says how it ended); wait for one"
    if "manifest.json" in files:
        return "a directory of shards, not a checkpoint; name the folder of a run that was trained on it"
    if "config.json" in files and any(file.startswith("model") and "safetensors" in file for file in files):
        return f"a Hugging Face model folder, not a checkpoint; make one of it: llm import --from {path} --out_dir DIR"
    if any(file.endswith(".gguf") for file in files):
        return "an exported GGUF model, not a checkpoint; name the run that it was exported from"
    if runs:
        return f"not a checkpoint, but the parent folder of {len(runs)} runs; name one, such as {path / runs[0]}"
    if path.is_file():
        return "a file; a checkpoint is a folder, step-NNNNNNNN in a run's folder"
    return f"not a checkpoint (no {STATE_FILE} in it); name a step-NNNNNNNN folder or a run's folder"


def read_tree(path: Path) -> dict[str, Any]:
    """Reads state.json. Raises UserError for a damaged file, or one of another format."""
    file = path / STATE_FILE
    try:
        if file.stat().st_size > MAX_STATE_BYTES:
            raise ValueError(f"{file.stat().st_size} bytes")
        tree = json.loads(file.read_bytes())
        # The version is checked before the fields, because fields of another format would be reported as damage.
        version = tree["format_version"]
        if version not in (FORMAT_VERSION, UNCHECKED_VERSION):
            raise UserError(f"{file}: checkpoint format {version!r}; this program reads {FORMAT_VERSION}")
        if version == FORMAT_VERSION and not checksums.is_intact(tree):
            raise ValueError("its checksum does not match")
        return dict(tree)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{file}: missing") from None
    # json.loads raises RecursionError for deep nesting.
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file}: damaged ({type(error).__name__}: {error})") from None


def tell_once(path: Path, line: str) -> None:
    """Writes a line about a path to stderr, once in this process and on rank 0."""
    if path not in _told and os.environ.get("RANK", "0") == "0":
        _told.add(path)
        tell(line, sys.stderr)
