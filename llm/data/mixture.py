"""Mixtures: one stream of sequences from several data sets, in stated proportions.

A schedule gives the source of each of 4,096 positions: the one that is furthest behind its share. The schedule repeats
for ever, so the source of any position, and the number of that source's sequences at earlier positions, follow from the
position alone: a run on a mixture continues from the same one integer as a run on a single data set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm.data.manifest import Manifest
from llm.errors import UserError

PERIOD = 4096
# Part of a mixture's hash: another schedule would make other data of the same sources.
LAYOUT_VERSION = "largest-deficit-v1"


@dataclass(frozen=True)
class Mixture:
    """Data sets that share a tokenizer, and their shares of the positions. A single data set is a mixture too."""

    sources: tuple[Manifest, ...]
    counts: tuple[int, ...]  # positions of each source in a period; their sum is PERIOD

    @property
    def name(self) -> str:
        """The paths of the sources, for messages."""
        return " + ".join(str(source.path) for source in self.sources)

    @property
    def dataset_hash(self) -> str:
        """The hex sha256 that identifies the contents and their proportions; of a single source, that source's own."""
        if len(self.sources) == 1:
            return self.sources[0].dataset_hash
        identity = {
            "mixture": LAYOUT_VERSION,
            "sources": [[source.dataset_hash, count] for source, count in zip(self.sources, self.counts, strict=True)],
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def sequences(self, split: str, seq_len: int) -> int:
        """The number of sequences of `seq_len` tokens in all sources."""
        return sum(source.sequences(split, seq_len) for source in self.sources)

    def unused_tokens(self, split: str, seq_len: int) -> int:
        """The number of tokens of the sources in no sequence."""
        return sum(source.unused_tokens(split, seq_len) for source in self.sources)

    def epochs(self, positions: int, seq_len: int) -> list[float]:
        """The number of epochs of each source in the first `positions` positions."""
        whole, part = divmod(positions, PERIOD)
        # The schedule repeats, so only the last period, which is not whole, has to be counted.
        begun = np.bincount(make_schedule(self.counts)[:part], minlength=len(self.sources))
        return [
            (whole * count + int(more)) / source.sequences("train", seq_len)
            for source, count, more in zip(self.sources, self.counts, begun, strict=True)
        ]


def mix(sources: Sequence[Manifest], weights: Sequence[float]) -> Mixture:
    """The mixture of these data sets with these positive weights, rounded to 4096ths of their sum.

    Raises UserError if the sources differ in their tokenizer, one comes twice, or a weight rounds to zero.
    """
    first = sources[0]
    for source in sources[1:]:
        if source.tokenizer_sha256 != first.tokenizer_sha256:
            raise UserError(
                f"data.sources: {first.path} and {source.path} were made with different tokenizers; prepare both with "
                "the same --tok"
            )
    # resolve: a link or a relative path may name the same directory once more.
    paths = [source.path.resolve() for source in sources]
    for source, path in zip(sources, paths, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"data.sources: {source.path} comes twice; name it once, with the sum of the weights")
    counts = round_weights(weights)
    for source, weight, count in zip(sources, weights, counts, strict=True):
        if count == 0:
            raise UserError(
                f"data.sources: the weight {weight:g} of {source.path} is less than half of 1/{PERIOD} of all; raise "
                "it or leave the source out"
            )
    return Mixture(tuple(sources), counts)


def round_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Integers in proportion to positive weights, with the sum PERIOD (largest remainders; on a tie the earlier)."""
    total = sum(weights)
    exact = [PERIOD * weight / total for weight in weights]
    counts = [int(share) for share in exact]
    # The largest remainder has the lowest key. sorted is stable, so of equal ones the earlier comes first.
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: PERIOD - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def make_schedule(counts: Sequence[int]) -> NDArray[np.uint16]:
    """The source at each position of a period, uint16 [sum(counts)].

    Each position goes to the source that is furthest behind its share, on a tie to the earlier one. So at every
    position each source is within 1.5 sequences of its share.
    """
    # Integers, because sums of floats would round, and a tie could then go either way.
    shares, period = np.array(counts, np.int64), sum(counts)
    order = np.empty(period, np.uint16)
    deficits = np.zeros(len(counts), np.int64)  # in units of 1/period of a sequence
    for position in range(period):
        deficits += shares
        # Of equal values argmax takes the first: the earlier source.
        chosen = int(np.argmax(deficits))
        deficits[chosen] -= period
        order[position] = chosen
        assert 2 * np.abs(deficits).max() < 3 * period, "a mixture strayed from its weights"
    return order
