"""The options of sampling, and the choice of tokens on the CPU, by csrc/decoder/sampler.cpp."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm.errors import UserError
from llm.inference import _decoder


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the logits. The options apply in this order.

    Raises UserError for an option out of range.
    """

    repetition_penalty: float = 1.0
    """Logits of tokens that the sequence already contains are divided by this if positive, else multiplied (Keskar et
    al. 2019)."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the most likely token, and of equal ones that with the smallest id."""
    top_k: int | None = None
    """Sample only among the K most likely tokens, and those that equal the last of them."""
    top_p: float | None = None
    """Sample among the fewest of the most likely tokens that together have this probability (Holtzman et al. 2020). Of
    equal tokens at the border, those with the smallest ids stay."""
    min_p: float | None = None
    """Sample among tokens with at least this fraction of the highest probability (Nguyen et al. 2024)."""
    seed: int = 0
    """The random numbers come from the CPU: the same logits and seed give the same tokens on every device, in every
    batch, except where a random number is within rounding of the border between two tokens."""

    def __post_init__(self) -> None:
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"--repetition_penalty {self.repetition_penalty}: must be above 0 (1: no penalty)")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature}: must be 0 (always the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top_k {self.top_k}: must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"--min_p {self.min_p}: must be at least 0 and at most 1")
        # Below 2^62, so that seed + stream is a valid seed too.
        if not 0 <= self.seed < 2**62:
            raise UserError(f"--seed {self.seed}: must be at least 0 and below 2^62")


class Sampler:
    """Chooses the next tokens of a batch of sequences.

    A token takes one random number, from its sequence's own generator: the tokens in order of likelihood, it is the one
    at which the sum of their probabilities exceeds this share of the sum of all that the options leave. Probabilities
    are multiples of 2^-42 of the largest one, so their sums are exact.

    Args:
        prompts: the tokens of each sequence so far; the sampler adds those that it chooses. Only the repetition penalty
            needs them.
        streams: a number for each sequence, added to sampling.seed.

    Raises ValueError for a token outside of the vocabulary, and for a vocabulary above 2^20 tokens.
    """

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], vocab_size: int, streams: Sequence[int]
    ) -> None:
        self.sampling, self.vocab_size = sampling, vocab_size
        # One generator for each sequence, so that its draws do not depend on the rest of the batch.
        self._uniforms = [_uniforms(sampling.seed + stream) for stream in streams]
        self._native = _decoder.Sampler(
            sequences=[list(prompt) for prompt in prompts],
            vocab_size=vocab_size,
            repetition_penalty=sampling.repetition_penalty,
            temperature=sampling.temperature,
            top_k=vocab_size if sampling.top_k is None else min(sampling.top_k, vocab_size),
            top_p=1.0 if sampling.top_p is None else sampling.top_p,
            min_p=0.0 if sampling.min_p is None else sampling.min_p,
        )

    def choose(self, logits: NDArray[np.float32], sequences: Sequence[int]) -> list[tuple[int, float]]:
        """Returns the next token of each of these sequences, and its log-probability before any option, in nats.

        logits: [B, V] of all sequences. The log-probability is NaN if the logits of a sequence are not finite.
        """
        return self._native.choose(logits, list(sequences), self.uniforms(sequences))

    def uniforms(self, sequences: Sequence[int]) -> list[float]:
        """Returns the next random number of each of these sequences."""
        return [next(self._uniforms[sequence]) for sequence in sequences]


def _uniforms(seed: int) -> Iterator[float]:
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.random(64).tolist()  # one at a time takes as long as greedy sampling
