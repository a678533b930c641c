"""Collects packed tokens and writes them to shards, in a folder that a killed run can continue from.

A run continues where its last shard of training tokens was finished. The journal, which is saved then, holds the
finished shards and the state just before the group of blocks that filled the last of them: the place in the input, the
counters, and the number of tokens of each split. A continued run reads again from that place and skips the tokens that
the finished shards already hold.

Training tokens are written straight to their shards. Three things go to plain files first:
- Validation tokens, until the end of the run. The journal holds their number at its state.
- The tokens of a long document, until its end has been read: it may turn out to be invalid UTF-8 or a duplicate.
- All tokens if the split is by position, because the cut depends on their number. Such a run has no journal: after a
  kill it starts again from the beginning.
"""

import copy
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llm.atomic import atomic_text
from llm.data.blocks import Block, Dropped, Place
from llm.data.exclusion import Exclusion, join_edges
from llm.data.manifest import ShardInfo
from llm.data.packing import DIGEST_BYTES, Packed, new_digest, token_dtype
from llm.data.shards import ShardWriter
from llm.data.tokenizer import Tokenizer
from llm.errors import UserError

COPY_TOKENS = 1 << 22
BYTES_A_DIGEST = 110  # memory per digest in a Python set, measured
JOURNAL_NAME = "journal.json"
EXCLUDED_NAME = "excluded.txt"
"""The file beside the manifest that lists the digests of documents that have a run of an evaluation text."""
JOURNAL_VERSION = 3
PLACES_KEPT = 100  # how many places of dropped documents the manifest lists


class Spool:
    """An array in a file that grows at its end and can be cut back.

    Opening it keeps the first `length` values of the file. Raises UserError if there are fewer.
    """

    def __init__(self, path: Path, dtype: np.dtype, length: int = 0) -> None:
        # "r+b" needs a file that exists; "wb" would empty the file of a killed run.
        path.touch()
        self.dtype = dtype
        self._file = open(path, "r+b")  # noqa: SIM115
        self.cut_back(length)

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.tobytes())
        self.length += len(values)

    def cut_back(self, length: int) -> None:
        size = length * self.dtype.itemsize
        # fstat does not count bytes in Python's buffer.
        self._file.flush()
        if os.fstat(self._file.fileno()).st_size < size:
            raise UserError(f"{self._file.name}: is shorter than it was; remove its folder to start again")
        self._file.truncate(size)
        # truncate does not move the write position.
        self._file.seek(size)
        self.length = length

    def read(self, low: int, high: int) -> np.ndarray:
        """Returns the values [low, high)."""
        # pread does not see Python's buffer, and does not move the write position of `append`.
        self._file.flush()
        size = self.dtype.itemsize
        read = os.pread(self._file.fileno(), (high - low) * size, low * size)
        if len(read) != (high - low) * size:  # truncated by another program, or more than the 2 GiB that one call reads
            raise UserError(f"{self._file.name}: is shorter than it was; remove its folder to start again")
        return np.frombuffer(read, self.dtype)

    def read_parts(self, low: int, high: int) -> Iterator[np.ndarray]:
        """Yields the values [low, high), COPY_TOKENS at a time."""
        for begin in range(low, high, COPY_TOKENS):
            yield self.read(begin, min(begin + COPY_TOKENS, high))

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


@dataclass
class ShardStream:
    """The shards of one split. Each but the last has exactly `shard_tokens` tokens; a document may span two shards."""

    name: str
    directory: Path
    tokenizer: Tokenizer
    shard_tokens: int
    shards: list[ShardInfo] = field(default_factory=list)  # the finished ones
    tokens: int = 0  # number of tokens appended; a continued run begins with fewer than its shards hold
    _writer: ShardWriter | None = None

    def append(self, tokens: np.ndarray) -> None:
        """Writes the tokens that the finished shards do not hold yet."""
        held = sum(shard.tokens for shard in self.shards)
        # A continued run packs again all tokens after the journal's state; finished shards hold some of them.
        to_skip = max(0, held - self.tokens)
        self.tokens += len(tokens)
        tokens = tokens[to_skip:]
        while len(tokens):
            if self._writer is None:
                self._writer = ShardWriter(
                    self.directory / f"{self.name}-{len(self.shards):05d}.bin",
                    vocab_size=self.tokenizer.vocab_size,
                    tokenizer_sha256=self.tokenizer.sha256,
                )
            room = self.shard_tokens - self._writer.tokens
            here, tokens = tokens[:room], tokens[room:]
            begins = here == self.tokenizer.begin_mark
            if self.tokenizer.begin_mark != self.tokenizer.bos_id:
                here = np.where(begins, here.dtype.type(self.tokenizer.bos_id), here)
            self._writer.append(here, np.flatnonzero(begins).astype(np.uint64))
            if self._writer.tokens == self.shard_tokens:
                self.finish()

    def finish(self) -> tuple[ShardInfo, ...]:
        """Completes the shard that is being written. Returns all shards."""
        if self._writer is not None:
            self.shards.append(self._writer.finish())
            self._writer = None
        return tuple(self.shards)


