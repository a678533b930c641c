"""Text to shards: documents are tokenized, split into train and validation, and packed into a directory of shards.

The directory (docs/data.md) is complete or has no manifest. New shards are made in a folder inside it, out of sight,
and take the old ones' place when they are complete; a run that was killed leaves that folder, and the next clears it.
"""

import fcntl
import hashlib
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llm.atomic import sync_directory, sync_file
from llm.corpus import Document, check_inputs, describe_documents, read_documents, resolve_documents
from llm.display import Display
from llm.errors import UserError
from llm.packing import batches, pack_all
from llm.shards import Manifest, ShardInfo, ShardWriter, read_manifest, write_manifest
from llm.tokenizer import Tokenizer, load_tokenizer

HASH_SPLIT_DOCUMENTS = 200
BYTES_A_WORKER = 4 << 20  # a process that has less to do than this costs more than it brings
COPY_TOKENS = 1 << 22
SECONDS_A_LINE = 30
_STAGING = ".incomplete"


def prepare_data(
    inputs: Sequence[str | os.PathLike[str]],
    tok: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    seq_len: int,
    shard_tokens: int,
    val_fraction: float = 0.005,
    documents: str = "auto",
    workers: int | None = None,
) -> dict[str, Any]:
    """Makes a directory of shards from text. The same input and settings give the same bytes, on any number of workers.

    The split. With 200 documents or more each goes to validation if the BLAKE2b hash of its text (of a long one: of its
    first piece, see `llm.corpus`) lies in the lowest `val_fraction`: where a document goes does not depend on the
    others, and its exact copies go with it. With fewer, the documents in their order are one running text, and
    validation is the last `val_fraction` of its tokens or, if that is more, one row. The cut moves back to the nearest
    place where text may be cut; the document it falls into becomes two.

    A directory that was made from the same input with the same settings is left as it is. One that was made from
    others is replaced once the new one is complete; other files in it are not touched.

    Args:
        inputs, documents: see `llm.corpus.read_documents`.
        tok: the tokenizer's model file. It is copied to the shards.
        seq_len: recorded as the default row length of training; shards serve others too.
        shard_tokens: tokens in each shard but the last.
        val_fraction: of the documents, or of the tokens; between 0 and 1.
        workers: processes; None: one a core, but no more than the input is worth.

    Returns {"train_tokens", "val_tokens", "documents", "dropped" {reason: documents}, "bytes", "bytes_per_token" (BOS
    and EOS not counted), "train_documents", "val_documents", "unused_tokens" {part: tokens}, "dataset_hash", "out_dir",
    "reused"}.
    Raises UserError: bad input or settings, or too little text for a document and a row in each part; OSError.
    """
    if seq_len < 2:
        raise UserError(f"--seq_len {seq_len}: a row has at least 2 tokens")
    if shard_tokens <= seq_len:
        raise UserError(f"--shard_tokens {shard_tokens}: a shard has to hold a row of --seq_len {seq_len} + 1 tokens")
    if not 0 < val_fraction < 1:
        raise UserError(f"--val_fraction {val_fraction}: lies between 0 and 1, such as 0.005")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: at least 1")
    size = check_inputs(inputs)
    settings = {
        "documents": [resolve_documents(path, documents) for path in inputs],
        "shard_tokens": shard_tokens,
        "val_fraction": val_fraction,
    }
    tokenizer = load_tokenizer(tok)
    if workers is None:
        workers = max(1, min(len(os.sched_getaffinity(0)), size // BYTES_A_WORKER))
    hashes = [_sha256(path) for path in inputs]
    out_dir = Path(out_dir)
    with _staging(out_dir) as staging, Display("preparing", total=size) as display:
        for path in inputs:
            display.line(describe_documents(path, documents))
        manifest = _made_before(out_dir, tokenizer, seq_len, settings, hashes)
        reused = manifest is not None
        if manifest is None:
            shutil.copyfile(tokenizer.path, staging / "tokenizer.model")
            sync_file(staging / "tokenizer.model")
            packing, shards, counters = _make(
                inputs, tokenizer, staging, seq_len, settings, documents, workers, display
            )
            write_manifest(
                staging,
                vocab_size=tokenizer.vocab_size,
                tokenizer_sha256=tokenizer.sha256,
                seq_len=seq_len,
                packing=packing,
                shards=shards,
                counters=counters | {"inputs_sha256": hashes},
            )
            _publish(staging, out_dir, display)
            manifest = read_manifest(out_dir)
        _report(manifest, reused, display)
    return _result(manifest) | {"out_dir": str(out_dir), "reused": reused}


def _sha256(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The directory.


@contextmanager
def _staging(out_dir: Path) -> Iterator[Path]:
    """An empty folder in `out_dir`, which no one else is preparing; both are gone after an error, if they were new."""
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir}: is a file; --out_dir names a directory")
    new = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(out_dir, os.O_RDONLY | os.O_DIRECTORY)
    staging = out_dir / _STAGING
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out_dir}: another prepare_data is writing here") from None
        except OSError:
            pass  # some network file systems lock no directories; the lock only guards against a slip
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            yield staging
        except OSError as error:
            if error.filename is None:  # a write, such as to a full disk
                error.filename = str(out_dir)
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            if new and not any(out_dir.iterdir()):
                out_dir.rmdir()
    finally:
        os.close(lock)


def _made_before(
    out_dir: Path, tokenizer: Tokenizer, seq_len: int, settings: dict[str, Any], hashes: list[str]
) -> Manifest | None:
    """What is in the directory, if it is complete and just what is asked for."""
    try:
        manifest = read_manifest(out_dir)
    except UserError:
        return None
    same = (
        manifest.tokenizer_sha256 == tokenizer.sha256
        and manifest.seq_len == seq_len
        and settings.items() <= manifest.packing.items()
        and manifest.counters.get("inputs_sha256") == hashes
        and _sha256_or_none(out_dir / "tokenizer.model") == tokenizer.sha256
    )
    shards = [shard for part in manifest.shards.values() for shard in part]
    whole = all(_size_or_none(out_dir / shard.file) == shard.bytes for shard in shards)
    return manifest if same and whole else None


def _size_or_none(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _sha256_or_none(path: Path) -> str | None:
    return _sha256(path) if path.is_file() else None


def _publish(staging: Path, out_dir: Path, display: Display) -> None:
    """Puts the new files in the place of the old; from the first step to the last there is no manifest."""
    old = out_dir / "manifest.json"
    if old.exists():
        display.line(f"{out_dir}: replaces the shards that were made from other input or settings")
        old.unlink()
        sync_directory(out_dir)
    for path in out_dir.iterdir():
        if re.fullmatch(r"(train|val)-\d{5,}\.bin", path.name):
            path.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "manifest.json"):
        if path.name == "manifest.json":
            sync_directory(out_dir)
        os.replace(path, out_dir / path.name)
    sync_directory(out_dir)


# The shards.


class _Part:
    """The shards of one part: exactly `shard_tokens` in each but the last; documents may cross from one to the next."""

    def __init__(self, name: str, directory: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.tokens = 0
        self.documents = 0
        self._name = name
        self._directory = directory
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._writer: ShardWriter | None = None
        self._shards: list[ShardInfo] = []

    def append(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        """tokens: [tokens]; starts: uint64 [documents that begin here], offsets into `tokens`."""
        self.tokens += len(tokens)
        self.documents += len(starts)
        while len(tokens):
            if self._writer is None:
                self._writer = ShardWriter(
                    self._directory / f"{self._name}-{len(self._shards):05d}.bin",
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
            self._shards.append(self._writer.finish())
            self._writer = None
        return tuple(self._shards)


def _make(
    inputs: Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    directory: Path,
    seq_len: int,
    settings: dict[str, Any],
    documents: str,
    workers: int,
    display: Display,
) -> tuple[dict[str, Any], dict[str, tuple[ShardInfo, ...]], dict[str, Any]]:
    """Writes the shards of both parts; returns the packing settings, the shards and the counters."""
    names = ", ".join(map(str, inputs))
    fraction = settings["val_fraction"]
    train, val = (_Part(name, directory, tokenizer, settings["shard_tokens"]) for name in ("train", "val"))
    by_hash = _at_least(HASH_SPLIT_DOCUMENTS, inputs, settings["documents"], documents)
    spool = None if by_hash else _Spool(directory / "tokens", tokenizer)
    sinks = {"train": train, "val": val} if spool is None else {"all": spool}
    count = size = text_tokens = 0
    dropped: Counter[str] = Counter()
    said = time.monotonic()
    stream = _assign(read_documents(inputs, documents, dropped), fraction if by_hash else None)
    for unit, packed in pack_all(batches(stream), directory / "tokenizer.model", workers):
        for some in packed:
            sinks[some.part].append(some.tokens, some.starts)
            text_tokens += len(some.tokens)
        for document in unit.documents:
            count += document.last
            size += document.bytes
            text_tokens -= document.first + document.last
        display.update(document.position, f"{text_tokens:,} tokens")
        if time.monotonic() - said > SECONDS_A_LINE:
            said = time.monotonic()
            display.line(f"{count:,} documents, {size:,} bytes, {text_tokens:,} tokens so far")
    if not count:
        raise UserError(f"{names}: no document with text in it")
    if spool is None:
        _check_hash_split(train, val, seq_len, fraction, names)
    else:
        spool.split(train, val, seq_len, fraction, names, display)
    counters = {
        "documents": count,
        "dropped": dict(dropped),
        "bytes": size,
        "text_tokens": text_tokens,
        "train_documents": train.documents,
        "val_documents": val.documents,
    }
    packing = settings | {"split": "hash" if by_hash else "position"}
    return packing, {"train": train.finish(), "val": val.finish()}, counters


def _at_least(limit: int, inputs: Sequence[str | os.PathLike[str]], modes: Sequence[str], documents: str) -> bool:
    """Whether there are that many documents; reads no further than it takes to tell."""
    if len(inputs) < limit and set(modes) == {"file"}:
        return False
    ends = (document for document in read_documents(inputs, documents) if document.last)
    return sum(1 for _ in islice(ends, limit)) == limit


def _assign(documents: Iterator[Document], val_fraction: float | None) -> Iterator[tuple[Document, str]]:
    """Gives each document its part by its hash; None: all are of the one part "all"."""
    part = "all"
    for document in documents:
        if val_fraction is not None and document.first:
            part = "val" if held_out(document.text, val_fraction) else "train"
        yield document, part


def held_out(text: str, val_fraction: float) -> bool:
    """Whether the split by hash puts a document that begins with this piece into validation."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"llm split").digest()
    return int.from_bytes(digest, "little") < val_fraction * 2**64


def _check_hash_split(train: _Part, val: _Part, seq_len: int, fraction: float, names: str) -> None:
    total = train.tokens + val.tokens
    if val.tokens <= seq_len:
        # Twice what it takes on average, and five documents: chance then seldom gives too few again.
        enough = max(2 * fraction, 2 * (seq_len + 1) / total, 5 / (train.documents + val.documents))
        way_out = f"raise --val_fraction to {math.ceil(enough * 1000) / 1000:g}" if enough < 0.5 else "use more text"
        raise UserError(
            f"{names}: --val_fraction {fraction:g} holds out {val.documents:,} documents with {val.tokens:,} of "
            f"{total:,} tokens, too few for one row of --seq_len {seq_len} + 1 tokens; {way_out} or lower --seq_len"
        )
    if train.tokens <= seq_len:
        raise UserError(
            f"{names}: --val_fraction {fraction:g} leaves {train.tokens:,} of {total:,} tokens to train on, too few "
            f"for one row of --seq_len {seq_len} + 1 tokens; lower --val_fraction or --seq_len, or use more text"
        )


class _Spool:
    """All tokens in a temporary file: where the running text is cut is known only at its end."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self._path = path
        self._tokenizer = tokenizer
        self._file = open(path, "wb")  # noqa: SIM115
        self._tokens = 0
        self._dtype = np.dtype(np.uint16)
        self._starts: list[int] = []

    def append(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        self._file.write(tokens.tobytes())
        self._dtype = tokens.dtype
        self._starts.extend((starts + np.uint64(self._tokens)).tolist())
        self._tokens += len(tokens)

    def split(self, train: _Part, val: _Part, seq_len: int, fraction: float, names: str, display: Display) -> None:
        """Copies the tokens up to the cut to one part, those after it to the other, and removes the file."""
        self._file.close()
        tokens = np.memmap(self._path, self._dtype, "r")
        starts = np.array(self._starts, np.uint64)
        share = round(self._tokens * fraction)
        at = self._place_to_cut(tokens, self._tokens - max(share, seq_len + 1))
        inside = at > 0 and tokens[at] != self._tokenizer.bos_id
        if at + inside <= seq_len:
            raise UserError(
                f"{names}: {self._tokens:,} tokens are too few for a row of --seq_len {seq_len} + 1 tokens to train on "
                f"and another for validation; use more text or lower --seq_len (to {max(2, self._tokens // 3)}, say)"
            )
        first_after = int(np.searchsorted(starts, at))
        _copy(tokens[:at], starts[:first_after], train)
        if inside:
            none = np.array([], np.uint64)
            train.append(np.array([self._tokenizer.eos_id], tokens.dtype), none)
            val.append(np.array([self._tokenizer.bos_id], tokens.dtype), np.array([0], np.uint64))
        _copy(tokens[at:], starts[first_after:] - np.uint64(at), val)
        why = "" if share > seq_len else f": one row, --val_fraction {fraction:g} would be less"
        display.line(
            f"fewer than {HASH_SPLIT_DOCUMENTS} documents, so validation is the end of the running text: the last "
            f"{val.tokens:,} of {self._tokens:,} tokens{why}"
        )
        del tokens
        self._path.unlink()

    def _place_to_cut(self, tokens: np.ndarray, at: int) -> int:
        """The last place at or before `at` where a document begins or text may be cut (as `corpus.cut` does); or 0."""
        pieces = self._tokenizer.piece_bytes()
        first = np.array([piece[0] if piece else -1 for piece in pieces])
        last = np.array([piece[-1] if piece else -1 for piece in pieces])
        blank, newline = ord(" "), ord("\n")
        while at > 0:
            low = max(0, at - COPY_TOKENS)
            before, after = tokens[low:at], tokens[low + 1 : at + 1]
            end, begin = last[before], first[after]
            safe = (end != blank) & (begin == blank) | (end == newline) & (begin != newline)
            places = np.flatnonzero(safe & (end >= 0) & (begin >= 0) | (after == self._tokenizer.bos_id))
            if len(places):
                return low + 1 + int(places[-1])
            at = low
        return 0


def _copy(tokens: np.ndarray, starts: np.ndarray, part: _Part) -> None:
    for low in range(0, len(tokens), COPY_TOKENS):
        block = tokens[low : low + COPY_TOKENS]
        begin, end = np.searchsorted(starts, [low, low + len(block)])
        part.append(np.asarray(block), starts[begin:end] - np.uint64(low))


# What came of it.


def _report(manifest: Manifest, reused: bool, display: Display) -> None:
    result = _result(manifest)
    if reused:
        display.line(f"{manifest.path}: already made from this input with these settings; left as it is")
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in result["dropped"].items()) or "none"
    display.line(
        f"documents {result['documents']:,} (dropped: {reasons}), bytes {result['bytes']:,}, "
        f"bytes a token {result['bytes_per_token']:.3f}"
    )
    for part in ("train", "val"):
        display.line(
            f"{part}: tokens {result[f'{part}_tokens']:,} (unused {result['unused_tokens'][part]:,}), rows of "
            f"{manifest.seq_len:,} {manifest.rows(part, manifest.seq_len):,}, documents "
            f"{result[f'{part}_documents']:,}, shards {len(manifest.shards[part]):,}"
        )


def _result(manifest: Manifest) -> dict[str, Any]:
    counters = manifest.counters
    return {
        "train_tokens": sum(shard.tokens for shard in manifest.shards["train"]),
        "val_tokens": sum(shard.tokens for shard in manifest.shards["val"]),
        "documents": counters["documents"],
        "dropped": counters["dropped"],
        "bytes": counters["bytes"],
        "bytes_per_token": counters["bytes"] / counters["text_tokens"],
        "train_documents": counters["train_documents"],
        "val_documents": counters["val_documents"],
        "unused_tokens": {part: manifest.unused_tokens(part, manifest.seq_len) for part in ("train", "val")},
        "dataset_hash": manifest.dataset_hash,
    }
