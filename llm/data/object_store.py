"""Data sets in an object store (s3://, gs://, hf://, whatever fsspec knows): each is copied before it is read.

Training reads every shard from its first step on, so the whole data set comes first, into a folder of data.cache:

data.cache/
    NAME-HASH/              the last part of the URL, and the beginning of dataset_hash
        train-00000.bin     .train-00000.bin.part until it is whole and its sha256 is the manifest's
        tokenizer.model
        manifest.json       written last: a folder that has it is complete, and the next run uses it again

The contents decide the folder, so a data set that changes in the store never changes a copy that a run reads.
"""

import contextlib
import hashlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llm.config import DataConfig, SourceConfig
from llm.config_text import is_url
from llm.data.manifest import MANIFEST_NAME, Manifest, ShardInfo, parse_manifest, read_manifest, write_manifest
from llm.data.mixture import Mixture, mix_stages
from llm.data.tokenizer import load_tokenizer
from llm.display import Display, tell
from llm.errors import UserError
from llm.locks import Busy, locked

T = TypeVar("T")

STREAMS = 8
"""Files that are copied at the same time."""
PIECE = 16 * 2**20
"""Bytes of one request. What has come of a file is kept, so a failure costs a piece."""
CHECKSUM_TRIES = 3
"""How often a file is fetched whose checksum is wrong: a line may damage one, the store damages all."""
LONGEST_PAUSE = 30.0
"""Seconds between two tries at most; the first pause is one second, and each is twice the one before."""
NEWS_SECONDS = 60.0
"""Seconds between two lines about the progress, or about failures."""
LASTING = (
    *(FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError),
    *(ImportError, ValueError, TypeError),
)
"""Errors that asking again does not mend."""


def open_manifest(path: str, cache: str, retry_minutes: float) -> Manifest:
    """Reads the manifest of a directory or a URL. That of a URL names the folder of its copy, there or not.

    Args:
        path, cache, retry_minutes: data.path, data.cache and data.retry_minutes.

    Raises UserError as `read_manifest`, and if the store does not answer.
    """
    if not is_url(path):
        return read_manifest(path)
    store = _Store(path, retry_minutes, partial(tell, file=sys.stderr), threading.Event())
    manifest = parse_manifest(store.read_all(MANIFEST_NAME), Path(cache), store.name(MANIFEST_NAME))
    name = re.sub(r"[^\w.-]", "_", path.rstrip("/").rpartition("/")[2])
    return replace(manifest, path=Path(cache, f"{name}-{manifest.dataset_hash[:12]}"), url=path)


def read_data(config: DataConfig) -> Mixture:
    """Reads the manifest of every directory that the config names, also in object stores.

    Raises UserError if one is missing.
    """

    def read(source: SourceConfig) -> Manifest:
        return open_manifest(source.path, config.cache, config.retry_minutes)

    return mix_stages(
        [
            (from_tokens, list(map(read, sources)), [source.weight for source in sources])
            for from_tokens, sources in config.mixtures
        ]
    )


def is_copied(data: Sequence[Manifest]) -> bool:
    """Whether this machine has all of these data sets."""
    return not any(source.url and (_missing(source) or not _has_others(source)) for source in data)


def _has_others(manifest: Manifest) -> bool:
    return all((manifest.path / file).is_file() for file in (MANIFEST_NAME, *manifest.tokenizer_files))


def _missing(manifest: Manifest) -> list[ShardInfo]:
    return [shard for shard in manifest.all_shards if _size(manifest.path / shard.file) != shard.bytes]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def copy(data: Sequence[Manifest], config: DataConfig, display: Display, stop: threading.Event) -> None:
    """Copies those data sets that are in an object store; returns when each is complete and its checksums are right.

    Of several processes that copy into one folder, one works and the others wait. A copy that was interrupted goes on.

    Args:
        display: shows the progress.
        stop: ends the work, without an error.

    Raises UserError, with the name of the file, if the store fails for data.retry_minutes, or its files are not those
    of the manifest; and if the disk has no room, before anything is copied.
    """
    remote = [source for source in data if source.url]
    for source in remote:
        if is_copied([source]):
            display.line(f"data        {source.url} is in {source.path} already")
    waiting = [source for source in remote if not is_copied([source])]
    _check_room(waiting, config.cache)
    for source in waiting:
        source.path.mkdir(parents=True, exist_ok=True)
        with _alone(source, display, stop):
            if not stop.is_set() and not is_copied([source]):  # else another process has done it
                _Copy(source, config.retry_minutes, display, stop).make()


