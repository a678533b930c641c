"""What happens to a step whose loss or gradient is not finite."""

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from llm.config import TrainConfig
from llm.errors import ReportedByRank0, UserError
from llm.model.checkpoint import TrainState
from llm.training.engine import Engine
from llm.training.saving import Saver


class NonFiniteGuard:
    """Counts such a step as skipped, or saves the state before it and ends the run. Every rank has one.

    Args:
        config: for train.on_nonfinite and train.max_skips.
        sequences_per_step: for the message, which has the positions of the step's sequences.
        say: shows a line to the user.
    """

    def __init__(
        self, config: TrainConfig, engine: Engine, saver: Saver, sequences_per_step: int, say: Callable[[str], None]
    ) -> None:
        self._config, self._engine, self._saver, self._say = config, engine, saver, say
        self._sequences_per_step = sequences_per_step
        self._scale = engine.loss_scale

    def judge(self, state: TrainState, losses: Tensor, *, applied: bool) -> TrainState:
        """Called after each step with the state before it. Returns this state, with a skipped step counted.

        losses: of this rank's micro-batches. applied: from Engine.update.

        Raises UserError on every rank if the run must end. Collective.
        """
        scale, self._scale = self._scale, self._engine.loss_scale  # of the step; it may be lower now
        if applied:
            return state
        step = f"step {state.step + 1}: "
        # Dynamic loss scaling finds its scale by occasional overflows. At scale 1 the gradient itself is wrong.
        # All ranks must decide the same.
        if scale is not None and scale > 1 and math.isfinite(self._engine.world.sum(losses.sum())):
            self._say(
                f"{step}the gradient overflows at loss scale {scale:.0f}; left out, the next one's is {self._scale:.0f}"
            )
            return replace(state, overflows=state.overflows + 1)
        skipped, position = state.skipped + 1, state.data.position
        what = (
            f"{step}the loss or its gradient is not finite (positions {position} to "
            f"{position + self._sequences_per_step - 1})"
        )
        if self._config.on_nonfinite == "skip" and skipped <= self._config.max_skips:
            self._say(f"{what}; left out, {skipped} of at most {self._config.max_skips}")
            return replace(state, skipped=skipped)
        raise self._save_step_before(state, what + ("" if skipped == 1 else f", as {skipped - 1} steps before it were"))

    def _save_step_before(self, state: TrainState, what: str) -> UserError:
        """Saves the state before the step, which the optimizer has not changed. Returns the error that ends the run."""
        self._saver.close()  # it may be writing the same step
        # Before step 1 there are only initial weights, which a new run makes again.
        if state.step > 0 and not self._engine.world.first_rank_only(lambda: self._saver.has(state.step)):
            # The run may have gone wrong before this step, so the older checkpoints must stay.
            self._saver.save(self._engine, state, delete=False)
        try:
            self._saver.finish(self._engine.world)
        # A UserError would be printed by every rank.
        except ReportedByRank0:
            raise
        except UserError as error:
            return UserError(f"{what}; {error}")
        again = f"step {state.step} is saved: go on from it" if state.step > 0 else "it is the first: begin again"
        return UserError(
            f"{what}; {again} with a lower optimizer.lr, with train.precision=fp32, or leave such steps out with "
            "train.on_nonfinite=skip"
        )
