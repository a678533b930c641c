"""What `llm doctor` checks in the folders of data and checkpoints, alone and between the processes of a launcher."""

import errno
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm.atomic import sync_directory
from llm.config_text import is_url
from llm.errors import UserError
from llm.locks import locked
from llm.tools.doctor_node import Finding

PROBE = ".llm-doctor-"
PROBE_BYTES = 64 * 2**20
BLOCK = 4 * 2**20
READ_BYTES = 256 * 2**20
SLOW_DISK = 20e6
"""Bytes/s below which saving a checkpoint of 125M parameters takes more than a minute."""
FREE_BYTES = 2**30
SEEN_SECONDS = 5.0
"""How long a file of another node may stay unseen: NFS asks for a folder again after some seconds."""


def existing(folder: str | Path) -> Path:
    """Returns the folder, or the nearest one above it that exists."""
    path = Path(folder)
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def check_checkpoints(folder: str, needed: int | None) -> tuple[dict[str, float], list[Finding]]:
    """Writes a file where checkpoints go, and tries what they need: rename, links and locks.

    needed: bytes of the checkpoints that a run keeps; None: not known.

    Returns the rates of writing and reading in bytes/s, and what was found.
    """
    place = existing(folder)
    part, where = "disk", folder if place == Path(folder) else f"{folder} (in {place}, it is not there yet)"
    another = "free some space, or set checkpoint.dir to another folder"
    probe: Path | None = None
    try:
        probe = Path(tempfile.mkdtemp(prefix=PROBE, dir=place))
        written = _write(probe / "probe")
        rates = {"write": written, "read": _read(probe / "probe", PROBE_BYTES)}
        broken = [what for what, works in _abilities(probe) if not works]
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = f"is full: {PROBE_BYTES >> 20} MiB do not fit" if full else f"cannot be written: {error.strerror}"
        return {}, [Finding(part, f"{where} {why}", "wrong", another)]
    finally:
        if probe is not None:
            shutil.rmtree(probe, ignore_errors=True)
    free = shutil.disk_usage(place).free
    held = sum(file.stat().st_size for file in Path(folder).glob("step-*/*") if file.is_file())
    speed = f"writes {rates['write'] / 1e6:,.0f} and reads {rates['read'] / 1e6:,.0f} MB/s, {free / 1e9:.1f} GB free"
    findings = [Finding(part, f"{where} {speed}")]
    if needed is not None and free + held < needed:
        text = f"{folder} has {(free + held) / 1e9:.2f} GB for this run's checkpoints of {needed / 1e9:.2f} GB"
        findings.append(Finding(part, text, "wrong", f"{another}, or lower checkpoint.keep_last"))
    elif free < FREE_BYTES:
        findings.append(Finding(part, f"{folder} is nearly full: {free / 2**20:,.0f} MiB free", "warning", another))
    if rates["write"] < SLOW_DISK:
        mend = "set checkpoint.dir to a faster disk: a save waits for the one before"
        findings.append(Finding(part, f"{folder} is slow", "warning", mend))
    for what in broken:
        mend = "set checkpoint.dir to a file system that has them"
        # Without locks a run still works, but two may write to one folder.
        findings.append(Finding(part, f"{folder}: no {what} there", "warning" if what == "locks" else "wrong", mend))
    if not broken:
        findings.append(Finding(part, f"{folder}: rename, links and locks work"))
    return rates, findings


