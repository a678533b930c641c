"""Scores documents with a model: cuts them into windows, packs these into batches, and sums the losses.

Every document is scored separately: the model gets BOS and predicts every token of the text and the EOS once. A
document longer than `context` tokens is scored in windows of that length, `stride` targets apart. Each window is
filled up with the tokens before its targets, the last one too. If `stride` is the length of a window, these are the
windows of lm-evaluation-harness.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm.data.tokenizer import Tokenizer
from llm.errors import UserError
from llm.inference.prompts import check_text
from llm.metrics import Score
from llm.model.transformer import IGNORE_INDEX, Transformer
from llm.world import oom_as_user_error

NOT_FINITE = (
    "the model's weights are damaged, or too large for this precision; try --precision fp32 or another checkpoint"
)
SUMS = 3
"""Number of sums per document: nats and number of all targets; nats of the text, without EOS."""


@dataclass(frozen=True)
class Chunk:
    """A document, or a part of a long document."""

    ids: list[int]  # without BOS and EOS
    text: bytes
    last: bool
    position: int  # bytes of its input file that have been read, for the progress display


Window = tuple[int, list[int], list[int]]
"""(number of the document, input tokens, targets); the targets belong to the last inputs."""


@dataclass
class PackedSequence:
    """Windows of several documents, at most `context` tokens. Documents do not attend to each other."""

    inputs: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    doc_start: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)  # for each token, the number of its document

    def add(self, document: int, inputs: list[int], targets: list[int]) -> None:
        self.doc_start += [len(self.inputs)] * len(inputs)
        self.documents += [document] * len(inputs)
        self.inputs += inputs
        self.labels += [IGNORE_INDEX] * (len(inputs) - len(targets)) + targets


def score_texts(
    model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], *, context: int, stride: int, batch_size: int
) -> list[Score]:
    """Scores each text as a document of its own, in this process and on the model's device.

    Args:
        context: tokens per window, at most model.max_seq_len. stride: targets per window, at most `context`.
        batch_size: sequences in one forward pass, which may hold several texts each.

    Raises UserError for a text that is not valid Unicode, options out of range, and losses that are not finite.
    """
    check_stride(stride, context)
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: must be at least 1")
    for number, text in enumerate(texts, 1):
        check_text(text, f"text {number}")
    chunks = [Chunk(tokenizer.encode(text), text.encode(), last=True, position=0) for text in texts]
    # fp64, because a sum of millions of losses loses digits in fp32.
    sums = torch.zeros(len(texts), SUMS, dtype=torch.float64, device=model.embed_tokens.weight.device)
    with oom_as_user_error("lower --batch_size"):
        for batch in pack(windows(chunks, tokenizer, context, stride), context, batch_size):
            add_losses(model, batch, tokenizer.eos_id, sums)
    scores = []
    for number, (chunk, (nll, targets, text_nll)) in enumerate(zip(chunks, sums.tolist(), strict=True), 1):
        if not math.isfinite(nll):
            raise UserError(f"the loss of text {number} is not finite: {NOT_FINITE}")
        scores.append(Score(nll, int(targets), text_nll, text_bytes(chunk, tokenizer)))
    return scores


def check_stride(stride: int, context: int) -> None:
    if not 1 <= stride <= context:
        raise UserError(f"--stride {stride}: must be at least 1 and at most the model's sequences of {context} tokens")


def text_bytes(chunk: Chunk, tokenizer: Tokenizer) -> int:
    """Returns the bytes of the chunk's text. The name of EOS in a text is an EOS, and no EOS counts as text."""
    named = chunk.ids.count(tokenizer.eos_id)
    return len(chunk.text) - (named * len(tokenizer.decode_bytes([tokenizer.eos_id])) if named else 0)


def windows(chunks: Iterable[Chunk], tokenizer: Tokenizer, length: int, stride: int) -> Iterator[Window]:
    """Cuts documents into windows of at most `length` inputs; each window after the first has `stride` targets."""
    document, seen, waiting, take = 0, [tokenizer.bos_id], list[int](), length
    for chunk in chunks:
        waiting += chunk.ids
        if chunk.last:
            waiting.append(tokenizer.eos_id)
        while len(waiting) >= take or (chunk.last and waiting):
            targets, waiting = waiting[:take], waiting[take:]
            # The last target is not an input, because this window does not score the token after it.
            yield document, (seen + targets[:-1])[-length:], targets
            # No window has more than `length` inputs, so older tokens are not needed.
            seen, take = (seen + targets)[-length:], stride
        if chunk.last:
            document, seen, take = document + 1, [tokenizer.bos_id], length


def pack(windows: Iterable[Window], length: int, batch_size: int) -> Iterator[list[PackedSequence]]:
    """Packs whole windows into sequences of at most `length` tokens; yields lists of batch_size sequences."""
    batch, sequence = list[PackedSequence](), PackedSequence()
    for document, inputs, targets in windows:
        if len(sequence.inputs) + len(inputs) > length:
            batch.append(sequence)
            sequence = PackedSequence()
            if len(batch) == batch_size:
                yield batch
                batch = []
        sequence.add(document, inputs, targets)
    if sequence.inputs:
        yield [*batch, sequence]


def _stack(sequences: list[PackedSequence], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns inputs, labels, doc_start and document numbers, each [B, S]; doc_start is int32, the others int64.

    Sequences are padded with tokens that have no label and attend only to themselves.
    """
    width = max(len(sequence.inputs) for sequence in sequences)
    for sequence in sequences:
        # Padding adds zeros to the sums of its document, so any document number is right.
        for _ in range(width - len(sequence.inputs)):
            sequence.add(sequence.documents[-1], [0], [IGNORE_INDEX])

    def tensor(name: str, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor([getattr(sequence, name) for sequence in sequences], dtype=dtype).to(device)

    return tensor("inputs"), tensor("labels"), tensor("doc_start", torch.int32), tensor("documents")


@torch.inference_mode()
def add_losses(model: Transformer, sequences: list[PackedSequence], eos_id: int, sums: Tensor) -> None:
    """Adds the losses of the sequences' targets to `sums` [documents, SUMS]."""
    inputs, labels, doc_start, documents = _stack(sequences, sums.device)
    losses = model(inputs, labels=labels, doc_start=doc_start, reduction="none")
    # Tokens without a label are computed too, but must not count.
    valid = labels >= 0
    nll = torch.where(valid, losses.double(), 0.0)
    text = valid & (labels != eos_id)
    values = torch.stack([nll, valid.double(), nll * text], dim=-1)
    sums.index_add_(0, documents.flatten(), values.flatten(0, 1))
