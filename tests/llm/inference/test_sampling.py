"""Sampling: the token of each random number is that of a plain reference, which sorts the whole vocabulary."""

import os
import subprocess
import sys
from itertools import chain, product

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from running import REPOSITORY
from torch import Tensor

from llm.inference import _decoder
from llm.inference.sampling import Sampler, Sampling

MARGIN = 2e-6
"""Difference of probabilities that is allowed: the reference rounds otherwise."""


def native(vocab_size: int, held: list[int] | None = None, **options: float) -> _decoder.Sampler:
    all_options = {"repetition_penalty": 1, "temperature": 1, "top_k": vocab_size, "top_p": 1, "min_p": 0} | options
    return _decoder.Sampler(sequences=[held or []], vocab_size=vocab_size, **all_options)


def reference(logits: Tensor, options: dict[str, float], margin: float) -> tuple[list[int], np.ndarray, int]:
    """Returns the tokens in order of likelihood, the sums of their probabilities in fp64, and how many are kept.

    Tokens are equal if their distances to the largest logit are equal in fp32. margin: added to top-p, and taken from
    min-p, so that a token at the border is kept.
    """
    temperature, top_k, top_p, min_p = (options.get(name) for name in ("temperature", "top_k", "top_p", "min_p"))
    distances = ((logits.max() - logits) / (temperature or 1)).tolist()
    order = np.argsort(distances, kind="stable").tolist()
    if top_k is not None and top_k < len(order):
        border = distances[order[int(top_k) - 1]]
        order = [token for token in order if distances[token] <= border]
    weights = np.exp(-np.array([distances[token] for token in order]))
    sums = np.cumsum(weights) / weights.sum()
    kept = len(order)
    if top_p is not None and top_p < 1:
        kept = max(1, int((sums - weights / weights.sum() < top_p + margin).sum()))
    if min_p is not None:
        kept = min(kept, max(1, int((weights >= min_p * (1 - margin)).sum())))
    return order, sums, kept


def check(logits: Tensor, options: dict[str, float], uniforms: list[float]) -> bool:
    """Each random number must lie in its token's part of the probabilities that are kept.

    Returns False, and checks nothing, if rounding decides whether to keep a token that matters.
    """
    (order, sums, most), (_, _, least) = (reference(logits, options, margin) for margin in (MARGIN, -MARGIN))
    if sums[most - 1] - sums[least - 1] > 10 * MARGIN:
        return False
    place = {token: n for n, token in enumerate(order[:most])}
    sampler = native(len(logits), **options)
    logprobs = logits.double().log_softmax(0)
    for uniform in uniforms:
        ((token, logprob),) = sampler.choose(logits[None].numpy(), [0], [uniform])
        end = sums[place[token]]
        begin = sums[place[token] - 1] if place[token] else 0.0
        assert begin - MARGIN <= uniform * sums[most - 1]
        assert uniform * sums[least - 1] <= end + MARGIN
        assert logprob == pytest.approx(logprobs[token].item(), abs=2e-6)
    return True


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.3, 0.8, 1.0, 2.0]),
        "top_k": st.integers(1, 50),
        "top_p": st.floats(0.01, 1),
        "min_p": st.floats(0, 1),
    },
)
# Many of them are equal, or nearly so.
LOGITS = st.lists(st.sampled_from([-float("inf"), -30.0, -1.0, 0.0, 0.5, 0.500001, 2.0, 3.0]), min_size=1, max_size=40)


