"""A line of metrics.jsonl: metrics are recorded by name, and those of which each rank has a part are summed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running import small_config

from llm.config_file import parse_config
from llm.display import Display
from llm.model.checkpoint import DataState, TrainState
from llm.training import meter
from llm.training.batch_plan import make_plan
from llm.training.meter import Meter
from llm.training.run_log import RunLog
from llm.world import World


class TwoRanks(World):
    """Rank 0 of two; each of the other's two micro-batches has 5 of every sum."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor[:, 1] += 5
        return tensor


def test_a_line_has_the_newest_steps_metrics_by_name_with_parts_summed_over_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    world = TwoRanks(0, 0, 2, torch.device("cpu"), torch.float32)
    config = parse_config(small_config(Path("data"), Path("run"), model__vocab_size=100, data__seq_len=64), "test")
    plan = make_plan(config, 2, world.device, dtype=world.dtype)
    lines: list[dict[str, Any]] = []
    folder = SimpleNamespace(write_metrics=lines.append)
    taken = Meter(plan.tokens_per_step, world.device)
    log = RunLog(plan, world, Display("", 1, silent=True), taken, folder)  # type: ignore[arg-type]
    for step in (1, 2):
        taken.count_step()
        log.record(
            TrainState(step, 512 * step, DataState("", 64, 0, "", 0)),
            sum_over_ranks={"loss": torch.tensor([step, 0.5 * step]), "entropy": torch.tensor([2.0, 0.0])},
            lr=0.5 / step,
            grad_norm=torch.tensor(4.0 * step),
        )
    log.write_steps()
    names = ("step", "tokens", "loss", "entropy", "lr", "grad_norm", "step_ms")
    assert [tuple(line[name] for name in names) for line in lines] == [(2, 1024, 13.0, 12.0, 0.25, 8.0, 1000.0)]