@dataclass
class Counters:
    """Counts of what was read. The names are those in the manifest."""

    documents: int = 0  # kept
    dropped: dict[str, int] = field(default_factory=dict)  # {reason: documents}
    dropped_places: list[str] = field(default_factory=list)  # the first, without empty and duplicate documents
    bytes: int = 0  # bytes of the text that was kept
    text_tokens: int = 0  # without BOS and EOS
    byte_tokens: int = 0  # byte-fallback tokens among them
    piece_bytes: int = 0  # bytes of these tokens; `bytes`, if decoding gives back the text
    round_trip_documents: int = 0  # decoded again, as a check

    def add(self, packed: Packed, kept: np.ndarray, framing: int) -> None:
        """kept: bool [documents]; framing: how many BOS and EOS tokens each document has."""
        self.round_trip_documents += packed.checked
        self.bytes += int(packed.bytes[kept].sum())
        self.text_tokens += int((packed.lengths[kept] - framing).sum())
        self.byte_tokens += int(packed.byte_tokens[kept].sum())
        self.piece_bytes += int(packed.piece_bytes[kept].sum())

    def drop(self, dropped: Dropped) -> None:
        self.dropped[dropped.reason] = self.dropped.get(dropped.reason, 0) + 1
        if dropped.is_fault and len(self.dropped_places) < PLACES_KEPT:
            self.dropped_places.append(dropped.where)


@dataclass
class _LongDocument:
    """A document whose last chunk has not arrived, and the state before it, for the case that it is dropped."""

    spool: Spool
    begin: int  # length of the spool before the document
    counters_before: Counters
    words: np.ndarray  # hashes of its last words so far, for `exclusion.join_edges`
    excluded: bool = False
    digest: "hashlib.blake2b" = field(default_factory=new_digest)


