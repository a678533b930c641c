"""A run goes on from what is good, whatever became of its folder, and keeps what it began with."""

import json
import os
import re
import shlex
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import read_losses

from llm.data.tokenizer import load_tokenizer
from llm.metrics import read_metrics
from llm.model import checkpoint, checkpoint_path
from llm.training import saving
from llm.training.train import Run

WriteConfig = Callable[..., Path]
Llm = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps, saved at every second one, and its config."""
    from running import run_llm, small_config

    folder = tmp_path_factory.mktemp("trained")
    tree = small_config(small_shards, folder / "run", checkpoint__every_steps=2, checkpoint__keep_last=9)
    (folder / "config.json").write_text(json.dumps(tree))
    run_llm("train", "--config", folder / "config.json")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run", symlinks=True))


@pytest.fixture
def train(trained: Path, run: Path, llm_here: Llm) -> Llm:
    """`llm train` in the copy of the run, to twelve steps."""
    arguments = [
        "train",
        "--config",
        trained / "config.json",
        f"checkpoint.dir={run}",
        f"train.total_tokens={12 * 512}",
    ]
    return lambda *more: llm_here(*arguments, *more)


def steps(run: Path) -> list[int]:
    return [checkpoint_path.step_of(path) for path in checkpoint_path.saved(run)]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1000] ^= 2
    file.write_bytes(content)


def test_a_damaged_newest_is_named_with_the_command_that_goes_on(run: Path, train: Llm) -> None:
    flip(run / "step-00000008/optimizer-exp_avg.safetensors")
    flip(run / "step-00000006/model.safetensors")
    damaged = (run / "step-00000008/optimizer-exp_avg.safetensors").read_bytes()
    metrics = (run / "metrics.jsonl").read_bytes()
    code, _, err = train()
    assert code == 1
    error = next(line for line in err.splitlines() if line.startswith("error: "))
    assert "step-00000008/optimizer-exp_avg.safetensors: damaged (the checksum of " in error
    added = shlex.split(
        re.search(r"the newest good checkpoint is .*: to go on from it, add (.*) to the command", error)[1]
    )
    assert added == ["--resume", str(run / "step-00000004")]
    code, _, err = train(*added)
    assert code == 0, err
    assert "resumed     at step 4" in err
    assert steps(run) == [2, 4, 6, 8, 10, 12]
    assert not any(checkpoint.verify(path) for path in checkpoint_path.saved(run))
    # Nothing that was newer is gone.
    assert (run / "step-00000008.before-1/optimizer-exp_avg.safetensors").read_bytes() == damaged
    assert (run / "step-00000006.before-1").is_dir()
    assert (run / "metrics.before-1.jsonl").read_bytes() == metrics
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line] == list(range(1, 13))


def test_a_link_that_a_user_has_set_back_decides(trained: Path, run: Path, train: Llm) -> None:
    (run / "latest").unlink()
    (run / "latest").symlink_to("step-00000004")
    code, _, err = train("train.total_tokens=4096")
    assert code == 0, err
    assert "resumed     at step 4" in err
    assert steps(run) == [2, 4, 6, 8]
    assert (run / "latest").readlink() == Path("step-00000008")
    # The same again: one equal to what was there is not kept twice.
    assert not list(run.glob("step-*.before-*"))
    assert read_losses(run) == read_losses(trained / "run")


def test_copied_with_links_followed_a_run_goes_on_twice(trained: Path, run: Path, train: Llm) -> None:
    shutil.rmtree(run)
    shutil.copytree(trained / "run", run)
    code, _, err = train("train.total_tokens=5120")
    assert code == 0, err
    assert (run / "latest").readlink() == Path("step-00000010")
    code, _, err = train()
    assert code == 0, err
    assert "resumed     at step 10" in err


def test_a_checkpoint_behind_a_link_keeps_the_metrics(run: Path, train: Llm, tmp_path: Path) -> None:
    (run / "step-00000008").rename(tmp_path / "elsewhere")
    (run / "step-00000008").symlink_to(tmp_path / "elsewhere")
    code, _, err = train("checkpoint.keep_last=1", "checkpoint.keep_best=false")
    assert code == 0, err
    assert read_metrics(run / "metrics.jsonl")[1]["step"] == 1
    assert steps(run) == [12]
    assert (tmp_path / "elsewhere/state.json").exists()


@pytest.mark.parametrize("damage", [b"\xff", b"[]\n", b"{}\n", b"\0\n"])
def test_damaged_metrics_stop_no_run_and_no_line_is_lost(run: Path, train: Llm, damage: bytes) -> None:
    log = run / "metrics.jsonl"
    before = log.read_bytes()
    first = before.index(b"\n") + 1
    # Without its last newline, as after a kill.
    log.write_bytes((before[:first] + damage + before[first:])[:-1])
    code, _, err = train()
    assert code == 0, err
    assert log.read_bytes().startswith(before[:first] + damage + before[first:])
    assert read_metrics(log)[-1]["step"] == 12


def test_a_folder_renamed_while_it_trains_stays_the_runs(
    run: Path, train: Llm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, moved = Run.step, tmp_path / "moved"

    def rename(self: Run, batches: Any) -> None:
        if self.state.step == 9:
            run.rename(moved)
        step(self, batches)

    monkeypatch.setattr(Run, "step", rename)
    code, _, err = train()
    assert code == 0, err
    assert steps(moved) == [2, 4, 6, 8, 10, 12]
    assert json.loads((moved / "status.json").read_text())["status"] == "complete"
    assert len(read_losses(moved)) == 12
    assert not run.exists()


def test_another_runs_checkpoint_since_the_set_up_is_not_overwritten(
    run: Path, train: Llm, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Run._check_sanity

    def train_on(self: Run) -> list[str]:
        if not (run / "step-00000009").exists():
            shutil.copytree(run / "step-00000008", run / "step-00000009")
            saving.point(run / "latest", "step-00000009")
        return check(self)

    monkeypatch.setattr(Run, "_check_sanity", train_on)
    code, _, err = train()
    assert (code, f"error: {run}: another run has just written here; start again" in err) == (1, True), err


class Strange(Exception):
    """An error that nobody foresees."""


@pytest.mark.parametrize("failing", [[10], [10, 12]])
def test_any_error_of_a_save_is_said_and_the_last_one_ends_the_run(
    run: Path, train: Llm, monkeypatch: pytest.MonkeyPatch, failing: list[int]
) -> None:
    write, seen = saving.write_checkpoint, []

    def fail(path: Path, *arguments: Any) -> None:
        seen.append(json.loads((run / "status.json").read_text()))
        if checkpoint_path.step_of(path) in failing:
            raise Strange("what is this")
        write(path, *arguments)

    monkeypatch.setattr(saving, "write_checkpoint", fail)
    monkeypatch.setattr(threading, "excepthook", lambda args: pytest.fail(f"a thread ended by {args}"))
    code, _, err = train()
    said = (
        f"{run / 'step-00000010'}: the checkpoint could not be written: Strange: what is this; older ones are untouched"
    )
    assert said in err
    assert (seen[1]["status"], seen[1]["failed_saves"]) == ("running", [said])
    status = json.loads((run / "status.json").read_text())
    assert status["failed_saves"][0] == said
    assert (code, status["status"]) == ((0, "complete") if failing == [10] else (1, "failed"))


def test_a_run_whose_last_checkpoint_was_deleted_is_not_complete(
    run: Path, train: Llm, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = saving.Saver.finish

    def delete(self: saving.Saver, *arguments: Any) -> None:
        self.close()
        shutil.rmtree(run / "step-00000012")
        finish(self, *arguments)

    monkeypatch.setattr(saving.Saver, "finish", delete)
    code, _, err = train()
    assert (code, "step-00000012: the last checkpoint of this run is gone; start again to go on" in err) == (1, True)
    assert json.loads((run / "status.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("what", ["the folder is moved", "another tokenizer", "a shard is overwritten"])
def test_a_run_keeps_its_data_whatever_becomes_of_the_folder(
    run: Path, train: Llm, small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    data = Path(shutil.copytree(small_shards, tmp_path / "data"))
    sha256, step = load_tokenizer(data).sha256, Run.step

    def change(self: Run, batches: Any) -> None:
        if self.state.step == 9 and what == "another tokenizer":
            (data / "tokenizer.model").write_bytes(b"")
        elif self.state.step == 9 and what == "the folder is moved":
            data.rename(tmp_path / "gone")
        elif self.state.step == 9:
            for path in data.glob("train-*.bin"):
                with open(path, "r+b") as file:
                    file.seek(4096)
                    file.write(os.urandom(path.stat().st_size - 4096))
        step(self, batches)

    monkeypatch.setattr(Run, "step", change)
    code, _, err = train(f"data.path={data}")
    if what == "another tokenizer":
        assert code == 0, err
    elif what == "the folder is moved":
        assert f"warning     {data}: is gone; the run goes on with the shards that are open" in err
    else:
        assert (code, "checksum of " in err or "was replaced or changed" in err) == (1, True), err
    # Also where the data end the run, what it has learned is saved, with the tokenizer that it began with.
    newest = checkpoint_path.newest(run)
    assert newest is not None
    assert checkpoint_path.step_of(newest) > 8
    assert checkpoint.verify(newest) == []
    assert load_tokenizer(newest).sha256 == sha256


def test_shards_with_another_tokenizer_are_refused(
    run: Path, train: Llm, small_shards: Path, small_corpus: Path, llm_here: Llm, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(small_shards, tmp_path / "data"))
    make = ["train_tokenizer", "--input", small_corpus, "--model_prefix", tmp_path / "other", "--vocab_size", 500]
    assert llm_here(*make)[0] == 0
    content = (tmp_path / "other.model").read_bytes()
    (data / "tokenizer.model").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, _, err = train(f"data.path={data}")
    assert code == 1
    assert "tokenizer.model: " in err
