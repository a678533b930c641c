"""Writes files and folders that are complete or absent: under a temporary name, then synced and renamed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llm.errors import UserError
from llm.locks import LOCK_FILE, locked

STAGING = ".incomplete"
"""The folder for files until all of them are complete, inside of the one that they are for."""
MOVING = ".moving"
"""The file in it that lists them, in their order, while they are moved out."""


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable. A rename survives a crash only after its directory is synced."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    # fsync also writes what other descriptors have written, so a read-only descriptor is enough.
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a binary file that appears at `path` only if the block ends without an error. Makes parent folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory, because a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            # flush Python's buffer first, because fsync knows only the kernel's data.
            file.flush()
            os.fsync(file.fileno())
        # The rename comes after fsync; otherwise a power failure could leave the name on an empty file.
        os.replace(temporary, path)
        sync_directory(path.parent)
    # BaseException, because Ctrl-C must not leave a temporary file either.
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text to `path`, completely or not at all."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextmanager
def atomic_directory(path: str | os.PathLike[str], last: str = "config.json") -> Iterator[Path]:
    """Yields an empty temporary directory that becomes `path` if the block ends without an error.

    Every file in it is synced first. A `path` that exists and is not empty is replaced. An empty folder stays the same
    folder, because it may be a mount point, a link or the current directory: its files are moved in, and the one named
    `last` comes last, without which nobody takes the folder for complete.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    into = path.is_dir() and not _contents(path)
    temporary = path / STAGING if into else path.with_name(f".{path.name}.tmp")
    # A killed process may have left its files.
    for name in _moved(path) if into else ():
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        # Synced before the rename, so that after a power failure the final name never has incomplete files.
        for file in temporary.iterdir():
            sync_file(file)
        sync_directory(temporary)
        if into:
            names = sorted((file.name for file in temporary.iterdir()), key=lambda name: (name == last, name))
            atomic_text(temporary / MOVING, "\n".join(names))
            for name in names:
                os.rename(temporary / name, path / name)
                sync_directory(path)
            shutil.rmtree(temporary)
            sync_directory(path)
        elif path.exists():
            # rename does not replace a directory with files, so the old one is moved away first.
            discarded = path.with_name(f".{path.name}.old")
            shutil.rmtree(discarded, ignore_errors=True)
            os.rename(path, discarded)
            os.rename(temporary, path)
            shutil.rmtree(discarded)
        else:
            os.rename(temporary, path)
        sync_directory(path.parent)
    except BaseException as error:
        # An error of a write has no file name, and that of the temporary folder means nothing to a user. An error
        # without a number is a text of ours, which a file name would replace.
        system = isinstance(error, OSError) and error.errno is not None
        if isinstance(error, OSError) and system and str(temporary) in str(error.filename or temporary):
            error.filename, error.filename2 = str(path), None
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def output_directory(out_dir: str | os.PathLike[str], last: str = "config.json") -> Iterator[Path]:
    """As `atomic_directory`, for a folder that a command makes: it is locked meanwhile, and must be absent or empty.

    Raises UserError if it is not, or if another command makes it at this moment.
    """
    path = Path(os.path.realpath(out_dir))
    check_absent(Path(out_dir))
    with locked(path, "another command writes here; wait for it or name another --out_dir"):
        # Again, because another command may have made it since.
        check_absent(Path(out_dir))
        with atomic_directory(path, last) as made:
            yield made


def check_absent(out_dir: Path) -> None:
    """Raises UserError if the folder that a command will write into is not empty."""
    if os.path.lexists(out_dir) and not (out_dir.is_dir() and not _contents(out_dir)):
        raise UserError(f"{out_dir}: exists already; name another --out_dir or delete it")


def _contents(path: Path) -> list[Path]:
    """Returns what a folder holds, without what a killed command, a lock or a new file system has left in it."""
    left = {STAGING, LOCK_FILE, "lost+found", *_moved(path)}
    return [entry for entry in path.iterdir() if entry.name not in left]


def _moved(path: Path) -> list[str]:
    """Returns the files that a killed command was moving into a folder; none if it has moved all of them."""
    with contextlib.suppress(OSError, ValueError):
        names = (path / STAGING / MOVING).read_text("utf-8").split("\n")
        if not (path / names[-1]).exists() and all(name == os.path.basename(name) for name in names):
            return names
    return []