class TestAgainstTheReference:
    @given(values=LOGITS, options=OPTIONS, shift=st.sampled_from([0.0, 7.0, -100.0]))
    def test_each_random_number_gives_the_same_token(
        self, values: list[float], options: dict[str, float], shift: float
    ) -> None:
        assume(max(values) > -float("inf"))
        uniforms = [0.0, 1 - 2**-53, *((n + 0.5) / 64 for n in range(64))]
        assume(check(torch.tensor(values) + shift, options, uniforms))

    @pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"top_k": 50},
            {"top_k": 20_000, "top_p": 0.9, "min_p": 1e-4},
            {"top_p": 0.95},
            {"top_p": 0.9999, "temperature": 0.8},
            {"min_p": 0.05},
        ],
    )
    def test_of_a_whole_vocabulary(self, spread: float, options: dict[str, float]) -> None:
        noise = torch.Generator().manual_seed(0)
        logits = spread * torch.randn(32_003, generator=noise)
        assert check(logits, options, torch.rand(100, generator=noise, dtype=torch.float64).tolist())

    @given(values=LOGITS, options=OPTIONS, rows=st.permutations(range(4)))
    def test_a_row_gives_the_same_bits_alone_and_in_any_batch(
        self, values: list[float], options: dict[str, float], rows: list[int]
    ) -> None:
        assume(max(values) > -float("inf"))
        logits = torch.stack([torch.tensor(values).roll(n) for n in range(4)])
        sampling = Sampling(**options)  # type: ignore[arg-type]
        prompts = [[0]] * 4
        together = Sampler(sampling, prompts, len(values), [3, 1, 4, 1]).choose(logits.numpy(), rows)
        for row, chosen in zip(rows, together, strict=True):
            alone = Sampler(sampling, [[0]], len(values), [[3, 1, 4, 1][row]])
            assert alone.choose(logits[row : row + 1].numpy(), [0]) == [chosen]

    @pytest.mark.parametrize("instruction_set", ["portable", "avx2"])
    def test_every_instruction_set_chooses_the_same(self, instruction_set: str) -> None:
        program = (
            "import numpy, torch; from llm.inference.sampling import *; g = torch.Generator().manual_seed(1);"
            "s = Sampler(Sampling(temperature=0.8, top_p=0.9, min_p=0.001), [[1]] * 8, 5003, range(8));"
            "print([s.choose(torch.randn(8, 5003, generator=g).numpy(), range(8)) for _ in range(9)])"
        )

        def choices(**variables: str) -> list[list[tuple[int, float]]]:
            path = {"PYTHONPATH": str(REPOSITORY)}
            done = subprocess.run(
                [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | path | variables
            )
            if "this machine has" in done.stderr:
                pytest.skip(done.stderr.splitlines()[-1])
            assert done.returncode == 0, done.stderr
            return eval(done.stdout)  # type: ignore[no-any-return]

        expected, found = choices(), choices(LLM_INSTRUCTION_SET=instruction_set)
        for a, b in zip(chain(*expected), chain(*found), strict=True):
            assert a[0] == b[0]
            assert a[1] == pytest.approx(b[1], abs=1e-6)


class TestOptions:
    LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, [0.5, 0.3, 0.15, 0.05]),
            ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
            ({"top_k": 2}, [0.625, 0.375, 0, 0]),
            ({"top_k": 100}, [0.5, 0.3, 0.15, 0.05]),
            ({"top_k": 2**70}, [0.5, 0.3, 0.15, 0.05]),
            ({"top_p": 0.4}, [1, 0, 0, 0]),
            ({"top_p": 0.6}, [0.625, 0.375, 0, 0]),
            ({"top_p": 0.9}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
            ({"top_p": 1.0}, [0.5, 0.3, 0.15, 0.05]),
            ({"top_k": 3, "top_p": 0.6}, [0.625, 0.375, 0, 0]),  # 0.5 / 0.95 alone is below 0.6
            ({"min_p": 0.4}, [0.625, 0.375, 0, 0]),
            ({"min_p": 0.2}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
            ({"min_p": 0.0}, [0.5, 0.3, 0.15, 0.05]),
            ({"temperature": 0.5, "min_p": 0.4}, [1, 0, 0, 0]),  # 0.09 / 0.25 is below 0.4: temperature comes first
            ({"temperature": 0}, [1, 0, 0, 0]),
            ({"temperature": 0, "repetition_penalty": 2.0, "held": [0, 3]}, [0, 1, 0, 0]),  # 0.5^2 < 0.3
            ({"repetition_penalty": 2.0, "held": [0, 0]}, [0.25 / 0.75, 0.3 / 0.75, 0.15 / 0.75, 0.05 / 0.75]),
        ],
    )
    def test_draws_from_the_distribution_that_the_options_leave(self, options: dict, expected: list[float]) -> None:
        held = options.get("held", [])
        sampling = Sampling(**{name: value for name, value in options.items() if name != "held"})
        # Each draws once, because a sampler remembers what it chose for the penalty.
        count = 4000
        sampler = Sampler(sampling, [held] * count, 4, range(count))
        drawn = [token for token, _ in sampler.choose(self.LOGITS.expand(count, 4).numpy(), range(count))]
        frequencies = np.bincount(drawn, minlength=4) / count
        for frequency, probability in zip(frequencies, expected, strict=True):
            assert frequency == pytest.approx(probability, abs=0.03)
            assert probability > 0 or frequency == 0

    def choose(self, logits: list[float], held: list[int] | None = None, uniform: float = 0.0, **options: float) -> int:
        ((token, _),) = native(len(logits), held, **options).choose(torch.tensor([logits]).numpy(), [0], [uniform])
        return token

    def test_a_positive_logit_is_divided_by_the_penalty(self) -> None:
        options = {"temperature": 0, "repetition_penalty": 2.0}
        assert self.choose([3.0, 2.0, -1.0], [0], **options) == 1
        assert self.choose([5.0, 2.0, -1.0], [0], **options) == 0

    def test_a_chosen_token_is_penalised_in_the_next_step(self) -> None:
        sampler = native(3, [], temperature=0, repetition_penalty=2.0)
        logits = torch.tensor([[3.0, 2.0, 1.0]])
        assert [sampler.choose(logits.numpy(), [0], [0.0])[0][0] for _ in range(2)] == [0, 1]
        assert torch.equal(logits, torch.tensor([[3.0, 2.0, 1.0]]))

    def test_of_equal_tokens_greedy_and_top_p_take_the_first_ids_and_top_k_all(self) -> None:
        last = 1 - 2**-53
        equal = [1.0, 2.0, 2.0, 2.0]
        assert self.choose(equal, temperature=0) == 1
        assert self.choose(equal, top_p=0.5, uniform=last) == 2
        assert self.choose(equal, top_k=1, uniform=last) == 3
        assert self.choose(equal, min_p=1.0, uniform=last) == 3

    @pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-300])
    def test_a_tiny_temperature_is_greedy(self, temperature: float) -> None:
        assert self.choose([-3e38, 1.0, 3e38, 2.9e38], temperature=temperature, uniform=0.999) == 2


