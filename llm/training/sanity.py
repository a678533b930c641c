"""Warns about settings of a run that make no sense, before its first step.

Only two things are errors, and train.force=true allows them: text that is repeated too often, and a run that takes too
long. Other unusual settings may be intended, so each of them only gives a line.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from llm.config import Config
from llm.data.mixture import Mixture
from llm.errors import UserError
from llm.training.batch_plan import Plan

MAX_EPOCHS = 100.0
"""For 4 epochs, repeated text is nearly as useful as new text; after about 40 it adds nothing (Muennighoff et al.
2023, "Scaling Data-Constrained Language Models").
"""
MAX_HOURS = 1_000.0
ASSUMED_MFU = 0.4
"""The fraction of the measured matmul rate for the estimate of hours, as in `llm plan` on a CPU."""
LONG_WARMUP = 0.2
"""Of the run."""
FEW_STEPS = 100
FEW_TOKENS_A_PARAMETER = 1.0
"""Below, models of 0.2M and 0.4M parameters differ by 2 % (benchmarks/LOG.md, "The law below five tokens a
parameter").
"""
FEW_VALIDATION_TOKENS = 10_000
"""The loss of fewer tokens is uncertain by a hundredth of itself or more: its standard deviation is about that of one
token's loss, 2 to 3 nats, over the root of their number.
"""


@dataclass(frozen=True)
class Size:
    """The numbers of a run that are checked."""

    epochs: float
    """Epochs of the source that is repeated most."""
    hours: float
    """Estimated."""
    steps: int
    warmup: float
    """schedule.warmup_tokens as a fraction of the run's tokens."""
    tokens_a_parameter: float
    validation_tokens: int
    """Scored at each validation."""


def measure(config: Config, data: Mixture, plan: Plan) -> Size:
    """Returns the size of a whole run. config: from `resolve`."""
    train = config.train
    steps = math.ceil(train.horizon / plan.tokens_per_step)
    validation = data.sequences("val", plan.seq_len) * plan.seq_len
    if train.eval_tokens is not None:
        validation = min(validation, math.ceil(train.eval_tokens / plan.seq_len) * plan.seq_len)
    speed = ASSUMED_MFU * plan.matmul_flops * plan.world_size / plan.flops.usual
    # By stage and source; stages with the same source read the same text.
    epochs = data.epochs(steps * plan.sequences_per_step, plan.seq_len, plan.sequences_per_step)
    return Size(
        epochs=float(epochs.sum(axis=0).max()),
        hours=train.horizon / speed / 3600,
        steps=steps,
        warmup=config.schedule.warmup / train.horizon,
        tokens_a_parameter=train.horizon / plan.parameters,
        validation_tokens=validation,
    )


def mistakes(size: Size) -> Iterator[str]:
    """Yields the errors."""
    if size.epochs > MAX_EPOCHS:
        yield (
            f"train.total_tokens is {size.epochs:,.0f} epochs over the text (more than {MAX_EPOCHS:.0f}; from about 40 "
            "on nothing more is learned from it)"
        )
    if size.hours > MAX_HOURS:
        yield (
            f"it takes about {size.hours:,.0f} hours (more than {MAX_HOURS:,.0f}; an estimate: {ASSUMED_MFU:.0%} of "
            "the matmul rate measured here)"
        )


def remarks(size: Size) -> Iterator[str]:
    """Yields the lines that are not errors."""
    if size.steps < FEW_STEPS:
        yield f"a run of {size.steps} steps is short: fewer than {FEW_STEPS}"
    if size.warmup > LONG_WARMUP:
        yield f"schedule.warmup_tokens is long: {size.warmup:.0%} of the run, more than a fifth"
    if size.tokens_a_parameter < FEW_TOKENS_A_PARAMETER:
        yield (
            f"the run reads {size.tokens_a_parameter:.2g} tokens a parameter: a smaller model learns about as much "
            "from them, in a fraction of the time"
        )
    if size.validation_tokens < FEW_VALIDATION_TOKENS:
        yield (
            f"validation scores {size.validation_tokens:,} tokens, fewer than {FEW_VALIDATION_TOKENS:,}: small "
            "differences of its loss mean nothing; prepare_data holds out more with a larger --val_fraction"
        )


def check(config: Config, data: Mixture, plan: Plan, before: Config | None) -> list[str]:
    """Returns lines about settings that make no sense; none about a run that continues with the same settings.

    before: the config of the checkpoint that the run continues from; None: a new run.

    Raises UserError for an error; for a continued run only if train.total_tokens is higher than before.
    """
    if before is not None and config.train.horizon <= before.train.horizon:
        return []
    size = measure(config, data, plan)
    wrong = list(mistakes(size))
    if wrong and not config.train.force:
        raise UserError(
            f"this run makes no sense: {'; '.join(wrong)}; set a lower train.total_tokens, prepare more text or take a "
            "smaller model, or set train.force=true to train all the same"
        )
    return [*wrong, *remarks(size)]
