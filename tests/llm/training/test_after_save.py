"""checkpoint.after_save runs after each save, in the background, and whatever it does changes nothing of the run."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from running import deepspeed_module, read_losses

from llm.metrics import read_metrics
from llm.training import train
from llm.training.after_save import AfterSave

Llm = Callable[..., tuple[int, str, str]]
WriteConfig = Callable[..., Path]


def wait_until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def checkpoints(tmp_path: Path, count: int) -> list[Path]:
    folders = [tmp_path / f"step-{number:08d}" for number in range(1, count + 1)]
    for folder in folders:
        folder.mkdir()
    return folders


def test_the_command_gets_the_folder_and_no_rank_and_those_between_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "node0")
    said: list[str] = []
    command = (
        f'until [ -f {tmp_path}/go ]; do sleep 0.01; done; echo "$LLM_CHECKPOINT:$RANK$MASTER_ADDR" >> {tmp_path}/done'
    )
    after_save = AfterSave(command, said.append, said.append)
    first, second, third = checkpoints(tmp_path, 3)
    for folder in (first, second, third):
        after_save.start(folder)
    # The second would have to stay on the disk, as would all that follow if each takes longer than a save.
    assert after_save.names == {first.name, third.name}
    assert said == [f"after_save  {second.name} is left out: the command takes longer than a save"]
    assert not (tmp_path / "done").exists()
    (tmp_path / "go").touch()
    wait_until(lambda: not after_save.names)
    assert (tmp_path / "done").read_text() == f"{first}:\n{third}:\n"
    assert (len(said), after_save.failures) == (3, 0)


def test_a_failure_is_shown_with_the_end_of_its_output_and_the_next_one_runs(tmp_path: Path) -> None:
    said: list[str] = []
    failed: list[str] = []
    command = "case $LLM_CHECKPOINT in *1) echo access; echo denied >&2; exit 3;; esac"
    after_save = AfterSave(command, said.append, failed.append)
    first, second = checkpoints(tmp_path, 2)
    after_save.start(first)
    after_save.start(second)
    wait_until(lambda: not after_save.names)
    assert failed == [f"{first}: checkpoint.after_save ended with 3: access denied; the run goes on"]
    assert said == [*failed, f"after_save  {second.name} done in 0 s"]
    assert after_save.failures == 1


def test_who_waits_no_longer_ends_the_command_and_names_what_is_not_done(tmp_path: Path) -> None:
    said: list[str] = []
    after_save = AfterSave(f"sleep 300; touch {tmp_path}/done", said.append, said.append)
    first, second = checkpoints(tmp_path, 2)
    with after_save:
        after_save.start(first)
        after_save.start(second)
    after_save.leave()
    (line,) = said
    assert f"not done for {first} and {second}" in line
    wait_until(lambda: not any(thread.name == "after_save" for thread in threading.enumerate()))
    assert len(said) == 1


def test_a_folder_stays_while_the_command_reads_it_and_the_run_waits_for_the_last(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path
) -> None:
    run, go = tmp_path / "run", tmp_path / "go"
    config = write_config(
        checkpoint__every_steps=2,
        checkpoint__keep_last=1,
        checkpoint__keep_best=False,
        checkpoint__after_save=f'until [ -f {go} ]; do sleep 0.01; done; ls "$LLM_CHECKPOINT" >> {tmp_path}/seen',
    )
    found: list[list[str]] = []

    def look() -> None:
        status = run / "status.json"
        wait_until(lambda: status.exists() and json.loads(status.read_text())["status"] == "complete")
        wait_until(lambda: "step-00000006" not in [path.name for path in run.iterdir()])
        found.append(sorted(path.name for path in run.glob("step-*")))
        go.touch()

    looking = threading.Thread(target=look)
    looking.start()
    code, _, err = llm_here("train", "--config", config)
    looking.join()
    assert code == 0, err
    assert found == [["step-00000002", "step-00000008"]]
    assert (tmp_path / "seen").read_text().split().count("state.json") == 2
    assert [path.name for path in run.glob("step-*")] == ["step-00000008"]
    assert "waiting     for checkpoint.after_save of step-00000002, step-00000008" in err


def test_a_command_that_fails_never_ends_the_run(write_config: WriteConfig, llm_here: Llm, tmp_path: Path) -> None:
    code, _, err = llm_here("train", "--config", write_config(checkpoint__after_save="no_such_program --now"))
    assert code == 0
    assert "checkpoint.after_save ended with 127" in err
    assert "no_such_program" in (tmp_path / "run/log.txt").read_text()
    assert [line["after_save_failures"] for line in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in line]
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["status"] == "complete"


def test_the_run_waits_up_to_a_limit_and_then_names_what_is_not_done(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "LIMIT_MINUTES", 0.001)
    code, _, err = llm_here("train", "--config", write_config(checkpoint__after_save="sleep 300"))
    assert code == 0, err
    assert f"not done for {tmp_path}/run/step-00000008" in err
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "complete"


@pytest.mark.slow
def test_of_two_ranks_one_runs_the_command(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(checkpoint__after_save=f'basename "$LLM_CHECKPOINT" >> {tmp_path}/seen; sleep 2')
    deepspeed_module(2, "llm", "train", "--config", config)
    assert (tmp_path / "seen").read_text() == "step-00000008\n"
    assert len(read_losses(tmp_path / "run")) == 8
