"""Turns blocks of text into packed tokens, in parallel. The result does not depend on the number of processes.

`group_blocks` joins small blocks into groups, the unit of work of a process. `pack` encodes a group, and `pack_all`
calls it in several processes; `ray_pool` does so on a cluster. Each process imports this file, so the file imports
nothing that takes long.
"""

import hashlib
import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import numpy as np

from llm.data import blocks as limits
from llm.data.blocks import Block, Dropped, chunks_of
from llm.data.document_reader import parse
from llm.data.exclusion import Edges, Exclusion, hash_words
from llm.data.token_files import IDS
from llm.data.tokenizer import Tokenizer, load_tokenizer
from llm.errors import UserError

# Large enough that handing a group to a worker costs little, small enough that all workers stay busy until the end.
GROUP_BYTES = 1 << 20
GROUP_BLOCKS = 1024
DIGEST_BYTES = 16
CHECKED = 64  # one in this many documents of a group is decoded again, as a check
CHECKED_TOKENS = 1024  # its first tokens that are decoded
GROUPS_A_WORKER = 2  # one is packed while the next is already there


class WorkerFailed(UserError):
    """A worker could not do its work, for a cause outside the input, such as a process that died."""


@dataclass(frozen=True)
class Settings:
    """All settings that decide how documents become tokens."""

    tokenizer: Path
    text_key: str = "text"
    val_fraction: float | None = None  # fraction held out by hash; None: the split is not by hash
    digests: bool = False  # whether to hash each document, to find equal ones
    exclusion: Exclusion | None = None  # runs of words that no document may have


@dataclass(frozen=True)
class Packed:
    """The tokens of a group's documents, in order: for each document BOS, the text's tokens, EOS.

    A chunk of a long document is a group by itself and counts as one document. Only the first chunk has BOS, only the
    last has EOS.
    """

    tokens: np.ndarray  # [tokens], dtype `token_dtype`; each document begins with Tokenizer.begin_mark
    lengths: np.ndarray  # int64 [documents], tokens per document
    held_out: np.ndarray  # bool [documents]: in the validation split; has no meaning for a chunk after the first
    digests: list[bytes]  # of each document, if asked for or if one is excluded
    bytes: np.ndarray  # int64 [documents], bytes of text
    byte_tokens: np.ndarray  # int64 [documents], byte-fallback tokens
    piece_bytes: np.ndarray  # int64 [documents], bytes of the tokens; those of the text, if decoding gives it back
    excluded: np.ndarray  # bool [documents]: has one of the runs; of a chunk, without those that begin before it
    edges: Edges | None  # of a chunk, if there are runs to find
    dropped: list[Dropped]
    checked: int  # documents that were decoded again


PackAll = Callable[[Iterable[list[Block]], Settings], Iterator[tuple[list[Block], Packed]]]
"""`pack_all` in processes of this machine, or on a cluster."""


