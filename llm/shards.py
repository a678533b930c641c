"""Shard files, their manifest, and the loader that turns them into batches. The C++ of csrc/ does the work.

A data set is a directory with `manifest.json`, `tokenizer.model` and shards (csrc/shard.hpp describes their bytes). It
stores documents end to end; rows are cut when reading, so the same shards serve any length: row r of length S is
tokens[r*S .. r*S + S] of its shard, the last token shared with the next row.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from llm import _shards
from llm.atomic import atomic_text, sync_directory
from llm.errors import UserError
from llm.mixture import PERIOD, Mixture, lay_out

if TYPE_CHECKING:  # writing shards, in many processes, needs no torch
    import numpy as np
    import torch
    from numpy.typing import NDArray

FORMAT_VERSION: int = _shards.FORMAT_VERSION
ORDER_VERSION: str = _shards.ORDER_VERSION
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "val")
# Memory that a loader may use for document indexes: 8 million documents. The rest are read from the files as needed.
INDEX_BYTES = 64 << 20


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest knows of a shard."""

    file: str  # its name in the directory
    tokens: int
    documents: int  # that begin in it
    bytes: int
    sha256: str  # of the whole file
    header_crc32c: int  # stands for the whole file as well, and is compared whenever the shard is opened


class ShardWriter:
    """Writes one shard as a stream. The file appears at `path` when `finish` returns, and not at all otherwise.

    A context manager: leaving the block without `finish` removes what was written.

    Args:
        path: where the shard shall be; its directory exists.
        vocab_size: ids are below it. It decides the width of a token: 2 bytes iff vocab_size <= 65536, else 4.
        tokenizer_sha256: hex digest of the tokenizer model.

    Raises:
        OSError: on any failure to write (full disk, no permission), here and in the methods; names `path`.
    """

    def __init__(self, path: str | os.PathLike[str], *, vocab_size: int, tokenizer_sha256: str) -> None:
        self.path = Path(path)
        self._temporary = self.path.with_name(f".{self.path.name}.tmp")
        self._pid = os.getpid()
        self._open = False
        with self._naming_path():
            self._core = _shards.ShardWriter(os.fsencode(self._temporary), vocab_size, bytes.fromhex(tokenizer_sha256))
            self._open = True

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._core.tokens

    @property
    def documents(self) -> int:
        """Document starts so far."""
        return self._core.documents

    def append(
        self,
        tokens: NDArray[np.uint16] | NDArray[np.uint32] | NDArray[np.int32],
        document_starts: NDArray[np.uint64],
    ) -> None:
        """Adds tokens to the end.

        Args:
            tokens: [n] ids.
            document_starts: [d] uint64, ascending: the offsets in *these* tokens at which a document begins. A document
                may begin in an earlier call, or in an earlier shard.

        Raises:
            ValueError: an id is not in the vocabulary, or a start is out of order or range; nothing was added.
        """
        with self._naming_path():
            self._core.append(tokens, document_starts)

    def finish(self) -> ShardInfo:
        """Completes the file, makes it durable and gives it its name."""
        with self._naming_path():
            header_crc32c = self._core.finish()
            with open(self._temporary, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.seek(0, os.SEEK_END)
            os.replace(self._temporary, self.path)
            self._open = False
            sync_directory(self.path.parent)
        return ShardInfo(self.path.name, self.tokens, self.documents, size, sha256, header_crc32c)

    def abort(self) -> None:
        """Removes an unfinished file; does nothing after `finish`."""
        # A forked child that drops its copy must not remove the parent's file.
        if self._open and self._pid == os.getpid():
            self._open = False
            self._core.abandon()
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def __del__(self) -> None:
        self.abort()

    @contextmanager
    def _naming_path(self) -> Iterator[None]:
        """After an OSError nothing is left, and the error names the file that the caller knows."""
        try:
            yield
        except OSError as error:
            self.abort()
            error.filename, error.filename2 = str(self.path), None
            raise


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says about a data set."""

    path: Path  # the directory
    format_version: int
    vocab_size: int
    tokenizer_sha256: str
    seq_len: int  # what the data were prepared for: the default of data.seq_len
    packing: dict[str, Any]  # the settings that decided which tokens are stored, and in which split
    shards: dict[str, tuple[ShardInfo, ...]]  # "train", "val"
    counters: dict[str, Any]
    dataset_hash: str

    def rows(self, split: str, seq_len: int) -> int:
        """How many rows of `seq_len` tokens the split holds."""
        return sum(_rows(shard, seq_len) for shard in self.shards[split])

    def unused_tokens(self, split: str, seq_len: int) -> int:
        """Tokens in no row: what follows each shard's last full one."""
        return sum(
            shard.tokens - (rows * seq_len + 1 if (rows := _rows(shard, seq_len)) else 0)
            for shard in self.shards[split]
        )


def _rows(shard: ShardInfo, seq_len: int) -> int:
    return max(0, (shard.tokens - 1) // seq_len)


def dataset_hash(
    *, tokenizer_sha256: str, packing: Mapping[str, Any], shards: Mapping[str, Sequence[ShardInfo]]
) -> str:
    """The identity of a data set's contents: hex sha256. No path, time or host goes into it."""
    identity = {
        "format_version": FORMAT_VERSION,
        "tokenizer_sha256": tokenizer_sha256,
        "packing": packing,
        "shards": {split: [[shard.sha256, shard.tokens] for shard in shards[split]] for split in SPLITS},
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_manifest(
    directory: str | os.PathLike[str],
    *,
    vocab_size: int,
    tokenizer_sha256: str,
    seq_len: int,
    packing: Mapping[str, Any],
    shards: Mapping[str, Sequence[ShardInfo]],
    counters: Mapping[str, Any],
) -> Manifest:
    """Writes `manifest.json`, the last file of a data set: with it the directory is complete.

    Args:
        packing: JSON values that decided the contents (document mode, split rule); part of the hash.
        shards: "train" and "val", in order.
        counters: JSON values for people (documents, bytes, what was dropped); not part of the hash.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "dataset_hash": dataset_hash(tokenizer_sha256=tokenizer_sha256, packing=packing, shards=shards),
        "vocab_size": vocab_size,
        "tokenizer_sha256": tokenizer_sha256,
        "seq_len": seq_len,
        "packing": packing,
        "counters": counters,
        "shards": {split: [asdict(shard) for shard in shards[split]] for split in SPLITS},
    }
    atomic_text(Path(directory) / MANIFEST_NAME, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return read_manifest(directory)


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Reads and checks `manifest.json`; the shards themselves are not touched.

    Raises:
        UserError: there is no such directory or no manifest in it, or it is damaged, of another version, or changed.
    """
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if not directory.exists():
            raise UserError(f"{directory}: no such directory; make the shards with `llm prepare_data`") from None
        if not directory.is_dir():
            raise UserError(f"{directory}: not a directory; name the one that `llm prepare_data` made") from None
        raise UserError(
            f"{directory}: holds no {MANIFEST_NAME}: `llm prepare_data` was interrupted or never ran here; run it"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise UserError(f"{path}: not JSON ({error}); run `llm prepare_data` again") from None
    if not isinstance(content, dict) or "format_version" not in content:
        raise UserError(f"{path}: not the manifest of a data set; run `llm prepare_data` again")
    if content["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: shard format version {content['format_version']!r}, but this program reads version "
            f"{FORMAT_VERSION}; run `llm prepare_data` again"
        )
    try:
        shards = {split: tuple(_shard_info(shard) for shard in content["shards"][split]) for split in SPLITS}
        for split in SPLITS:
            _integer(sum(shard.tokens for shard in shards[split]))
        manifest = Manifest(
            path=directory,
            format_version=content["format_version"],
            vocab_size=_integer(content["vocab_size"]),
            tokenizer_sha256=_digest(content["tokenizer_sha256"]),
            seq_len=_integer(content["seq_len"]),
            packing=dict(content["packing"]),
            shards=shards,
            counters=dict(content["counters"]),
            dataset_hash=_digest(content["dataset_hash"]),
        )
        expected = dataset_hash(tokenizer_sha256=manifest.tokenizer_sha256, packing=manifest.packing, shards=shards)
    except KeyError as error:
        raise UserError(f"{path}: the key {error} is missing; run `llm prepare_data` again") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}; run `llm prepare_data` again") from None
    if manifest.dataset_hash != expected:
        raise UserError(
            f"{path}: dataset_hash does not match the contents: it was changed; run `llm prepare_data` again"
        )
    return manifest


def _shard_info(entry: Mapping[str, Any]) -> ShardInfo:
    info = ShardInfo(**{field.name: entry[field.name] for field in fields(ShardInfo)})
    name = info.file
    if not isinstance(name, str) or not name.isprintable() or name != os.path.basename(name) or name in ("", ".", ".."):
        raise ValueError(f"{info.file!r} is not the name of a file in this directory")
    for name in ("tokens", "documents", "bytes", "header_crc32c"):
        _integer(entry[name])
    if info.header_crc32c >= 2**32:
        raise ValueError(f"{info.header_crc32c} where a crc32c is due")
    _digest(info.sha256)
    return info


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} where a count is due")
    return value


def _digest(value: Any) -> str:
    if not isinstance(value, str) or len(value) != 64 or len(bytes.fromhex(value)) != 32:
        raise ValueError(f"{value!r} where a sha256 is due")
    return value


def verify_shard(manifest: Manifest, shard: ShardInfo, bos_id: int, eos_id: int) -> list[str]:
    """All that is wrong with a shard, a line each, from reading it whole; an empty list where it is whole.

    Checked are the header against the manifest, the checksum of every block, the range of every id, the order of the
    document starts, and that BOS stands where documents begin, after an EOS, and nowhere else.
    """
    return _shards.verify_shard(_core_spec(manifest, shard), *_core_dataset(manifest), bos_id, eos_id)


def document_starts(manifest: Manifest, shard: ShardInfo) -> NDArray[np.uint64]:
    """The index of the first token of every document that begins in the shard: uint64 [documents], ascending.

    Raises:
        UserError: the shard is missing, damaged or not the one in the manifest.
    """
    return _shards.document_starts(_core_spec(manifest, shard), *_core_dataset(manifest))


def _core_spec(manifest: Manifest, shard: ShardInfo) -> tuple[bytes, int, int, int, int]:
    path = os.fsencode(manifest.path / shard.file)
    return path, shard.tokens, shard.documents, shard.bytes, shard.header_crc32c


def _core_dataset(manifest: Manifest) -> tuple[int, bytes]:
    return manifest.vocab_size, bytes.fromhex(manifest.tokenizer_sha256)


def row_of(seed: int, epoch: int, rows: int, index: int) -> int:
    """The row at place `index` of an epoch: a pseudo-random permutation of range(rows), computed in O(1)."""
    return _shards.row_of(seed, epoch, rows, index)


class Batch(NamedTuple):
    """A micro-batch of B rows of S tokens, in memory that the loader uses again."""

    input_ids: torch.Tensor  # int64 [B, S]
    labels: torch.Tensor  # int64 [B, S]: the next token, -100 where that begins a document and in empty rows
    doc_start: (
        torch.Tensor
    )  # int32 [B, S]: the index in the row where the token's document begins, 0 if it began before


class Loader:
    """An iterator over one rank's micro-batches; threads fill them ahead of time.

    The rows of all epochs stand in one infinite sequence of positions: with N rows, position p is row
    permutation(seed, p div N) of (p mod N), or row p mod N without `shuffle`. In the training split of a mixture,
    llm.mixture says which source position p belongs to and how many of its rows stand before, c; source s is permuted
    with seed + s, and c takes the place of p. Elsewhere the sources' rows follow each other, as one source.

    The step that begins at position c takes [c, c + global_batch); the next one begins at c + global_batch. In it, slot
    b of micro-batch m on rank r is position c + (m*world_size + r)*micro_batch + b where that lies in the step and
    below `end`, else an empty row: ids 0, labels -100, doc_start 0. So world size, micro-batch, threads and prefetch
    change nothing in what a step sees, and a run is continued by giving the position where it stood.

    A batch stays valid through the next `prefetch - 1` calls of next(); then its memory is filled anew. After a fork
    the child's copy goes on by itself from where the parent's stood. Close it, use it as a context manager, or just
    drop it.

    Args:
        data: a data set, or a mixture of several.
        split: "train" or "val".
        seq_len: tokens a row, S.
        global_batch: rows a step, over all ranks.
        micro_batch: rows a batch, B.
        position: where the first step begins.
        end: the first position that is not read; the iterator stops after the step that covers it. None: endless.
        threads: that read and fill; each needs one core only while it works.
        prefetch: batches kept ready; twice as many are in memory.
        io: "pread", or "mmap": no system call for a row, but a shard that shrinks or a disk that fails while it is in
            use ends the process with SIGBUS, where pread gives an error.
        pin_memory: page-locked batches, for asynchronous copies to a GPU.

    Raises:
        UserError: the split, or one source's training split, has no row of that length. From next() and targets(): a
            shard is missing, damaged, of another version or tokenizer, or not the one in the manifest; names the file.
    """

    def __init__(
        self,
        data: Manifest | Mixture,
        split: str,
        *,
        seq_len: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        position: int = 0,
        shuffle: bool = True,
        end: int | None = None,
        threads: int = 2,
        prefetch: int = 4,
        io: Literal["pread", "mmap"] = "pread",
        pin_memory: bool = False,
    ) -> None:
        for name, value, low, high in (
            ("seq_len", seq_len, 1, 2**31),
            ("seed", seed, 0, 2**64),
            ("global_batch", global_batch, 1, 2**31),
            ("micro_batch", micro_batch, 1, 2**31),
            ("world_size", world_size, 1, 2**31),
            ("rank", rank, 0, world_size),
            ("position", position, 0, 2**62),
            ("end", end or 0, 0, 2**62),
            ("threads", threads, 1, 1025),
            ("prefetch", prefetch, 1, 2**16),
        ):
            if not low <= value < high:
                raise ValueError(f"{name} is {value}, not in [{low}, {high})")
        import torch

        mixture = data if isinstance(data, Mixture) else Mixture((data,), (PERIOD,))
        mixed = split == "train" and len(mixture.sources) > 1
        for manifest in mixture.sources:
            if manifest.rows(split, seq_len) == 0 and (mixed or mixture.rows(split, seq_len) == 0):
                longest = max((shard.tokens for shard in manifest.shards[split]), default=0)
                raise UserError(
                    f"{manifest.path}: seq_len {seq_len} is longer than the data: a row needs {seq_len + 1} tokens, "
                    f"and the longest {split} shard has {longest}; lower data.seq_len, or prepare more text"
                )
        shards = [_core_spec(source, shard) for source in mixture.sources for shard in source.shards[split]]
        vocab_size, tokenizer_sha256 = _core_dataset(mixture.sources[0])
        self.rows = mixture.rows(split, seq_len)
        self.micro_batches = -(-global_batch // (micro_batch * world_size))
        shape = (micro_batch, seq_len)
        self._batches = [
            Batch(
                torch.empty(shape, dtype=torch.int64, pin_memory=pin_memory),
                torch.empty(shape, dtype=torch.int64, pin_memory=pin_memory),
                torch.empty(shape, dtype=torch.int32, pin_memory=pin_memory),
            )
            for _ in range(_shards.slots_needed(prefetch))
        ]
        self._core = _shards.Loader(
            vocab_size=vocab_size,
            tokenizer_sha256=tokenizer_sha256,
            shards=shards,
            slots=[
                (batch.input_ids.data_ptr(), batch.labels.data_ptr(), batch.doc_start.data_ptr())
                for batch in self._batches
            ],
            memory=self._batches,
            seq_len=seq_len,
            seed=seed,
            global_batch=global_batch,
            micro_batch=micro_batch,
            rank=rank,
            world_size=world_size,
            position=position,
            end=end,
            shuffle=shuffle,
            threads=threads,
            prefetch=prefetch,
            index_bytes=INDEX_BYTES,
            mapped=io == "mmap",
            source_shards=[len(source.shards[split]) for source in mixture.sources] if mixed else [len(shards)],
            period=lay_out(mixture.counts).tolist() if mixed else [0],
        )
        # Also at exit: no thread may outlive the interpreter.
        weakref.finalize(self, self._core.close)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return self._batches[self._core.next()]

    def targets(self, position: int, count: int) -> int:
        """The number of labels that are not -100 at positions [position, position + count), those from `end` on left
        out. Read from the document index alone, so that every rank knows a step's before its first micro-batch.
        """
        return self._core.targets(position, count)

    def close(self) -> None:
        """Ends the threads. Batches that were handed out keep their values."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
