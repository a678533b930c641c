"""A run that is asked to stop, or meets numbers that are not finite: what it saves, reports and leaves untouched."""

import contextlib
import json
import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from running import environment, read_losses
from safetensors.torch import load_file
from torch import Tensor

from llm import device_rates, interrupts, metrics
from llm.errors import STOPPED
from llm.metrics import read_metrics
from llm.model import checkpoint, checkpoint_path
from llm.model.checkpoint import write_state
from llm.model.transformer import LMHead
from llm.training import saving, stopping
from llm.training.engine import Engine, import_deepspeed
from llm.training.stopping import SIGNALS, StopRequest
from llm.world import World

WriteConfig = Callable[..., Path]
Llm = Callable[..., tuple[int, str, str]]

ALONE = World(0, 0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """The signals that come to what was there before a run."""
    numbers: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: numbers.append(number)) for number in SIGNALS}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_and_its_repeats_change_nothing(number: signal.Signals, tmp_path: Path, heard: list[int]) -> None:
    request = StopRequest(ALONE, tmp_path, None)
    with request.listening():
        assert request.agreed() == ""
        for _ in range(3):  # a launcher passes on what the whole process group was sent
            os.kill(os.getpid(), number)
            assert request.agreed() == number.name
        assert heard == []
    os.kill(os.getpid(), number)
    assert heard == [number]


def test_ctrl_c_again_after_a_while_does_what_it_did_before(
    tmp_path: Path, heard: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with StopRequest(ALONE, tmp_path, None).listening():
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(stopping, "IMPATIENT_SECONDS", 0.0)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert heard == []
        os.kill(os.getpid(), signal.SIGINT)
        assert heard == [signal.SIGINT]


def test_a_signal_that_comes_while_ranks_agree_is_not_lost(
    tmp_path: Path, heard: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def agree(self: World, value: int) -> int:
        if value == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return value

    monkeypatch.setattr(World, "agree", agree)
    request = StopRequest(ALONE, tmp_path, None)
    with request.listening():
        assert request.agreed() == ""
        assert request.agreed() == "SIGTERM"


def test_a_file_and_the_clock_ask_too(tmp_path: Path) -> None:
    assert StopRequest(ALONE, tmp_path, 1e-9).agreed() == "train.max_minutes is over"
    request = StopRequest(ALONE, tmp_path, 1e9)
    assert request.agreed() == ""
    (tmp_path / "stop").touch()
    assert request.agreed() == "the file stop asks for it"
    assert not (tmp_path / "stop").exists(), "it would stop the run that goes on from here"


@pytest.mark.parametrize("deletable", [True, False])
def test_a_file_from_before_the_start_stops_nothing_and_a_new_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deletable: bool
) -> None:
    if not deletable:
        monkeypatch.setattr(Path, "unlink", mock.Mock(side_effect=PermissionError))
    (tmp_path / "stop").touch()
    said: list[str] = []
    request = StopRequest(ALONE, tmp_path, None, said.append)
    assert request.agreed() == ""
    assert said == [f"{tmp_path}/stop: is from before this start and stops nothing"]
    os.utime(tmp_path / "stop", ns=(1, 1)) if not deletable else (tmp_path / "stop").touch()
    assert request.agreed() == "the file stop asks for it"


def test_a_folder_in_the_place_of_the_stop_file_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "stop").mkdir()
    request = StopRequest(ALONE, tmp_path, None, lambda line: None)
    assert request.agreed() == ""


