"""Documents to packed tokens, in parallel and in order: what comes out does not depend on the number of processes.

Imports nothing heavy: each worker process imports this file anew.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm.corpus import Document
from llm.errors import UserError
from llm.tokenizer import Tokenizer

BATCH_CHARS = 1 << 18  # a worker's unit: long beside the cost of handing it over, short beside the whole
BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class Packed:
    """Tokens of some documents of one part ("train", "val"), in order: BOS, the text's, EOS for each."""

    part: str
    tokens: np.ndarray  # [tokens], uint16 where the vocabulary allows it, else uint32
    starts: np.ndarray  # uint64 [documents that begin here], offsets into `tokens`


@dataclass(frozen=True)
class Batch:
    """A unit of work: documents or pieces, and the part that each belongs to."""

    documents: list[Document]
    parts: list[str]


def pack(tokenizer: Tokenizer, batch: Batch) -> list[Packed]:
    """Encodes a batch; one `Packed` for each part that is in it."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    bos, eos = np.array([tokenizer.bos_id], dtype), np.array([tokenizer.eos_id], dtype)
    ids, ends = tokenizer.encode_batch([document.text.encode() for document in batch.documents])
    encoded = np.split(ids, ends[:-1])
    result = []
    for part in sorted(set(batch.parts)):
        arrays: list[np.ndarray] = []
        starts: list[int] = []
        count = 0
        for document, ids, its_part in zip(batch.documents, encoded, batch.parts, strict=True):
            if its_part != part:
                continue
            if document.first:
                starts.append(count)
                arrays.append(bos)
            arrays.append(ids.astype(dtype))
            if document.last:
                arrays.append(eos)
            count += document.first + len(ids) + document.last
        result.append(Packed(part, np.concatenate(arrays), np.array(starts, np.uint64)))
    return result


def batches(documents: Iterable[tuple[Document, str]]) -> Iterator[Batch]:
    """Groups documents, each with its part, into units of work. Where the cuts fall changes no token."""
    batch = Batch([], [])
    chars = 0
    for document, part in documents:
        batch.documents.append(document)
        batch.parts.append(part)
        chars += len(document.text)
        if chars >= BATCH_CHARS or len(batch.documents) >= BATCH_DOCUMENTS:
            yield batch
            batch = Batch([], [])
            chars = 0
    if batch.documents:
        yield batch


def pack_all(units: Iterable[Batch], tokenizer: Path, workers: int) -> Iterator[tuple[Batch, list[Packed]]]:
    """Packs every batch, in order, in `workers` processes (1: in this one). Holds a few batches a worker at a time.

    Raises UserError where a worker process dies.
    """
    if workers == 1:
        own = Tokenizer(tokenizer)
        for unit in units:
            yield unit, pack(own, unit)
        return
    # spawn: a fork of a process that has threads (torch's, a test runner's) may deadlock.
    context = multiprocessing.get_context("spawn")
    waiting: deque[tuple[Batch, Future[list[Packed]]]] = deque()
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer,)) as pool:
        try:
            for unit in units:
                waiting.append((unit, pool.submit(_work, unit)))
                if len(waiting) > 2 * workers:
                    unit, future = waiting.popleft()
                    yield unit, future.result()
            while waiting:
                unit, future = waiting.popleft()
                yield unit, future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died, perhaps for want of memory; fewer --workers need less, and 1 starts none"
            ) from None
        finally:
            for _, future in waiting:
                future.cancel()


_tokenizer: Tokenizer  # a worker process's own


def _start_worker(tokenizer: Path) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's to handle
    threading.Thread(target=_follow_parent, daemon=True).start()
    _tokenizer = Tokenizer(tokenizer)


def _follow_parent() -> None:
    """Ends this process with its parent; a pool's worker would else wait for ever after a kill -9."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(unit: Batch) -> list[Packed]:
    return pack(_tokenizer, unit)
