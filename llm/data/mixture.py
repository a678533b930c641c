"""Mixtures: one stream of sequences from several data sets, in given proportions, which may change in stages.

A schedule assigns each of 4,096 positions to the source that is furthest behind its share. The schedule repeats until
the next stage begins, which has its own schedule, or for ever. So the position alone determines its source and the
number of that source's sequences at earlier positions: a run on a mixture continues from one integer, as a run on a
single data set does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm.data.manifest import Manifest
from llm.errors import UserError

PERIOD = 4096
# Part of a mixture's hash, because another schedule makes other data from the same sources.
LAYOUT_VERSION = "largest-deficit-v1"


@dataclass(frozen=True)
class Stage:
    """The shares of the sources from a given token of the run on."""

    from_tokens: int
    counts: tuple[int, ...]
    """Positions of each source of the mixture per period, 0 for sources that are not in this stage. Sum: PERIOD."""


@dataclass(frozen=True)
class Mixture:
    """Data sets that share a tokenizer, and their shares of the positions. A single data set is a mixture too."""

    sources: tuple[Manifest, ...]
    """The sources of all stages, each once, in the order of their first stage."""
    stages: tuple[Stage, ...]
    """At least one. The first stage begins at token 0, each later one after the one before it."""

    @property
    def name(self) -> str:
        """Returns the names of the sources, for messages."""
        return " + ".join(source.name for source in self.sources)

    def begins(self, seq_len: int, global_batch: int) -> list[int]:
        """Returns the first position of each stage: its from_tokens, rounded up to whole steps of `global_batch`."""
        return [-(-stage.from_tokens // (seq_len * global_batch)) * global_batch for stage in self.stages]

    def hash_at(self, position: int, seq_len: int, global_batch: int) -> str:
        """Returns the hex sha256 of the data before a position: contents, proportions, and first positions of stages.

        It does not depend on later stages, so a run may still change them. With one stage and one source so far, it is
        the hash of that source.
        """
        begins = self.begins(seq_len, global_batch)
        # Before position 0 there is no data, but the first stage counts.
        begun = sum(begin < max(position, 1) for begin in begins)
        counts = [stage.counts for stage in self.stages[:begun]]
        # The sources are in the order of the stages, so the ones in use come first.
        used = max(source for of_stage in counts for source, count in enumerate(of_stage) if count) + 1
        hashes = [source.dataset_hash for source in self.sources[:used]]
        if begun == used == 1:
            return hashes[0]
        identity: dict[str, object] = {"mixture": LAYOUT_VERSION}
        if begun == 1:
            identity["sources"] = [[of_source, count] for of_source, count in zip(hashes, counts[0], strict=False)]
        else:
            identity["sources"] = hashes
            identity["stages"] = [[begin, of_stage[:used]] for begin, of_stage in zip(begins, counts, strict=False)]
        return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def bytes_per_piece_byte(self) -> float:
        """Bytes of text for each byte of its tokens: 1 unless the tokenizer changes the text."""
        pieces = sum(source.counters.get("piece_bytes", source.counters.get("bytes", 0)) for source in self.sources)
        return sum(source.counters.get("bytes", 0) for source in self.sources) / pieces if pieces else 1.0

    def sequences(self, split: str, seq_len: int) -> int:
        """Returns the number of sequences of `seq_len` tokens in all sources."""
        return sum(source.sequences(split, seq_len) for source in self.sources)

    def unused_tokens(self, split: str, seq_len: int) -> int:
        """Returns the number of tokens of the sources that belong to no sequence."""
        return sum(source.unused_tokens(split, seq_len) for source in self.sources)

    def epochs(self, positions: int, seq_len: int, global_batch: int) -> NDArray[np.float64]:
        """Returns the epochs of each source in each stage for the first `positions` positions: [stages, sources]."""
        begins = self.begins(seq_len, global_batch)
        drawn = np.zeros((len(self.stages), len(self.sources)))
        for stage, of_stage, begin, end in zip(self.stages, drawn, begins, [*begins[1:], positions], strict=True):
            whole, part = divmod(max(0, min(end, positions) - begin), PERIOD)
            # The schedule repeats, so only the incomplete last period is counted.
            last = np.bincount(make_schedule(stage.counts)[:part], minlength=len(self.sources))
            of_stage += whole * np.array(stage.counts) + last
        return drawn / [source.sequences("train", seq_len) for source in self.sources]


def mix(sources: Sequence[Manifest], weights: Sequence[float]) -> Mixture:
    """Makes the mixture of these data sets with these positive weights; see `mix_stages`."""
    return mix_stages([(0, sources, weights)])


def mix_stages(stages: Sequence[tuple[int, Sequence[Manifest], Sequence[float]]]) -> Mixture:
    """Makes the mixture of stages (from_tokens, sources, weights). Weights are rounded to 4096ths of their stage's sum.

    A directory in several stages is one source. Raises UserError if sources have different tokenizers, a stage has a
    source twice, or a weight rounds to zero.
    """
    union: dict[Path, Manifest] = {}
    for number, (_, sources, _) in enumerate(stages):
        # resolve, because a link or a relative path may name the same directory again.
        paths = [source.path.resolve() for source in sources]
        for source, path in zip(sources, paths, strict=True):
            if paths.count(path) > 1:
                raise UserError(f"{_key(number)}: {source.name} comes twice; name it once, with the sum of the weights")
            first = next(iter(union.values()), source)
            if source.tokenizer_sha256 != first.tokenizer_sha256:
                raise UserError(
                    f"{_key(number)}: {first.name} and {source.name} were made with different tokenizers; prepare both "
                    "with the same --tok"
                )
            union.setdefault(path, source)
    found = list(union)
    mixed = []
    for number, (from_tokens, sources, weights) in enumerate(stages):
        counts = [0] * len(found)
        for source, weight, count in zip(sources, weights, round_weights(weights), strict=True):
            if count == 0:
                raise UserError(
                    f"{_key(number)}: the weight {weight:g} of {source.name} is less than half of 1/{PERIOD} of all; "
                    "raise it or leave the source out"
                )
            counts[found.index(source.path.resolve())] = count
        mixed.append(Stage(from_tokens, tuple(counts)))
    return Mixture(tuple(union.values()), tuple(mixed))


def _key(stage: int) -> str:
    """Returns the config key of a stage's sources."""
    return "data.sources" if stage == 0 else f"data.stages.{stage - 1}.sources"


