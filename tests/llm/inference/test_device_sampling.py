"""Sampling in torch, and on a GPU: the tokens are those of the C++ for the same random numbers."""

import numpy as np
import pytest
import torch
from drawing import LOGITS, OPTIONS, UNIFORMS, check, choose
from hypothesis import assume, given

from llm.inference.device_sampling import can_choose
from llm.inference.sampling import Sampling

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@given(values=LOGITS, options=OPTIONS, uniforms=UNIFORMS)
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
