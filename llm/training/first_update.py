"""Checks in every run with Muon that the first update of some matrices is the one that Muon defines.

A wrong orthogonalisation does not stop a run: it still learns, but worse. DeepSpeed's own Muon had such an error at
ZeRO 1 and 2 (its issue 8441).
"""

import math

import torch
from torch import Tensor

from llm.config import Config
from llm.errors import UserError
from llm.model.hf import to_hf
from llm.training.engine import Engine
from llm.training.optim import is_block_matrix

LARGEST = 1.25
"""Upper bound of the singular values of an update: five steps give at most 1.21, and bf16 adds less than 0.01."""
TOLERANCE = 0.05
"""Largest difference between an update's product with the momentum and the product after five steps in fp32. In bf16 it
is 0.025 if all singular values are equal, because then all have the same error, and 0.003 otherwise."""
ROUNDING = 2.0**-23
"""Relative rounding error of a weight: its decay and its update each round it once, by at most 2^-24."""


class FirstUpdate:
    """The first update after a start or a resume, of four parameters, in turn from the first, middle and last block.

    Every rank makes one before this update, and calls `check` after it. Both are collective.
    """

    def __init__(self, engine: Engine, config: Config) -> None:
        self._engine, self._config = engine, config
        last = config.model.n_layers - 1
        blocks = (0, last // 2, last)
        kinds = dict.fromkeys(name.split(".", 2)[2] for name in engine.parameters if is_block_matrix(name))
        self._names = [f"layers.{blocks[number % 3]}.{kind}" for number, kind in enumerate(kinds)]
        self._before = self._read()

    def _read(self) -> list[tuple[Tensor, Tensor]]:
        """Returns (weight, momentum) of each parameter, whole, in fp32."""
        engine = self._engine
        # clone, because at stage 0 they are views, which the update changes.
        return [
            (engine.read_parameter(name).clone(), engine.read_moment(name, "momentum_buffer").clone())
            for name in self._names
        ]

    def check(self, step: int) -> None:
        """Raises UserError on rank 0, and ReportedByRank0 on the others, if the update of a matrix is wrong.

        step: the number of the update, for the message.
        """
        after, options, rate = self._read(), self._config.optimizer, self._engine.muon_lr
        decay = options.weight_decay
        assert rate is not None
        assert decay is not None  # `resolve` has set it

        def compare() -> None:
            for name, (old_weight, old), (weight, momentum) in zip(self._names, self._before, after, strict=True):
                # Of M' = momentum * M + (1 - momentum) * G, Nesterov's is momentum * M' + (1 - momentum) * G.
                nesterov = (1 + options.muon_momentum) * momentum - options.muon_momentum * old
                moved = (1 - rate * decay) * old_weight - weight
                parts = [to_hf(self._config.model, name, tensor) for tensor in (moved, nesterov, weight)]
                for part in parts[0]:
                    wrong = what_is_wrong(*(tensors[part] for tensors in parts), rate=rate)
                    if wrong:
                        raise UserError(
                            f"step {step}: {part} has not moved as Muon moves it: {wrong}; the run ends, since it "
                            "would learn less than it should: use optimizer.kind=adamw in a new run, or remove "
                            "deepspeed.extra if there is one"
                        )

        self._engine.world.first_rank_only(compare)


def what_is_wrong(moved: Tensor, nesterov: Tensor, weight: Tensor, *, rate: float) -> str:
    """Returns the error, or "" if `moved` is rate * 0.2 * sqrt(max(rows, columns)) times the orthogonalised `nesterov`.

    Among all matrices U with singular values of at most 1, the sum of U * M is largest for the orthogonalised M, where
    it is the sum of M's singular values. So two numbers are enough. They do not depend on directions in which M is
    nearly zero, where the result in bf16 is arbitrary.

    Args:
        moved, nesterov, weight: for one matrix, its change by the update, the momentum, and its new value.
    """
    unit = 0.2 * math.sqrt(max(moved.shape)) * rate
    # The change that rounding may cause; it matters if the rate is tiny.
    noise = ROUNDING * float(weight.norm())
    largest = _largest_singular_value(moved)
    product, expected = (float((update * nesterov).sum()) for update in (moved, unit * _five_steps(nesterov)))
    slack = noise * float(nesterov.norm())
    if not largest <= LARGEST * unit + noise:
        return f"the update's largest singular value is {largest / unit:.2f}, and five steps give at most 1.21"
    if not abs(product - expected) <= TOLERANCE * expected + slack:
        return f"the update has {product / expected:.3f} times the product with the momentum that five steps give"
    return ""


def _largest_singular_value(matrix: Tensor) -> float:
    """Returns the largest singular value by power iteration; slightly too small if others are near it."""
    vector = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
    for _ in range(30):
        vector = matrix.mT @ (matrix @ vector)
        vector /= vector.norm().clamp(min=1e-30)
    return float((matrix @ vector).norm())


def _five_steps(matrix: Tensor) -> Tensor:
    """Jordan's iteration as in his text; intentionally not the code that is checked."""
    x = matrix / matrix.norm().clamp(min=1e-30)
    x = x.mT if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x
