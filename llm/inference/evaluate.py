"""Scores text with a trained model: negative log-likelihood per token, perplexity, bits per byte and per character.

scoring.py defines the windows of a document, which are as long as the sequences of training, and computes their losses.
This file reads the documents, divides the work among processes, and adds up the results.
"""

import bisect
import itertools
import lzma
import math
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm.data.document_reader import Drops, read_sources
from llm.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from llm.data.shards import Loader, document_starts
from llm.data.text_files import find_sources
from llm.data.tokenizer import Tokenizer
from llm.display import Display
from llm.errors import UserError, visible
from llm.inference.scoring import NOT_FINITE, SUMS, Chunk, Window, add_losses, check_stride, pack, text_bytes, windows
from llm.metrics import Score
from llm.model.checkpoint import load_model, read_state
from llm.model.checkpoint_path import locate
from llm.model.transformer import Transformer
from llm.rendezvous import leave_group
from llm.world import DTYPES, World, join, oom_as_user_error

BATCH_SIZE = 8
SHARD_CHUNK_TOKENS = 1 << 14


def evaluate(
    ckpt: str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]],
    *,
    tok: str | os.PathLike[str] | None = None,
    documents: str = "auto",
    text_key: str = "text",
    stride: int | None = None,
    batch_size: int = BATCH_SIZE,
    compress: bool = False,
    strict: bool = False,
    device: str = "auto",
    precision: str = "fp32",
    show: bool = False,
) -> dict[str, Any]:
    """`llm eval --input`: scores files and shards with a checkpoint, in all processes that a launcher started.

    The processes share the windows, so one long text keeps all of them busy. Except for rounding, the result does not
    depend on the number of processes, on the batch size or on the order of the documents.

    Args:
        inputs: text as for `document_reader.read_documents`, with `documents` and `text_key`, or directories of shards,
            whose validation split is scored.
        stride: targets per window, at most the sequence length of training, which is the default. A smaller stride
            gives every target more context and takes longer.
        compress: also compress the text of each input with xz -9 and zstd -19, for comparison; all text is in memory.
        strict: raise UserError for the first document that cannot be used (`blocks.Dropped`), instead of counting it.
        show: print the result as a table.

    Returns the result of `evaluate_model`. Raises UserError for missing or empty input, and for a tokenizer other than
    the checkpoint's.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: must be at least 1")
    world = join(device, DTYPES[precision])
    for path in inputs:
        # Only rank 0 checks, so that an error is printed once.
        if not _holds_shards(path):
            world.first_rank_only(partial(find_sources, [path], documents, text_key))
    # All ranks use the folder that rank 0 finds, because a running training may change the link `latest`.
    folder = world.first_rank_only(lambda: locate(ckpt))
    model, tokenizer = load_model(folder, world.device, world.dtype, tok=tok)
    context = read_state(folder)[1].data.seq_len
    with oom_as_user_error("lower --batch_size"):
        result = evaluate_model(
            model,
            tokenizer,
            inputs,
            # The config of an imported model has no data.seq_len.
            context=context or model.config.max_seq_len,
            stride=stride,
            documents=documents,
            text_key=text_key,
            batch_size=batch_size,
            compress=compress,
            strict=strict,
            world=world,
        )
    leave_group()
    if show and world.rank == 0:
        _print_table(result)
    return result


def evaluate_model(
    model: Transformer,
    tokenizer: Tokenizer,
    inputs: Sequence[str | os.PathLike[str]],
    *,
    context: int,
    stride: int | None = None,
    documents: str = "auto",
    text_key: str = "text",
    batch_size: int = BATCH_SIZE,
    compress: bool = False,
    strict: bool = False,
    world: World | None = None,
) -> dict[str, Any]:
    """Scores files and shards with a model in memory, on the model's device.

    Args:
        context: tokens per window, at most model.max_seq_len.
        world: the processes that share the windows; all have the same model and inputs. None: only this process.

    Returns nll_per_token (nats), perplexity, bits_per_byte, bits_per_character, tokens (targets), bytes and characters
    (of text), documents, nll_per_token_stderr and bits_per_byte_stderr (over documents; None for a single document);
    with `compress` also xz_bits_per_byte and zstd_bits_per_byte; dropped {reason: documents}; and
    inputs, a list with the same values for each
    input, whose name is under "input".
    """
    where = model.embed_tokens.weight.device
    world = world or World(0, 0, 1, where, torch.float32)
    stride = context if stride is None else stride
    check_stride(stride, context)
    sources = [_Source(path, tokenizer, documents, text_key) for path in inputs]
    drops = Drops(strict=strict)
    # Text is compressed once, not by every process.
    reader = _Reader(sources, tokenizer, drops, keep_text=compress and world.rank == 0)
    # fp64, because a sum of millions of losses loses digits in fp32.
    sums = torch.zeros(0, SUMS, dtype=torch.float64, device=where)
    with Display("evaluating", sum(source.bytes for source in sources), silent=world.rank > 0) as display:
        drops.say = display.line
        for source in sources:
            display.line(source.description)
        for number, batch in enumerate(pack(reader.windows(context, stride, display), context, batch_size)):
            # Every rank reads all windows and grows its sums equally, so that world.sum adds tensors of equal shape.
            missing = batch[-1].documents[-1] + 1 - len(sums)
            if missing > 0:
                # At least doubled, so that each document's sums are copied only a few times.
                sums = torch.cat([sums, sums.new_zeros(max(missing, len(sums)), SUMS)])
            if number % world.size == world.rank:
                add_losses(model, batch, tokenizer.eos_id, sums)
    # Removes the unused rows of the doubling.
    sums = world.sum(sums)[: reader.ends[-1]].cpu()
    world.first_rank_only(lambda: _check_finite(sums, sources, reader.ends))
    sums = torch.cat([sums, torch.tensor(reader.sizes, dtype=torch.float64)], dim=1)
    compressed: list[dict[str, int]] = [{} for _ in sources]
    if reader.keep_text:
        with Display("compressing", 1) as display:
            display.endless("compressing")  # neither program tells how far it is
            compressed = [_compressed_sizes(text) for text in reader.texts]
    total = {program: sum(sizes[program] for sizes in compressed) for program in compressed[0]}
    return _result(sums, total) | {
        "dropped": dict(drops.counts),
        "inputs": [
            {"input": str(source.path), **_result(part, sizes)}
            for source, part, sizes in zip(sources, sums.tensor_split(reader.ends[:-1]), compressed, strict=True)
        ],
    }


def _print_table(result: dict[str, Any]) -> None:
    """Prints the result of `evaluate_model`: a line per input, and a total if there are several, in 80 columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    lines = [(line["input"], line) for line in result["inputs"]]
    lines += [("all", result)] if len(lines) > 1 else []
    console = Console(highlight=False, width=80)
    # In two parts, because all columns are wider than most terminals.
    for keys in (("documents", "bytes", "tokens", "bits_per_character"), SCORES):
        shown = [key for key in keys if key in result]
        table = Table(box=None, pad_edge=False)
        table.add_column("", overflow="fold", ratio=1)
        for key in shown:
            table.add_column(HEADINGS.get(key, key), justify="right", no_wrap=True)
        for name, line in lines:
            # A Text, because rich would read brackets in a str as markup.
            cells = (_cell(line, key) for key in shown)
            table.add_row(Text(visible(name)), *cells, style="bold" if line is result else None)
        console.print(table)


