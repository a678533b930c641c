"""Fits the law of llm/training/expected_loss.py: `python -m benchmarks.fit_law [LADDER.jsonl ...]`.

Reads the runs of `benchmarks.bench_ladder` at the rules' settings with Muon, and the published runs of
benchmarks/published_runs.json. Fits log(bits per byte) by least squares. Each text has a factor of its own: that of a
published text is free, because its sample is not here, and that of another is near 1. Prints the constants, each run's
error, and the errors of each text when the fit has not seen it.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from llm.errors import UserError, exit_code
from llm.training.expected_loss import worth

HERE = Path(__file__).parent
EXPONENTS = [(0.2, 0.2), (0.35, 0.3)]
"""(alpha, beta) that the fit starts from; the best end counts."""
PRIOR = 0.02
"""Weight of the prior on the exponents of a text's xz and bigram."""
EXPONENTS_OF_OTHERS, WEIGHT = (0.34, 0.28), 0.05
"""(alpha, beta) of Hoffmann et al. 2022, and the weight of the prior on their logarithms."""
BEST, BEST_WEIGHT = "FineWeb-Edu", 0.1
"""The text whose runs are the best of their computing budgets, and the weight of that.

In the published runs N and D grow together, so their losses alone leave open how the loss divides among the two. But at
the best N of a budget N D, a change of N changes nothing: alpha A / N^alpha = beta B / D^beta. Without it, the law's
best model of 100 million parameters and more reads 3 tokens a parameter, or 200, as the small runs have it.
"""
FALL, FALL_WEIGHTS = (0.15, 5e6), (0.02, 0.05)
"""(C, E) as the ladder's loss falls at 0.4M parameters and more, and the weights of the prior on their logarithms."""
OWN = 0.2
"""Weight of the prior on the factor of a text: the features miss a text's bits by five times a run's own error.

Without such factors, what distinguishes two texts would change the exponents, because each has runs of other sizes.
"""


@dataclass(frozen=True)
class Run:
    text: str
    n: float
    """Parameters without the embedding."""
    d: float
    """Different tokens of the same worth."""
    bits_per_byte: float
    features: tuple[float, float] | None
    """The text's bits per byte by `xz -9` and by a bigram model; None: a published run."""


