"""Packed tokens on their way into shards: kept in a folder such that the work can be killed and taken up again.

A part's tokens first go to the end of two plain files. What stands there before the length that the journal knows is
certain; what stands behind it is cut off when the work goes on. Full shards are written from these files, and the files
then begun anew under another name, so that the journal always finds those that belong to it.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm.atomic import atomic_text
from llm.data.document_reader import Block, Dropped, Place
from llm.data.manifest import ShardInfo
from llm.data.packing import DIGEST_BYTES, Packed, Unit, chain, is_piece
from llm.data.shards import ShardWriter
from llm.data.tokenizer import Tokenizer
from llm.errors import UserError

COPY_TOKENS = 1 << 22
JOURNAL_NAME = "journal.json"
SHOWN_PLACES = 100  # of documents that are dropped, in the manifest


class Spool:
    """A part's tokens and document starts, in two files that grow at the end and can be cut back.

    `path` without suffix; the files' first `tokens` and `documents` count, what is behind them is cut off.
    """

    def __init__(self, path: Path, dtype: np.dtype, tokens: int = 0, documents: int = 0) -> None:
        self.dtype = dtype
        self._paths = [path.with_name(f"{path.name}.{what}") for what in ("tokens", "starts")]
        for file in self._paths:
            file.touch()
        self._tokens, self._starts = (open(file, "r+b") for file in self._paths)  # noqa: SIM115
        self.cut_back(tokens, documents)

    def append(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        """tokens: [tokens]; starts: integer [documents that begin here], offsets into `tokens`."""
        self._tokens.write(tokens.tobytes())
        self._starts.write((starts.astype(np.uint64) + np.uint64(self.tokens)).tobytes())
        self.tokens += len(tokens)
        self.documents += len(starts)

    def cut_back(self, tokens: int, documents: int) -> None:
        for file, size in ((self._tokens, tokens * self.dtype.itemsize), (self._starts, documents * 8)):
            file.flush()
            if os.fstat(file.fileno()).st_size < size:
                raise UserError(f"{file.name}: is shorter than it was; remove its folder to begin anew")
            file.truncate(size)
            file.seek(size)
        self.tokens, self.documents = tokens, documents

    def read(self, low: int, high: int) -> np.ndarray:
        """Tokens [low, high)."""
        self._tokens.flush()
        size = self.dtype.itemsize
        return np.frombuffer(os.pread(self._tokens.fileno(), (high - low) * size, low * size), self.dtype)

    def chunks(self, low: int, high: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens [low, high) and the documents that begin there, piece by piece, as `append` takes them."""
        self._starts.flush()
        starts = np.memmap(self._paths[1], np.uint64, "r") if self.documents else np.empty(0, np.uint64)
        for begin in range(low, high, COPY_TOKENS):
            end = min(begin + COPY_TOKENS, high)
            first, last = np.searchsorted(starts, np.array([begin, end], np.uint64))
            yield self.read(begin, end), np.array(starts[first:last]) - np.uint64(begin)

    def sync(self) -> None:
        for file in (self._tokens, self._starts):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in (self._tokens, self._starts):
            file.close()