SCORES = ("nll_per_token", "perplexity", "bits_per_byte", "xz_bits_per_byte", "zstd_bits_per_byte")
HEADINGS = {
    "bits_per_character": "bits/char",
    "nll_per_token": "NLL/token",
    "bits_per_byte": "bits/byte",
    "xz_bits_per_byte": "xz -9",
    "zstd_bits_per_byte": "zstd -19",
}


def _cell(line: dict[str, Any], key: str) -> str:
    value, error = line[key], line.get(f"{key}_stderr") if key == "bits_per_byte" else None
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2f}" if key == "perplexity" else f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _holds_shards(path: str | os.PathLike[str]) -> bool:
    return Path(path, MANIFEST_NAME).is_file()


class _Source:
    """One input: text files, or the validation split of shards."""

    def __init__(self, path: str | os.PathLike[str], tokenizer: Tokenizer, documents: str, text_key: str) -> None:
        self.path = path
        self._tokenizer = tokenizer
        self._text_key = text_key
        self._manifest = _matching_manifest(path, tokenizer) if _holds_shards(path) else None
        # Of shards only the tokens are known, and their bytes are not those of the text if the tokenizer changes it.
        self.bytes_per_piece_byte = 1.0 if self._manifest is None else self._manifest.bytes_per_piece_byte
        if self._manifest is None:
            found = find_sources([path], documents, text_key)
            self._files = found.files
            self.bytes = found.bytes
            self.description = "\n".join(found.lines)
        else:
            self.bytes = sum(shard.bytes for shard in self._manifest.shards["val"])
            self.description = f"{path}: shards, the validation split"

    def chunks(self, drops: Drops) -> Iterator[Chunk]:
        """drops: counts the documents that are left out."""
        if self._manifest is not None:
            yield from _chunks_of_shards(self._manifest, self._tokenizer, self.bytes)
            return
        texts: list[str] = []
        for chunk in read_sources(self._files, self._text_key, drops):
            texts.append(chunk.text)
            # Only our tokenizers may get a long document in chunks.
            if self._tokenizer.cuttable or chunk.last:
                text = "".join(texts)
                yield Chunk(self._tokenizer.encode(text), text.encode(), chunk.last, chunk.position)
                texts = []


