"""Mixtures: one stream of sequences from several data sets, in stated proportions, which may change in stages.

A schedule gives the source of each of 4,096 positions: the one that is furthest behind its share. The schedule repeats
until the next stage begins, with a schedule of its own, or for ever. So the source of any position, and the number of
that source's sequences at earlier positions, follow from the position alone: a run on a mixture continues from the same
one integer as a run on a single data set.
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
# Part of a mixture's hash: another schedule would make other data of the same sources.
LAYOUT_VERSION = "largest-deficit-v1"


@dataclass(frozen=True)
class Stage:
    """The shares of the sources from a token of the run on."""

    from_tokens: int
    counts: tuple[int, ...]
    """Positions of each source of the mixture in a period, 0 of one that the stage leaves out; the sum is PERIOD."""


@dataclass(frozen=True)
class Mixture:
    """Data sets that share a tokenizer, and their shares of the positions. A single data set is a mixture too."""

    sources: tuple[Manifest, ...]
    """Those of all stages, each once, in the order in which the stages name them first."""
    stages: tuple[Stage, ...]
    """At least one; the first begins at token 0, each other one at a later token than the one before it."""

    @property
    def name(self) -> str:
        """The paths of the sources, for messages."""
        return " + ".join(str(source.path) for source in self.sources)

    def begins(self, seq_len: int, global_batch: int) -> list[int]:
        """The position at which each stage begins: its from_tokens, rounded up to whole steps of `global_batch`."""
        return [-(-stage.from_tokens // (seq_len * global_batch)) * global_batch for stage in self.stages]

    def hash_at(self, position: int, seq_len: int, global_batch: int) -> str:
        """The hex sha256 that identifies what lies before a position: contents, proportions, and where stages begin.

        Stages that begin later take no part, so a run may still change them. With one stage and one source so far it is
        that source's own hash.
        """
        begins = self.begins(seq_len, global_batch)
        # Before position 0 there is nothing, and the first stage still counts.
        begun = sum(begin < max(position, 1) for begin in begins)
        counts = [stage.counts for stage in self.stages[:begun]]
        # The sources are in the order of the stages, so those of the stages begun are the first.
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

    def sequences(self, split: str, seq_len: int) -> int:
        """The number of sequences of `seq_len` tokens in all sources."""
        return sum(source.sequences(split, seq_len) for source in self.sources)

    def unused_tokens(self, split: str, seq_len: int) -> int:
        """The number of tokens of the sources in no sequence."""
        return sum(source.unused_tokens(split, seq_len) for source in self.sources)

    def epochs(self, positions: int, seq_len: int, global_batch: int) -> NDArray[np.float64]:
        """The epochs of each source that each stage has in the first `positions` positions: [stages, sources]."""
        begins = self.begins(seq_len, global_batch)
        drawn = np.zeros((len(self.stages), len(self.sources)))
        for stage, of_stage, begin, end in zip(self.stages, drawn, begins, [*begins[1:], positions], strict=True):
            whole, part = divmod(max(0, min(end, positions) - begin), PERIOD)
            # The schedule repeats, so only the last period, which is not whole, has to be counted.
            last = np.bincount(make_schedule(stage.counts)[:part], minlength=len(self.sources))
            of_stage += whole * np.array(stage.counts) + last
        return drawn / [source.sequences("train", seq_len) for source in self.sources]


def mix(sources: Sequence[Manifest], weights: Sequence[float]) -> Mixture:
    """The mixture of these data sets with these positive weights; see `mix_stages`."""
    return mix_stages([(0, sources, weights)])


def mix_stages(stages: Sequence[tuple[int, Sequence[Manifest], Sequence[float]]]) -> Mixture:
    """The mixture of stages (from_tokens, sources, weights), with weights rounded to 4096ths of their stage's sum.

    A directory that several stages name is one source. Raises UserError if sources differ in their tokenizer, one comes
    twice in a stage, or a weight rounds to zero.
    """
    union: dict[Path, Manifest] = {}
    for number, (_, sources, _) in enumerate(stages):
        # resolve: a link or a relative path may name the same directory once more.
        paths = [source.path.resolve() for source in sources]
        for source, path in zip(sources, paths, strict=True):
            if paths.count(path) > 1:
                raise UserError(f"{_key(number)}: {source.path} comes twice; name it once, with the sum of the weights")
            first = next(iter(union.values()), source)
            if source.tokenizer_sha256 != first.tokenizer_sha256:
                raise UserError(
                    f"{_key(number)}: {first.path} and {source.path} were made with different tokenizers; prepare both "
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
                    f"{_key(number)}: the weight {weight:g} of {source.path} is less than half of 1/{PERIOD} of all; "
                    "raise it or leave the source out"
                )
            counts[found.index(source.path.resolve())] = count
        mixed.append(Stage(from_tokens, tuple(counts)))
    return Mixture(tuple(union.values()), tuple(mixed))


def _key(stage: int) -> str:
    """The config's key of a stage's sources."""
    return "data.sources" if stage == 0 else f"data.stages.{stage - 1}.sources"


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


@lru_cache(maxsize=128)
def make_schedule(counts: tuple[int, ...]) -> NDArray[np.uint16]:
    """The source at each position of a period, uint16 [sum(counts)].

    Each position goes to the source that is furthest behind its share, on a tie to the earlier one. So at every
    position each source is within 1.5 sequences of its share; one with the share 0 is never behind.
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
    order.setflags(write=False)  # the callers share it
    return order
