"""The loss that a run should reach: predicted from the model, the tokens and a sample of the text.

    bits per byte = S (1 + A / N^a + B / D^b) (1 + C / (1 + (D / E)^2))

N is the number of parameters without the embedding, D the number of different tokens that have the worth of those that
the run reads, and S belongs to the text (after Hoffmann et al. 2022, arXiv 2203.15556, section 3.3, where S is 1). The
last factor is that of the first few million tokens: around E the loss falls faster than a power of D, probably since a
model learns there to copy from its context (Olsson et al. 2022, arXiv 2209.11895). The constants are fitted by
`python -m benchmarks.fit_law` on runs of this project and on published runs that were tuned as well.
"""

import lzma
import math
from dataclasses import dataclass

import numpy as np

from llm.config import Config
from llm.data.bigram import Bigram
from llm.data.mixture import Mixture
from llm.data.object_store import is_copied
from llm.data.shards import Loader
from llm.data.tokenizer import load_tokenizer
from llm.model.transformer import parameter_count
from llm.training.resolve import epoch_tokens

A, ALPHA, B, BETA, C, E = 26.708, 0.21679, 46.303, 0.21836, 0.22704, 6.231e6
TEXT, TEXT_XZ, TEXT_BIGRAM = 0.12151, 0.34354, 0.93979
"""S = TEXT * xz^TEXT_XZ * bigram^TEXT_BIGRAM, from the figures of `Text`."""
WEB_TEXT = 0.5367
"""S of English web text: FineWeb of the published runs."""
WEB_BYTES_PER_TOKEN = 4.4
"""Bytes per token of English web text with a vocabulary of 32,000."""
ADAMW = 1.02
"""Bits per byte with AdamW over those with Muon, both by the rules."""
BAND = 0.1
"""Half of the width of the band, as a fraction: 28 of 34 runs whose text the fit has not seen are inside."""
EPOCHS_WORTH = 15.4
"""New text has at most the worth of so many epochs more (Muennighoff et al. 2023, arXiv 2305.16264, equation 5)."""
SAMPLED, SCORED, PARTS = 2**20, 2**18, 64
"""Tokens that a sample of the training split has, tokens of the validation split, and the parts of each at most."""
XZ_BYTES = 2**18
"""Text is compressed in blocks of this size, because a longer text needs fewer bits per byte."""


@dataclass(frozen=True)
class Text:
    """What a sample tells of a text."""

    xz: float
    """Bits per byte that `xz -9` needs."""
    bigram: float
    """Bits per byte of a bigram model."""
    bytes_per_token: float


Pairs = tuple[np.ndarray, np.ndarray]
"""Tokens, and for each the one that follows; negative: none. Both int and of one length."""


def sample_text(data: Mixture, seq_len: int, scored: Pairs | None = None) -> Text:
    """Measures the documents that a run is scored on, always with the same result, in about a second.

    Documents of one text differ so much that others of it would tell too little. The bigram model counts a sample of
    the training split, and knows the scored documents as little as the run will.

    Args:
        scored: None: a sample of the validation split.
    """
    tokenizer = load_tokenizer(data.sources[0].path)
    bigram = Bigram([_sample(data, "train", seq_len, SAMPLED)], tokenizer.vocab_size)
    ids, labels = _sample(data, "val", seq_len, SCORED) if scored is None else scored
    token_bytes = tokenizer.token_bytes()
    # EOS is no part of the text.
    text = (labels >= 0) & (token_bytes[np.maximum(labels, 0)] > 0)
    text_bytes = int(token_bytes[labels[text]].sum())
    bits = -float(np.log2(bigram.probability(ids[text], labels[text])).sum())
    raw = tokenizer.decode_bytes(labels[text].tolist())
    blocks = [raw[begin : begin + XZ_BYTES] for begin in range(0, len(raw), XZ_BYTES)]
    xz = 8 * sum(len(lzma.compress(block, preset=9)) for block in blocks) / len(raw)
    return Text(xz, bits / text_bytes, text_bytes / int((labels >= 0).sum()))


def _sample(data: Mixture, split: str, seq_len: int, tokens: int) -> Pairs:
    """Returns about so many tokens of a split, from everywhere, because data may be in the order of their sources."""
    sequences = data.sequences(split, seq_len)
    parts = max(1, min(PARTS, sequences * seq_len // tokens))
    length = max(1, min(sequences, tokens // seq_len) // parts)
    read = [_read(data, split, seq_len, part * (sequences // parts), length) for part in range(parts)]
    ids, labels = (np.concatenate(arrays) for arrays in zip(*read, strict=True))
    return ids, labels


def _read(data: Mixture, split: str, seq_len: int, first: int, count: int) -> Pairs:
    """Returns the tokens of sequences in the order of the shards, each [count * seq_len]."""
    end = first + count
    with Loader(
        data, split, seq_len=seq_len, seed=0, global_batch=1, micro_batch=1, position=first, end=end, shuffle=False
    ) as loader:
        # Copied, because the loader reuses the memory of a batch.
        rows = [(batch.input_ids.numpy().copy(), batch.labels.numpy().copy()) for batch in loader]
    ids, labels = (np.concatenate(arrays).ravel() for arrays in zip(*rows, strict=True))
    return ids, labels


@dataclass(frozen=True)
class Expected:
    """The validation loss at the end of a run, in nats per token, and its band."""

    loss: float
    low: float
    high: float
    bits_per_byte: float

    def __str__(self) -> str:
        return (
            f"a validation loss of {self.loss:.3g} at the end ({self.low:.3g} to {self.high:.3g}), "
            f"{self.bits_per_byte:.3g} bits per byte [LOG.md]"
        )


def expect_from(config: Config, data: Mixture) -> Expected:
    """Predicts the run of a config with all settings on its data; of data that are not copied yet as of web text."""
    assert config.data.seq_len is not None
    text = sample_text(data, config.data.seq_len) if is_copied(data.sources) else None
    return expect(config, text, epoch_tokens(data, config.data.seq_len))


def expect(config: Config, text: Text | None, epoch: int | None) -> Expected:
    """Predicts a run by the rules of llm/training/rules.py. A run with other rates may end higher.

    Args:
        config: with all settings.
        text: None: English web text.
        epoch: different tokens of the training split; None: as many as the run reads.
    """
    model = config.model
    assert model.vocab_size is not None
    n = parameter_count(model) - (0 if model.tie_embeddings else model.vocab_size * model.d_model)
    d = worth(config.train.horizon, epoch)
    scale = WEB_TEXT if text is None else TEXT * text.xz**TEXT_XZ * text.bigram**TEXT_BIGRAM
    fall = 1 + C / (1 + (d / E) ** 2)
    bits = scale * (1 + A * n**-ALPHA + B * d**-BETA) * fall * (ADAMW if config.optimizer.kind == "adamw" else 1)
    loss = bits * math.log(2) * (WEB_BYTES_PER_TOKEN if text is None else text.bytes_per_token)
    return Expected(loss, loss * (1 - BAND), loss * (1 + BAND), bits)


def worth(tokens: int, epoch: int | None) -> float:
    """Returns how many different tokens would have the worth of `tokens` from a text of `epoch` tokens."""
    if epoch is None or tokens <= epoch:
        return tokens
    return epoch * (1 + EPOCHS_WORTH * (1 - math.exp(-(tokens / epoch - 1) / EPOCHS_WORTH)))