class _Reader:
    """Reads the windows of all inputs in order, and counts their documents."""

    def __init__(self, sources: list[_Source], tokenizer: Tokenizer, drops: Drops, *, keep_text: bool) -> None:
        self.drops = drops
        self.sources = sources
        self.tokenizer = tokenizer
        self.keep_text = keep_text
        self.ends: list[int] = []  # number of documents up to the end of each input
        self.sizes: list[list[float]] = []  # bytes and characters of each document's text
        self.texts: list[bytearray] = []  # text of each input
        self._position = 0  # bytes of the file up to the end of the newest chunk
        self._inside = False  # a document

    def windows(self, length: int, stride: int, display: Display) -> Iterator[Window]:
        """Yields the windows. Documents are numbered across all inputs. Raises UserError for an input without any."""
        for source in self.sources:
            first = self.ends[-1] if self.ends else 0
            self.ends.append(first)
            self.texts.append(bytearray())
            before = sum(earlier.bytes for earlier in self.sources[: len(self.ends) - 1])
            scored = 0
            for document, inputs, targets in windows(self._chunks(source), self.tokenizer, length, stride):
                yield first + document, inputs, targets
                # The reader is far ahead of the model, so its position alone would be the end of a small file at once.
                # Text can be more bytes than its compressed file, so the text alone would pass the end.
                scored += len(self.tokenizer.decode_bytes(targets))
                display.update(before + min(scored, self._position), f"document {self.ends[-1] + 1:,}")
            if self.ends[-1] == first:
                raise UserError(f"{source.path}: no document with text in it (dropped: {self.drops})")

    def _chunks(self, source: _Source) -> Iterator[Chunk]:
        for chunk in source.chunks(self.drops):
            self._position = chunk.position
            if self.keep_text:
                self.texts[-1] += chunk.text
            if not self._inside:
                self.sizes.append([0, 0])
            self._inside = not chunk.last
            size = text_bytes(chunk, self.tokenizer)
            self.sizes[-1][0] += size * source.bytes_per_piece_byte
            # In UTF-8 a byte 10xxxxxx continues a character; every other byte begins one.
            characters = size - len(re.findall(rb"[\x80-\xbf]", chunk.text))
            self.sizes[-1][1] += characters * source.bytes_per_piece_byte
            yield chunk
            self.ends[-1] += chunk.last


def _matching_manifest(path: str | os.PathLike[str], tokenizer: Tokenizer) -> Manifest:
    manifest = read_manifest(path)
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"{path}: made with another tokenizer (sha256 {manifest.tokenizer_sha256[:12]}) than the checkpoint's "
            f"({tokenizer.sha256[:12]}); give the text itself"
        )
    return manifest