def _check_room(data: Sequence[Manifest], cache: str) -> None:
    needed = sum(shard.bytes - _size(_part(source, shard.file)) for source in data for shard in _missing(source))
    if not data:
        return
    Path(cache).mkdir(parents=True, exist_ok=True)
    if needed > (free := shutil.disk_usage(cache).free):
        raise UserError(
            f"{cache}: {needed / 1e9:,.2f} GB of {' and '.join(source.url for source in data)} are to be copied, and "
            f"{free / 1e9:,.2f} GB are free; name a folder on another disk, data.cache=DIR"
        )


@contextlib.contextmanager
def _alone(source: Manifest, display: Display, stop: threading.Event) -> Iterator[None]:
    """Waits until no other process copies into the folder."""
    with contextlib.ExitStack() as held:
        told = False
        while not stop.is_set():
            try:
                held.enter_context(locked(source.path, "another process copies"))
                break
            except Busy:
                if not told:
                    display.line(f"data        waiting for another process that copies to {source.path}")
                told = True
                stop.wait(1)
        yield


def _part(source: Manifest, file: str) -> Path:
    return source.path / f".{file}.part"


class _Stopped(Exception):
    """The caller wants no more."""


class _Copy:
    """The copying of one data set."""

    def __init__(self, source: Manifest, retry_minutes: float, display: Display, stop: threading.Event) -> None:
        self._source, self._display, self._stop = source, display, stop
        self._store = _Store(source.url, retry_minutes, display.line, stop)
        self._shards = sorted(_missing(source), key=lambda shard: -shard.bytes)
        self._total = sum(shard.bytes for shard in self._shards)
        self._done = 0
        self._counting = threading.Lock()
        self._begin = self._told = time.monotonic()

    def make(self) -> None:
        source, display = self._source, self._display
        size = f"{len(self._shards)} shards, {self._total / 1e9:,.2f} GB"
        display.line(f"data        copying {source.url} to {source.path}: {size}")
        display.begin("copying", self._total)
        # Else a folder whose shards were lost would count as complete while they come.
        (source.path / MANIFEST_NAME).unlink(missing_ok=True)
        with ThreadPoolExecutor(STREAMS, "copy") as pool:
            futures = [pool.submit(self._copy_shard, shard) for shard in self._shards]
            try:
                self._copy_tokenizer()
                for future in as_completed(futures):
                    future.result()
            except BaseException as error:
                self._stop.set()  # the other streams
                pool.shutdown(cancel_futures=True)
                if isinstance(error, _Stopped):
                    return
                raise
        write_manifest(
            source.path,
            vocab_size=source.vocab_size,
            tokenizer_sha256=source.tokenizer_sha256,
            seq_len=source.seq_len,
            packing=source.packing,
            shards=source.shards,
            counters=source.counters,
            tokenizer=source.tokenizer,
        )
        seconds = time.monotonic() - self._begin
        rate = f"{self._total / seconds / 1e6:,.0f} MB/s"
        display.line(f"data        copied {self._total / 1e9:,.2f} GB in {seconds:,.0f} s, {rate}")

    def _copy_shard(self, shard: ShardInfo) -> None:
        name, part = self._store.name(shard.file), _part(self._source, shard.file)
        if (size := self._store.size(shard.file)) != shard.bytes:
            raise UserError(
                f"{name}: has {size:,} bytes, and {shard.bytes:,} by its manifest; copy the data set to the store again"
            )
        for _ in range(CHECKSUM_TRIES):
            self._fetch(shard, part)
            with open(part, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                    os.replace(part, self._source.path / shard.file)
                    return
            part.unlink()
            self._count(-shard.bytes)
            self._display.line(f"data        {name}: the checksum of what has come is wrong; fetching it again")
        raise UserError(
            f"{name}: came {CHECKSUM_TRIES} times with another sha256 than its manifest's; copy the data set to the "
            "store again"
        )

    def _fetch(self, shard: ShardInfo, part: Path) -> None:
        """Completes a file of which some bytes may be there."""
        with open(part, "ab") as file:
            if file.tell() > shard.bytes:
                file.truncate(0)
            self._count(at := os.fstat(file.fileno()).st_size)
            while at < shard.bytes:
                content = self._store.read(shard.file, at, min(at + PIECE, shard.bytes))
                file.write(content)
                at += len(content)
                self._count(len(content))
            file.flush()
            os.fsync(file.fileno())

    def _copy_tokenizer(self) -> None:
        for _ in range(CHECKSUM_TRIES):
            for file in self._source.tokenizer_files:
                (self._source.path / file).write_bytes(self._store.read_all(file))
            with contextlib.suppress(UserError):  # one that cannot be read is another one, too
                if load_tokenizer(self._source.path).sha256 == self._source.tokenizer_sha256:
                    return
        raise UserError(
            f"{self._store.name(self._source.tokenizer_files[0])}: not the tokenizer that the shards were made with; "
            "copy the data set to the store again"
        )

    def _count(self, size: int) -> None:
        with self._counting:
            self._done += size
            self._display.update(self._done)
            if (now := time.monotonic()) - self._told > NEWS_SECONDS:
                self._told = now
                self._display.line(f"data        {self._done / 1e9:,.2f} of {self._total / 1e9:,.2f} GB are here")


class _Store:
    """The files under a URL. What fails is asked for again, until nothing has come for `minutes`."""

    def __init__(self, url: str, minutes: float, say: Callable[[str], None], stop: threading.Event) -> None:
        self._url, self._minutes, self._say, self._stop = url.rstrip("/"), minutes, say, stop
        self._told = -NEWS_SECONDS
        self._files, self._folder = _file_system(self._url)

    def name(self, file: str) -> str:
        return f"{self._url}/{file}"

    def size(self, file: str) -> int:
        return self._ask(file, lambda path: int(self._files.info(path)["size"]))

    def read_all(self, file: str) -> bytes:
        size, content = self.size(file), b""
        while len(content) < size:
            content += self.read(file, len(content), size)
        return content

    def read(self, file: str, begin: int, end: int) -> bytes:
        """Returns bytes of a file from `begin` on: at least one, at most to `end`."""

        def read(path: str) -> bytes:
            content: bytes = self._files.cat_file(path, start=begin, end=end)
            if not 0 < len(content) <= end - begin:
                raise OSError(f"{len(content)} bytes came instead of {end - begin}")
            return content

        return self._ask(file, read)

    def _ask(self, file: str, question: Callable[[str], T]) -> T:
        begin, pause = time.monotonic(), 1.0
        while not self._stop.is_set():
            try:
                return question(f"{self._folder}/{file}")
            # Each store has exceptions of its own.
            except Exception as error:
                problem = " ".join(f"{type(error).__name__}: {error}".split())
                if isinstance(error, LASTING) or "Credentials" in type(error).__name__:
                    raise UserError(f"{self.name(file)}: {_way_out(error, problem)}") from None
            left = begin + 60 * self._minutes - time.monotonic()
            if left <= 0:
                raise UserError(
                    f"{self.name(file)}: nothing has come for {self._minutes:g} minutes (data.retry_minutes): "
                    f"{problem}; the same command goes on with what is here"
                )
            self._tell(f"{self.name(file)}: {problem}; asked again for up to {left / 60:.1f} minutes")
            self._stop.wait(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)
        raise _Stopped

    def _tell(self, line: str) -> None:
        # Once a minute, not for every piece of every stream.
        if (now := time.monotonic()) - self._told >= NEWS_SECONDS:
            self._told = now
            self._say(f"data        {line}")


def _file_system(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system for a URL, and the folder in it."""
    # Here, because most runs read folders of this machine.
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    try:
        return url_to_fs(url)
    except ImportError as error:
        package = known_implementations[url.partition("://")[0]]["class"].partition(".")[0]
        wanted = "'llm-from-scratch[cloud]'" if package == "s3fs" else package
        raise UserError(f"{url}: {error}: pip install {wanted}") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}; name a store that fsspec knows, such as s3://, gs:// or hf://") from None


def _way_out(error: Exception, problem: str) -> str:
    if isinstance(error, FileNotFoundError):
        return "the store has no such file; name the URL of a directory that `llm prepare_data` made"
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return f"the store refuses it ({problem}); give this user the right to read it, as the store's own program asks"
    return problem
