"""`llm compare` finds the first step, number and tensor in which two runs differ."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import without_checksums
from safetensors.torch import load_file, save_file

Llm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def runs(write_config: Callable[..., Path], llm_here: Llm, tmp_path: Path) -> tuple[Path, Path]:
    """A run of six steps, saved at every other one, and its copy."""
    config = write_config(train__total_tokens=6 * 512, checkpoint__every_steps=2)
    code, _, err = llm_here("train", "--config", config)
    assert code == 0, err
    shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=True)
    return tmp_path / "run", tmp_path / "copy"


def compared(llm_here: Llm, a: Path, b: Path) -> tuple[int, dict[str, Any], str]:
    code, out, err = llm_here("compare", a, b, "--json")
    return code, json.loads(out), err


def test_the_first_difference_is_found_and_times_are_none(llm_here: Llm, runs: tuple[Path, Path]) -> None:
    a, b = runs
    lines = [json.loads(line) for line in (b / "metrics.jsonl").read_text().splitlines()]
    (b / "metrics.jsonl").write_text("".join(json.dumps(line | {"step_ms": 1.0}) + "\n" for line in lines))
    code, found, err = compared(llm_here, a, b)
    assert (code, found["same"], found["steps"], found["checkpoints"], found["failed"]) == (0, True, 7, 3, [])
    assert "metrics     the same bits at all 7 logged steps in common, up to step 6" in err

    # A number at step 5, and two tensors at step 4.
    for line in lines:
        if line["step"] == 5:
            line["grad_norm"] += 0.25
    (b / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = without_checksums(b / "step-00000004") / "optimizer-exp_avg.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 0.5
    tensors["model.layers.1.mlp.up_proj.weight"][0, :2] -= 2.0
    save_file(tensors, file)
    code, found, err = compared(llm_here, a, b)
    assert (code, found["step"], found["metric"]["step"]) == (1, 4, 5)
    assert (found["metric"]["name"], found["metric"]["difference"]) == ("grad_norm", pytest.approx(0.25))
    tensor = found["tensor"]
    assert (tensor["step"], tensor["file"], tensor["name"]) == (
        *(4, "optimizer-exp_avg", "model.layers.1.mlp.up_proj.weight"),
    )
    assert (tensor["difference"], tensor["elements"], tensor["tensors"]) == (pytest.approx(2.0), 2, 2)
    assert "differ at step 5, after 5 equal logged steps: grad_norm" in err
    assert err.endswith("error: failed: the runs differ from step 4 on; see above\n")


def test_runs_of_two_seeds_differ_from_the_first_step_on(
    llm_here: Llm, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert llm_here("train", "--config", tmp_path / "config.json", "train.seed=5", f"checkpoint.dir={other}")[0] == 0
    code, found, err = compared(llm_here, runs[0], other)
    assert (code, found["step"], found["metric"]["name"]) == (1, 0, "val_loss")
    assert (found["tensor"]["step"], found["tensor"]["name"]) == (2, "model.embed_tokens.weight")
    assert "setting     train.seed: 1337 -> 5" in err


def test_a_zero_of_another_sign_is_a_difference(llm_here: Llm, runs: tuple[Path, Path]) -> None:
    a, b = runs
    for run, zero in ((a, 0.0), (b, -0.0)):
        file = without_checksums(run / "step-00000006") / "model.safetensors"
        save_file(load_file(file) | {"model.norm.weight": torch.full((32,), zero)}, file)
    code, found, _ = compared(llm_here, a, b)
    assert (code, found["tensor"]["name"], found["tensor"]["difference"]) == (1, "model.norm.weight", 0.0)


def test_what_is_no_run_is_refused(llm_here: Llm, tmp_path: Path) -> None:
    code, _, err = llm_here("compare", tmp_path, tmp_path)
    assert code == 1
    assert f"{tmp_path}: holds no run; name the checkpoint.dir of one" in err
