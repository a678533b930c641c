"""Writes files and folders that are complete or absent: under a temporary name, then synced and renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llm.errors import UserError


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
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty temporary directory that becomes `path` if the block ends without an error.

    Every file in it is synced first. An existing `path` is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    # A killed process may have left its files.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        # Synced before the rename, so that after a power failure the final name never has incomplete files.
        for file in temporary.iterdir():
            sync_file(file)
        sync_directory(temporary)
        if path.exists():
            # rename does not replace a directory with files, so the old one is moved away first.
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
    """Raises UserError if the folder that a command will write into is not empty."""
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise UserError(f"{out_dir}: exists already; name another --out_dir or delete it")
