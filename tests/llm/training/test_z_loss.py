"""train.z_loss: training minimises it and it has its own metric; `loss` and `val_loss` stay the NLL alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

WriteConfig = Callable[..., Path]
Llm = Callable[..., tuple[int, str, str]]
WEIGHT = 0.1


@pytest.mark.parametrize("stage", [0, 3])
def test_training_minimises_it_and_its_metric_is_not_in_the_loss(
    llm_here: Llm, write_config: WriteConfig, tmp_path: Path, stage: int
) -> None:
    def lines(z_loss: float) -> list[dict[str, float]]:
        folder = tmp_path / str(z_loss)
        settings = {"train__micro_batch": 1, "train__log_every_steps": 1, "train__precision": "fp32"}
        changes = settings | {"train__z_loss": z_loss, "checkpoint__dir": str(folder), "deepspeed__zero_stage": stage}
        code, _, err = llm_here("train", "--config", write_config(**changes))
        assert code == 0, err
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    (start, *others), (start_with_z, *others_with_z) = lines(0.0), lines(WEIGHT)
    assert start["val_loss"] == start_with_z["val_loss"]
    plain, steps = ([line for line in found if "loss" in line] for found in (others, others_with_z))
    assert not any("z_loss" in line for line in plain)
    assert all("z_loss" in line for line in steps)
    # The first step has the same weights; only its gradient is another.
    assert steps[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    assert steps[0]["grad_norm"] != pytest.approx(plain[0]["grad_norm"], rel=1e-3)
    # At first every token is nearly as likely as any other: lse^2 is nearly (log V)^2, and the NLL log V.
    assert steps[0]["z_loss"] == pytest.approx(WEIGHT * start["val_loss"] ** 2, rel=0.1)
    assert steps[-1]["z_loss"] < 0.95 * steps[0]["z_loss"]