def _write(path: Path) -> float:
    """Returns bytes/s, until the bytes are on the disk."""
    # Random, because some file systems compress.
    block, begin = os.urandom(BLOCK), time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(PROBE_BYTES // BLOCK):
            left = memoryview(block)
            while left:
                left = left[file.write(left) :]
        os.fsync(file.fileno())
    return PROBE_BYTES / (time.perf_counter() - begin)


def _read(path: Path, most: int) -> float:
    """Returns bytes/s from the disk, as far as the kernel drops what it holds of the file."""
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin, total = time.perf_counter(), 0
        while total < most and (block := file.read(BLOCK)):
            total += len(block)
    return total / (time.perf_counter() - begin)


def _abilities(probe: Path) -> Iterator[tuple[str, bool]]:
    """Yields what checkpoints need of a file system, and whether it works there."""
    (probe / "old").write_text("new")
    (probe / "name").write_text("old")
    os.replace(probe / "old", probe / "name")
    sync_directory(probe)
    yield "renames", (probe / "name").read_text() == "new" and not (probe / "old").exists()
    try:
        (probe / "link").symlink_to("name")
        (probe / "other").symlink_to("nowhere")
        os.replace(probe / "link", probe / "other")
        yield "links", os.readlink(probe / "other") == "name"
    except OSError:
        yield "links", False
    try:
        yield "locks", _is_refused(probe)
    except OSError:
        yield "locks", False


def _is_refused(folder: Path) -> bool:
    """Whether a second lock of a folder is refused while the first is held."""
    with locked(folder, "is held", patient=False):
        return not _is_free(folder)


def _is_free(folder: Path) -> bool:
    try:
        with locked(folder, "is held", patient=False):
            return True
    except UserError:
        return False


def check_data(folder: str) -> tuple[dict[str, float], list[Finding]]:
    """Reads the largest shard; returns the rate in bytes/s, and what was found."""
    # Here, because `llm doctor` has to run where the extension does not load.
    try:
        from llm.data.manifest import MANIFEST_NAME, read_manifest
    except ImportError:
        return {}, []  # which is told elsewhere
    if is_url(folder):
        return {}, [_check_store(folder)]
    if not (Path(folder) / MANIFEST_NAME).exists():
        return {}, [Finding("data", f"{folder}: no shards there yet", mend="llm prepare_data")]
    try:
        manifest = read_manifest(folder)
        shards = [Path(folder) / shard.file for shard in manifest.shards["train"]]
        largest = max(shards, key=lambda path: path.stat().st_size)
        rate = _read(largest, READ_BYTES)
    except (UserError, OSError, ValueError) as error:
        mend = f"llm inspect {folder} --verify tells more; prepare the data again"
        return {}, [Finding("data", f"{folder} cannot be read: {error}", "wrong", mend)]
    text = f"{folder} reads {rate / 1e6:,.0f} MB/s"
    mend = "put the shards on a faster disk: training would wait for them"
    slow = rate < SLOW_DISK and largest.stat().st_size > BLOCK
    return {"data": rate}, [Finding("data", text, "warning", mend) if slow else Finding("data", text)]


def _check_store(url: str) -> Finding:
    from llm.data.object_store import open_manifest

    try:
        manifest = open_manifest(url, "", 0)
    except UserError as error:
        return Finding("data", str(error), "wrong", "training copies the data from there")
    size = sum(shard.bytes for shard in manifest.all_shards)
    return Finding("data", f"{url} answers; {size / 1e9:,.2f} GB are copied to each node before the first step")


def data_hash(folder: str) -> str:
    """Identifies the data in a folder; empty: there are none."""
    try:
        from llm.data.object_store import open_manifest

        return open_manifest(folder, "", 0).dataset_hash
    except (UserError, ImportError):
        return ""


def check_shared(folder: str, rank: int, size: int, gather: Callable[[Any], list[Any]]) -> list[Finding]:
    """Whether all ranks see the same folder, and each other's renames, links and locks there. Collective.

    gather: exchanges a value; returns those of all ranks, in their order.
    """
    place = existing(folder)
    shared = place / f"{PROBE}{gather(secrets.token_hex(4))[0]}"
    try:
        # Every step ends with a gather, also where it failed: the others wait there.
        made = gather(rank == 0 and _succeeds(lambda: shared.mkdir()))[0]
        if not made:
            return [Finding("shared", f"{folder}: rank 0 cannot write there", "wrong", "check its permissions")]
        seen = gather(_is_seen(shared))
        blind = [other for other in range(size) if not seen[other]]
        if blind:
            mend = "mount one file system at this path on every node, or set checkpoint.dir to a folder of such a one"
            text = f"{folder} is not rank 0's folder on {ranks_in_words(blind)}"
            return [Finding("shared", text, "wrong", mend)]
        return list(_common(shared, folder, rank, size, gather))
    finally:
        # Only when nobody looks any more.
        gather(None)
        if rank == 0:
            shutil.rmtree(shared, ignore_errors=True)


def _common(shared: Path, folder: str, rank: int, size: int, gather: Callable[[Any], list[Any]]) -> Iterator[Finding]:
    def mine() -> None:
        (shared / f"new-{rank}").write_text(str(rank))
        os.replace(shared / f"new-{rank}", shared / f"rank-{rank}")
        (shared / f"link-{rank}").symlink_to(f"rank-{rank}")

    wrote = gather(_succeeds(mine))
    links = [shared / f"link-{other}" for other in range(size)]
    finds = gather(all(_is_seen(link) and _succeeds(link.read_text) for link in links))
    for failed, what in ((wrote, "cannot write there"), (finds, "do not see what the others renamed and linked")):
        if ranks := [other for other in range(size) if not failed[other]]:
            text = f"{folder}: {ranks_in_words(ranks)} {what}"
            yield Finding("shared", text, "wrong", "check the permissions and the mount of its file system")
    if rank == 0:
        with locked(shared, "is held", patient=False):
            gather(None)
            free = gather(False)
    else:
        gather(None)
        free = gather(_is_free(shared))
    if any(free):
        ranks = [other for other in range(size) if free[other]]
        text = f"{folder}: {ranks_in_words(ranks)} got a lock that rank 0 holds"
        yield Finding("shared", text, "warning", "mount it with locks (Lustre: -o flock; NFS: version 4)")
    elif all(wrote) and all(finds):
        yield Finding("shared", f"{folder} is the same folder on all {size} ranks; rename, links and locks work")


def _is_seen(path: Path) -> bool:
    end = time.monotonic() + SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _succeeds(call: Callable[[], object]) -> bool:
    try:
        call()
    except OSError:
        return False
    return True


def ranks_in_words(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {named}"
