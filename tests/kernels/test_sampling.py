"""The choice of tokens by kernels: against the C++ sampler and against plain torch."""

import math
from pathlib import Path

import pytest
import torch
from drawing import LOGITS, OPTIONS, UNIFORMS, check, choose
from hypothesis import HealthCheck, assume, given, settings
from machines import EXACT, TRITON, Machine
from mutation import mutated
from torch import Tensor

from kernels import reference, sampling
from kernels.dispatch import using
from kernels.launch import force_tile
from llm.inference.sampling import Sampling

SMALL = {"BLOCK_V": 16, "num_warps": 4}  # so that a row has several blocks
OPTION_SETS = [
    {},
    {"temperature": 0.0},
    {"temperature": 1e-30},
    {"temperature": 0.8, "top_k": 7},
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 0.9},
    {"top_p": 1e-300},
    {"top_p": 0.5 + 2**-53},  # of 40 equal tokens, one more than of 0.5
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _in_small_blocks():
    torch.manual_seed(0)
    with using("triton"), force_tile("sampling.keys", SMALL), force_tile("sampling.choose", SMALL):
        yield


def drawn(module, logits: Tensor, uniforms: Tensor, options: dict[str, float]) -> list[Tensor]:
    """(tokens, logprobs) of the module's kernels."""
    device = logits.device
    out = torch.zeros(len(logits), dtype=torch.int64, device=device), torch.zeros(len(logits), device=device)
    if options.get("temperature") == 0:
        module.likeliest_tokens(logits, out)
    else:
        module.drawn_tokens(logits, uniforms, *tensors(options, logits), out)
    return list(out)


def tensors(options: dict[str, float], logits: Tensor) -> tuple[Tensor, ...]:
    types = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float64, "min_p": torch.float32}
    defaults = {"temperature": 1.0, "top_k": logits.shape[1], "top_p": 1.0, "min_p": 0.0}
    values = defaults | options
    return tuple(torch.tensor([values[name]], dtype=dtype, device=logits.device) for name, dtype in types.items())


def in_torch(logits: Tensor, uniforms: Tensor, options: dict[str, float]) -> list[Tensor]:
    if options.get("temperature") == 0:
        return list(reference.likeliest_tokens(logits))
    return list(reference.drawn_tokens(logits, uniforms, *tensors(options, logits)))


def rows(machine: Machine, batch: int = 6, width: int = 40) -> tuple[Tensor, Tensor]:
    """Logits with ties, zeros of both signs and -infinities, as a slice of wider rows; and random numbers."""
    logits = 2 * machine.randn(batch, width + 5)
    logits[:, 3:9] = logits[:, 4:5]
    logits[0, 10:12] = -INF
    logits[1] = logits[1].clamp(max=-0.5)
    logits[1, 20], logits[1, 21] = -0.0, 0.0
    logits[2] = -0.0
    logits[3, ::2] = 0.0
    return logits[:, :width], torch.rand(batch, dtype=torch.float64).to(machine.device)


def assert_same(found: list[Tensor], right: list[Tensor]) -> None:
    assert torch.equal(found[0], right[0])
    torch.testing.assert_close(found[1], right[1], atol=1e-5, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("machine", EXACT)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=LOGITS, options=OPTIONS, uniforms=UNIFORMS)
def test_each_random_number_gives_the_token_of_the_cpp(
    machine: Machine, values: list[float], options: dict[str, float], uniforms: list[float]
) -> None:
    assume(max(values) > -INF)
    logits = torch.stack([torch.tensor(values).roll(n) for n in range(len(uniforms))])
    check(logits.to(machine.device), options, torch.tensor(uniforms, dtype=torch.float64))


@pytest.mark.parametrize("machine", TRITON)
@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_the_tokens_are_those_of_the_cpp_and_of_torch(machine: Machine, options: dict[str, float]) -> None:
    for width in (40, 48, 1):
        logits, uniforms = rows(machine, width=max(width, 22))
        logits, capped = logits[:, :width], options | {"top_k": min(options.get("top_k", width), width)}
        check(logits, capped, uniforms.cpu())
        assert_same(drawn(sampling, logits, uniforms, capped), in_torch(logits, uniforms, capped))


