"""`llm.train`: runs from a config, several in one process, each as in a process of its own; and the caller's on_log."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from running import environment, numbers_of, small_config

import llm
from llm.model.transformer import Transformer

WriteConfig = Callable[..., Path]

KINDS: dict[str, dict[str, Any]] = {
    "a": {"train__seed": 3},
    "b": {"optimizer__kind": "muon", "train__z_loss": 1e-4},
    "c": {"deepspeed__zero_stage": 3, "train__micro_batch": 2},
}


def config(shards: Path, run_dir: Path | str, **changes: Any) -> llm.Config:
    return llm.load_config(small_config(shards, Path(run_dir), **changes))


LIBRARIES = {"DS_SKIP_CUDA_CHECK", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR"}
"""Variables that stay set for DeepSpeed, and by it and torch when they are imported."""


def surroundings() -> tuple[object, ...]:
    """What a run shares with its process."""
    variables = {name: value for name, value in os.environ.items() if name not in LIBRARIES}
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    threads = {thread.name for thread in threading.enumerate()}
    return variables, handlers, threads, dist.is_initialized(), gc.get_freeze_count(), sys.stdout, sys.stderr


def contents(run: Path) -> dict[str, bytes]:
    """The files of a run's checkpoints."""
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.glob("step-*/*"))}