class Store:
    """All that a run has produced: shards, tokens that are in no shard yet, and counters.

    Args:
        directory: an empty folder, or one with the journal of a killed run, which is continued.
        by_hash: whether the split is by hash or by position.
        dedup: keep only the first of equal documents.
        exclusion: drop documents with one of these runs of words, and list their digests in EXCLUDED_NAME.
        identity: JSON values that decide the result. The journal keeps them for `can_resume`.
    """

    def __init__(
        self,
        directory: Path,
        tokenizer: Tokenizer,
        *,
        by_hash: bool,
        shard_tokens: int,
        dedup: bool,
        exclusion: Exclusion | None = None,
        identity: dict[str, Any],
    ) -> None:
        journal = read_journal(directory) or {}
        state = journal.get("state", {})
        shards = [ShardInfo(**shard) for shard in journal.get("shards", [])]
        self.place = Place(**state.get("place", {}))  # where reading starts
        self.counters = Counters(**state.get("counters", {}))
        self.train = ShardStream("train", directory, tokenizer, shard_tokens, shards, state.get("train_tokens", 0))
        # These shards are written at the end of a run, so a killed run has left none.
        self.val = ShardStream("val", directory, tokenizer, shard_tokens)
        self.by_hash = by_hash
        self._directory = directory
        self._identity = identity
        self._state = state
        dtype = token_dtype(tokenizer)
        self.val_spool = Spool(directory / "val.tokens", dtype, state.get("val_tokens", 0))
        # Split by position: holds all tokens. By hash: holds a long training document until its end is read.
        # It starts empty, because a run never continues inside a long document.
        self.spool = Spool(directory / "train.tokens", dtype)
        # dtype V (raw bytes), because numpy drops zero bytes at the end of dtype S.
        self._digests = Spool(directory / "digests", np.dtype(f"V{DIGEST_BYTES}"), state.get("digests", 0))
        self._exclusion = exclusion
        self._excluded = Spool(directory / "excluded", self._digests.dtype, state.get("excluded", 0))
        self._seen: set[bytes] | None = set() if dedup else None
        if self._seen is not None:
            for part in self._digests.read_parts(0, self._digests.length):
                self._seen.update(part.tolist())
        self._long: _LongDocument | None = None

    def add(self, blocks: list[Block], packed: Packed) -> None:
        """Adds a packed group. Saves the journal if that finished a shard."""
        # Recorded before the group is added: if a shard fills up in the middle of a group, the run continues before it.
        if blocks[0].can_start:
            self._state = {
                "place": asdict(blocks[0].place),
                "counters": asdict(self.counters),
                "train_tokens": self.train.tokens,
                "val_tokens": self.val_spool.length,
                "digests": self._digests.length,
                "excluded": self._excluded.length,
            }
        shards = len(self.train.shards)
        if blocks[-1].is_part:
            self._add_chunk(blocks[-1], packed)
        else:
            self._add_documents(packed)
        if len(self.train.shards) > shards:
            self._save()

    def _add_documents(self, packed: Packed) -> None:
        for dropped in packed.dropped:
            self.counters.drop(dropped)
        kept = ~packed.excluded
        for i, digest in enumerate(packed.digests):
            if packed.excluded[i]:
                self._exclude(digest)
            elif not self._is_new(digest):
                kept[i] = False
                self.counters.drop(Dropped("duplicate", ""))
        self.counters.documents += int(np.count_nonzero(kept))
        self.counters.add(packed, kept, framing=2)
        (self.train if self.by_hash else self.spool).append(_tokens_of(packed, kept & ~packed.held_out))
        self.val_spool.append(_tokens_of(packed, kept & packed.held_out))

    def _add_chunk(self, block: Block, packed: Packed) -> None:
        if block.first:
            # If the first chunk was dropped there are no documents, and any() is False.
            spool = self.val_spool if packed.held_out.any() else self.spool
            # deepcopy, because `drop` changes the dict and the list in place.
            before = copy.deepcopy(self.counters)
            self._long = _LongDocument(spool, spool.length, before, np.zeros(0, np.uint64))
        document = self._long
        assert document is not None
        document.spool.append(packed.tokens)
        # The concatenated chunks are the text, so the digest is the same as for a document in one block.
        document.digest.update(block.data)
        document.excluded |= bool(packed.excluded.any())
        if self._exclusion and packed.edges:
            around, document.words = join_edges(document.words, packed.edges, self._exclusion.ngram)
            document.excluded |= self._exclusion.finds(around)
        self.counters.add(packed, np.ones(len(packed.lengths), np.bool_), framing=block.first + block.last)
        if not block.last:
            return
        dropped = packed.dropped[0] if packed.dropped else None
        excluded = document.excluded and not dropped
        if not dropped and not excluded and not self._is_new(document.digest.digest()):
            dropped = Dropped("duplicate", str(block.path))
        if dropped or excluded:
            document.spool.cut_back(document.begin)
            # The check has decoded these chunks, whether or not the document is kept.
            checked = self.counters.round_trip_documents
            self.counters = replace(document.counters_before, round_trip_documents=checked)
            if dropped:
                self.counters.drop(dropped)
            else:
                self._exclude(document.digest.digest())
            return
        self.counters.documents += 1
        if self.by_hash:
            for tokens in self.spool.read_parts(0, self.spool.length):
                self.train.append(tokens)
            self.spool.cut_back(0)

    def _is_new(self, digest: bytes) -> bool:
        if self._seen is None:
            return True
        if digest in self._seen:
            return False
        self._seen.add(digest)
        # Written to a file too: a continued run must know the documents of the finished shards.
        self._digests.append(np.frombuffer(digest, self._digests.dtype))
        return True

    def _exclude(self, digest: bytes) -> None:
        self.counters.drop(Dropped("excluded", ""))
        self._excluded.append(np.frombuffer(digest, self._excluded.dtype))

    def _save(self) -> None:
        # Synced before the journal, which refers to these bytes.
        self.val_spool.sync()
        self._excluded.sync()
        self._digests.sync()
        journal = {
            "version": JOURNAL_VERSION,
            "identity": self._identity,
            # The state before this group, which a continued run packs again.
            "state": self._state,
            "shards": [asdict(shard) for shard in self.train.shards],
        }
        atomic_text(self._directory / JOURNAL_NAME, json.dumps(journal) + "\n")

    def finish(self) -> dict[str, tuple[ShardInfo, ...]]:
        """Writes the last shard of each split, and the list of documents that were excluded."""
        # Read in parts, because the validation tokens of a large corpus need not fit in memory.
        for tokens in self.val_spool.read_parts(0, self.val_spool.length):
            self.val.append(tokens)
        if self._exclusion:
            digests = self._excluded.read(0, self._excluded.length).tolist()
            atomic_text(self._directory / EXCLUDED_NAME, "".join(f"{digest.hex()}\n" for digest in digests))
        return {"train": self.train.finish(), "val": self.val.finish()}

    def close(self) -> None:
        for spool in (self.val_spool, self.spool, self._digests, self._excluded):
            spool.close()


def _tokens_of(packed: Packed, chosen: np.ndarray) -> np.ndarray:
    """chosen: bool [documents]."""
    # Indexing by bools copies, which is not needed if all are chosen.
    return packed.tokens if chosen.all() else packed.tokens[np.repeat(chosen, packed.lengths)]


def read_journal(directory: Path) -> dict[str, Any] | None:
    """Reads the journal in a folder; None if there is none that this program can continue."""
    try:
        # It is written atomically, so it is complete if it exists.
        journal: dict[str, Any] = json.loads((directory / JOURNAL_NAME).read_bytes())
    except FileNotFoundError:
        return None
    return journal if journal.get("version") == JOURNAL_VERSION else None