class TestBadLogits:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("place", [0, 15, 16, 36])
    @pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 0.5, "top_k": 3, "top_p": 0.5}])
    def test_one_that_is_not_finite_makes_the_logprob_nan(
        self, bad: float, place: int, options: dict[str, float]
    ) -> None:
        logits = torch.zeros(2, 37)
        logits[1, place] = bad
        sampler = Sampler(Sampling(**options), [[1], [2]], 37, [0, 0])  # type: ignore[arg-type]
        (_, good), (_, none) = sampler.choose(logits.numpy(), [0, 1])
        assert good == pytest.approx(-np.log(37))
        assert np.isnan(none)

    def test_tokens_without_probability_are_never_chosen_but_not_all_can_be(self) -> None:
        logits = torch.full((1, 9), -float("inf"))
        sampler = native(9, temperature=0.7)
        assert np.isnan(sampler.choose(logits.numpy(), [0], [0.5])[0][1])
        logits[0, 4] = -1e30
        for uniform in (0.0, 0.5, 1 - 2**-53):
            assert sampler.choose(logits.numpy(), [0], [uniform]) == [(4, 0.0)]

    @pytest.mark.parametrize("penalty", [1e39, 1e-50])
    @pytest.mark.parametrize("temperature", [0, 1])
    def test_a_penalty_beyond_fp32_ends_in_nan_too(self, penalty: float, temperature: float) -> None:
        sampler = native(3, [0, 1, 2], repetition_penalty=penalty, temperature=temperature)
        assert np.isnan(sampler.choose(np.array([[0.0, 1.0, -1.0]], np.float32), [0], [0.5])[0][1])


def test_the_cpp_refuses_what_it_would_read_or_write_outside_of_its_memory() -> None:
    sampler = native(5)
    logits = np.zeros((1, 5), np.float32)
    bad = [(logits[:, :4], [0], [0.5]), (logits, [1], [0.5]), (logits, [-1], [0.5]), (logits, [0], [])]
    bad += [(logits, [0], [value]) for value in (1.0, -0.1, float("nan"))]
    for arguments in bad:
        with pytest.raises(ValueError, match="logits is float32"):
            sampler.choose(*arguments)
    for token, size in product([-1, 5], [5]):
        with pytest.raises(ValueError, match="outside of the vocabulary"):
            native(size, [token])
    with pytest.raises(ValueError, match="2\\^20"):
        native(2**20 + 1)
