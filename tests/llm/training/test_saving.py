"""Saving while training goes on: what is kept, and what a full disk, a slow one or a kill leaves."""

import errno
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from running import environment, read_losses, start_two
from safetensors import SafetensorError

from llm.metrics import MetricsLog, read_metrics
from llm.model import checkpoint, checkpoint_path, tensor_files
from llm.training import run_folder, saving

WriteConfig = Callable[..., Path]
Llm = Callable[..., tuple[int, str, str]]
TRUE_WRITE = saving.write_checkpoint


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint_path.saved(run)]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_full_disk_or_weights_gone_wrong_cost_one_checkpoint_and_not_the_run(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file, intact = tensor_files.save_file, {}

    def fill(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, file, metadata)
        if file.parent.name == f".{full}.tmp" and file.name == "optimizer-exp_avg.safetensors":
            os.truncate(file, file.stat().st_size // 2)
            intact.update(contents(file.parent.parent / "step-00000002"))
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    def write(path: Path, *arguments: Any) -> None:
        if path.name == "step-00000006":
            arguments[0]["model"]["model.norm.weight"][3] = torch.nan
        TRUE_WRITE(path, *arguments)

    monkeypatch.setattr(tensor_files, "save_file", fill)
    monkeypatch.setattr(saving, "write_checkpoint", write)
    full = "step-00000004"
    config, run = write_config(checkpoint__every_steps=2, checkpoint__keep_last=2), tmp_path / "run"
    code, _, err = llm_here("train", "--config", config)
    assert code == 0, err
    failed = "the checkpoint could not be written:"
    assert f"step-00000004: {failed} No space left on device; older ones are untouched" in err
    assert f"step-00000006: {failed} model.norm.weight of model is not finite; older ones are untouched" in err
    assert steps(run) == [2, 8]
    assert contents(run / "step-00000002") == intact
    assert not list(run.glob(".step-*")), "half a checkpoint takes the space of the next"

    # The last one is what the run was for.
    full, other = "step-00000008", tmp_path / "other"
    code, _, err = llm_here("train", "--config", config, f"checkpoint.dir={other}")
    assert code == 1
    assert steps(other) == [2, 4]
    assert (other / "latest").readlink() == Path("step-00000004")
    assert json.loads((other / "status.json").read_text())["status"] == "failed"
    assert not list(other.glob(".step-*"))


@pytest.mark.parametrize("freed", ["at step 6", "at the end", "never"])
def test_metrics_that_a_full_disk_does_not_take_wait_for_it(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, freed: str
) -> None:
    log = tmp_path / "run/metrics.jsonl"
    log_line, finish, pwrite, room = MetricsLog.write, saving.Saver.finish, os.pwrite, math.inf

    def write(self: MetricsLog, line: dict[str, Any]) -> None:
        nonlocal room
        if line["step"] == 3:
            room = log.stat().st_size + 100  # for less than a line
        elif f"at step {line['step']}" == freed:
            room = math.inf
        log_line(self, line)

    def finish_with_room(*arguments: Any) -> None:
        nonlocal room
        if freed == "at the end":
            room = math.inf
        finish(*arguments)

    def fill(descriptor: int, line: bytes, offset: int) -> int:
        if offset >= room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, line[: int(min(room - offset, len(line)))], offset)

    monkeypatch.setattr(MetricsLog, "write", write)
    monkeypatch.setattr(saving.Saver, "finish", finish_with_room)
    monkeypatch.setattr(os, "pwrite", fill)
    code, _, err = llm_here("train", "--config", write_config(train__eval_every_steps=4, checkpoint__every_steps=4))
    said = f"{log}: cannot be written (No space left on device); its lines are kept until it can be\n"
    assert err.count(said) == 1
    assert steps(tmp_path / "run") == [4, 8], "the run goes on"
    status = json.loads((tmp_path / "run/status.json").read_text())
    if freed == "never":
        assert code == 1
        assert f"error: {log}: No space left on device; free some space" in err
        assert status["status"] == "failed"
        assert len(log.read_bytes().split(b"\n")[-1]) == 100, "half a line may end the file"
        assert [line["step"] for line in lines(tmp_path / "run")] == [0, 1, 2]
    else:
        assert code == 0, err
        assert status["status"] == "complete"
        assert [line["step"] for line in lines(tmp_path / "run")] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
        assert status["result"]["train_loss"] == read_losses(tmp_path / "run")[-1]


def test_a_status_that_cannot_be_written_is_said_and_the_exit_code_says_so(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atomic_text = run_folder.atomic_text

    def fill(path: Path, text: str) -> None:
        if path.name == "status.json" and '"running"' not in text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        atomic_text(path, text)

    monkeypatch.setattr(run_folder, "atomic_text", fill)
    code, _, err = llm_here("train", "--config", write_config())
    status = tmp_path / "run/status.json"
    assert code == 1
    assert f"error: {status}: No space left on device; free some space" in err
    assert f"{status}: could not be written (No space left on device)" in err
    assert steps(tmp_path / "run") == [8]


def test_training_goes_on_while_a_checkpoint_is_written_and_a_second_save_waits(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, gather, events, second = saving.Saver.save, saving.gather, [], threading.Event()

    def request(self: saving.Saver, engine: Any, state: checkpoint.TrainState, **options: bool) -> None:
        events.append(f"{state.step} requested")
        if state.step == 6:
            second.set()
        save(self, engine, state, **options)

    def gather_noted(*arguments: Any) -> saving.Gathered:
        events.append("gathered")
        return gather(*arguments)

    def write(path: Path, *arguments: Any) -> None:
        if path.name == "step-00000003":
            assert second.wait(60), "training waited for the write"
            time.sleep(0.2)  # a second save that did not wait would gather now
        TRUE_WRITE(path, *arguments)
        events.append(f"{int(path.name.removeprefix('step-'))} written")

    monkeypatch.setattr(saving.Saver, "save", request)
    monkeypatch.setattr(saving, "gather", gather_noted)
    monkeypatch.setattr(saving, "write_checkpoint", write)
    config = write_config(checkpoint__every_steps=3, train__total_tokens=6 * 512)
    code, _, err = llm_here("train", "--config", config)
    assert code == 0, err
    assert events == ["3 requested", "gathered", "6 requested", "3 written", "gathered", "6 written"]


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
    return read_metrics(run / "metrics.jsonl")


SLOW = """
import os, sys, time
from pathlib import Path
from llm.model import tensor_files
from llm import cli
true_save = tensor_files.save_file
def save_file(tensors, file, metadata):
    true_save(tensors, file, metadata)
    if file.parent.name == ".step-00000006.tmp" and os.environ.get("RANK", "0") == sys.argv[2]:
        Path(sys.argv[1]).touch()
        time.sleep(60)
tensor_files.save_file = save_file
sys.exit(cli.main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    "victim", [None, pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)]
)
def test_a_kill_inside_a_save_leaves_the_checkpoint_before(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, victim: int | None
) -> None:
    """victim: the rank that is killed while it writes its part, of two that write together; None: there is but one."""
    gather_bytes = {} if victim is None else {"checkpoint__gather_bytes": 0}
    config, inside = write_config(checkpoint__every_steps=3, **gather_bytes), tmp_path / "inside"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train = ["train", "--config", str(config)]
    command = [sys.executable, "-c", SLOW, str(inside), str(victim or 0), *train, f"checkpoint.dir={killed}"]
    if victim is None:
        processes = [psutil.Popen(command, env=environment(), stderr=subprocess.DEVNULL)]
    else:
        processes = start_two(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not inside.exists():
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        processes[victim or 0].kill()
        for process in processes:
            assert process.wait(60) != 0
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    assert steps(killed) == [3]
    assert (killed / "latest").readlink() == Path("step-00000003")

    for folder in (killed, whole):
        code, _, err = llm_here(*train, f"checkpoint.dir={folder}")
        assert code == 0, err
    assert not list(killed.glob(".step-*"))
    assert steps(killed) == [3, 6, 8]
    if victim is None:
        assert read_losses(killed) == read_losses(whole)
        for file in sorted((whole / "latest").glob("*.safetensors")):
            assert file.read_bytes() == (killed / "latest" / file.name).read_bytes(), file.name
    else:  # two ranks' losses are added up in another order than here
        assert read_losses(killed) == pytest.approx(read_losses(whole), abs=1e-5)
