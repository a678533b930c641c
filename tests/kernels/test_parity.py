"""The rule of parity itself: it accepts rounding and refuses mistakes."""

import pytest
import torch

from kernels import reference
from kernels.parity import check, compare, disagreements


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_accepts_the_reference_and_one_rounding(dtype: torch.dtype) -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    assert compare("x", exact.to(dtype), exact.to(dtype), exact.to(dtype), exact).agrees


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, w: reference.rms_norm(x, w, 1e-2),
        lambda x, w: reference.rms_norm(x, w) * 1.001,
        lambda x, w: torch.cat((reference.rms_norm(x, w)[:-1], x[-1:])),
        lambda x, w: reference.rms_norm(x, w.detach()) + 0 * w,  # the value is right, a gradient is not
        lambda x, w: reference.rms_norm(x, w) + torch.nan,
    ],
)
def test_refuses_mistakes(wrong) -> None:
    results = check(wrong, reference.rms_norm, [torch.randn(16, 32), torch.randn(32)], rows={"gradient 1": 16})
    assert not all(result.agrees for result in results)


def test_refuses_a_drift_that_no_maximum_shows() -> None:
    exact = torch.full((1000,), 1e-3, dtype=torch.float64)
    drifted = (exact * 1.005).float()
    assert compare("x", drifted, exact.float(), exact.float(), exact).agrees
    assert not compare("x", drifted, exact.float(), exact.float(), exact, gradient=True).agrees


def test_says_which_result_exceeds_which_limit() -> None:
    exact = torch.ones(2, 3, dtype=torch.float64)
    wrong, nan = exact.clone(), exact.clone()
    wrong[1, 2], nan[0, 1] = 1.5, torch.nan
    results = [
        compare(name, x.float(), exact.float(), exact.float(), exact, gradient=name == "gradient 0")
        for name, x in (("output 0", exact), ("output 1", nan), ("gradient 0", wrong))
    ]
    assert disagreements(results) == (
        "output 1: NaN at other places, error nan above 1.1e-05; "
        "gradient 0: error 0.5 above 1.1e-05, relative root mean square error 0.204 above 1e-05"
    )
    assert disagreements(results[:1]) == ""


@pytest.mark.parametrize(
    ("naive", "ours", "agrees"), [(0.003, 0.006, False), (0.02, 0.015, True), (0.02, 0.025, False)]
)
def test_where_terms_cancel_naive_torch_is_the_limit(naive: float, ours: float, agrees: bool) -> None:
    """Relative root mean square errors in bf16. Where naive torch's is below 0.005, that is the limit."""
    exact = torch.randn(1000, dtype=torch.float64)
    off_by = [exact * (1 + error * torch.randn(1000).sign()) for error in (ours, naive)]
    result = compare("x", off_by[0].bfloat16(), exact.bfloat16(), off_by[1], exact, gradient=True)
    assert result.agrees == agrees, result.reason
    assert agrees or "root mean square" in result.reason


def test_names_another_shape_or_dtype() -> None:
    inputs = [torch.randn(4, 8), torch.ones(8)]
    for other in (lambda x, w: reference.rms_norm(x, w)[:-1], lambda x, w: reference.rms_norm(x, w).double()):
        with pytest.raises(AssertionError, match="output 0 is"):
            check(other, reference.rms_norm, inputs)


def test_names_a_changed_input() -> None:
    def in_place(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x.mul_(2)
        return x * 1

    with pytest.raises(AssertionError, match="changes its input 0"):
        check(in_place, lambda x, upcast=True: x * 2, [torch.randn(3)])
