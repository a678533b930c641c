"""Sampling in torch: the tokens are those of the C++ for the same random numbers."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from llm.inference.device_sampling import DeviceSampler, can_choose, is_greedy
from llm.inference.sampling import Sampler, Sampling

MARGIN = 1e-6
"""How near to the border of a token's share a random number may be, for the two to choose differently. Relative, how
near top-p and min-p may be to the border of a token.
"""
# Many logits are equal, or nearly so.
LOGITS = st.lists(st.sampled_from([-float("inf"), -30.0, -1.0, 0.0, 0.5, 0.500001, 2.0, 3.0]), min_size=1, max_size=40)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.0]),
        "top_k": st.integers(1, 50),
        "top_p": st.floats(0.01, 1),
        "min_p": st.floats(0, 1),
    },
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


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


@given(values=LOGITS, options=OPTIONS, uniforms=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=6))
def test_each_random_number_gives_the_token_of_the_cpp(
    values: list[float], options: dict[str, float], uniforms: list[float]
) -> None:
    assume(max(values) > -float("inf"))
    logits = torch.stack([torch.tensor(values).roll(n) for n in range(len(uniforms))])
    check(logits, options, torch.tensor(uniforms, dtype=torch.float64))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0},
        {"temperature": 1e-300},
        {"temperature": 1e-30},
        {"top_k": 50},
        {"top_k": 2**70, "temperature": 0.8},
        {"top_k": 20_000, "top_p": 0.9, "min_p": 1e-4},
        {"top_p": 0.95},
        {"min_p": 0.05},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_whole_vocabulary(options: dict[str, float], spread: float, device: str, dtype: torch.dtype) -> None:
    """Also in bf16, where many logits are equal, and of a view whose rows have padding behind them."""
    noise = torch.Generator().manual_seed(0)
    logits = (spread * torch.randn(16, 32_128, generator=noise)).to(device, dtype)[:, :32_003]
    near = 0
    for _ in range(3):
        uniforms = torch.rand(16, generator=noise, dtype=torch.float64)
        near += check(logits, options, uniforms)
    assert near <= 12  # a quarter; one of 32,003 equal tokens has a share of 3e-5


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 0.5, "top_k": 3, "top_p": 0.5}])
def test_a_row_that_is_not_finite_changes_no_other(bad: float, options: dict[str, float]) -> None:
    sampling, uniforms = Sampling(**options), torch.tensor([0.3, 0.5, 0.9, 0.1], dtype=torch.float64)  # type: ignore[arg-type]
    logits = torch.randn(4, 37, generator=torch.Generator().manual_seed(0))
    right = choose(logits, sampling, uniforms)
    logits[1, 15] = bad
    logits[2] = -float("inf")
    found = choose(logits, sampling, uniforms)
    assert (found[0], found[3]) == (right[0], right[3])
    assert np.isnan([found[1][1], found[2][1]]).all()
    assert all(0 <= token < 37 for token, _ in found)


def test_a_penalty_is_left_to_the_cpp() -> None:
    assert can_choose(Sampling(top_p=0.5, top_k=3, min_p=0.1))
    assert not can_choose(Sampling(repetition_penalty=1.1))
