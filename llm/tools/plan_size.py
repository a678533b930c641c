"""Chooses the size of a model for a time: `llm plan --hours`."""

import math
from collections.abc import Iterator
from typing import Any

from llm.config import Config
from llm.config_file import parse_config
from llm.data.mixture import Mixture
from llm.errors import UserError
from llm.tools.plan_step import Machine, Planner
from llm.training.expected_loss import expect, sample_text
from llm.training.resolve import epoch_tokens, resolve
from llm.training.rules import EPOCHS

WIDTHS = (64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096)


def shape(width: int) -> dict[str, int]:
    """Returns a model of this width, in the proportions of the shipped configs.

    A layer for each 64 of the width, at least 4; heads of 128, in narrow models of 32; half as many keys and values;
    d_ff of 8/3 of the width, so that SwiGLU's three matrices are as large as two of four times the width.
    """
    heads = width // 128 if width >= 768 else width // 32
    return {
        "n_layers": max(4, width // 64),
        "d_model": width,
        "n_heads": heads,
        "n_kv_heads": heads // 2 if heads % 2 == 0 else heads,
        "d_ff": 64 * round(8 * width / 3 / 64),
    }


def choose(asked: Config, data: Mixture | None, machine: Machine, processes: int, hours: float, source: str) -> Config:
    """Returns the config with the shape and train.total_tokens that should reach the least loss in this time.

    asked: its model and length are replaced; what else it states stays. source: its file, for messages.

    Raises UserError if no size fits the memory and the time.
    """
    text, epoch = None, None
    if data is not None:
        seq_len = resolve(asked, data)[0].data.seq_len
        assert seq_len is not None
        text, epoch = sample_text(data, seq_len), epoch_tokens(data, seq_len)
    least, chosen = math.inf, None
    for config in _sizes(asked, data, machine, processes, hours, epoch, source):
        loss = expect(resolve(config, data)[0], text, epoch).loss
        # Over the size, the loss falls and then rises, because a larger model sees fewer tokens in the time.
        if loss > least:
            break
        least, chosen = loss, config
    if chosen is None:
        raise UserError(f"{source}: no model from {WIDTHS[0]} wide on fits and takes a step in {hours:g} hours")
    return chosen


def _sizes(
    asked: Config, data: Mixture | None, machine: Machine, processes: int, hours: float, epoch: int | None, source: str
) -> Iterator[Config]:
    """Yields a config of each width that fits, with as many tokens as the time allows, at most EPOCHS epochs."""
    tree: dict[str, Any] = asked.model_dump(exclude_unset=True)
    for width in WIDTHS:
        tree["model"] = {**tree.get("model", {}), **shape(width)}

        def planner(total: float) -> Planner:
            tokens = math.inf if epoch is None else EPOCHS * epoch
            tree["train"] = {**tree.get("train", {}), "total_tokens": max(1, int(min(total, tokens)))}
            return Planner(resolve(parse_config(tree, source), data)[0], machine)

        # A first guess, because the batch, and with it the exact speed, depends on the length of the run.
        guess = planner(1)
        speed = processes * guess.seq_len / guess.pass_seconds(1, "none")
        guess = planner(3600 * hours * speed)
        best = guess.recommended(list(guess.choices(processes)))
        if best is None:
            return
        exact = planner(3600 * hours * guess.config.train.batch / best.seconds)
        if exact.config.train.horizon >= exact.config.train.batch:
            yield parse_config(tree, source)
