"""The fit of the law of the expected loss, and that its constants are those of the committed runs."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fit_law import Law, Run, error, fit, read_ladder, read_published
from llm.training import expected_loss

CONSTANTS = [getattr(expected_loss, name) for name in ("A", "ALPHA", "B", "BETA", "C", "E")]
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_fit_finds_the_law_that_made_the_runs() -> None:
    # With the exponents of the prior, which would move the fit otherwise.
    # ... and by other names, because this law's best runs of their budgets are others.
    published = [replace(run, text=f"another {run.text}") for run in read_published()]
    law = Law(
        40.0, 0.34, 30.0, 0.28, 0.15, 5e6, (0.2, 0.5, 0.5), {run.text: 0.6 for run in published if not run.features}
    )
    sizes = ((4.6e5, 1e6), (4.6e5, 4e6), (4.6e5, 8e6), (8e5, 8e6))
    ours = [
        Run(str(xz), n, d, 0, (xz, bigram)) for xz, bigram in ((1.5, 1.9), (2.3, 2.2), (2.2, 2.6)) for n, d in sizes
    ]
    runs = [Run(run.text, run.n, run.d, law.predict(run), run.features) for run in (*ours, *published)]
    found = fit(runs)
    assert max(abs(error(found, run)) for run in runs) < 0.01
    assert found.alpha == pytest.approx(law.alpha, rel=0.01)
    assert found.beta == pytest.approx(law.beta, rel=0.01)


def test_the_constants_are_those_of_the_committed_runs() -> None:
    law = fit([run for path in sorted(RESULTS.glob("ladder*.jsonl")) for run in read_ladder(path)] + read_published())
    text = (expected_loss.TEXT, expected_loss.TEXT_XZ, expected_loss.TEXT_BIGRAM)
    committed = Law(*CONSTANTS, text, {})
    # What they predict is compared: on another processor the flat directions of the fit end elsewhere.
    for n, d in ((2e5, 1e6), (5e5, 1e7), (1e8, 3e9), (1e9, 3e10)):
        for features in ((1.5, 1.9), (2.3, 2.6)):
            run = Run("", n, d, 0, features)
            assert committed.predict(run) == pytest.approx(law.predict(run), rel=0.003)


def test_the_best_model_of_a_budget_reads_as_many_tokens_as_measured() -> None:
    # nanochat's best models of four budgets read 10 to 11 tokens a parameter. `llm plan --hours` minimises the law.
    law, sizes = Law(*CONSTANTS, (1, 0, 0), {}), [10 ** (6 + i / 50) for i in range(200)]
    for budget in (6 * 1.1e8 * 1.24e9, 6 * 3.8e8 * 3.8e9):
        best = min(sizes, key=lambda n: law.predict(Run("", n, budget / 6 / n, 0, (1, 1))))
        assert 5 < budget / 6 / best**2 < 25