def test_a_thread_answers_signals_and_ends_the_process_where_the_main_thread_does_not(
    tmp_path: Path, heard: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: queue.Queue[str] = queue.Queue()
    ended: queue.Queue[int] = queue.Queue()
    noted: list[str] = []
    monkeypatch.setattr(stopping, "IMPATIENT_SECONDS", 0.2)
    monkeypatch.setattr(interrupts, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(interrupts.os, "_exit", ended.put)
    with StopRequest(ALONE, tmp_path, None, said.put, lambda: noted.append("failed")).listening():
        signal.raise_signal(signal.SIGINT)
        assert said.get(timeout=10).startswith("SIGINT: the run finishes this step, saves and stops; Ctrl-C again")
        signal.raise_signal(signal.SIGINT)  # a launcher passes it on
        assert said.empty()
        time.sleep(0.3)
        signal.raise_signal(signal.SIGINT)
        assert said.get(timeout=10).startswith("SIGINT again: the run ends without a save")
        assert ended.get(timeout=10) == 130
        assert noted == ["failed"]


def status_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def signal_rank_1(launcher: psutil.Process, ranks: list[psutil.Process], run: Path) -> None:
    next(rank for rank in ranks if rank.environ()["RANK"] == "1").send_signal(signal.SIGUSR1)


def signal_the_group(launcher: psutil.Process, ranks: list[psutil.Process], run: Path) -> None:
    os.killpg(launcher.pid, signal.SIGTERM)


def signal_the_launchers_child(launcher: psutil.Process, ranks: list[psutil.Process], run: Path) -> None:
    ranks[0].parent().terminate()


def write_the_file(launcher: psutil.Process, ranks: list[psutil.Process], run: Path) -> None:
    (run / "stop").touch()


@pytest.mark.parametrize(
    ("launched_by", "ask", "reason"),
    [
        pytest.param("deepspeed", signal_the_group, "SIGTERM", marks=pytest.mark.slow),
        ("torchrun", signal_rank_1, "SIGUSR1"),
        pytest.param("deepspeed", signal_the_launchers_child, "SIGTERM", marks=pytest.mark.slow),
        pytest.param("torchrun", signal_the_group, "SIGTERM", marks=pytest.mark.slow),
        pytest.param("deepspeed", write_the_file, "the file stop asks for it", marks=pytest.mark.slow),
    ],
)
def test_whoever_is_asked_all_ranks_save_and_leave_and_the_run_can_go_on(
    write_config: WriteConfig,
    llm_here: Llm,
    tmp_path: Path,
    launched_by: str,
    ask: Callable[[psutil.Process, list[psutil.Process], Path], None],
    reason: str,
) -> None:
    config = write_config(train__total_tokens=40_000 * 512, train__eval_every_steps=100_000)
    run, port = tmp_path / "run", str(20_000 + os.getpid() % 20_000)
    options = {
        "deepspeed": ["--num_gpus", "2", "--master_port", port, "--module"],
        "torchrun": ["--nproc_per_node=2", f"--master_port={port}", "-m"],
    }[launched_by]
    executable = str(Path(sys.executable).parent / launched_by)
    command = [executable, *options, "llm", "train", "--config", str(config)]
    env = environment() | {"DS_ACCELERATOR": "cpu"}
    with open(tmp_path / "output", "w") as output:
        launcher = psutil.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
    ranks: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or not read_losses(run):
            assert launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ranks = [child for child in launcher.children(recursive=True) if "RANK" in child.environ()]
        assert len(ranks) == 2
        ask(launcher, ranks, run)
        assert not psutil.wait_procs(ranks, timeout=25)[1]
        code = launcher.wait(25)
        # torchrun passes no code on, and a launcher that gets SIGTERM itself has its own.
        assert code == STOPPED or (code != 0 and (reason == "SIGTERM" or launched_by == "torchrun"))
    finally:
        for process in (*ranks, launcher):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    stopped = status_of(run)
    assert (stopped["status"], stopped["message"]) == ("stopped", reason), (tmp_path / "output").read_text()
    step = stopped["result"]["step"]
    assert (run / "latest").resolve().name == f"step-{step:08d}"
    assert len(read_losses(run)) == step < 40_000

    end = f"train.total_tokens={(step + 3) * 512}"
    code, _, err = llm_here("train", "--config", config, end, "schedule.kind=wsd", "schedule.decay_tokens=0")
    assert code == 0, err
    assert len(read_losses(run)) == step + 3


def test_a_signal_twice_within_a_step_and_again_in_the_save_still_saves(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: list[int]
) -> None:
    forward, write_checkpoint, steps = LMHead.forward, saving.write_checkpoint, 0

    def terminate_twice(self: LMHead, *arguments: Any) -> Tensor:
        nonlocal steps
        steps += self.training
        if steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *arguments)

    def terminate_again(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write_checkpoint(*arguments)

    monkeypatch.setattr(LMHead, "forward", terminate_twice)
    monkeypatch.setattr(saving, "write_checkpoint", terminate_again)
    code, _, err = llm_here("train", "--config", write_config())
    assert code == STOPPED, err
    assert err.count("SIGTERM: the run finishes this step, saves and stops") == 1
    assert heard == []
    stopped = status_of(tmp_path / "run")
    assert (stopped["status"], stopped["message"], stopped["result"]["step"]) == ("stopped", "SIGTERM", 3)
    assert (tmp_path / "run/latest").readlink() == Path("step-00000003")
    assert len(read_losses(tmp_path / "run")) == 3


def test_a_signal_cuts_a_validation_short(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_sums, batches = metrics.score_sums, 0

    def scored(*arguments: Any) -> Tensor:
        nonlocal batches
        batches += 1
        if batches == at_start + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return score_sums(*arguments)

    def noted_backward(self: Engine, *arguments: Any) -> Tensor:
        training.append(self.module.training)
        return backward(self, *arguments)

    backward, training = Engine.backward, []
    monkeypatch.setattr(Engine, "backward", noted_backward)
    monkeypatch.setattr(metrics, "score_sums", scored)
    config = write_config(train__eval_every_steps=3, train__micro_batch=1)  # 1,024 tokens are 16 batches
    at_start = 16
    code, _, err = llm_here("train", "--config", config)
    assert code == STOPPED, err
    assert batches == at_start + 1
    stopped = status_of(tmp_path / "run")
    assert (stopped["status"], stopped["message"], stopped["result"]["step"]) == ("stopped", "SIGTERM", 3)
    code, _, err = llm_here("train", "--config", config)
    assert code == 0, err
    assert set(training) == {True}, "the step after a validation trains as any other"
    validated = [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl") if "val_loss" in line]
    assert validated == [0, 3, 6, 8], "what was cut short comes first when the run goes on"


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.inf


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """poison(loss_at, gradient_at): the training steps (from 1) whose loss or gradient is not finite."""
    true_forward = LMHead.forward

    def start(*, loss_at: int = 0, gradient_at: int = 0) -> None:
        steps = 0

        def forward(
            self: LMHead, hidden: Tensor, labels: Tensor | None = None, reduction: str = "sum", z_loss: float = 0.0
        ) -> Tensor:
            nonlocal steps
            loss = true_forward(self, hidden, labels, reduction, z_loss)
            if reduction != "sum":
                return loss
            steps += 1
            if steps == gradient_at:
                return _BadGradient.apply(loss)
            return loss * torch.nan if steps == loss_at else loss

        monkeypatch.setattr(LMHead, "forward", forward)

    return start


@pytest.mark.parametrize(("stage", "offload"), [(0, "none"), (1, "cpu"), (2, "cpu"), (3, "none")])
def test_a_step_that_is_not_finite_changes_nothing(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, poison: Callable[..., None], stage: int, offload: str
) -> None:
    config = write_config(deepspeed__zero_stage=stage, deepspeed__offload=offload, schedule__kind="wsd")

    def train(name: str, *overrides: str) -> tuple[int, str, Path]:
        run = tmp_path / name
        code, _, err = llm_here("train", "--config", config, f"checkpoint.dir={run}", *overrides)
        return code, err, run

    poison()
    code, err, clean = train("clean", "checkpoint.every_steps=4")
    assert code == 0, err

    for what in ("loss_at", "gradient_at"):
        poison(**{what: 5})
        code, err, stopped = train(what)
        assert code == 1
        assert "step 5: the loss or its gradient is not finite (positions 32 to 39)" in err
        assert status_of(stopped)["status"] == "failed"
        files = sorted((clean / "step-00000004").glob("*.safetensors"))
        assert len(files) == 4
        for file in files:  # what was learned before is saved, bit for bit
            assert file.read_bytes() == (stopped / "latest" / file.name).read_bytes(), file.name

    poison(loss_at=3, gradient_at=5)
    code, err, skipped = train("skipped", "train.on_nonfinite=skip")
    assert code == 0, err
    assert "left out, 2 of at most 10" in err
    last = read_lines(skipped)[-1]
    assert (last["step"], last["skipped_steps"]) == (8, 2)
    counts = load_file(skipped / "latest/optimizer-step.safetensors")
    assert {float(count) for count in counts.values()} == {6.0}
    weights = load_file(skipped / "latest/model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_step_left_out_leaves_the_micro_batches_of_the_next_together(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, poison: Callable[..., None]
) -> None:
    config = write_config(deepspeed__zero_stage=0, schedule__kind="wsd", train__on_nonfinite="skip")
    for sequences, micro_batch in ((8, 3), (2, 9)):  # the third step begins with this micro-batch
        poison(gradient_at=micro_batch)
        run = f"checkpoint.dir={tmp_path / str(sequences)}"
        code, _, err = llm_here("train", "--config", config, f"train.micro_batch={sequences}", run)
        assert code == 0, err
        assert "step 3: the loss or its gradient is not finite" in err
    assert read_losses(tmp_path / "2") == pytest.approx(read_losses(tmp_path / "8"), rel=0, abs=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_the_save_of_a_run_that_goes_wrong_deletes_no_checkpoint(
    write_config: WriteConfig,
    llm_here: Llm,
    tmp_path: Path,
    poison: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    full: bool,
) -> None:
    """The step before may be where it went wrong: the last checkpoint from before that is kept, too."""
    run, true_write, true_rename = tmp_path / "run", saving.write_checkpoint, os.rename
    deleted: list[tuple[str, str]] = []

    def write(path: Path, *arguments: Any) -> None:
        if full and path.name == "step-00000005":
            raise OSError(28, "No space left on device")
        true_write(path, *arguments)

    def rename(source: Path, target: Path) -> None:
        if str(target).endswith(".deleted"):
            assert checkpoint.read_state(run / "latest")[0].step > int(source.name[-8:])
            deleted.append((source.name, (run / "latest").readlink().name))
        true_rename(source, target)

    monkeypatch.setattr(saving, "write_checkpoint", write)
    monkeypatch.setattr(os, "rename", rename)
    poison(gradient_at=6)
    config = write_config(checkpoint__every_steps=2, checkpoint__keep_last=1)
    code, _, err = llm_here("train", "--config", config)
    assert code == 1
    assert deleted == [("step-00000002", "step-00000004")]
    assert "step 6: the loss or its gradient is not finite (positions 40 to 47); " in err
    assert ("step-00000005: the checkpoint could not be written" if full else "step 5 is saved") in err
    assert [path.name for path in checkpoint_path.saved(run)] == ["step-00000004", "step-00000005"][: 1 if full else 2]
    assert (run / "latest").resolve() == checkpoint_path.saved(run)[-1].resolve()

    poison()
    code, _, err = llm_here("train", "--config", config)
    assert code == 0, err
    assert [path.name for path in checkpoint_path.saved(run)] == ["step-00000008"]
    newest = [older for older, newer in deleted[1:]]
    assert newest == (
        ["step-00000004", "step-00000006"] if full else ["step-00000004", "step-00000005", "step-00000006"]
    )


def test_a_checkpoint_that_is_there_is_not_written_again(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, poison: Callable[..., None]
) -> None:
    """It would be gone for the moment in which another takes its place."""
    run, config = tmp_path / "run", write_config(checkpoint__every_steps=4)
    poison(gradient_at=5)
    assert llm_here("train", "--config", config)[0] == 1
    before = (run / "step-00000004").stat().st_ino
    poison(gradient_at=1)
    code, _, err = llm_here("train", "--config", config)
    assert (code, "step 5: the loss or its gradient is not finite" in err) == (1, True), err
    assert (run / "step-00000004").stat().st_ino == before


def read_lines(run: Path) -> list[dict[str, Any]]:
    from llm.metrics import read_metrics

    return [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def test_steps_left_out_are_capped_also_across_a_resume(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, poison: Callable[..., None]
) -> None:
    config = write_config(train__on_nonfinite="skip", train__max_skips=1, checkpoint__every_steps=3)
    poison(loss_at=2, gradient_at=5)
    code, _, err = llm_here("train", "--config", config)
    assert code == 1
    assert "step 5" in err
    assert "as 1 steps before it were" in err
    poison(gradient_at=1)
    code, _, err = llm_here("train", "--config", config)
    assert code == 1
    assert "resumed     at step 4" in err
    assert "step 5" in err


def test_an_overflow_lowers_the_loss_scale_and_ends_no_run(
    write_config: WriteConfig,
    llm_here: Llm,
    tmp_path: Path,
    poison: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss scaling tries scales that are too high; a loss that is not finite, or a scale of 1, is another matter."""
    monkeypatch.setattr(device_rates, "measure_matmul_flops", lambda *arguments: 1e9)  # slow in fp16 on most processors
    accelerator = import_deepspeed(torch.device("cpu")).get_accelerator()
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: False)
    config = write_config(train__precision="fp16", schedule__kind="wsd", checkpoint__every_steps=4)
    assert "has no fp16; use bf16 or fp32" in llm_here("train", "--config", config)[2]
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: True)

    poison(gradient_at=3)
    code, _, err = llm_here("train", "--config", config)
    assert code == 0, err
    assert "step 3: the gradient overflows at loss scale 65536; left out, the next one's is 32768" in err
    last = read_lines(tmp_path / "run")[-1]
    assert (last["skipped_steps"], last["overflow_steps"], last["loss_scale"]) == (0, 1, 32768)
    counts = load_file(tmp_path / "run/latest/optimizer-step.safetensors")
    assert {float(count) for count in counts.values()} == {7.0}

    source = tmp_path / "run/step-00000004"
    arguments = ["train", "--config", config, "--resume", source]
    poison()
    code, _, err = llm_here(*arguments, f"checkpoint.dir={tmp_path / 'resumed'}")
    assert code == 0, err
    state = json.loads((source / "state.json").read_text())
    for name in ("model", "optimizer-exp_avg"):
        file = f"step-00000008/{name}.safetensors"
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()
    assert read_lines(tmp_path / "resumed")[-1]["loss_scale"] == 32768

    poison(loss_at=2)
    code, _, err = llm_here(*arguments, f"checkpoint.dir={tmp_path / 'bad-loss'}")
    assert (code, "step 6: the loss or its gradient is not finite" in err) == (1, True)

    state["loss_scaler"]["cur_scale"] = 1.0
    write_state(source, {"loss_scaler": state["loss_scaler"]})
    poison(gradient_at=1)
    code, _, err = llm_here(*arguments, f"checkpoint.dir={tmp_path / 'bad-gradient'}")
    assert (code, "step 5: the loss or its gradient is not finite" in err) == (1, True)