def _chunks_of_shards(manifest: Manifest, tokenizer: Tokenizer, total_bytes: int) -> Iterator[Chunk]:
    """Yields the documents of the validation split. A BOS begins each, an EOS ends it, and neither occurs inside."""
    for shard in manifest.shards["val"]:
        # BOS and EOS of a document are already two tokens.
        if shard.tokens < 2:
            raise UserError(f"{manifest.path}: {shard.file} holds no document")
    total = sum(shard.tokens for shard in manifest.shards["val"])
    begins, done = list[int](), 0
    for shard in manifest.shards["val"]:
        begins += (document_starts(manifest, shard).astype(np.int64) + done).tolist()
        done += shard.tokens
    done, document = 0, -1
    for tokens in _tokens_of_shards(manifest, tokenizer.bos_id):
        at = 0
        while at < len(tokens):
            if document + 1 < len(begins) and begins[document + 1] == done + at:
                document += 1
                at += 1  # over its BOS
            end = begins[document + 1] if document + 1 < len(begins) else total
            last = end <= done + len(tokens)
            # Over its EOS.
            ids = tokens[at : min(end - done, len(tokens)) - last].tolist()
            if last and tokens[end - done - 1] != tokenizer.eos_id:
                raise UserError(
                    f"{manifest.path}: the validation split ends inside a document; run `llm prepare_data` again"
                )
            at = min(end - done, len(tokens))
            yield Chunk(ids, tokenizer.decode_bytes(ids), last, total_bytes * (done + at) // total)
        done += len(tokens)


def _tokens_of_shards(manifest: Manifest, bos_id: int) -> Iterator[Tensor]:
    """Yields all tokens in order, int64 [N] at a time, from the loader, which checks the files.

    With sequences of one token, the loader yields every token as an input except the last of a shard. That token is the
    label of the shard's last sequence; if a sequence has no label, the next token is a BOS.
    """
    shards = manifest.shards["val"]
    ends = list(itertools.accumulate(shard.tokens - 1 for shard in shards))
    sequences = 0
    with Loader(
        manifest,
        "val",
        seq_len=1,
        seed=0,
        global_batch=SHARD_CHUNK_TOKENS,
        micro_batch=SHARD_CHUNK_TOKENS,
        # The tokens of a document must come in order.
        shuffle=False,
        end=ends[-1],
    ) as loader:
        for batch in loader:
            begin = 0
            for end in [end - sequences for end in ends if sequences < end <= sequences + SHARD_CHUNK_TOKENS]:
                last = batch.labels[end - 1]
                yield torch.cat([batch.input_ids[begin:end, 0], torch.where(last < 0, bos_id, last)])
                begin = end
            sequences += SHARD_CHUNK_TOKENS
            yield batch.input_ids[begin : ends[-1] - sequences + SHARD_CHUNK_TOKENS, 0]


def _check_finite(sums: Tensor, sources: Sequence[_Source], ends: Sequence[int]) -> None:
    """Raises UserError if the loss of a document is not finite. sums: fp64 [documents, 5]."""
    wrong = (~sums[:, 0].isfinite()).nonzero().flatten().tolist()
    if wrong:
        source = bisect.bisect_right(ends, wrong[0])
        number = wrong[0] - (ends[source - 1] if source else 0) + 1
        raise UserError(
            f"{sources[source].path}: the loss of document {number} is not finite, as of {len(wrong)} of {len(sums)} "
            f"documents: {NOT_FINITE}"
        )


def _compressed_sizes(text: bytearray) -> dict[str, int]:
    """Returns {program: compressed size in bytes} for xz -9 and zstd -19."""
    import pyarrow

    # Python has zstd only since 3.14.
    zstd = pyarrow.Codec("zstd", compression_level=19)
    return {"xz": len(lzma.compress(text, preset=9)), "zstd": zstd.compress(text).size}


def _result(sums: Tensor, compressed: dict[str, int]) -> dict[str, Any]:
    """sums: fp64 [documents, 5]."""
    nll, tokens, text_nll, size, characters = sums.sum(0).tolist()
    score = Score(nll, int(tokens), text_nll, int(size))
    per_byte = _standard_error(sums[:, 2], sums[:, 3])
    return {
        "nll_per_token": score.nll_per_token,
        "nll_per_token_stderr": _standard_error(sums[:, 0], sums[:, 1]),
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "bits_per_byte_stderr": None if per_byte is None else per_byte / math.log(2),
        "bits_per_character": text_nll / math.log(2) / characters,
        "tokens": score.tokens,
        "bytes": score.text_bytes,
        "characters": int(characters),
        "documents": len(sums),
        **{f"{program}_bits_per_byte": 8 * length / size for program, length in compressed.items()},
    }


def _standard_error(numerator: Tensor, denominator: Tensor) -> float | None:
    """Returns the standard error of a ratio of sums over independently drawn documents (Cochran 1977, section 2.11)."""
    n = len(numerator)
    # One document has no spread.
    if n < 2:
        return None
    ratio = numerator.sum() / denominator.sum()
    return math.sqrt(n / (n - 1) * float((numerator - ratio * denominator).square().sum())) / float(denominator.sum())
