"""Files and folders that are complete or absent: they are written under a temporary name, synced, and renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llm.errors import UserError


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable. A rename is only safe once the parent directory is synced."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    # fsync writes out what other descriptors have written, so one for reading is enough.
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a binary file that appears at `path` only if the block ends without an error. Parents are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory, because a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            # Python's own buffer first: fsync knows only what the kernel has.
            file.flush()
            os.fsync(file.fileno())
        # The rename comes after fsync: in the other order a power failure could leave the name on an empty file.
        os.replace(temporary, path)
        sync_directory(path.parent)
    # BaseException: Ctrl-C must leave no temporary file either.
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text to `path`: all of it, or nothing."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty temporary directory that becomes `path` if the block ends without an error.

    Every file in it is synced first. An existing `path` is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    # A process that was killed here may have left its files.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        # Before the rename, so that a power failure cannot leave a complete name on incomplete files.
        for file in temporary.iterdir():
            sync_file(file)
        sync_directory(temporary)
        if path.exists():
            # rename does not replace a directory that has files, so the old one moves away first.
            discarded = path.with_name(f".{path.name}.old")
            shutil.rmtree(discarded, ignore_errors=True)
            os.rename(path, discarded)
            os.rename(temporary, path)
            shutil.rmtree(discarded)
        else:
            os.rename(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_absent(out_dir: Path) -> None:
    """Raises UserError if a command would write into a folder that is not empty."""
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise UserError(f"{out_dir}: exists already; name another --out_dir or delete it")
