"""Choices of tokens on the logits' device, held against the C++ for the same random numbers."""

from itertools import product

import pytest
from hypothesis import strategies as st
from torch import Tensor

from llm.inference.device_sampling import DeviceSampler, is_greedy
from llm.inference.sampling import Sampler, Sampling

MARGIN = 1e-6
"""How near to the border of a token's share a random number may be, for the two to choose differently. Relative, how
near top-p and min-p may be to the border of a token.
"""
# Many logits are equal, or nearly so; 0.0 and -0.0 are.
LOGITS = st.lists(
    st.sampled_from([-float("inf"), -30.0, -1.0, -0.0, 0.0, 0.5, 0.500001, 2.0, 3.0]), min_size=1, max_size=40
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.0]),
        "top_k": st.integers(1, 50),
        "top_p": st.floats(0.01, 1),
        "min_p": st.floats(0, 1),
    },
)
UNIFORMS = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=6)


def choose(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> list[tuple[int, float]]:
    sampler = DeviceSampler(len(logits), logits.device)
    sampler.set(sampling, logits.shape[1])
    sampler.uniforms.copy_(uniforms)
    (sampler.take_likeliest if is_greedy(sampling) else sampler.draw)(logits)
    return list(zip(sampler.tokens.tolist(), sampler.logprobs.tolist(), strict=True))


def expected(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> list[tuple[int, float]]:
    rows = range(len(logits))
    sampler = Sampler(sampling, [[0]] * len(logits), logits.shape[1], rows)
    return sampler._native.choose(logits.float().cpu().numpy(), list(rows), uniforms.tolist())


def check(logits: Tensor, options: dict[str, float], uniforms: Tensor) -> int:
    """Every row's token and log-probability. Returns how many random numbers are near the border of two tokens."""
    sampling = Sampling(**options)  # type: ignore[arg-type]
    found, right = choose(logits, sampling, uniforms), expected(logits, sampling, uniforms)
    allowed = [{token} for token, _ in right]
    # A token at the border of top-p or min-p is kept or not.
    names = [name for name in ("top_p", "min_p") if name in options]
    moved = [options] + [
        options | {name: min(1.0, options[name] * (1 + shift))} for name in names for shift in (-MARGIN, MARGIN)
    ]
    for others, shift in product(moved, (-MARGIN, MARGIN)):
        shifted = (uniforms + shift).clamp(0, 1 - 2**-53)
        for tokens, (token, _) in zip(allowed, expected(logits, Sampling(**others), shifted), strict=True):  # type: ignore[arg-type]
            tokens.add(token)
    for (token, logprob), (same, its_logprob), tokens in zip(found, right, allowed, strict=True):
        assert token in tokens
        assert token != same or logprob == pytest.approx(its_logprob, abs=1e-5)
    return sum(len(tokens) > 1 for tokens in allowed)