def read_ladder(path: Path) -> list[Run]:
    """Returns the runs of a ladder.jsonl at the rules' settings with Muon."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [
        Run(
            line["text"]["name"],
            # The embedding and the LM head, which counts, have the same size.
            (line["parameters"] + line["matrices"]) / 2,
            worth(line["tokens"], line["epoch"]),
            line["bits_per_byte"],
            (line["text"]["xz"], line["text"]["bigram"]),
        )
        for line in lines
        if line["optimizer"] == "muon" and line["factor"] == 1 and set(line["stated"]) <= {"tokens a parameter"}
    ]


def read_published() -> list[Run]:
    runs = json.loads((HERE / "published_runs.json").read_text("utf-8"))["runs"]
    return [
        Run(run["text"], run["n"], run["d"], run["bits_per_byte"], (run["xz"], run["bigram"]) if "xz" in run else None)
        for run in runs
    ]


@dataclass(frozen=True)
class Law:
    """bits per byte = S (1 + A / N^alpha + B / D^beta) (1 + C / (1 + (D / E)^2))."""

    a: float
    alpha: float
    b: float
    beta: float
    c: float
    e: float
    text: tuple[float, float, float]
    """S = text[0] * xz^text[1] * bigram^text[2]."""
    own: dict[str, float]
    """S of each published text; what S of another text of the fit is multiplied by."""

    def predict(self, run: Run) -> float:
        scale = self.own.get(run.text, 1.0)
        if run.features is not None:
            scale *= self.text[0] * run.features[0] ** self.text[1] * run.features[1] ** self.text[2]
        fall = 1 + self.c / (1 + (run.d / self.e) ** 2)
        return scale * (1 + self.a * run.n**-self.alpha + self.b * run.d**-self.beta) * fall


def fit(runs: Sequence[Run]) -> Law:
    """Least squares of the logarithms, in fp64, from several starts."""
    texts = sorted({run.text for run in runs})
    log_n, log_d = (np.log([getattr(run, name) for run in runs]) for name in ("n", "d"))
    measured = np.log([run.bits_per_byte for run in runs])
    # What each run's log S is a sum of: 1, log xz, log bigram, and what its text has of its own.
    design = np.zeros((len(runs), 3 + len(texts)))
    weights = np.zeros(len(texts))
    for row, run in zip(design, runs, strict=True):
        row[3 + texts.index(run.text)] = 1
        if run.features is not None:
            row[:3] = [1.0, *np.log(run.features)]
            weights[texts.index(run.text)] = OWN
    best = np.array([run.text == BEST for run in runs])

    def residuals(x: np.ndarray) -> np.ndarray:
        # log A - 15 alpha instead of log A, so that the parameters hardly depend on each other.
        a, alpha, b, beta = x[0], math.exp(x[1]), x[2], math.exp(x[3])
        by_n, by_d = a - alpha * (log_n - 15), b - beta * (log_d - 18)
        fall = np.log1p(np.exp(x[4]) / (1 + np.exp(2 * (log_d - 15 - x[5]))))
        law = np.log1p(np.exp(by_n) + np.exp(by_d)) + fall
        slopes = BEST_WEIGHT * (x[1] + by_n - x[3] - by_d)[best]
        known = WEIGHT * (x[[1, 3]] - np.log(EXPONENTS_OF_OTHERS))
        fell = FALL_WEIGHTS * (x[4:6] - np.log(FALL) + [0, 15])
        priors = [PRIOR * (x[7:9] - 0.5), known, fell, 1e-4 * x[[0, 2]], weights * x[9:], slopes]
        return np.concatenate([design @ x[6:] + law - measured, *priors])

    starts = [
        [0.0, math.log(alpha), 0.0, math.log(beta), -2.0, 0.5, *[0.0] * design.shape[1]] for alpha, beta in EXPONENTS
    ]
    found = min((least_squares(residuals, start, xtol=1e-12, ftol=1e-12) for start in starts), key=lambda fit: fit.cost)
    a, alpha, b, beta, c, e, first, xz, bigram, *own = found.x.tolist()
    alpha, beta = math.exp(alpha), math.exp(beta)
    return Law(
        math.exp(a + 15 * alpha),
        alpha,
        math.exp(b + 18 * beta),
        beta,
        math.exp(c),
        math.exp(e + 15),
        (math.exp(first), xz, bigram),
        {text: math.exp(factor) for text, factor in zip(texts, own, strict=True)},
    )


def error(law: Law, run: Run) -> float:
    """In per cent of the measured bits per byte."""
    return 100 * (law.predict(run) / run.bits_per_byte - 1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fit_law", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ladders", type=Path, nargs="*", default=sorted((HERE / "results").glob("ladder*.jsonl")))
    options = parser.parse_args(arguments)

    def run() -> None:
        if not options.ladders:
            raise UserError("no ladder.jsonl: run benchmarks.bench_ladder first")
        runs = [run for path in options.ladders for run in read_ladder(path)] + read_published()
        law = fit(runs)
        print(law)
        for one in runs:
            print(f"{one.text:<28} N {one.n:<12.3g} D {one.d:<12.3g} {one.bits_per_byte:.4f} {error(law, one):+.2f} %")
        for left_out in sorted({one.text for one in runs if one.features}):
            without = fit([one for one in runs if one.text != left_out])
            for one in runs:
                if one.text == left_out:
                    print(f"without {left_out}: {one.bits_per_byte:.4f} at D {one.d:.3g} {error(without, one):+.2f} %")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