class ShardStream:
    """A part's shards: exactly `shard_tokens` in each but the last; documents may cross from one to the next."""

    def __init__(
        self, name: str, directory: Path, tokenizer: Tokenizer, shard_tokens: int, shards: tuple[ShardInfo, ...] = ()
    ) -> None:
        self.shards = list(shards)
        self.tokens = sum(shard.tokens for shard in shards)
        self.documents = sum(shard.documents for shard in shards)
        self._name = name
        self._directory = directory
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._writer: ShardWriter | None = None

    def append(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        """tokens: [tokens]; starts: uint64 [documents that begin here], offsets into `tokens`."""
        self.tokens += len(tokens)
        self.documents += len(starts)
        while len(tokens):
            if self._writer is None:
                self._writer = ShardWriter(
                    self._directory / f"{self._name}-{len(self.shards):05d}.bin",
                    vocab_size=self._tokenizer.vocab_size,
                    tokenizer_sha256=self._tokenizer.sha256,
                )
            room = self._shard_tokens - self._writer.tokens
            here = int(np.searchsorted(starts, min(room, len(tokens))))
            self._writer.append(tokens[:room], starts[:here])
            tokens, starts = tokens[room:], starts[here:] - np.uint64(room)
            if self._writer.tokens == self._shard_tokens:
                self.finish()

    def finish(self) -> tuple[ShardInfo, ...]:
        if self._writer is not None:
            self.shards.append(self._writer.finish())
            self._writer = None
        return tuple(self.shards)


@dataclass
class Counters:
    """What there was; JSON values."""

    documents: int = 0  # kept
    bytes: int = 0  # of their text
    text_tokens: int = 0  # BOS and EOS not counted
    byte_tokens: int = 0  # of these: a byte of a character that the vocabulary lacks
    checked: int = 0  # documents that were decoded again
    dropped: dict[str, int] = field(default_factory=dict)  # by reason
    places: list[str] = field(default_factory=list)  # of those that are not empty or duplicate, the first of them

    def drop(self, dropped: Dropped) -> None:
        self.dropped[dropped.reason] = self.dropped.get(dropped.reason, 0) + 1
        if dropped.reason not in ("empty", "duplicate") and len(self.places) < SHOWN_PLACES:
            self.places.append(dropped.where)


@dataclass
class _Open:
    """A document of which there are more pieces to come, and where its part ended before it."""

    part: str
    tokens: int
    documents: int
    digest: str = ""
    bytes: int = 0
    text_tokens: int = 0
    byte_tokens: int = 0


class Store:
    """What a preparation has done so far: the parts' tokens, the counters, and where to read on.

    Args:
        directory: an empty folder, or one that another Store was in when it was killed.
        parts: "train" and "val"; or "all", whose tokens stay in one spool.
        dedup: of equal documents only the first is kept.
        identity: JSON values; what the work is. Kept in the journal, for whoever wants to go on.
    """

    def __init__(
        self,
        directory: Path,
        tokenizer: Tokenizer,
        *,
        parts: tuple[str, ...],
        shard_tokens: int,
        dedup: bool,
        identity: dict[str, Any],
    ) -> None:
        self.directory = directory
        self._identity = identity
        self._shard_tokens = shard_tokens
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        journal = read_journal(directory) or {}
        self._place: Place | None = Place(**journal.get("place", {}))
        self.counters = Counters(**journal.get("counters", {}))
        self._open = _Open(**journal["open"]) if journal.get("open") else None
        self.streams: dict[str, ShardStream] = {}
        self.spools: dict[str, Spool] = {}
        for name in parts:
            state = journal.get("parts", {}).get(name, {"shards": [], "tokens": 0, "documents": 0})
            shards = tuple(ShardInfo(**shard) for shard in state["shards"])
            self.streams[name] = ShardStream(name, directory, tokenizer, shard_tokens, shards)
            self.spools[name] = Spool(self._spool_path(name), dtype, state["tokens"], state["documents"])
        self._digests = None
        if dedup:
            self._digests = open(directory / "digests", "a+b")  # noqa: SIM115
            self._digests.truncate(journal.get("digests", 0))
            self._seen = set[bytes]()
            self._digests.seek(0)
            while digest := self._digests.read(DIGEST_BYTES):
                self._seen.add(digest)

    def _spool_path(self, name: str) -> Path:
        return self.directory / f"{name}-{len(self.streams[name].shards):05d}"

    def add(self, unit: Unit, packed: Packed) -> bool:
        """Takes a packed unit in; returns whether there are shards now that the journal does not know."""
        self.counters.checked += packed.checked
        if is_piece(unit):
            self._add_piece(unit[0], packed)
        else:
            for dropped in packed.dropped:
                self.counters.drop(dropped)
            self._add_documents(packed)
        self._place = unit[-1].next
        return self._open is None and self._write_full_shards()

    def _add_documents(self, packed: Packed) -> None:
        kept = self._fresh(packed.digests) if self._digests else np.ones(len(packed.lengths), np.bool_)
        if missing := int(np.count_nonzero(~kept)):
            self.counters.dropped["duplicate"] = self.counters.dropped.get("duplicate", 0) + missing
        for name in self.spools:
            chosen = kept if name == "all" else kept & (packed.held_out == (name == "val"))
            lengths = packed.lengths[chosen]
            if len(lengths):
                tokens = packed.tokens if chosen.all() else packed.tokens[np.repeat(chosen, packed.lengths)]
                self.spools[name].append(tokens, np.cumsum(lengths) - lengths)
        self.counters.documents += int(np.count_nonzero(kept))
        self.counters.bytes += int(packed.bytes[kept].sum())
        self.counters.text_tokens += int(packed.lengths[kept].sum()) - 2 * int(np.count_nonzero(kept))
        self.counters.byte_tokens += int(packed.byte_tokens[kept].sum())

    def _add_piece(self, block: Block, packed: Packed) -> None:
        if block.first:
            name = "all" if "all" in self.spools else "val" if packed.held_out.any() else "train"
            self._open = _Open(name, self.spools[name].tokens, self.spools[name].documents)
        document = self._open
        assert document is not None
        spool = self.spools[document.part]
        spool.append(packed.tokens, np.zeros(int(block.first and len(packed.tokens) > 0), np.uint64))
        document.bytes += int(packed.bytes.sum())
        document.text_tokens += len(packed.tokens) - (block.first + block.last) * len(packed.lengths)
        document.byte_tokens += int(packed.byte_tokens.sum())
        if self._digests:
            document.digest = chain(bytes.fromhex(document.digest), block.data).hex()
        if not block.last:
            return
        self._open = None
        dropped = block.dropped
        if dropped is None and self._digests and not self._fresh(bytes.fromhex(document.digest))[0]:
            dropped = Dropped("duplicate", str(block.path))
        if dropped is not None:
            spool.cut_back(document.tokens, document.documents)
            self.counters.drop(dropped)
            return
        self.counters.documents += 1
        self.counters.bytes += document.bytes
        self.counters.text_tokens += document.text_tokens
        self.counters.byte_tokens += document.byte_tokens

    def _fresh(self, digests: bytes) -> np.ndarray:
        assert self._digests is not None
        fresh = np.zeros(len(digests) // DIGEST_BYTES, np.bool_)
        for i in range(len(fresh)):
            digest = digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES]
            if digest not in self._seen:
                fresh[i] = True
                self._seen.add(digest)
                self._digests.write(digest)
        return fresh

    def _write_full_shards(self) -> bool:
        written = False
        for name, stream in self.streams.items():
            old = self.spools[name]
            full = old.tokens // self._shard_tokens * self._shard_tokens
            if name == "all" or not full:
                continue
            for tokens, starts in old.chunks(0, full):
                stream.append(tokens, starts)
            new = Spool(self._spool_path(name), old.dtype)
            for tokens, starts in old.chunks(full, old.tokens):
                new.append(tokens, starts)
            old.close()  # `save` removes its files
            self.spools[name] = new
            written = True
        return written

    @property
    def text_tokens(self) -> int:
        """Tokens of text so far, also of a document that is not complete."""
        return self.counters.text_tokens + (self._open.text_tokens if self._open else 0)

    @property
    def text_bytes(self) -> int:
        """Bytes of that text."""
        return self.counters.bytes + (self._open.bytes if self._open else 0)

    @property
    def place(self) -> Place | None:
        """Where to read on; None: where reading cannot begin, inside a record."""
        return self._place

    def save(self) -> None:
        """Makes everything so far certain. There has to be a `place`."""
        assert self._place is not None
        for spool in self.spools.values():
            spool.sync()
        if self._digests:
            self._digests.flush()
            os.fsync(self._digests.fileno())
        journal = {
            "identity": self._identity,
            "place": asdict(self._place),
            "counters": asdict(self.counters),
            "open": asdict(self._open) if self._open else None,
            "digests": self._digests.tell() if self._digests else 0,
            "parts": {
                name: {
                    "shards": [asdict(shard) for shard in self.streams[name].shards],
                    "tokens": spool.tokens,
                    "documents": spool.documents,
                }
                for name, spool in self.spools.items()
            },
        }
        atomic_text(self.directory / JOURNAL_NAME, json.dumps(journal) + "\n")
        current = {self._spool_path(name).name for name in self.spools}
        for path in self.directory.iterdir():
            if path.suffix in (".tokens", ".starts") and path.stem not in current:
                path.unlink()

    def finish(self) -> dict[str, tuple[ShardInfo, ...]]:
        """Writes the last shard of each part."""
        for name, spool in self.spools.items():
            for tokens, starts in spool.chunks(0, spool.tokens):
                self.streams[name].append(tokens, starts)
        return {name: stream.finish() for name, stream in self.streams.items()}

    def close(self) -> None:
        for spool in self.spools.values():
            spool.close()
        if self._digests:
            self._digests.close()


def read_journal(directory: Path) -> dict[str, Any] | None:
    """What a Store knew when it was last saved; None: it was not."""
    try:
        journal: dict[str, Any] = json.loads((directory / JOURNAL_NAME).read_bytes())
    except FileNotFoundError:
        return None
    return journal