@pytest.mark.slow  # three processes, and three runs in this one
def test_runs_after_each_other_are_those_of_processes_of_their_own(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their paths are relative, because the config in a checkpoint has them."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    processes = []
    for folder in (together, alone):
        folder.mkdir()
    for kind, changes in KINDS.items():
        file = alone / f"{kind}.json"
        file.write_text(json.dumps(small_config(small_shards, Path(kind), checkpoint__every_steps=4, **changes)))
        command = [sys.executable, "-m", "llm", "train", "--config", file.name]
        processes.append(subprocess.Popen(command, cwd=alone, env=environment(), stderr=subprocess.PIPE))
    monkeypatch.chdir(together)
    before = surroundings()
    for kind, changes in KINDS.items():
        result = llm.train(config(small_shards, kind, checkpoint__every_steps=4, **changes), quiet=True)
        assert (result["step"], result["stopped"]) == (8, None)
        assert surroundings() == before
    for process in processes:
        _, err = process.communicate()
        assert process.returncode == 0, err
    for kind in KINDS:
        assert numbers_of(together / kind) == numbers_of(alone / kind)
        found = contents(together / kind)
        assert found == contents(alone / kind)
        assert {name.partition("/")[0] for name in found} == {"step-00000004", "step-00000008"}


def models() -> int:
    """The models that are in memory."""
    found = (thing for thing in gc.get_objects() if isinstance(thing, Transformer))
    return sum(not model.embed_tokens.weight.is_meta for model in found)


def test_a_run_after_others_is_as_the_first_and_nothing_of_it_stays(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()
    before, models_before = surroundings(), models()
    for folder, kind in (("first", "a"), ("first", "b"), ("second", "a")):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        llm.train(config(small_shards, kind, **KINDS[kind]), quiet=True)
        assert surroundings() == before
        assert models() == models_before
    assert numbers_of(tmp_path / "first/a") == numbers_of(tmp_path / "second/a")
    assert contents(tmp_path / "first/a") == contents(tmp_path / "second/a")

    # Nor of a run that fails, while the traceback is there.
    (tmp_path / "second/a/latest/optimizer-exp_avg.safetensors").write_bytes(b"")
    with pytest.raises(llm.UserError, match="optimizer-exp_avg"):
        llm.train(config(small_shards, "a", train__total_tokens=8192, **KINDS["a"]), quiet=True)
    assert surroundings() == before
    assert models() == models_before


def test_on_log_gets_each_record_of_the_metrics_and_a_run_goes_on(
    small_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = config(small_shards, tmp_path / "run", train__log_every_steps=2, train__eval_every_steps=3)
    records: list[dict[str, Any]] = []
    result = llm.train(made, on_log=records.append, quiet=True)
    assert records == llm.read_metrics(tmp_path / "run")
    assert [record["step"] for record in records if "val_loss" in record] == [0, 3, 6, 8]
    assert [record["step"] for record in records if "loss" in record] == [2, 4, 6, 8]
    assert result["train_loss"] == records[-2]["loss"]
    longer = llm.load_config(made.model_dump(), ["train.total_tokens=6144"])
    more: list[dict[str, Any]] = []
    assert llm.train(longer, on_log=more.append, quiet=True)["step"] == 12
    assert records + more == llm.read_metrics(tmp_path / "run")
    frame = llm.read_frame(tmp_path / "run")
    assert frame["step"].tolist() == [record["step"] for record in records + more]
    assert frame["loss"].dropna().tolist() == [record["loss"] for record in records + more if "loss" in record]
    assert capfd.readouterr().err == ""
    assert "validation: loss" in (tmp_path / "run/log.txt").read_text()


def failing_at(step: int, key: str) -> Callable[[dict[str, Any]], None]:
    def on_log(record: dict[str, Any]) -> None:
        if record["step"] == step and key in record:
            raise ZeroDivisionError("of the caller")

    return on_log


@pytest.fixture(scope="module")
def whole(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has disturbed."""
    run: Path = tmp_path_factory.mktemp("whole") / "run"
    llm.train(config(small_shards, run, train__eval_every_steps=4), quiet=True)
    return run


@pytest.mark.parametrize(
    ("step", "key", "status"),
    [
        (3, "loss", "stopped"),
        pytest.param(4, "val_loss", "stopped", marks=pytest.mark.slow),
        (8, "val_loss", "complete"),
    ],
)
def test_an_error_of_on_log_ends_the_run_with_a_checkpoint_and_the_next_run_goes_on(
    small_shards: Path, tmp_path: Path, whole: Path, step: int, key: str, status: str
) -> None:
    made = config(small_shards, tmp_path / "run", train__eval_every_steps=4)
    with pytest.raises(ZeroDivisionError, match="of the caller") as raised:
        llm.train(made, on_log=failing_at(step, key), quiet=True)
    assert f"the run in {tmp_path / 'run'} is saved at its last step" in raised.value.__notes__[0]
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == status
    assert (tmp_path / "run/latest").resolve().name == f"step-{step:08d}"
    assert llm.train(made, quiet=True)["step"] == 8
    assert numbers_of(tmp_path / "run") == numbers_of(whole)
    last = "step-00000008/model.safetensors"
    assert contents(tmp_path / "run")[last] == contents(whole)[last]


def test_a_run_in_another_thread_is_the_same(small_shards: Path, tmp_path: Path, whole: Path) -> None:
    made = config(small_shards, tmp_path / "run", train__eval_every_steps=4)
    thread = threading.Thread(target=llm.train, args=(made,), kwargs={"quiet": True})
    thread.start()
    thread.join()
    assert numbers_of(tmp_path / "run") == numbers_of(whole)


def test_what_cannot_train_is_a_user_error_and_the_next_run_works(small_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(llm.UserError, match="train takes a Config, not a str"):
        llm.train("configs/tiny.json")  # type: ignore[arg-type]
    with pytest.raises(llm.UserError, match="nowhere"):
        llm.train(config(tmp_path / "nowhere", tmp_path / "run"), quiet=True)
    with pytest.raises(llm.UserError, match="no such checkpoint"):
        llm.train(config(small_shards, tmp_path / "run"), resume=str(tmp_path / "nowhere"), quiet=True)
    tree = small_config(small_shards, tmp_path / "run")
    with pytest.raises(llm.UserError, match=r"the config: unknown key model\.n_layer"):
        llm.load_config({**tree, "model": {**tree["model"], "n_layer": 2}})
    with pytest.raises(llm.UserError, match="overrides is a list"):
        llm.load_config(tree, "train.seed=1")
    assert llm.train(llm.load_config(tree, ["train.total_tokens=512"]), quiet=True)["step"] == 1
    assert tree == small_config(small_shards, tmp_path / "run")


ON_TWO_RANKS = """
import sys, llm
def on_log(record):
    if record["step"] == 3:
        raise ZeroDivisionError("of the caller")
llm.train(llm.load_config(sys.argv[1]), on_log=on_log)
"""


@pytest.mark.slow  # two processes
def test_an_error_of_on_log_ends_all_ranks_with_a_checkpoint(write_config: WriteConfig, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(ON_TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, tmp_path / "program.py", write_config()], env=environment(), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "ZeroDivisionError: of the caller" in done.stderr
    assert json.loads((tmp_path / "run/status.json").read_text())["message"] == "on_log has raised an error"
    assert (tmp_path / "run/latest").resolve().name == "step-00000003"
