"""One process or two, ZeRO 0 to 3, fp32 and bf16: the same samples, the same losses; a resume changes no bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import deepspeed, read_losses, small_config

SCENARIOS = Path(__file__).parent / "scenarios.py"
STEPS = 50
TOKENS = STEPS * 512

# (precision, ZeRO stage) of every combination that the engine offers
COMBINATIONS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]


def scenario(
    name: str, shards: Path, output: Path, *, die_after: int | None = None, resume: object = "auto", **changes: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "config": small_config(shards, output / name, train__total_tokens=TOKENS, **changes),
        "die_after": die_after,
        "resume": str(resume),
    }


def zero(precision: str, stage: int) -> dict[str, Any]:
    return {"train__precision": precision, "deepspeed__zero_stage": stage}


@pytest.fixture(scope="module")
def one_process(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on one process: every precision once, whatever its stage."""
    output = tmp_path_factory.mktemp("one")
    runs = [
        scenario("fp32", small_shards, output, checkpoint__every_steps=20, **zero("fp32", 1)),
        scenario("fp32-accumulated", small_shards, output, train__micro_batch=2, **zero("fp32", 1)),
        scenario("fp32-recomputed", small_shards, output, train__activation_checkpointing=True, **zero("fp32", 1)),
        scenario("bf16", small_shards, output, **zero("bf16", 1)),
    ]
    (output / "scenarios.json").write_text(json.dumps(runs))
    subprocess.run([sys.executable, SCENARIOS, output], check=True, capture_output=True)
    return output


@pytest.fixture(scope="module")
def two_processes(small_shards: Path, one_process: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs on two processes at every stage; also killed after step 33 and resumed from step 20."""
    output = tmp_path_factory.mktemp("two")
    runs = [
        scenario(f"{precision}-{stage}", small_shards, output, **zero(precision, stage))
        for precision, stage in COMBINATIONS
    ]
    # 8 rows a step are not a multiple of 2 processes x 3 rows: some slots stay empty.
    runs.append(scenario("uneven", small_shards, output, train__micro_batch=3, **zero("fp32", 2)))
    tied = {"model__tie_embeddings": True, "model__qk_norm": True}
    runs.append(scenario("tied-2", small_shards, output, **tied, **zero("fp32", 2)))
    runs.append(scenario("tied-3", small_shards, output, **tied, **zero("fp32", 3)))
    runs.append(scenario("recomputed", small_shards, output, train__activation_checkpointing=True, **zero("fp32", 3)))
    for precision, stage in COMBINATIONS:
        name = f"killed-{precision}-{stage}"
        settings = {"checkpoint__every_steps": 20, **zero(precision, stage)}
        runs.append(scenario(name, small_shards, output, die_after=33, **settings))
        runs.append(scenario(name, small_shards, output, **settings))
    for stage in (0, 2, 3):  # from one process at stage 1
        source = one_process / "fp32/step-00000020"
        runs.append(scenario(f"moved-{stage}", small_shards, output, resume=source, **zero("fp32", stage)))
    (output / "scenarios.json").write_text(json.dumps(runs))
    deepspeed(2, SCENARIOS, output)
    return output


@pytest.mark.parametrize(("precision", "stage"), COMBINATIONS)
def test_two_processes_lose_what_one_loses(one_process: Path, two_processes: Path, precision: str, stage: int) -> None:
    expected = read_losses(one_process / precision)
    assert len(expected) == STEPS
    tolerance = 1e-5 if precision == "fp32" else 2e-3
    assert read_losses(two_processes / f"{precision}-{stage}") == pytest.approx(expected, rel=0, abs=tolerance)


@pytest.mark.parametrize("name", ["uneven", "recomputed"])
def test_micro_batch_and_recomputation_change_no_loss(one_process: Path, two_processes: Path, name: str) -> None:
    expected = read_losses(one_process / "fp32")
    assert read_losses(two_processes / name) == pytest.approx(expected, rel=0, abs=1e-5)


def test_accumulation_and_recomputation_change_no_loss(one_process: Path) -> None:
    expected = read_losses(one_process / "fp32")
    assert read_losses(one_process / "fp32-accumulated") == pytest.approx(expected, rel=0, abs=1e-5)
    assert read_losses(one_process / "fp32-recomputed") == pytest.approx(expected, rel=0, abs=1e-5)


def test_tied_embeddings_train_the_same_at_every_stage(two_processes: Path) -> None:
    expected = read_losses(two_processes / "tied-2")
    assert len(expected) == STEPS
    assert read_losses(two_processes / "tied-3") == pytest.approx(expected, rel=0, abs=1e-5)


def test_losses_fall(one_process: Path) -> None:
    losses = read_losses(one_process / "fp32")
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(("precision", "stage"), COMBINATIONS)
def test_killed_and_resumed_is_bit_for_bit_the_same(two_processes: Path, precision: str, stage: int) -> None:
    whole, resumed = two_processes / f"{precision}-{stage}", two_processes / f"killed-{precision}-{stage}"
    assert read_losses(resumed) == read_losses(whole)
    last = f"step-{STEPS:08d}"
    for file in sorted((whole / last).glob("*.safetensors")):
        assert file.read_bytes() == (resumed / last / file.name).read_bytes(), file.name


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_moves_to_more_processes_and_another_stage(one_process: Path, two_processes: Path, stage: int) -> None:
    expected = read_losses(one_process / "fp32")[20:]
    assert read_losses(two_processes / f"moved-{stage}") == pytest.approx(expected, rel=0, abs=1e-5)


def test_validation_is_the_same_on_any_number_of_processes(one_process: Path, two_processes: Path) -> None:
    def validation(folder: Path) -> list[float]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["val_loss"] for line in lines if "val_loss" in line]

    expected = validation(one_process / "fp32")
    assert len(expected) == 2
    assert validation(two_processes / "fp32-3") == pytest.approx(expected, rel=0, abs=1e-5)


def test_runs_leave_no_shared_memory(two_processes: Path) -> None:
    assert not [name for name in os.listdir("/dev/shm") if "deepspeed" in name or "shm_allreduce" in name]
