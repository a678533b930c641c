"""Scoring text with a trained model: negative log-likelihood per token, perplexity, bits per byte."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import torch

from llm import metrics
from llm.checkpoint import load_model, locate, read_state
from llm.corpus import check_inputs, describe_documents, read_documents
from llm.display import Display
from llm.engine import pick_device
from llm.errors import UserError
from llm.model import IGNORE_INDEX, Transformer
from llm.shards import Batch
from llm.tokenizer import Tokenizer


@dataclass
class Row:
    """Input tokens side by side that do not see each other; at most as many as the model's context."""

    inputs: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    doc_start: list[int] = field(default_factory=list)

    def add(self, inputs: list[int], labels: list[int]) -> None:
        self.doc_start += [len(self.inputs)] * len(inputs)
        self.inputs += inputs
        self.labels += labels


def evaluate(
    ckpt: str | os.PathLike[str],
    inputs: Sequence[str],
    *,
    tok: str | os.PathLike[str] | None = None,
    documents: str = "auto",
    batch_size: int = 8,
    device: str = "auto",
    precision: str = "fp32",
) -> dict[str, Any]:
    """Scores each document of some text files by itself: every token and the EOS are predicted once, BOS is given.

    A document longer than the rows that the model was trained on is scored in windows of that length which follow each
    other; a window does not see the one before. But for rounding, batch_size and the documents' order change nothing.

    Returns nll_per_token (nats), perplexity, bits_per_byte, tokens (targets), bytes (of text) and documents.
    Raises UserError for missing or empty input and for a tokenizer that is not the checkpoint's.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: must be at least 1")
    check_inputs(inputs)
    where = pick_device(device)
    model, tokenizer = load_model(ckpt, where, torch.bfloat16 if precision == "bf16" else torch.float32, tok=tok)
    context = read_state(locate(ckpt))[0].data.seq_len
    return evaluate_model(model, tokenizer, inputs, context=context, documents=documents, batch_size=batch_size)


def evaluate_model(
    model: Transformer,
    tokenizer: Tokenizer,
    inputs: Sequence[str],
    *,
    context: int,
    documents: str = "auto",
    batch_size: int = 8,
) -> dict[str, Any]:
    """The same for a model in memory, on its own device. context: tokens a window, at most model.max_seq_len."""
    total_bytes = check_inputs(inputs)
    where = model.embed_tokens.weight.device
    count = 0
    sums = torch.zeros(4, dtype=torch.float64, device=where)
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(where)
    with Display("evaluating", total_bytes) as display:
        for path in inputs:
            display.line(describe_documents(path, documents))

        def read() -> Iterator[Iterator[int]]:
            """The token ids of one document after another."""
            nonlocal count
            pieces = read_documents(inputs, documents)
            for piece in pieces:
                count += 1
                rest = iter([piece]) if piece.last else chain([piece], _rest_of_document(pieces))
                display.update(piece.position, f"document {count:,}")
                yield chain.from_iterable(tokenizer.encode(part.text) for part in rest)

        for batch in _batches(_rows(read(), tokenizer, context), batch_size):
            sums += _score(model, batch, token_bytes, tokenizer.eos_id)
    if count == 0:
        raise UserError(f"{', '.join(map(str, inputs))}: no document with text in it")
    score = metrics.score_from_sums(sums)
    return {
        "nll_per_token": score.nll_per_token,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "bytes": score.text_bytes,
        "documents": count,
    }


def _rest_of_document(pieces: Iterator[Any]) -> Iterator[Any]:
    for piece in pieces:
        yield piece
        if piece.last:
            return


def _rows(documents: Iterable[Iterator[int]], tokenizer: Tokenizer, length: int) -> Iterator[Row]:
    """Fills rows of at most `length` tokens with whole documents, long documents in windows of `length`."""
    row = Row()
    for ids in documents:
        given = tokenizer.bos_id
        tokens = chain(ids, [tokenizer.eos_id])
        while True:
            labels = list(islice(tokens, length))
            if not labels:
                break
            inputs = [given, *labels[:-1]]
            if len(row.inputs) + len(inputs) > length:
                yield row
                row = Row()
            row.add(inputs, labels)
            given = labels[-1]
    if row.inputs:
        yield row


def _batches(rows: Iterable[Row], batch_size: int) -> Iterator[Batch]:
    waiting: list[Row] = []
    for row in rows:
        waiting.append(row)
        if len(waiting) == batch_size:
            yield _stack(waiting)
            waiting = []
    if waiting:
        yield _stack(waiting)


def _stack(rows: list[Row]) -> Batch:
    """Pads rows on the right with tokens that carry no label and see only themselves."""
    width = max(len(row.inputs) for row in rows)
    for row in rows:
        while len(row.inputs) < width:
            row.add([0], [IGNORE_INDEX])
    return Batch(
        torch.tensor([row.inputs for row in rows]),
        torch.tensor([row.labels for row in rows]),
        torch.tensor([row.doc_start for row in rows], dtype=torch.int32),
    )


@torch.inference_mode()
def _score(model: Transformer, batch: Batch, token_bytes: torch.Tensor, eos_id: int) -> torch.Tensor:
    batch = Batch(*(tensor.to(token_bytes.device) for tensor in batch))
    losses = model(**batch._asdict(), reduction="none")
    return metrics.score_sums(losses, batch.labels, token_bytes, eos_id)
