"""Blocks of text to packed tokens, in parallel and in order: what comes out does not depend on the number of processes.

Imports nothing heavy: each worker process imports this file anew.
"""

import hashlib
import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from llm.data import document_reader
from llm.data.document_reader import Block, Dropped, parse, pieces_of
from llm.data.tokenizer import Tokenizer
from llm.errors import UserError

UNIT_BYTES = 1 << 20  # a worker's unit: long beside the cost of handing it over, short beside the whole
UNIT_BLOCKS = 1024
DIGEST_BYTES = 16
CHECKED = 64  # of as many documents the first is decoded again
CHECKED_TOKENS = 1024  # at its beginning

Unit = Sequence[Block]  # whole documents; or one block that is a piece of a document


class WorkerDied(UserError):
    """A worker process came to its end before its work did."""


@dataclass(frozen=True)
class Settings:
    """What decides how documents become tokens."""

    tokenizer: Path
    text_key: str = "text"
    val_fraction: float | None = None  # held out by hash; None: all documents are of one part
    digests: bool = False  # of each document, to find equal ones


@dataclass(frozen=True)
class Packed:
    """The tokens of a unit's documents (or of its piece), in order: BOS, the text's, EOS for each."""

    tokens: np.ndarray  # [tokens], uint16 where the vocabulary allows it, else uint32
    lengths: np.ndarray  # int64 [documents], tokens of each
    held_out: np.ndarray  # bool [documents]: belongs to validation; of a later piece it says nothing
    digests: bytes  # DIGEST_BYTES for each document, or none; none of a piece
    bytes: np.ndarray  # int64 [documents], of text
    byte_tokens: np.ndarray  # int64 [documents], tokens that are a byte of a character which the vocabulary lacks
    dropped: list[Dropped]
    checked: int  # documents that were decoded again


def pack(tokenizer: Tokenizer, unit: Unit, settings: Settings) -> Packed:
    """Encodes a unit. Raises UserError: a bad record, or a text that does not come back when it is decoded."""
    texts: list[bytes] = []
    dropped: list[Dropped] = []
    for block in unit:
        its_texts, its_dropped = parse(block, settings.text_key)
        texts += its_texts
        dropped += its_dropped
    ids, ends = tokenizer.encode_batch(texts)
    begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if texts else ends
    checked = range(0, len(texts), CHECKED)
    for i in checked:
        _check_round_trip(tokenizer, texts[i], ids[begins[i] : min(ends[i], begins[i] + CHECKED_TOKENS)], unit)
    whole = [unit[-1].first, unit[-1].last] if is_piece(unit) else [True, True]
    is_byte = np.concatenate([np.zeros(1, np.int64), np.cumsum(tokenizer.is_byte()[ids])])
    return Packed(
        tokens=_frame(ids, begins, ends, tokenizer, *whole),
        lengths=ends - begins + sum(whole),
        held_out=np.array([held_out(text, settings.val_fraction) for text in texts], np.bool_),
        digests=b"".join(map(digest, texts)) if settings.digests and not is_piece(unit) else b"",
        bytes=np.array([len(text) for text in texts], np.int64),
        byte_tokens=is_byte[ends] - is_byte[begins],
        dropped=dropped,
        checked=len(checked),
    )


