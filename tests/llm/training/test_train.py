"""Runs as processes: killed and started again, stopped by the clock, refused where something does not fit."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from running import REPOSITORY, environment, read_losses, run_llm

from llm.data.tokenizer import load_tokenizer
from llm.errors import STOPPED
from llm.metrics import read_metrics
from llm.model.checkpoint import write_state
from llm.rendezvous import INTERFACES, leave_group

WriteConfig = Callable[..., Path]
Llm = Callable[..., tuple[int, str, str]]


def result(called: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = called
    assert code == 0, err
    parsed: dict[str, Any] = json.loads(out.splitlines()[-1])
    return parsed


def start(config: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "llm", "train", "--config", str(config), *overrides]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    file = run_dir / "metrics.jsonl"
    while process.poll() is None:
        if file.exists() and any(line["step"] >= step for line in read_metrics(file)):
            return
        time.sleep(0.002)
    pytest.fail("the run ended before it could be killed")


@pytest.mark.slow  # test_kills does it more often, to forks
def test_kill_9_and_start_again_changes_no_bit(write_config: WriteConfig, tmp_path: Path) -> None:
    settings = {"train__total_tokens": 40 * 512, "checkpoint__every_steps": 8, "train__eval_every_steps": 10}
    config = write_config(**settings)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_llm("train", "--config", config, f"checkpoint.dir={whole}")
    process = start(config, f"checkpoint.dir={killed}")
    wait_for_step(killed, 13, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((killed / "status.json").read_text())["status"] == "running"
    done = run_llm("train", "--config", config, f"checkpoint.dir={killed}")
    assert "resumed     at step" in done.stderr
    assert read_losses(killed) == read_losses(whole)
    assert len(read_losses(whole)) == 40
    kept = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss", "bits_per_byte")
    lines = [
        [{key: line[key] for key in kept if key in line} for line in read_metrics(run / "metrics.jsonl")]
        for run in (whole, killed)
    ]
    assert lines[0] == lines[1]
    for file in sorted((whole / "latest").glob("*.safetensors")):
        assert file.read_bytes() == (killed / "latest" / file.name).read_bytes(), file.name


def test_the_clock_stops_a_run_that_then_goes_on(write_config: WriteConfig, llm_here: Llm, tmp_path: Path) -> None:
    config = write_config(train__total_tokens=30 * 512)
    code, out, err = llm_here("train", "--config", config, "train.max_minutes=1e-9", "--json")
    assert code == STOPPED, err
    stopped = json.loads(out.splitlines()[-1])
    assert (stopped["step"], stopped["stopped"]) == (1, "train.max_minutes is over")
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "stopped"
    done = result(llm_here("train", "--config", config, "--json"))
    assert (done["step"], done["stopped"]) == (30, None)
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "complete"


def test_a_run_killed_between_its_last_checkpoint_and_its_end_only_ends(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path
) -> None:
    config = write_config()
    whole = result(llm_here("train", "--config", config, "--json"))
    status = tmp_path / "run/status.json"
    status.write_text('{"status": "running", "result": null, "message": null}\n')
    again = result(llm_here("train", "--config", config, "--json"))
    assert {**again, "tokens_per_second": 0} == {**whole, "tokens_per_second": 0}
    assert len(read_losses(tmp_path / "run")) == 8


def test_more_tokens_continue_a_complete_run(write_config: WriteConfig, llm_here: Llm, tmp_path: Path) -> None:
    config = write_config()
    result(llm_here("train", "--config", config, "--json"))
    done = result(llm_here("train", "--config", config, f"train.total_tokens={10 * 512}", "--json"))
    assert done["step"] == 10
    assert len(read_losses(tmp_path / "run")) == 10


def test_resume_never_and_resume_from_a_path(write_config: WriteConfig, llm_here: Llm, tmp_path: Path) -> None:
    config = write_config(checkpoint__every_steps=4)
    result(llm_here("train", "--config", config, "--json"))
    code, _, err = llm_here("train", "--config", config, "--resume", "never")
    assert code == 1
    assert "already holds a run" in err
    assert len(list(tmp_path.glob("run/step-*"))) == 2
    other = f"checkpoint.dir={tmp_path / 'other'}"
    result(llm_here("train", "--config", config, other, "--resume", str(tmp_path / "run/step-00000004"), "--json"))
    assert read_losses(tmp_path / "other") == read_losses(tmp_path / "run")[4:]
    code, _, err = llm_here("train", "--config", config, "--resume", tmp_path / "other/step-00000008")
    assert code == 1
    assert "already holds a run" in err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.d_ff=48", "d_ff: 64 -> 48"),
        ("train.seed=7", "seed: 1337 -> 7"),
        ("data.seq_len=32", "seq_len: 64 -> 32"),
    ],
)
def test_another_model_or_other_data_cannot_go_on(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, override: str, expected: str
) -> None:
    config = write_config(train__total_tokens=512)
    result(llm_here("train", "--config", config, "--json"))
    before = sorted(tmp_path.rglob("*"))
    code, _, err = llm_here("train", "--config", config, override, "train.total_tokens=1024")
    assert code == 1
    assert expected in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.vocab_size=999"], "model.vocab_size 999 does not match"),
        (["train.global_batch_tokens=500"], "the nearest is 512"),
        (["model.max_seq_len=32"], "above model.max_seq_len 32"),
        (["data.path=nowhere"], "nowhere"),
        (["model.max_seq_len=100000", "data.seq_len=100000", "train.global_batch_tokens=100000"], "100000"),
        (["train.init_from=nowhere"], "nowhere: no such checkpoint"),
        (["--resume", "nowhere"], "nowhere: no such checkpoint"),
        (["deepspeed.extra.gradient_accumulation_steps=2"], "is set by train.global_batch_tokens"),
        (["deepspeed.extra.zero_optimization.stage=2"], "is set by deepspeed.zero_stage"),
        (["deepspeed.extra.zero_optimization.nonsense=2"], "DeepSpeed refuses the config with deepspeed.extra"),
        (["train.device=cuda"], "cannot use an NVIDIA device"),
    ],
)
def test_what_does_not_fit_is_one_line_and_starts_nothing(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, overrides: list[str], expected: str
) -> None:
    if overrides == ["train.device=cuda"] and os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has an NVIDIA device")
    code, out, err = llm_here("train", "--config", write_config(), *overrides)
    assert code == 1
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert not list(tmp_path.glob("run/step-*"))


def test_a_lost_link_and_a_damaged_status_do_not_stop_a_resume(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path
) -> None:
    config = write_config()
    result(llm_here("train", "--config", config, "--json"))
    (tmp_path / "run/latest").unlink()
    (tmp_path / "run/status.json").write_text('{"status": "com')
    (tmp_path / "run/.step-00000099.tmp").mkdir()
    more = f"train.total_tokens={9 * 512}"
    assert result(llm_here("train", "--config", config, more, "--json"))["step"] == 9
    assert not (tmp_path / "run/.step-00000099.tmp").exists()


def test_a_refused_start_leaves_a_complete_run_complete(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path
) -> None:
    config = write_config(train__total_tokens=512)
    whole = result(llm_here("train", "--config", config, "--json"))
    assert llm_here("train", "--config", config, "train.seed=7")[0] == 1
    assert result(llm_here("train", "--config", config, "--json")) == whole


def test_a_run_begun_anew_keeps_no_line_of_the_one_before(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path
) -> None:
    config = write_config(train__total_tokens=512)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0, "val_loss": 1.0}\n')
    result(llm_here("train", "--config", config, "--json"))
    assert [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == [0, 1, 1]


def test_two_runs_do_not_share_a_folder_and_one_that_was_refused_can_begin_later(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    held = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    config = write_config(train__total_tokens=512)
    code, _, err = llm_here("train", "--config", config)
    os.close(held)
    assert code == 1
    assert "another run writes here" in err
    # As an evaluation in the same process, which knows nothing of DeepSpeed's groups.
    leave_group()
    result(llm_here("train", "--config", config, "--json"))


def test_weights_of_another_tokenizer_are_refused(
    write_config: WriteConfig, llm_here: Llm, small_corpus: Path, tmp_path: Path
) -> None:
    config = write_config(train__total_tokens=512)
    result(llm_here("train", "--config", config, "--json"))
    donor = Path(shutil.copytree(tmp_path / "run/latest", tmp_path / "donor"))
    arguments = ["--input", small_corpus, "--model_prefix", tmp_path / "other", "--vocab_size", 400]
    assert llm_here("train_tokenizer", *arguments)[0] == 0
    shutil.copyfile(tmp_path / "other.model", donor / "tokenizer.model")
    write_state(donor, {"tokenizer_sha256": load_tokenizer(donor).sha256})
    code, _, err = llm_here("train", "--config", config, f"checkpoint.dir={tmp_path / 'n'}", f"train.init_from={donor}")
    assert code == 1
    assert "another tokenizer" in err


def test_weights_of_another_model_are_refused_by_every_key_that_differs(
    write_config: WriteConfig, llm_here: Llm, random_checkpoint: Path
) -> None:
    """Also where the shapes are the same: other values would make other functions of the same weights."""
    changes = {
        "n_kv_heads": (1, 2),
        "rope_theta": (10000.0, 500.0),
        "norm_eps": (1e-06, 1e-05),
        "qk_norm": (False, True),
        "tie_embeddings": (False, True),
    }
    settings = {f"model__{key}": here for key, (_, here) in changes.items()} | {"model__max_seq_len": 128}
    config = write_config(**settings, train__init_from=str(random_checkpoint))
    code, _, err = llm_here("train", "--config", config)
    assert code == 1
    differences = [
        f"model.{key} {json.dumps(there)}, here {json.dumps(here)}" for key, (there, here) in changes.items()
    ]
    assert f"is of another model ({'; '.join(differences)}); set its values" in err.splitlines()[-1]


def test_another_optimizer_than_the_checkpoints_is_named(write_config: WriteConfig, llm_here: Llm) -> None:
    """And not a muon_lr that the user has not stated."""
    config = write_config(train__total_tokens=512, optimizer__kind="muon", optimizer__lr=None)
    result(llm_here("train", "--config", config, "--json"))
    code, _, err = llm_here("train", "--config", config, "optimizer.kind=adamw", "train.total_tokens=1024")
    assert code == 1
    assert "another optimizer (optimizer.kind: muon -> adamw)" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("value", "expected"), [("triton", "needs an NVIDIA device"), ("foo", "unknown backend 'foo'")]
)
def test_kernels_that_cannot_run_are_one_line(
    write_config: WriteConfig, llm_here: Llm, monkeypatch: pytest.MonkeyPatch, value: str, expected: str
) -> None:
    monkeypatch.setenv("LLM_KERNELS", value)
    code, _, err = llm_here("train", "--config", write_config())
    assert code == 1
    assert expected in err


def test_a_process_trains_again_and_listens_for_nobody_outside(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Others of this process may have left them.
    for name in INTERFACES:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    for number, stage in enumerate((1, 3)):
        config = write_config(train__total_tokens=512, deepspeed__zero_stage=stage)
        result(llm_here("train", "--config", config, f"checkpoint.dir={tmp_path / str(number)}", "--json"))
    listening = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    assert set(listening) <= {"127.0.0.1", "::1"}
    joined = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *INTERFACES)
    assert [os.environ.get(name) for name in joined] == [before.get(name) for name in joined]


def test_a_step_faster_than_the_matmul_rate_has_the_rate_measured_again(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([1.0, 1e15])  # the first is taken while another program has the processor
    monkeypatch.setattr("llm.device_rates.measure_matmul_flops", lambda *_: next(rates))
    code, _, err = llm_here("train", "--config", write_config())
    assert code == 0, err
    assert err.count("above 100 % of matmul: its rate was measured again") == 1
    fractions = [line["matmul_fraction"] for line in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert max(fractions) < 1


def test_run_json_names_the_commit_of_the_source(write_config: WriteConfig, llm_here: Llm, tmp_path: Path) -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    assert llm_here("train", "--config", write_config(train__total_tokens=512))[0] == 0
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
    assert json.loads((tmp_path / "run/run.json").read_text())["commit"].removesuffix("-dirty") == head


def test_the_last_checkpoint_of_a_run_is_resumed_in_another_folder(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path
) -> None:
    config = write_config(train__total_tokens=1024)
    first = result(llm_here("train", "--config", config, "--json"))
    other = tmp_path / "other"
    resume = ["--resume", first["checkpoint"], f"checkpoint.dir={other}"]
    again = result(llm_here("train", "--config", config, "--json", *resume))
    assert (again["step"], Path(again["checkpoint"]).parent) == (first["step"], other.resolve())