@pytest.mark.parametrize("machine", EXACT)
def test_columns_that_are_not_adjacent(machine: Machine) -> None:
    logits, uniforms = rows(machine)
    apart = logits.T.contiguous().T
    for options in ({}, {"temperature": 0.0}):
        assert_same(drawn(sampling, apart, uniforms, options), drawn(sampling, logits, uniforms, options))


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_whole_vocabulary_in_the_shipped_blocks(machine: Machine, dtype: torch.dtype) -> None:
    logits, uniforms = 3 * machine.randn(3, 32_003).to(dtype), torch.tensor([0.0, 0.7, 1 - 2**-53])
    uniforms = uniforms.double().clamp(max=1 - 2**-53).to(machine.device)
    with force_tile("sampling.keys", {"BLOCK_V": 2048}), force_tile("sampling.choose", {"BLOCK_V": 2048}):
        for options in ({}, {"temperature": 0.0}, {"top_k": 20_000, "top_p": 0.95, "min_p": 1e-4}):
            assert_same(drawn(sampling, logits, uniforms, options), in_torch(logits, uniforms, options))


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize("bad", [NAN, -NAN, INF])
@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_a_row_that_is_not_finite_changes_no_other(machine: Machine, bad: float, options: dict[str, float]) -> None:
    logits, uniforms = rows(machine)
    given = Sampling(**options)  # type: ignore[arg-type]
    right = choose(logits, given, uniforms)
    logits[1, 15] = bad
    logits[4] = -INF
    logits[5] = bad
    found = choose(logits, given, uniforms)
    for row in (0, 2, 3):
        assert found[row] == right[row]
    assert all(math.isnan(found[row][1]) for row in (1, 4, 5))
    assert all(0 <= token < logits.shape[1] for token, _ in found)


@pytest.mark.parametrize("machine", EXACT)
def test_no_rows(machine: Machine) -> None:
    for options in ({}, {"temperature": 0.0}):
        tokens, _ = drawn(sampling, machine.randn(0, 5), torch.zeros(0, dtype=torch.float64), options)
        assert not len(tokens)


MUTATIONS = [
    # A row's stride, and the last block.
    ("logits += row * row_stride", "logits += row * columns"),
    ("tl.load(logits + row * row_stride + token)", "tl.load(logits + row * columns + token)"),
    ("token = tl.zeros([BLOCK_V], tl.int32) + (columns - 1)", "token = tl.zeros([BLOCK_V], tl.int32)"),
    ("tl.min(token, axis=0)", "tl.max(token, axis=0)"),
    # The keys.
    ("tl.div_rn(top - values, tl.load(temperature))", "tl.div_rn(top, tl.load(temperature)) - values"),
    pytest.param("bitcast=True) & SIGNLESS", "bitcast=True)", marks=pytest.mark.interpreter),  # GPUs take 0.0 of both
    ("torch.sort(keys, dim=-1, stable=True)", "torch.sort(keys, dim=-1, stable=True, descending=True)"),
    # The options.
    ("tl.load(top_k) - 1", "tl.load(top_k) - 1 - (tl.load(top_k) > 1).to(tl.int64)"),
    ("distance <= border", "distance < border"),
    ("tl.where(weight >= least", "tl.where(weight > least"),
    ("tl.ceil(", "tl.floor("),
    ("if wanted < left:", "if wanted < 0:"),
    ("left = tl.minimum(left, tl.sum(likely_totals, axis=0))", "left = tl.minimum(left, left)"),
    # The draw.
    (".to(tl.int64) + 1, left)", ".to(tl.int64), left)"),
    ("sums = reached + tl.cumsum(masses, axis=0)", "sums = tl.cumsum(masses, axis=0)"),
    ("sums < target, 1, 0", "sums <= target, 1, 0"),
    ("sums - masses < target", "sums < target"),
    ("tl.load(order + row * columns + ", "tl.load(order + "),
    # The log-probabilities.
    ("(logit - tl.load(tops + row)) - tl.load(log_totals + row)", "logit - tl.load(log_totals + row)"),
    ("0.0 - log_total)", "log_total)"),
]


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_a_change_of_the_kernels_is_seen(machine: Machine, old: str, new: str, tmp_path: Path) -> None:
    module = mutated("sampling", old, new, tmp_path)
    logits, _ = rows(machine)
    for options in OPTION_SETS:
        for uniform in (0.0, 0.3, 0.7, 1 - 2**-53):
            uniforms = torch.full((len(logits),), uniform, dtype=torch.float64, device=machine.device)
            found, right = drawn(module, logits, uniforms, options), in_torch(logits, uniforms, options)
            if not (torch.equal(found[0], right[0]) and torch.allclose(found[1], right[1], atol=1e-4)):
                return
    pytest.fail("nothing differs")