def _frame(
    ids: np.ndarray, begins: np.ndarray, ends: np.ndarray, tokenizer: Tokenizer, bos: bool, eos: bool
) -> np.ndarray:
    """Puts BOS before and EOS behind each document."""
    count = len(ends)
    tokens = np.empty(len(ids) + count * (bos + eos), np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    text = np.ones(len(tokens), np.bool_)
    if bos:
        at = begins + np.arange(count) * (bos + eos)
        tokens[at], text[at] = tokenizer.bos_id, False
    if eos:
        at = ends + np.arange(count) * (bos + eos) + bos
        tokens[at], text[at] = tokenizer.eos_id, False
    tokens[text] = ids
    return tokens


def _check_round_trip(tokenizer: Tokenizer, text: bytes, ids: np.ndarray, unit: Unit) -> None:
    decoded = tokenizer.decode_bytes(ids.tolist())
    if not text.startswith(decoded) or (len(ids) < CHECKED_TOKENS and decoded != text):
        raise UserError(
            f"{unit[0].path}: round trip failed: the tokens of {text[:40].decode(errors='replace')!r}... decode to "
            f"{decoded[:40].decode(errors='replace')!r}...; {tokenizer.path} loses text, make another tokenizer"
        )


def held_out(text: bytes, val_fraction: float | None) -> bool:
    """Whether the split by hash puts a document into validation; of a long one the first piece decides."""
    if val_fraction is None:
        return False
    if len(text) > document_reader.PIECE_CHARS:
        text = next(pieces_of(text.decode()))[0].encode()
    number = hashlib.blake2b(text, digest_size=8, person=b"llm split").digest()
    return int.from_bytes(number, "little") < val_fraction * 2**64


def digest(text: bytes) -> bytes:
    """Stands for a document: BLAKE2b of its first piece, continued by `chain` over the others."""
    if len(text) <= document_reader.PIECE_CHARS:
        return chain(b"", text)
    result = b""
    for piece, _, _ in pieces_of(text.decode()):
        result = chain(result, piece.encode())
    return result


def chain(before: bytes, piece: bytes) -> bytes:
    return hashlib.blake2b(before + piece, digest_size=DIGEST_BYTES, person=b"llm dedup").digest()


def is_piece(unit: Unit) -> bool:
    """Whether a unit is one piece of a document that has others."""
    return unit[-1].mode == "piece" and not (unit[-1].first and unit[-1].last)


def units(blocks: Iterable[Block]) -> Iterator[Unit]:
    """Groups blocks into units of work. Where the cuts fall changes no token."""
    unit: list[Block] = []
    size = 0
    for block in blocks:
        alone = is_piece([block])
        if unit and (alone or size >= UNIT_BYTES or len(unit) >= UNIT_BLOCKS):
            yield unit
            unit, size = [], 0
        if alone:
            yield [block]
        else:
            unit.append(block)
            size += len(block.data) + sum(len(value or b"") for value in block.values)
    if unit:
        yield unit


def pack_all(work: Iterable[Unit], settings: Settings, workers: int) -> Iterator[tuple[Unit, Packed]]:
    """Packs every unit, in order, in `workers` processes (1: in this one). Holds two units a worker at a time.

    Raises WorkerDied where a worker process dies.
    """
    if workers == 1:
        own = Tokenizer(settings.tokenizer)
        for unit in work:
            yield unit, pack(own, unit, settings)
        return
    # spawn: a fork of a process that has threads (torch's, a test runner's) may deadlock. A pipe for each worker, as an
    # executor's queue may wait for ever for a worker that was killed.
    context = multiprocessing.get_context("spawn")
    connections: list[Connection] = []
    processes = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, settings), daemon=True)
            process.start()
            theirs.close()
            connections.append(ours)
            processes.append(process)
        waiting: deque[tuple[Unit, Connection]] = deque()
        for unit, connection in zip(work, cycle(connections), strict=False):
            if len(waiting) == 2 * workers:
                yield _receive(*waiting.popleft())
            _send(unit, connection)
            waiting.append((unit, connection))
        while waiting:
            yield _receive(*waiting.popleft())
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join()


def _send(unit: Unit, connection: Connection) -> None:
    try:
        connection.send(unit)
    except OSError:
        raise WorkerDied(_DIED) from None


def _receive(unit: Unit, connection: Connection) -> tuple[Unit, Packed]:
    try:
        result = connection.recv()
    except (EOFError, OSError):
        raise WorkerDied(_DIED) from None
    if isinstance(result, Exception):
        raise result
    return unit, result


_DIED = "a worker process died, perhaps for want of memory; fewer --workers need less, and 1 starts none"


def _serve(connection: Connection, settings: Settings) -> None:
    """What a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's to handle
    work: queue.SimpleQueue[Unit] = queue.SimpleQueue()

    def take_in() -> None:
        # In a thread of its own: two processes that both send and do not receive would wait for each other for ever.
        try:
            while True:
                work.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # the parent is done, or it died

    threading.Thread(target=take_in, daemon=True).start()
    try:
        tokenizer = Tokenizer(settings.tokenizer)
        while True:
            connection.send(pack(tokenizer, work.get(), settings))
    except Exception as error:
        connection.send(error)
        threading.Event().wait()  # for the parent, who ends it
