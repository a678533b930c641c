"""`llm prepare_data`: tokenizes documents, splits them into train and validation, and writes a directory of shards.

The directory (docs/data.md) is complete or has no manifest. New shards are written to a hidden folder inside it, and
replace the old ones when all are complete. A killed run leaves that folder, and the next run continues in it from the
last finished shard (see `llm.data.spool`).

The flow: `read_blocks` splits the files into blocks, `pack_all` encodes them in several processes (`ray_pool`: on
several machines), `Store.add` writes the tokens to shards, `publish` moves the finished files to their place.
"""

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from llm.atomic import sync_file
from llm.data.blocks import START, Block, Place
from llm.data.document_reader import describe_drops, parse, read_blocks
from llm.data.exclusion import Exclusion, read_exclusion
from llm.data.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from llm.data.packing import PackAll, Settings, WorkerFailed, group_blocks, pack_all
from llm.data.ray_pool import cluster
from llm.data.shard_folder import publish, staging_folder
from llm.data.split import HASH_SPLIT_DOCUMENTS, check_hash_split, split_by_position
from llm.data.spool import BYTES_A_DIGEST, EXCLUDED_NAME, JOURNAL_NAME, Store, read_journal
from llm.data.text_files import Source, Sources, find_sources
from llm.data.token_files import find_token_files, read_token_blocks
from llm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from llm.display import Display
from llm.errors import UserError

BYTES_A_WORKER = 4 << 20  # with less input than this, starting a process costs more than it saves
SECONDS_A_LINE = 30
LINES_OF_DROPPED = 20
NGRAM = 13