def round_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Returns integers in proportion to weights, with the sum PERIOD (largest remainders; ties: earlier first)."""
    total = sum(weights)
    exact = [PERIOD * weight / total for weight in weights]
    counts = [int(share) for share in exact]
    # The largest remainder has the lowest key. sorted is stable, so among equals the earlier comes first.
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: PERIOD - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


@lru_cache(maxsize=128)
def make_schedule(counts: tuple[int, ...]) -> NDArray[np.uint16]:
    """Returns the source at each position of a period, uint16 [sum(counts)].

    Each position goes to the source that is furthest behind its share; the earlier one if two are equal. So at every
    position each source is within 1.5 sequences of its share; a source with share 0 is never used.
    """
    # Integers, because sums of floats are rounded, and a tie would then be undefined.
    shares, period = np.array(counts, np.int64), sum(counts)
    order = np.empty(period, np.uint16)
    deficits = np.zeros(len(counts), np.int64)  # in 1/period sequences
    for position in range(period):
        deficits += shares
        # Among equal values argmax takes the first, the earlier source.
        chosen = int(np.argmax(deficits))
        deficits[chosen] -= period
        order[position] = chosen
        assert 2 * np.abs(deficits).max() < 3 * period, "a mixture strayed from its weights"
    order.setflags(write=False)  # the callers share it
    return order
