"""Saving beside the training: what is kept, and what a full disk, a slow one or a kill leaves."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import environment, read_losses, run_llm

from llm import checkpoint

WriteConfig = Callable[..., Path]
Llm = Callable[..., tuple[int, str, str]]
TRUE_WRITE = checkpoint._write


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.saved(run)]


def test_a_full_disk_or_weights_gone_wrong_cost_one_checkpoint_and_not_the_run(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, *arguments: Any) -> None:
        if path.name in full:
            raise OSError(28, "No space left on device")
        if path.name == "step-00000006":
            arguments[0]["model"]["model.norm.weight"][3] = torch.nan
        TRUE_WRITE(path, *arguments)

    monkeypatch.setattr(checkpoint, "_write", write)
    full = {"step-00000004"}
    config = write_config(checkpoint__every_steps=2, checkpoint__keep_last=2)
    code, _, err = llm_here("train", "--config", config)
    assert code == 0, err
    failed = "the checkpoint could not be written:"
    assert f"step-00000004: {failed} [Errno 28] No space left on device; older ones are untouched" in err
    assert f"step-00000006: {failed} model.norm.weight of model is not finite; older ones are untouched" in err
    assert steps(tmp_path / "run") == [2, 8]

    # The last one is what the run was for.
    full = {"step-00000008"}
    code, _, err = llm_here("train", "--config", config, f"checkpoint.dir={tmp_path / 'other'}")
    assert code == 1
    assert steps(tmp_path / "other") == [2, 4]
    assert (tmp_path / "other/latest").readlink() == Path("step-00000004")
    assert json.loads((tmp_path / "other/status.json").read_text())["status"] == "failed"


def test_training_goes_on_while_a_slow_disk_writes_and_a_second_save_waits(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "run/metrics.jsonl"
    trained: dict[str, list[int]] = {}
    writing = threading.Lock()

    def write(path: Path, *arguments: Any) -> None:
        assert writing.acquire(blocking=False), "two saves at once"
        before = len(log.read_text().splitlines())
        deadline = time.monotonic() + 5
        while len(log.read_text().splitlines()) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.2)
        trained[path.name] = [before, len(log.read_text().splitlines())]
        TRUE_WRITE(path, *arguments)
        writing.release()

    monkeypatch.setattr(checkpoint, "_write", write)
    config = write_config(checkpoint__every_steps=3, train__total_tokens=12 * 512)
    code, _, err = llm_here("train", "--config", config, "checkpoint.keep_last=9")
    assert code == 0, err
    assert steps(tmp_path / "run") == [3, 6, 9, 12]
    began, ended = trained["step-00000003"]
    assert began < ended <= began + 3, "training waited, or a later save did not"


def test_what_is_kept(write_config: WriteConfig, llm_here: Llm, tmp_path: Path) -> None:
    config = write_config(
        checkpoint__every_steps=1,
        checkpoint__keep_last=2,
        checkpoint__keep_every_steps=4,
        train__eval_every_steps=3,
        train__total_tokens=10 * 512,
        # Learns until step 3, and is blown up after.
        optimizer__lr=1e-2,
        schedule__warmup_tokens=3 * 512,
    )
    run = tmp_path / "run"
    code, _, err = llm_here("train", "--config", config)
    assert code == 0, err
    best = min((line["val_loss"], line["step"]) for line in lines(run) if "val_loss" in line and line["step"])
    kept = {4, 8, 9, 10, best[1]}
    assert set(steps(run)) == kept
    assert (run / "best").readlink() == Path(f"step-{best[1]:08d}")
    assert checkpoint.read_state(run / "best")[0].val_loss == best[0]
    code, _, err = llm_here("train", "--config", config, "train.total_tokens=5632", "checkpoint.keep_best=false")
    assert code == 0, err
    assert "changed     checkpoint.keep_best: true -> false" in err
    assert "changed     train.total_tokens: 5120 -> 5632" in err
    assert {4, 8, 10, 11} <= set(steps(run)) <= {4, 8, 10, 11, best[1]}


def lines(run: Path) -> list[dict[str, Any]]:
    from llm.metrics import read_metrics

    return read_metrics(run / "metrics.jsonl")


SLOW = """
import sys, time
from pathlib import Path
from llm import checkpoint, cli
true_save = checkpoint.save_file
def save_file(tensors, file, metadata):
    true_save(tensors, file, metadata)
    if file.parent.name == ".step-00000006.tmp":
        Path(sys.argv[1]).touch()
        time.sleep(60)
checkpoint.save_file = save_file
cli.main(sys.argv[2:])
"""


def test_a_kill_inside_a_save_leaves_the_checkpoint_before(write_config: WriteConfig, tmp_path: Path) -> None:
    config, inside = write_config(checkpoint__every_steps=3), tmp_path / "inside"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_llm("train", "--config", config, f"checkpoint.dir={whole}")
    command = [sys.executable, "-c", SLOW, str(inside), "train", "--config", str(config), f"checkpoint.dir={killed}"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not inside.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert steps(killed) == [3]
    assert list(killed.glob(".step-*")), "the kill came inside a save"
    run_llm("train", "--config", config, f"checkpoint.dir={killed}")
    assert not list(killed.glob(".step-*"))
    assert read_losses(killed) == read_losses(whole)
    for file in sorted((whole / "latest").glob("*.safetensors")):
        assert file.read_bytes() == (killed / "latest" / file.name).read_bytes(), file.name
