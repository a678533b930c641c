"""An interpolated bigram model: a baseline for a trained model, on the same text and the same vocabulary.

Interpolated Kneser-Ney (Kneser & Ney 1995; Chen & Goodman 1999, section 2.7), the strongest of the plain bigrams. With
c(v, w) the times that w followed v, c(v) = sum_w c(v, w), and N1+ counting distinct neighbours:

    P(w | v)  = max(c(v, w) - D, 0) / c(v)  +  D N1+(v .) / c(v) * P1(w)        (P1(w) where v was never followed)
    P1(w)     = max(N1+(. w) - D1, 0) / N1+(. .)  +  D1 |{w: N1+(. w) > 0}| / N1+(. .) / V

P1 asks in how many contexts w occurs, not how often; the rest of its mass is uniform over the V pieces. Both discounts
are n1 / (n1 + 2 n2), n1 and n2 being how many of the counts they discount equal 1 and 2 (Ney, Essen & Kneser 1994).
"""

from collections.abc import Iterable

import numpy as np

from llm.data.tokenizer import Tokenizer
from llm.metrics import Score


class Bigram:
    """Probabilities from the (token, next token) pairs of a training text."""

    def __init__(self, pairs: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> None:
        """Counts the pairs of tokens.

        pairs: chunks of (tokens, labels), integers of one shape, each label the token that follows. Negative labels are
        ignored. `input_ids` and `labels` of the loader's batches are such pairs.
        """
        self.vocab_size = vocab_size
        seen, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        for tokens, labels in pairs:
            valid = labels >= 0
            # One int64 per pair, because np.unique sorts numbers much faster than rows.
            keys = tokens[valid].astype(np.int64) * vocab_size + labels[valid]
            # Chunks are merged one by one, so that memory holds only the distinct pairs, not the text.
            new, times = np.unique(keys, return_counts=True)
            seen, slots = np.unique(np.concatenate([seen, new]), return_inverse=True)
            # With weights bincount returns float64, exact up to 2^53.
            counts = np.bincount(slots, np.concatenate([counts, times]), len(seen)).astype(np.int64)
        if not len(seen):
            raise ValueError("a bigram model needs at least one pair of tokens")
        self._pairs, self._counts = seen, counts
        before, after = np.divmod(seen, vocab_size)
        self._discount = _discount(counts)
        self._context = np.bincount(before, counts, vocab_size)
        self._followers = np.bincount(before, minlength=vocab_size)
        contexts = np.bincount(after, minlength=vocab_size)
        discount = _discount(contexts[contexts > 0])
        spread = discount * np.count_nonzero(contexts) / vocab_size
        self._unigram = (np.maximum(contexts - discount, 0) + spread) / len(seen)

    def probability(self, tokens: np.ndarray, following: np.ndarray) -> np.ndarray:
        """Returns P(following | token) for each pair, float64 with the shape of the arguments."""
        keys = tokens.astype(np.int64) * self.vocab_size + following
        # For a key above all others searchsorted returns len(pairs), which is not an index.
        slots = np.minimum(np.searchsorted(self._pairs, keys), len(self._pairs) - 1)
        counts = np.where(self._pairs[slots] == keys, self._counts[slots], 0)
        unigram, context = self._unigram[following], self._context[tokens]
        kept = np.maximum(counts - self._discount, 0)
        freed = self._discount * self._followers[tokens]
        # np.where computes both branches; np.maximum avoids a division by zero in the unused one.
        return np.where(context > 0, (kept + freed * unigram) / np.maximum(context, 1), unigram)

    def score(self, tokenizer: Tokenizer, texts: Iterable[str]) -> Score:
        """Scores documents as `llm eval` scores a model: with BOS as input, and EOS as a target outside the text."""
        nll = text_nll = 0.0
        targets = text_bytes = 0
        for text in texts:
            ids = tokenizer.encode(text)
            framed = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id])
            losses = -np.log(self.probability(framed[:-1], framed[1:]))
            nll += losses.sum()
            # The last loss belongs to EOS, which is not part of the text.
            text_nll += losses[:-1].sum()
            targets += len(losses)
            text_bytes += len(text.encode())
        return Score(float(nll), targets, float(text_nll), text_bytes)


def _discount(counts: np.ndarray) -> float:
    ones, twos = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return ones / (ones + 2 * twos) if ones and twos else 0.5  # too few counts to tell: one half, so that 0 < D < 1
