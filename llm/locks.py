"""Locks: of two commands that write to the same place at the same time, the second ends with an error.

A lock is the kernel's (flock), which it releases however the process ends. Some file systems have none (Lustre without
the mount option flock, some NFS). There a file next to what is written takes its place: it names the process that holds
the lock, which also renews its time. A process that no longer exists, or on another host has not renewed the file for a
while, holds nothing.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from llm.errors import UserError, visible

NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""What flock fails with on file systems without it."""
LOCK_FILE = ".lock"
RENEWED_SECONDS = 5
WATCHED_SECONDS = 20
"""Another host's lock that is not renewed for this long belongs to a process that has ended."""


class Busy(UserError):
    """Another process holds the lock."""


class Lock:
    """A lock that is held. `path`: the locked folder, also after it was renamed, or the locked file."""

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self._path, self._descriptor = path, descriptor

    @property
    def path(self) -> Path:
        """Raises FileNotFoundError if the folder was deleted."""
        if self._descriptor is None or not os.path.isdir("/proc/self/fd"):
            return self._path
        now = os.readlink(f"/proc/self/fd/{self._descriptor}")
        # The path as the user wrote it, while it leads to the same folder.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._descriptor)):
                return self._path
        if not os.path.isdir(now):
            raise FileNotFoundError(errno.ENOENT, "the folder was deleted", str(self._path))
        return Path(now)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], busy: str, *, patient: bool = True) -> Iterator[Lock]:
    """Locks a folder that exists, or else the name of what will be written: a file or a folder.

    Args:
        busy: the end of the error message if another process holds the lock.
        patient: whether to watch another host's lock file for a while, if the file system has no flock.

    Raises Busy, a UserError, if another process holds the lock.
    """
    path = Path(path)
    if path.is_dir():
        target, created = path, False
    else:
        target, created = path.with_name(f".{path.name}.lock"), True
        target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _open(target, created)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"{path}: {busy}") from None
            except OSError as error:
                if created:
                    target.unlink(missing_ok=True)
                if error.errno not in NO_FLOCK:
                    raise
                with _lock_file(path, busy, patient):
                    line = f"{path}: its file system has no flock ({error.strerror}); a lock file takes its place"
                    print(visible(line), file=sys.stderr, flush=True)
                    yield Lock(path, None if created else descriptor)
                return
            # Whoever held it before may have deleted the file since it was opened here: then another is made.
            if not created or _is_at(descriptor, target):
                break
            os.close(descriptor)
            descriptor = _open(target, created)
        try:
            yield Lock(path, None if created else descriptor)
        finally:
            if created:
                target.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _open(target: Path, created: bool) -> int:
    if not created:
        return os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return os.open(target, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


# Without flock.


@contextlib.contextmanager
def _lock_file(path: Path, busy: str, patient: bool) -> Iterator[None]:
    file = path / LOCK_FILE if path.is_dir() else path.with_name(f".{path.name}.lock.held")
    mine = json.dumps({"host": platform.node(), "pid": os.getpid(), "started": _started(os.getpid())})
    # O_EXCL: of several processes only one makes the file.
    while True:
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            break
        except FileExistsError:
            if _is_held(file, patient):
                raise Busy(f"{path}: {busy} ({file} names it)") from None
            file.unlink(missing_ok=True)
    with os.fdopen(descriptor, "w") as held:
        held.write(mine)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEWED_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(file)

    thread = threading.Thread(target=renew, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        file.unlink(missing_ok=True)


def _is_held(file: Path, patient: bool) -> bool:
    try:
        holder = json.loads(file.read_bytes())
        host, pid, started = holder["host"], int(holder["pid"]), holder["started"]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        host, pid, started = "", 0, ""  # it is being written, or was cut off: only its time tells
    if host == platform.node():
        return _started(pid) == started
    before = _renewed(file)
    end = time.monotonic() + (WATCHED_SECONDS if patient else 0)
    while time.monotonic() < end:
        if _renewed(file) != before:
            return True
        time.sleep(0.5)
    return not patient or _renewed(file) != before


def _renewed(file: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_mtime_ns
    return 0


def _started(pid: int) -> str:
    """Returns when a process of this host was started, which tells it from a later one with its number; "": none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The name, in parentheses, may contain anything; state is field 3 and the start time field 22.
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]