def pack(tokenizer: Tokenizer, blocks: Sequence[Block], settings: Settings) -> Packed:
    """Encodes a group, or checks one of token ids.

    Raises UserError for a bad record, for a text that decoding does not give back, and for an id that the tokenizer
    does not have.
    """
    checked = 0
    dropped: list[Dropped] = []
    if blocks[0].mode == "ids":
        texts, ids, ends = _decode(tokenizer, blocks)
    else:
        texts, dropped = _parse(blocks, settings.text_key)
        ids, ends = tokenizer.encode_batch(texts)
        # A tokenizer of others may change the text; `piece_bytes` then tells by how much.
        if tokenizer.lossless:
            checked = _check_round_trips(tokenizer, texts, ids, ends, blocks)
    # Without texts, [0] would be one element too many.
    begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if texts else ends
    # A chunk is alone in its group, and whole documents have both, so the last block decides for the group.
    has_bos, has_eos = blocks[-1].first, blocks[-1].last
    # Cast before the inserts, because each of them copies all tokens.
    tokens = ids.astype(token_dtype(tokenizer))
    if has_bos:
        tokens = np.insert(tokens, begins, tokenizer.begin_mark)
    if has_eos:
        # Each BOS before an end has moved that end by one.
        tokens = np.insert(tokens, ends + has_bos * np.arange(1, len(ends) + 1), tokenizer.eos_id)
    # Prefix sums: the count of a document is then one difference.
    is_byte, size = (
        np.concatenate([np.zeros(1, np.int64), np.cumsum(of_id[ids], dtype=np.int64)])
        for of_id in (tokenizer.is_byte(), tokenizer.token_bytes())
    )
    excluded, edges = np.zeros(len(texts), np.bool_), None
    if exclusion := settings.exclusion:
        for i, text in enumerate(texts):
            words = hash_words(text)
            excluded[i] = exclusion.finds(words)
            edges = exclusion.edges(words) if blocks[0].is_part else None
    needs_digests = settings.digests or excluded.any()
    return Packed(
        tokens=tokens,
        lengths=ends - begins + has_bos + has_eos,
        held_out=np.array([held_out(text, settings.val_fraction) for text in texts], np.bool_),
        digests=[new_digest(text).digest() for text in texts] if needs_digests else [],
        excluded=excluded,
        edges=edges,
        bytes=np.array([len(text) for text in texts], np.int64),
        byte_tokens=is_byte[ends] - is_byte[begins],
        piece_bytes=size[ends] - size[begins],
        dropped=dropped,
        checked=checked,
    )


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Returns the dtype of packed tokens: that of the shards, unless begin_mark needs a wider one."""
    # The C++ writer has the same rule.
    return np.dtype(np.uint16 if max(tokenizer.vocab_size, tokenizer.begin_mark + 1) <= 1 << 16 else np.uint32)


def _parse(blocks: Sequence[Block], text_key: str) -> tuple[list[bytes], list[Dropped]]:
    texts: list[bytes] = []
    dropped: list[Dropped] = []
    for block in blocks:
        its_texts, its_dropped = parse(block, text_key)
        texts += its_texts
        dropped += its_dropped
    return texts, dropped


def _decode(tokenizer: Tokenizer, blocks: Sequence[Block]) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    """Returns the texts of documents of token ids, and ids and ends as `Tokenizer.encode_batch` does."""
    texts: list[bytes] = []
    parts: list[np.ndarray] = []
    for block in blocks:
        for value in block.values or (block.data,):
            assert isinstance(value, bytes)
            ids = np.frombuffer(value, IDS)
            if ids.max() >= tokenizer.vocab_size:
                raise UserError(
                    f"{block.path}: has the id {ids.max():,}, but {tokenizer.path} has {tokenizer.vocab_size:,} tokens;"
                    " --tok must be the tokenizer that made the ids, and --tokens their type"
                )
            # Only a whole text, or its beginning, can have a blank in front that encoding has put there.
            texts.append(tokenizer.text_of(ids.tolist()) if block.first else tokenizer.decode_bytes(ids.tolist()))
            parts.append(ids)
    ends = np.cumsum([len(ids) for ids in parts], dtype=np.int64)
    return texts, np.concatenate(parts).astype(np.int32), ends


def _check_round_trips(
    tokenizer: Tokenizer, texts: Sequence[bytes], ids: np.ndarray, ends: np.ndarray, blocks: Sequence[Block]
) -> int:
    """Decodes the beginning of one document in CHECKED; returns how many."""
    checked = range(0, len(texts), CHECKED)
    for i in checked:
        begin = ends[i - 1] if i else 0
        _check_round_trip(tokenizer, texts[i], ids[begin : min(ends[i], begin + CHECKED_TOKENS)], blocks)
    return len(checked)


def _check_round_trip(tokenizer: Tokenizer, text: bytes, ids: np.ndarray, blocks: Sequence[Block]) -> None:
    # Compared as bytes, because the last token may end inside a character.
    decoded = tokenizer.decode_bytes(ids.tolist())
    # Fewer than CHECKED_TOKENS tokens are all tokens of the text, so they must give the whole text.
    if not text.startswith(decoded) or (len(ids) < CHECKED_TOKENS and decoded != text):
        raise UserError(
            f"{blocks[0].path}: round trip failed: the tokens of {text[:40].decode(errors='replace')!r}... decode to "
            f"{decoded[:40].decode(errors='replace')!r}...; {tokenizer.path} loses text, make another tokenizer"
        )


def held_out(text: bytes, val_fraction: float | None) -> bool:
    """Whether the split by hash puts a document into validation; for a long document, its first chunk decides."""
    if val_fraction is None:
        return False
    # A text of fewer bytes has fewer characters, so it is one chunk. A longer text may arrive whole or in chunks,
    # depending on its place in the file, but all its copies must be in the same split.
    if len(text) > limits.CHUNK_CHARS:
        # Token ids need not be UTF-8.
        text = next(chunks_of(text.decode(errors="surrogateescape")))[0].encode(errors="surrogateescape")
    # `person` makes this hash independent of `new_digest`.
    number = hashlib.blake2b(text, digest_size=8, person=b"llm split").digest()
    return int.from_bytes(number, "little") < val_fraction * 2**64


def new_digest(text: bytes = b"") -> "hashlib.blake2b":
    """Makes the hash that finds equal documents; the caller may update it with the rest of a document."""
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES, person=b"llm dedup")


def group_blocks(blocks: Iterable[Block], *, whole: bool = False) -> Iterator[list[Block]]:
    """Joins small blocks; a chunk of a long document stays alone. The grouping changes no token.

    whole: join the chunks of a document first, for a tokenizer that must encode it as a whole.
    """
    if whole:
        blocks = _joined(blocks)
    group: list[Block] = []
    size = 0
    for block in blocks:
        if group and (block.is_part or size >= GROUP_BYTES or len(group) >= GROUP_BLOCKS):
            yield group
            group, size = [], 0
        if block.is_part:
            yield [block]
        else:
            group.append(block)
            size += len(block.data) + sum(len(value) for value in block.values if isinstance(value, bytes))
    if group:
        yield group


def _joined(blocks: Iterable[Block]) -> Iterator[Block]:
    """Joins the chunks of each long document to one block."""
    chunks: list[Block] = []
    for block in blocks:
        if block.first:
            chunks = []
        chunks.append(block)
        if block.last and len(chunks) > 1:
            data = b"".join(chunk.data for chunk in chunks)
            yield replace(chunks[0], data=data, position=block.position, last=True, dropped=block.dropped)
        elif block.last:
            yield block


def pack_all(
    groups: Iterable[list[Block]], settings: Settings, workers: int, tokenizer: Tokenizer
) -> Iterator[tuple[list[Block], Packed]]:
    """Packs every group, in order, in `workers` processes (1: in this one). Holds two groups per worker in memory.

    tokenizer: that of `settings`, loaded; other processes load it again.

    Raises WorkerFailed if a worker process dies.
    """
    if workers == 1:
        for group in groups:
            yield group, pack(tokenizer, group, settings)
        return
    # spawn, because a fork of a process with threads (torch's, a test runner's) may deadlock. Each worker has a pipe of
    # its own, because an executor's queue may wait for ever for a worker that was killed.
    context = multiprocessing.get_context("spawn")
    connections: list[Connection] = []
    processes = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            # daemon: Python ends the workers if this process ends without the `finally` below.
            process = context.Process(target=_serve, args=(theirs, settings), daemon=True)
            process.start()
            # Only the worker may hold its end of the pipe; otherwise recv() would not notice that the worker died.
            theirs.close()
            connections.append(ours)
            processes.append(process)
        # Groups go to the workers in turn and are read in the same order, so a faster worker changes nothing.
        turn = cycle(connections)
        yield from in_order(groups, lambda group: _send(group, next(turn)), _receive, lambda: GROUPS_A_WORKER * workers)
    finally:
        # A worker ends when its connection is closed (`_serve`). All are closed first, so that all end at once.
        for connection in connections:
            connection.close()
        for process in processes:
            process.join()


Sent = TypeVar("Sent")


def in_order(
    groups: Iterable[list[Block]],
    send: Callable[[list[Block]], Sent],
    receive: Callable[[Sent], Packed],
    most: Callable[[], int],
) -> Iterator[tuple[list[Block], Packed]]:
    """Yields each group with its result, in the order of the groups, whichever is done first.

    At most most() groups are sent and not received, so memory is bounded: no more of `groups` is taken until then.
    """
    waiting: deque[tuple[list[Block], Sent]] = deque()
    for group in groups:
        # The number may change: nodes of a cluster come and go.
        while len(waiting) >= most():
            earliest, sent = waiting.popleft()
            yield earliest, receive(sent)
        waiting.append((group, send(group)))
    while waiting:
        earliest, sent = waiting.popleft()
        yield earliest, receive(sent)


def _send(group: list[Block], connection: Connection) -> Connection:
    try:
        connection.send(group)
    except OSError:
        raise WorkerFailed(_DIED) from None
    return connection


def _receive(connection: Connection) -> Packed:
    try:
        result = connection.recv()
    except (EOFError, OSError):
        raise WorkerFailed(_DIED) from None
    if isinstance(result, Exception):
        raise result
    packed: Packed = result
    return packed


_DIED = "a worker process died, perhaps for want of memory; fewer --workers need less, and 1 starts none"


def _serve(connection: Connection, settings: Settings) -> None:
    """Runs in a worker process: packs the groups that come through the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's to handle
    groups: queue.SimpleQueue[list[Block]] = queue.SimpleQueue()

    def receive() -> None:
        # A thread of its own: if both processes sent and neither received, both would wait for ever.
        try:
            while True:
                groups.put(connection.recv())
        except (EOFError, OSError):
            # Not sys.exit, which would end only this thread.
            os._exit(0)  # the parent has finished or died

    threading.Thread(target=receive, daemon=True).start()
    try:
        tokenizer = load_tokenizer(settings.tokenizer)
        while True:
            connection.send(pack(tokenizer, groups.get(), settings))
    except Exception as error:
        connection.send(error)
        threading.Event().wait()  # until the parent ends this process
