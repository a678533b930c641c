"""Shard files, their manifest, and the loader that makes batches from them. A thin layer over csrc/shards/.

A data set is a directory with `manifest.json`, the tokenizer and shards (csrc/shards/shard.hpp describes their
layout). It stores concatenated documents. Sequences are cut when they are read, so the same shards can be read at any
length: sequence r of length S is tokens[r*S .. r*S + S] of its shard; the last token is shared with the next sequence.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from llm.atomic import sync_directory
from llm.data import _shards
from llm.data._shards import CRC32C_IMPLEMENTATION, ORDER_VERSION, crc32c, token_bytes
from llm.data.manifest import FORMAT_VERSION, Manifest, ShardInfo, read_manifest, write_manifest
from llm.data.mixture import PERIOD, Mixture, Stage, make_schedule
from llm.errors import UserError

if TYPE_CHECKING:  # writing shards, in many processes, does not need torch
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = [
    "CRC32C_IMPLEMENTATION",
    "FORMAT_VERSION",
    "ORDER_VERSION",
    "Batch",
    "Loader",
    "Manifest",
    "ShardInfo",
    "ShardWriter",
    "crc32c",
    "document_starts",
    "read_manifest",
    "sequence_at",
    "token_bytes",
    "verify_shard",
    "write_manifest",
]


class ShardWriter:
    """Writes one shard as a stream. The file appears at `path` when `finish` returns, and not at all otherwise.

    A context manager: leaving the block without `finish` removes the file.

    Args:
        path: the path of the finished shard; its directory must exist.
        vocab_size: all ids are below it. A token takes 2 bytes if vocab_size <= 65536, else 4.
        tokenizer_sha256: hex digest of the tokenizer model.

    Raises:
        OSError: on any failure to write (full disk, no permission), here and in the methods; names `path`.
    """

    def __init__(self, path: str | os.PathLike[str], *, vocab_size: int, tokenizer_sha256: str) -> None:
        self.path = Path(path)
        self._temporary = self.path.with_name(f".{self.path.name}.tmp")
        self._pid = os.getpid()
        # Set before the core can fail, because abort() reads it, also from __del__ after a failed constructor.
        self._open = False
        with self._with_path():
            # fsencode, because the name of a file need not be valid UTF-8.
            self._core = _shards.ShardWriter(os.fsencode(self._temporary), vocab_size, bytes.fromhex(tokenizer_sha256))
            self._open = True

    @property
    def tokens(self) -> int:
        """The number of tokens so far."""
        return self._core.tokens

    @property
    def documents(self) -> int:
        """The number of document starts so far."""
        return self._core.documents

    def append(
        self,
        tokens: NDArray[np.uint16] | NDArray[np.uint32] | NDArray[np.int32],
        document_starts: NDArray[np.uint64],
    ) -> None:
        """Adds tokens to the end.

        Args:
            tokens: [n] ids.
            document_starts: [d] uint64, ascending: offsets in *these* tokens at which documents begin. A document
                may begin in an earlier call, or in an earlier shard.

        Raises:
            ValueError: an id is not in the vocabulary, or a start is out of order or range; nothing was added.
        """
        with self._with_path():
            self._core.append(tokens, document_starts)

    def finish(self) -> ShardInfo:
        """Completes the file, makes it durable and gives it its name."""
        with self._with_path():
            header_crc32c = self._core.finish()
            # The header is written last, so the hash cannot be computed while tokens are appended.
            with open(self._temporary, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.seek(0, os.SEEK_END)
            os.replace(self._temporary, self.path)
            # From now on there is no temporary file to remove, even if the sync fails.
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
    def _with_path(self) -> Iterator[None]:
        """On an OSError, removes the temporary file and names `path`, the file that the caller knows, in the error."""
        try:
            yield
        except OSError as error:
            self.abort()
            error.filename, error.filename2 = str(self.path), None
            raise


def verify_shard(manifest: Manifest, shard: ShardInfo, bos_id: int, eos_id: int, *, in_text: bool = False) -> list[str]:
    """Reads all of a shard and returns one line per error; an empty list if there is none.

    It checks the header against the manifest, the checksum of every block, the range of every id, the order of the
    document starts, and that BOS and EOS occur only at the boundaries of documents (in_text: elsewhere too).
    """
    return _shards.verify_shard(_core_spec(manifest, shard), *_core_dataset(manifest), bos_id, eos_id, in_text)


def document_starts(manifest: Manifest, shard: ShardInfo) -> NDArray[np.uint64]:
    """Returns the index of the first token of every document that begins in the shard: uint64 [documents], ascending.

    Raises:
        UserError: the shard is missing, damaged or not the one in the manifest.
    """
    return _shards.document_starts(_core_spec(manifest, shard), *_core_dataset(manifest))


def _core_spec(manifest: Manifest, shard: ShardInfo) -> tuple[bytes, int, int, int, int]:
    path = os.fsencode(manifest.path / shard.file)
    return path, shard.tokens, shard.documents, shard.bytes, shard.header_crc32c


def _core_dataset(manifest: Manifest) -> tuple[int, bytes]:
    return manifest.vocab_size, bytes.fromhex(manifest.tokenizer_sha256)


def sequence_at(seed: int, epoch: int, sequences: int, index: int) -> int:
    """Returns the sequence at `index` of an epoch: a pseudo-random permutation of range(sequences), in O(1)."""
    return _shards.sequence_at(seed, epoch, sequences, index)


class Batch(NamedTuple):
    """A micro-batch of B sequences of S tokens, in memory that the loader reuses."""

    input_ids: torch.Tensor  # int64 [B, S]
    labels: torch.Tensor  # int64 [B, S]: the next token; -100 if it begins a document, and in empty sequences
    doc_start: torch.Tensor  # int32 [B, S]: where in the sequence the token's document begins; 0 if it began earlier


class Loader:
    """An iterator over the micro-batches of one rank; threads fill them in advance.

    The sequences of all epochs form one infinite series of positions: with N sequences, position p is sequence
    permutation(seed, p div N) of (p mod N), or sequence p mod N without `shuffle`. In the training split of a mixture,
    llm.data.mixture gives the source s of position p and the number c of that source's sequences at earlier positions,
    in all stages; source s is permuted with seed + s, and c takes the place of p. In the other split the sequences of
    the sources of all stages follow each other, as if they were one source.

    The step that begins at position c takes [c, c + global_batch); the next one begins at c + global_batch. In it, slot
    b of micro-batch m on rank r is position c + (m*world_size + r)*micro_batch + b where that lies in the step and
    below `end`, else an empty sequence: ids 0, labels -100, doc_start 0. So the data of a step do not depend on world
    size, micro-batch, threads and prefetch, and a run can continue from its position alone.

    A batch stays valid during the next `prefetch - 1` calls of next(); then its memory is overwritten. After a fork,
    the child's copy continues independently from the parent's position. Close the loader, use it as a context manager,
    or just drop it.

    Args:
        data: a data set, or a mixture of several.
        split: "train" or "val".
        seq_len: tokens per sequence, S.
        global_batch: sequences per step, over all ranks.
        micro_batch: sequences per batch, B.
        position: position of the first step.
        end: the first position that is not read; the iterator stops after the step that covers it. None: endless.
        threads: number of threads that read and fill batches; idle threads use no processor time.
        prefetch: number of batches kept ready; twice as many are in memory.
        pin_memory: page-locked batches, for asynchronous copies to a GPU.

    Raises:
        UserError: the split, or one source's training split, has no sequence of that length. next() and targets() raise
            it if a shard is missing, damaged, of another version or tokenizer, or not the one in the manifest.
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

        mixture = data if isinstance(data, Mixture) else Mixture((data,), (Stage(0, (PERIOD,)),))
        mixed = split == "train" and len(mixture.sources) > 1
        stages = [(0, [0])]
        if mixed:
            begins = mixture.begins(seq_len, global_batch)
            schedules = [make_schedule(stage.counts).tolist() for stage in mixture.stages]
            stages = list(zip(begins, schedules, strict=True))
        for manifest in mixture.sources:
            # In a mixture every source has positions to fill. Otherwise it is enough that one source has a sequence.
            if manifest.sequences(split, seq_len) == 0 and (mixed or mixture.sequences(split, seq_len) == 0):
                longest = max((shard.tokens for shard in manifest.shards[split]), default=0)
                raise UserError(
                    f"{manifest.name}: seq_len {seq_len} is longer than the data: a sequence needs {seq_len + 1} "
                    f"tokens, and the longest {split} shard has {longest}; lower data.seq_len, or prepare more text"
                )
        shards = [_core_spec(source, shard) for source in mixture.sources for shard in source.shards[split]]
        # `mix` has checked that all sources have the same tokenizer.
        vocab_size, tokenizer_sha256 = _core_dataset(mixture.sources[0])
        self.sequences = mixture.sequences(split, seq_len)
        # Rounded up: the last micro-batch may have empty sequences.
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
            # The core writes to the addresses above, so it keeps the tensors alive until its threads have ended.
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
            source_shards=[len(source.shards[split]) for source in mixture.sources] if mixed else [len(shards)],
            stages=stages,
        )
        # Runs at exit too, because no thread may outlive the interpreter.
        # The core's method, because our own would keep `self` alive for ever.
        weakref.finalize(self, self._core.close)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return self._batches[self._core.next()]

    def targets(self, position: int, count: int) -> int:
        """Returns the number of labels other than -100 at positions [position, min(position + count, end)).

        It needs only the document index, so every rank knows the number of a step before its first micro-batch.
        """
        return self._core.targets(position, count)

    def close(self) -> None:
        """Ends the threads. Batches that were returned keep their values."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