def prepare_data(
    inputs: Sequence[str | os.PathLike[str]],
    tok: str | os.PathLike[str] | None,
    out_dir: str | os.PathLike[str],
    *,
    seq_len: int,
    shard_tokens: int,
    vocab_size: int | None = None,
    val_fraction: float = 0.005,
    documents: str = "auto",
    text_key: str = "text",
    tokens: str | None = None,
    dedup: str = "off",
    exclude: Sequence[str | os.PathLike[str]] = (),
    ngram: int = NGRAM,
    workers: int | None = None,
    ray: str | None = None,
    strict: bool = False,
) -> dict[str, Any]:
    """Makes a directory of shards from text. The same input and settings give the same bytes, on any number of workers.

    The split. With 200 documents or more, a document goes to validation if the BLAKE2b hash of its text (for a long
    document: of its first chunk, see `document_reader`) lies in the lowest `val_fraction`. So the split of a document
    does not depend on the other documents, and exact copies are in the same split. With fewer documents, all of them in
    order are one text, and validation is the last `val_fraction` of its tokens, but at least one sequence. The cut
    moves back to the nearest place where text may be cut; it divides a document into two.

    A directory that was made from the same input with the same settings is not changed. If input or settings differ,
    its shards are replaced once the new ones are complete; other files in it are not touched. An interrupted run
    continues after its last finished shard; one with fewer than 200 documents starts again from the beginning.

    Memory: 1 GB and 150 MB per worker for any size of input, and several times the size of the longest record of a
    .jsonl or .parquet; with `dedup` about 110 bytes more per document.

    Args:
        inputs, documents, text_key: see `document_reader.read_documents`.
        tokens: the input is token ids of `tok` (`token_files`): their type, or "auto" if a header tells it. None: text.
        strict: raise UserError for the first document that cannot be used (`blocks.Dropped`), instead of counting it.
        tok: the tokenizer, as for `load_tokenizer`; its files are copied into the directory. None: one is trained on
            the input first, with `vocab_size` tokens, as `train_tokenizer` does.
        seq_len: recorded as the default sequence length of training; the shards can be read at any other length.
        shard_tokens: tokens per shard; the last shard may have fewer.
        val_fraction: fraction of the documents, or of the tokens, for validation; between 0 and 1.
        exclude, ngram: leave out the documents that share a run of `ngram` words with these evaluation texts
            (`exclusion.read_exclusion`); EXCLUDED_NAME in the directory lists their digests (`packing.new_digest`).
        dedup: "exact" keeps only the first of equal documents, "off" keeps all.
        workers: number of processes; None: one per core, fewer for a small input.
        ray: the address of a Ray cluster whose CPUs take the place of the processes; see `ray_pool.cluster`.

    Returns {"train_tokens", "val_tokens", "documents", "dropped" {reason: documents}, "bytes", "bytes_per_token" (BOS
    and EOS not counted), "byte_fallback_rate" (fraction of tokens that are a single byte, for characters that the
    vocabulary lacks), "round_trip_documents" (decoded again, as a check), "train_documents", "val_documents",
    "unused_tokens" {split: tokens}, "dataset_hash", "out_dir", "reused"}.
    Raises UserError for bad input or settings, for too little text (each split needs a document and a sequence), for a
    text that decoding does not give back, and if the directory holds an interrupted run of other input or settings;
    OSError.
    """
    if seq_len < 2:
        raise UserError(f"--seq_len {seq_len}: a sequence has at least 2 tokens")
    if shard_tokens <= seq_len:
        raise UserError(
            f"--shard_tokens {shard_tokens}: a shard has to hold a sequence of --seq_len {seq_len} + 1 tokens"
        )
    if not 0 < val_fraction < 1:
        raise UserError(f"--val_fraction {val_fraction}: lies between 0 and 1, such as 0.005")
    if dedup not in ("off", "exact"):
        raise UserError(f"--dedup {dedup}: is off or exact")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: at least 1")
    if workers is not None and ray is not None:
        raise UserError("--workers is for processes of this machine; leave it out, --ray uses all CPUs of the cluster")
    if vocab_size is not None and ray is not None:
        raise UserError("--ray needs --tok, a file that all nodes find at this path; `llm train_tokenizer` makes one")
    if tokens is not None and (tok is None or documents != "auto" or text_key != "text"):
        raise UserError("--tokens needs --tok, and goes without --documents and --text_key, which are about text")
    sources = find_sources(inputs, documents, text_key) if tokens is None else find_token_files(inputs, tokens)
    settings = {
        # The mode found for each file instead of "auto", so that equal results have equal settings.
        "documents": [list(source.members) if source.mode == "tar" else source.mode for source in sources.files],
        "shard_tokens": shard_tokens,
        "val_fraction": val_fraction,
    }
    # Included only if they differ from the default, so that data sets made before these settings keep their hash.
    settings |= {"text_key": text_key} if text_key != "text" else {}
    settings |= {"dedup": dedup} if dedup != "off" else {}
    if ngram != NGRAM and not exclude:
        raise UserError(f"--ngram {ngram}: goes with --exclude; name evaluation texts, or leave it out")
    exclusion, said = read_exclusion(exclude, ngram) if exclude else (None, [])
    settings |= {"exclude": exclusion.settings} if exclusion else {}
    if workers is None:
        # Not cpu_count(), because a container or batch system may allow this process fewer cores.
        workers = max(1, min(len(os.sched_getaffinity(0)), sources.bytes // BYTES_A_WORKER))
    out_dir = Path(os.path.expanduser(out_dir))
    with (
        _tokenizer(tok, vocab_size, inputs, documents, text_key) as tokenizer,
        staging_folder(out_dir) as staging,
        Display("preparing", total=sources.bytes) as display,
        _processes(workers, tokenizer) if ray is None else cluster(ray, tokenizer, display.line) as pool,
    ):
        for line in [*sources.lines, *said]:
            display.line(line)
        # Threads are enough, because hashlib releases the GIL.
        with ThreadPoolExecutor(workers) as threads:
            hashes = list(threads.map(_sha256, (source.path for source in sources.files)))
        job = _Job(
            inputs, sources, tokenizer, staging, seq_len, settings, hashes, text_key, tokens, exclusion, pool, strict
        )
        manifest = _made_before(out_dir, job)
        reused = manifest is not None
        if manifest is None:
            # If there is a manifest, the interrupted run wrote all files, and only the move to `out_dir` is left.
            if not (staging / MANIFEST_NAME).exists() or not _can_resume(job):
                _make(job, display)
            publish(staging, out_dir, display)
            manifest = read_manifest(out_dir)
        # Without a journal `staging_folder` removes the folder.
        (staging / JOURNAL_NAME).unlink(missing_ok=True)
        _report(manifest, reused, display)
    return _result(manifest) | {"out_dir": str(out_dir), "reused": reused}


@dataclass(frozen=True)
class _Job:
    """The arguments of prepare_data, and values derived from them."""

    inputs: Sequence[str | os.PathLike[str]]
    sources: Sources
    tokenizer: Tokenizer
    staging: Path
    seq_len: int
    settings: dict[str, Any]
    hashes: list[str]
    text_key: str
    tokens: str | None
    exclusion: Exclusion | None
    pack_all: PackAll
    strict: bool

    @property
    def files(self) -> tuple[Source, ...]:
        return self.sources.files

    @property
    def dedup(self) -> bool:
        return self.settings.get("dedup") == "exact"

    @property
    def names(self) -> str:
        return ", ".join(map(str, self.inputs))

    def read(self, start: Place = START) -> Iterator[Block]:
        """Yields the blocks of the input, from the place of an earlier one on."""
        if self.tokens is None:
            return read_blocks(self.files, self.text_key, start, skip_repeats=self.dedup)
        separators = (self.tokenizer.bos_id, self.tokenizer.eos_id)
        return read_token_blocks(self.files, self.tokens, separators, start)

    @property
    def identity(self) -> dict[str, Any]:
        """Returns all that decides the result, as JSON values."""
        return {
            "tok": self.tokenizer.sha256,
            "seq_len": self.seq_len,
            **self.settings,
            "input": dict(enumerate(self.hashes)),
        }


def _processes(workers: int, tokenizer: Tokenizer) -> AbstractContextManager[PackAll]:
    return nullcontext(partial(pack_all, workers=workers, tokenizer=tokenizer))


@contextmanager
def _tokenizer(
    tok: str | os.PathLike[str] | None,
    vocab_size: int | None,
    inputs: Sequence[str | os.PathLike[str]],
    documents: str,
    text_key: str,
) -> Iterator[Tokenizer]:
    """Yields the tokenizer that is named, or one that is trained on the input and exists inside the block."""
    if (tok is None) == (vocab_size is None):
        raise UserError("prepare_data needs --tok, or --vocab_size to train a tokenizer on the input; not both")
    if tok is not None:
        yield load_tokenizer(tok)
        return
    assert vocab_size is not None
    # Nothing is kept for a run that goes on: the same input gives the same tokenizer.
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "tokenizer"
        yield load_tokenizer(
            train_tokenizer(inputs, prefix, vocab_size, documents=documents, text_key=text_key)["model"]
        )


def _sha256(path: str | os.PathLike[str]) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        error.filename = str(path)  # an error of reading has none
        raise


# The directory.


def _can_resume(job: _Job) -> bool:
    """Whether the folder holds an interrupted run of this job. Raises UserError if it is of another job."""
    journal = read_journal(job.staging)
    if journal is None:
        return False
    # Compared after JSON, which turns the integer keys of "input" into strings.
    before, now = journal["identity"], json.loads(json.dumps(job.identity))
    if before == now:
        return True
    differences = []
    for key in sorted(before.keys() | now.keys()):
        # A setting with its default value may be absent (`prepare_data`).
        old, new = before.get(key, "default"), now.get(key, "default")
        if key == "input" and old != new:
            changed = [str(file.path) for i, file in enumerate(job.files) if old.get(str(i)) != new.get(str(i))][:3]
            what = f"other contents in {', '.join(changed)}" if changed else "files are missing"
            differences.append(what if len(old) == len(new) else f"{len(old):,} files, now {len(new):,}")
        elif old != new:
            old, new = (value[:12] if key == "tok" else value for value in (old, new))
            differences.append(f"--{key} {old}, now {new}")
    raise UserError(
        f"{job.staging}: holds an interrupted run of other input or settings ({'; '.join(differences)}); "
        f"use those again to go on, or remove {job.staging} to begin anew"
    )


def _made_before(out_dir: Path, job: _Job) -> Manifest | None:
    """Returns the manifest in the directory if it is complete and was made from the same input and settings."""
    try:
        manifest = read_manifest(out_dir)
    # Absent, damaged or of another version: the directory is made again.
    except UserError:
        return None
    shards = [shard for part in manifest.shards.values() for shard in part]
    complete = (
        manifest.tokenizer_sha256 == job.tokenizer.sha256
        and manifest.seq_len == job.seq_len
        # The rule of the split follows from the input, so it is not compared.
        and manifest.packing == job.settings | {"split": manifest.packing.get("split")}
        and manifest.counters.get("inputs_sha256") == job.hashes
        and all(_holds(out_dir / name, content) for name, content in job.tokenizer.files.items())
        # Compares sizes only, because reading all shards takes long; `llm inspect --verify` does that.
        and all(_size(out_dir / shard.file) == shard.bytes for shard in shards)
        and (out_dir / EXCLUDED_NAME).exists() == bool(job.exclusion)
    )
    return manifest if complete else None


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


# The shards.


def _make(job: _Job, display: Display) -> None:
    """Makes the shards and their manifest in the staging folder, or continues an interrupted run there."""
    resumed = _can_resume(job)
    if not resumed:
        job.tokenizer.save(job.staging)
        for name in job.tokenizer.files:
            # `save` does not sync, but the files must be durable before the manifest is.
            sync_file(job.staging / name)
    if not job.tokenizer.cuttable and job.tokens is None:
        display.line(
            f"{job.tokenizer.path}: was not made by `llm train_tokenizer`: its ids may depend on text far around, so "
            "each document is read whole into memory, and encoding is slower"
        )
    if not job.tokenizer.cuttable:
        name = job.tokenizer.decode([job.tokenizer.bos_id])
        display.line(f"documents begin with id {job.tokenizer.bos_id} {name!r}: {job.tokenizer.begins}")
    if job.dedup:
        display.line(f"--dedup exact: takes {BYTES_A_DIGEST} bytes of memory a document, in addition to the usual")
    by_hash = _has_documents(HASH_SPLIT_DOCUMENTS, job)
    val_fraction = job.settings["val_fraction"]
    store = Store(
        job.staging,
        job.tokenizer,
        by_hash=by_hash,
        shard_tokens=job.settings["shard_tokens"],
        dedup=job.dedup,
        exclusion=job.exclusion,
        identity=job.identity,
    )
    try:
        if resumed:
            done = f"{store.counters.documents:,} documents, {store.counters.text_tokens:,} tokens"
            display.line(f"goes on with the interrupted run: {done} done")
        _read(job, store, display)
        if not by_hash:
            split_by_position(store, job.tokenizer, val_fraction, job.seq_len, job.names, display.line)
        shards = store.finish()
        if by_hash:
            check_hash_split(shards, val_fraction, job.seq_len, job.names)
        _check_unchanged(job)
    # Before UserError, its base class. The input is not the cause, so the journal stays for the next run.
    except WorkerFailed:
        raise
    except UserError:  # the input must change, so nothing can be continued
        # Without a journal, `staging_folder` removes the folder.
        (job.staging / JOURNAL_NAME).unlink(missing_ok=True)
        raise
    finally:
        store.close()
    write_manifest(
        job.staging,
        vocab_size=job.tokenizer.vocab_size,
        tokenizer_sha256=job.tokenizer.sha256,
        tokenizer=job.tokenizer.describe(),
        seq_len=job.seq_len,
        packing=job.settings | {"split": "hash" if by_hash else "position"},
        shards=shards,
        counters=asdict(store.counters)
        | {f"{part}_documents": sum(shard.documents for shard in shards[part]) for part in ("train", "val")}
        | {"inputs_sha256": job.hashes},
    )


def _read(job: _Job, store: Store, display: Display) -> None:
    """Reads and packs the input from the store's place on, and shows the progress."""
    val_fraction = job.settings["val_fraction"] if store.by_hash else None
    settings = Settings(job.tokenizer.path, job.text_key, val_fraction, job.dedup, job.exclusion)
    total = job.sources.bytes
    # Ids need not be encoded, so their documents need not be whole.
    blocks = group_blocks(job.read(store.place), whole=job.tokens is None and not job.tokenizer.cuttable)
    started = said = time.monotonic()
    # A continued run starts in the middle, so the rates count only what this run has read.
    begun: int | None = None
    bytes_before = store.counters.bytes
    shown = len(store.counters.dropped_places)
    for group, packed in job.pack_all(blocks, settings):
        store.add(group, packed)
        now, position, counters = time.monotonic(), group[-1].position, store.counters
        begun = position if begun is None else begun
        for where in counters.dropped_places[shown:LINES_OF_DROPPED]:
            display.line(f"dropped: {where}")
        shown = len(counters.dropped_places)
        if job.strict and shown:
            raise UserError(f"{counters.dropped_places[0]}; without --strict it is left out and counted")
        seconds = max(now - started, 1e-9)
        speed = f"{(counters.bytes - bytes_before) / seconds / 1e6:.1f} MB/s"  # bytes of text; files may be compressed
        rate = (position - begun) / seconds
        display.update(position, f"{counters.text_tokens:,} tokens, {speed}")
        if now - said >= SECONDS_A_LINE:
            said = now
            left = (total - position) / rate if rate else math.inf
            display.line(
                f"{position / total:.1%} read: {counters.documents:,} documents, {counters.text_tokens:,} tokens, "
                f"{speed}, {left / 60:.0f} minutes left"
            )
    if not store.counters.documents:
        dropped = describe_drops(store.counters.dropped, store.counters.dropped_places)
        raise UserError(f"{job.names}: no document with text in it (dropped: {dropped})")


def _check_unchanged(job: _Job) -> None:
    """Raises UserError if a file is not what it was when it was hashed: the shards would be of neither content."""
    before = dict(zip((file.path for file in job.files), job.hashes, strict=True))
    for path in job.sources.changed():
        # A copy or a backup may change the time alone.
        if not path.exists() or _sha256(path) != before[path]:
            raise UserError(f"{path}: changed while it was read, so no shards were made; wait until it is complete")


def _has_documents(limit: int, job: _Job) -> bool:
    """Whether there are that many documents; reads only as much as needed."""
    # One document per file: nothing has to be read.
    if len(job.files) < limit and {file.mode for file in job.files} == {"file"}:
        return False
    # Only the last chunk of a long document counts.
    ends = (text for block in job.read() if block.last for text in _documents_in(block, job.text_key))
    return sum(1 for _ in islice(ends, limit)) == limit


def _documents_in(block: Block, text_key: str) -> Sequence[object]:
    return block.values or (block.data,) if block.mode == "ids" else parse(block, text_key)[0]


# The result.


def _report(manifest: Manifest, reused: bool, display: Display) -> None:
    result = _result(manifest)
    if reused:
        display.line(f"{manifest.path}: already made from this input with these settings; left as it is")
    display.line(
        f"documents {result['documents']:,} (dropped: {describe_drops(result['dropped'])}), bytes {result['bytes']:,}, "
        f"bytes a token {result['bytes_per_token']:.3f}, byte fallback {result['byte_fallback_rate']:.3%} of tokens; "
        f"round trip checked on {result['round_trip_documents']:,}"
    )
    for part in ("train", "val"):
        display.line(
            f"{part}: tokens {result[f'{part}_tokens']:,} (unused {result['unused_tokens'][part]:,}), sequences of "
            f"{manifest.seq_len:,} {manifest.sequences(part, manifest.seq_len):,}, documents "
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
        "byte_fallback_rate": counters["byte_tokens"] / counters["text_tokens"],
        "round_trip_documents": counters["round_trip_documents"],
        "train_documents": counters["train_documents"],
        "val_documents": counters["val_documents"],
        "unused_tokens": {part: manifest.unused_tokens(part, manifest.seq_len) for part in ("train", "val")},
        "dataset_hash": manifest.dataset_hash,
    }
