"""Packed tokens on their way into shards, in a folder such that a killed run can continue.

A run continues where its last shard of training tokens was finished. The journal, which is saved then, holds the
finished shards and the state just before the group of blocks that filled the last of them: the place in the input, the
counters, and how many tokens there were of each part. A continued run reads again from that place and skips the tokens
that the finished shards hold already.

Training tokens are written straight to their shards. Three things go to plain files first:
- Validation tokens, until the end of the run. The journal knows how many of them belong to its state.
- The tokens of a long document, until its end is read: only then is it certain that it is UTF-8 and no duplicate.
- All tokens where the split is by position: the cut between the parts depends on their number. There is no journal
  then, and a killed run begins anew.
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
from llm.data.document_reader import Block, Dropped, Place
from llm.data.manifest import ShardInfo
from llm.data.packing import DIGEST_BYTES, Packed, new_digest, token_dtype
from llm.data.shards import ShardWriter
from llm.data.tokenizer import Tokenizer
from llm.errors import UserError

COPY_TOKENS = 1 << 22
BYTES_A_DIGEST = 110  # in Python's set of them; measured
JOURNAL_NAME = "journal.json"
JOURNAL_VERSION = 2
PLACES_KEPT = 100  # of dropped documents, in the manifest


class Spool:
    """An array in a file that grows at its end and can be cut back.

    Opening it keeps the first `length` values of the file. Raises UserError if there are fewer.
    """

    def __init__(self, path: Path, dtype: np.dtype, length: int = 0) -> None:
        # "r+b" needs a file that exists; "wb" would empty that of a killed run.
        path.touch()
        self.dtype = dtype
        self._file = open(path, "r+b")  # noqa: SIM115
        self.cut_back(length)

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.tobytes())
        self.length += len(values)

    def cut_back(self, length: int) -> None:
        size = length * self.dtype.itemsize
        # fstat does not count what is still in Python's buffer.
        self._file.flush()
        if os.fstat(self._file.fileno()).st_size < size:
            raise UserError(f"{self._file.name}: is shorter than it was; remove its folder to begin anew")
        self._file.truncate(size)
        # truncate does not move the place where the next write goes.
        self._file.seek(size)
        self.length = length

    def read(self, low: int, high: int) -> np.ndarray:
        """Values [low, high)."""
        # pread does not see Python's buffer, and does not move the place where `append` writes.
        self._file.flush()
        size = self.dtype.itemsize
        read = os.pread(self._file.fileno(), (high - low) * size, low * size)
        if len(read) != (high - low) * size:  # cut short from outside, or above the 2 GiB that one call reads
            raise UserError(f"{self._file.name}: is shorter than it was; remove its folder to begin anew")
        return np.frombuffer(read, self.dtype)

    def read_parts(self, low: int, high: int) -> Iterator[np.ndarray]:
        """Values [low, high), COPY_TOKENS at a time."""
        for begin in range(low, high, COPY_TOKENS):
            yield self.read(begin, min(begin + COPY_TOKENS, high))

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


@dataclass
class ShardStream:
    """The shards of one part: exactly `shard_tokens` in each but the last; documents may cross from one to the next."""

    name: str
    directory: Path
    tokenizer: Tokenizer
    shard_tokens: int
    shards: list[ShardInfo] = field(default_factory=list)  # the finished ones
    tokens: int = 0  # how many were appended. A resumed run begins with fewer than its shards hold
    _writer: ShardWriter | None = None

    def append(self, tokens: np.ndarray) -> None:
        """Writes the tokens that the finished shards do not hold already."""
        held = sum(shard.tokens for shard in self.shards)
        # A continued run packs again what came after the journal's state; part of it is in finished shards.
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
            # No text has BOS among its ids, so a document begins wherever there is one.
            self._writer.append(here, np.flatnonzero(here == self.tokenizer.bos_id).astype(np.uint64))
            if self._writer.tokens == self.shard_tokens:
                self.finish()

    def finish(self) -> tuple[ShardInfo, ...]:
        """Ends the shard that is being written. Returns all shards."""
        if self._writer is not None:
            self.shards.append(self._writer.finish())
            self._writer = None
        return tuple(self.shards)


@dataclass
class Counters:
    """Counts of what was read, under their names in the manifest."""

    documents: int = 0  # kept
    dropped: dict[str, int] = field(default_factory=dict)  # by reason
    dropped_places: list[str] = field(default_factory=list)  # of the first that are neither empty nor duplicate
    bytes: int = 0  # of the text that was kept
    text_tokens: int = 0  # without BOS and EOS
    byte_tokens: int = 0  # of these: a byte of a character that the vocabulary lacks
    round_trip_documents: int = 0  # decoded again, as a check

    def add(self, packed: Packed, kept: np.ndarray, framing: int) -> None:
        """kept: bool [documents]; framing: how many of BOS and EOS each of them has."""
        self.round_trip_documents += packed.checked
        self.bytes += int(packed.bytes[kept].sum())
        self.text_tokens += int((packed.lengths[kept] - framing).sum())
        self.byte_tokens += int(packed.byte_tokens[kept].sum())

    def drop(self, dropped: Dropped) -> None:
        self.dropped[dropped.reason] = self.dropped.get(dropped.reason, 0) + 1
        if dropped.reason not in ("empty", "duplicate") and len(self.dropped_places) < PLACES_KEPT:
            self.dropped_places.append(dropped.where)


@dataclass
class _LongDocument:
    """A document of which more chunks are to come, and the state before it, in case it is dropped."""

    spool: Spool
    begin: int  # length of the spool
    counters_before: Counters
    digest: "hashlib.blake2b" = field(default_factory=new_digest)


class Store:
    """Everything that a run has made so far: shards, tokens that are in none yet, and counters.

    Args:
        directory: an empty folder, or one with the journal of a killed run, which is continued.
        by_hash: the split is by hash, else by position.
        dedup: of equal documents only the first is kept.
        identity: JSON values that decide the result. They are kept in the journal for `can_resume`.
    """

    def __init__(
        self,
        directory: Path,
        tokenizer: Tokenizer,
        *,
        by_hash: bool,
        shard_tokens: int,
        dedup: bool,
        identity: dict[str, Any],
    ) -> None:
        journal = read_journal(directory) or {}
        state = journal.get("state", {})
        shards = [ShardInfo(**shard) for shard in journal.get("shards", [])]
        self.place = Place(**state.get("place", {}))  # where reading begins
        self.counters = Counters(**state.get("counters", {}))
        self.train = ShardStream("train", directory, tokenizer, shard_tokens, shards, state.get("train_tokens", 0))
        # Its shards are made at the end of a run, so a killed run has left none.
        self.val = ShardStream("val", directory, tokenizer, shard_tokens)
        self.by_hash = by_hash
        self._directory = directory
        self._identity = identity
        self._state = state
        dtype = token_dtype(tokenizer)
        self.val_spool = Spool(directory / "val.tokens", dtype, state.get("val_tokens", 0))
        # By position: all tokens. By hash: of a long document of the training part, until its end.
        # Emptied: a place to continue from is never inside a long document.
        self.spool = Spool(directory / "train.tokens", dtype)
        # V (raw bytes) and not S, of which numpy drops zero bytes at the end.
        self._digests = Spool(directory / "digests", np.dtype(f"V{DIGEST_BYTES}"), state.get("digests", 0))
        self._seen: set[bytes] | None = set() if dedup else None
        if self._seen is not None:
            for part in self._digests.read_parts(0, self._digests.length):
                self._seen.update(part.tolist())
        self._long: _LongDocument | None = None

    def add(self, blocks: list[Block], packed: Packed) -> None:
        """Takes in a packed group. Saves the journal if a shard was finished."""
        # Before the group is added: a shard may be filled in its middle, and the run then continues at its beginning.
        if blocks[0].can_start:
            self._state = {
                "place": asdict(blocks[0].place),
                "counters": asdict(self.counters),
                "train_tokens": self.train.tokens,
                "val_tokens": self.val_spool.length,
                "digests": self._digests.length,
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
        kept = np.ones(len(packed.lengths), np.bool_)
        for i, digest in enumerate(packed.digests):
            kept[i] = self._is_new(digest)
            if not kept[i]:
                self.counters.drop(Dropped("duplicate", ""))
        self.counters.documents += int(np.count_nonzero(kept))
        self.counters.add(packed, kept, framing=2)
        (self.train if self.by_hash else self.spool).append(_tokens_of(packed, kept & ~packed.held_out))
        self.val_spool.append(_tokens_of(packed, kept & packed.held_out))

    def _add_chunk(self, block: Block, packed: Packed) -> None:
        if block.first:
            # A first chunk that was dropped has no documents; any() is then False.
            spool = self.val_spool if packed.held_out.any() else self.spool
            # A deep copy, because `drop` changes the dict and the list in place.
            self._long = _LongDocument(spool, spool.length, copy.deepcopy(self.counters))
        document = self._long
        assert document is not None
        document.spool.append(packed.tokens)
        # The chunks end to end are the text, so this is the digest of the same document read whole.
        document.digest.update(block.data)
        self.counters.add(packed, np.ones(len(packed.lengths), np.bool_), framing=block.first + block.last)
        if not block.last:
            return
        dropped = packed.dropped[0] if packed.dropped else None
        if not dropped and not self._is_new(document.digest.digest()):
            dropped = Dropped("duplicate", str(block.path))
        if dropped:
            document.spool.cut_back(document.begin)
            # The chunks were decoded again, whether or not the document is kept.
            checked = self.counters.round_trip_documents
            self.counters = replace(document.counters_before, round_trip_documents=checked)
            self.counters.drop(dropped)
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
        # For a continued run, which must know the documents of the finished shards.
        self._digests.append(np.frombuffer(digest, self._digests.dtype))
        return True

    def _save(self) -> None:
        # Before the journal, which counts on these bytes.
        self.val_spool.sync()
        self._digests.sync()
        journal = {
            "version": JOURNAL_VERSION,
            "identity": self._identity,
            # Not the state now: the group that filled the shard is packed again.
            "state": self._state,
            "shards": [asdict(shard) for shard in self.train.shards],
        }
        atomic_text(self._directory / JOURNAL_NAME, json.dumps(journal) + "\n")

    def finish(self) -> dict[str, tuple[ShardInfo, ...]]:
        """Writes the last shard of each part."""
        # In parts: the validation tokens of a large corpus need not fit in memory.
        for tokens in self.val_spool.read_parts(0, self.val_spool.length):
            self.val.append(tokens)
        return {"train": self.train.finish(), "val": self.val.finish()}

    def close(self) -> None:
        for spool in (self.val_spool, self.spool, self._digests):
            spool.close()


def _tokens_of(packed: Packed, chosen: np.ndarray) -> np.ndarray:
    """chosen: bool [documents]."""
    # An array indexed by bools is a copy, which is not needed where all are chosen.
    return packed.tokens if chosen.all() else packed.tokens[np.repeat(chosen, packed.lengths)]


def read_journal(directory: Path) -> dict[str, Any] | None:
    """The journal in a folder; None: there is none that this program can continue."""
    try:
        # It was written atomically: if it is there, it is whole.
        journal: dict[str, Any] = json.loads((directory / JOURNAL_NAME).read_bytes())
    except FileNotFoundError:
        return None
    return journal if journal.get("version") == JOURNAL_VERSION else None
