"""Where a run's time goes, and which steps stand out."""

import gc
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llm.data.shards import Batch
from llm.metrics import OUTLIER_WINDOW, Outliers, read_metrics
from llm.training import meter
from llm.training.engine import Engine
from llm.training.meter import Meter
from llm.training.train import Run

Llm = Callable[..., tuple[int, str, str]]


class Clock:
    """Stands for the time module; moved by hand."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    hand = Clock()
    monkeypatch.setattr(meter, "time", hand)
    return hand


def step(taken: Meter, clock: Clock, wait: float) -> None:
    """1 s forward, 2 s backward of which half a second is communication, 0.25 s optimizer."""
    with taken.waiting():
        clock.now += wait
    with taken.phase("forward"):
        clock.now += 1
    with taken.phase("backward"):
        clock.now += 1
        with taken.phase("communication"):
            clock.now += 0.5
        clock.now += 0.5
    with taken.phase("optimizer"):
        clock.now += 0.25
    taken.count_step()


def test_a_step_is_split_and_what_comes_between_steps_is_outside_of_it(clock: Clock) -> None:
    taken = Meter(1000, torch.device("cpu"))
    clock.now += 7  # setting up
    taken.start()
    step(taken, clock, wait=0.5)
    with taken.outside("validation"), taken.phase("communication"):
        clock.now += 4
    step(taken, clock, wait=0.0)
    with taken.outside("save"):
        clock.now += 1
    assert taken.window() == pytest.approx(
        {
            "tokens_per_second": 2000 / 7,
            "tokens_per_second_run": 2000 / 12,
            "step_ms": 3500.0,
            "data_wait_ms": 250.0,
            "forward_ms": 1000.0,
            "backward_ms": 1500.0,
            "optimizer_ms": 250.0,
            "communication_ms": 500.0,
            "validation_ms": 2000.0,
            "save_ms": 500.0,
            "data_wait_ms_max": 500.0,
            "data_wait_ms_p99": 495.0,
        }
    )
    step(taken, clock, wait=0.25)
    again = taken.window()
    assert (again["step_ms"], again["data_wait_ms_max"], again["validation_ms"]) == (3500.0, 250.0, 0.0)
    assert again["data_wait_ms_p99"] > 490.0  # of all steps, not of the window
    assert again["tokens_per_second_run"] == pytest.approx(3000 / 15.5)


class Event:
    """Stands for torch.cuda.Event on a device that keeps up with the host's clock."""

    clock: Clock
    waits = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        assert stream == "computing"
        self.at = self.clock.now

    def synchronize(self) -> None:
        Event.waits += 1

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


def test_on_a_gpu_the_phases_lie_between_events_that_only_a_line_waits_for(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Event, "clock", clock, raising=False)
    monkeypatch.setattr(Event, "waits", 0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "computing")
    taken = Meter(1000, torch.device("cuda"))
    for _ in range(2):
        step(taken, clock, wait=0.5)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "another")
    with taken.phase("communication"):
        clock.now += 3
    assert Event.waits == 0
    line = taken.window()
    assert Event.waits > 0
    names = ("forward_ms", "backward_ms", "optimizer_ms", "communication_ms", "data_wait_ms")
    assert [line[name] for name in names] == [1000.0, 1500.0, 250.0, 500.0, 500.0]


def test_outliers_stand_far_above_what_came_before() -> None:
    chance = random.Random(0)
    norms = [5 / (1 + step / 50) + chance.gauss(0, 0.02) for step in range(400)]
    norms[10] = 500.0  # too early to tell
    norms[200] *= 4
    norms[300] = float("nan")
    norms[310] = 0.0  # below is not above
    found = Outliers()
    assert OUTLIER_WINDOW // 4 > 10
    assert [step for step, norm in enumerate(norms) if found.deviations(norm) is not None] == [200]


def test_of_a_level_metric_rounding_is_no_outlier() -> None:
    found = Outliers()
    assert [found.deviations(2.0 + 1e-6 * (step % 2)) for step in range(200)] == [None] * 200
    assert found.deviations(2.1) == pytest.approx(50, rel=0.01)


def test_a_run_splits_its_steps_and_names_an_outlier_between_the_logged_ones(
    write_config: Callable[..., Path], llm_here: Llm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original, count = Engine.update, iter(range(1, 1000))

    def spiking(self: Engine, lr: float) -> tuple[torch.Tensor, bool]:
        norm, applied = original(self, lr)
        return (norm * 100 if next(count) == 47 else norm), applied

    monkeypatch.setattr(Engine, "update", spiking)
    config = write_config(train__total_tokens=50 * 512, train__log_every_steps=10, checkpoint__every_steps=15)
    code, _, err = llm_here("train", "--config", config, "train.eval_every_steps=25")
    assert code == 0, err
    lines = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50]
    parts = ("data_wait_ms", "forward_ms", "backward_ms", "optimizer_ms", "communication_ms")
    for line in lines:
        assert all(line[part] >= 0 for part in parts)
        assert min(line["forward_ms"], line["backward_ms"], line["optimizer_ms"]) > 0
        assert 0.5 * line["step_ms"] < sum(line[part] for part in parts) <= line["step_ms"]
        assert 0 < line["tokens_per_second_run"] < 1.001 * line["tokens_per_second"] or line["step"] > 10
        assert 0 < line["matmul_fraction_causal"] < line["matmul_fraction"]
        assert line["mfu"] is None
        assert line["mfu_causal"] is None
    assert [line["step"] for line in lines if line["save_ms"] > 0] == [20, 40, 50]  # after 15, 30 and 45
    assert [line["step"] for line in lines if line["validation_ms"] > 0] == [10, 30]  # after 0 and 25
    (outlier,) = [entry for line in lines for entry in line.get("outliers", [])]
    assert (outlier["step"], outlier["tokens"], outlier["metric"]) == (47, 47 * 512, "grad_norm")
    assert outlier["value"] > 20
    assert "outliers" in lines[-1]
    assert "step     47  outlier: grad norm" in err


def test_what_set_up_made_is_spared_collections_inside_the_loop(
    write_config: Callable[..., Path], llm_here: Llm, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, frozen = Run.step, []

    def watched(self: Run, batches: Iterator[Batch]) -> Any:
        frozen.append(gc.get_freeze_count())
        return original(self, batches)

    monkeypatch.setattr(Run, "step", watched)
    code, _, err = llm_here("train", "--config", write_config(train__total_tokens=2 * 512))
    assert code == 0, err
    assert len(frozen) == 2
    assert min(frozen) > 10_000
    assert gc.get_freeze_count() == 0


class Reads(TorchDispatchMode):
    """Counts the tensors that the host reads, for each of which it waits for a GPU, by whose code reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.by_whom = {"llm": 0, "deepspeed": 0}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op == torch.ops.aten._local_scalar_dense.default:
            frame = sys._getframe()
            while (package := frame.f_globals.get("__name__", "").split(".")[0]) not in self.by_whom:
                assert frame.f_back is not None
                frame = frame.f_back
            self.by_whom[package] += 1
        return op(*args, **(kwargs or {}))


def watch_steps(monkeypatch: pytest.MonkeyPatch, mode: TorchDispatchMode) -> list[Run]:
    """Has every step run under the mode; returns whose steps ran."""
    original: Callable[..., Any] = Run.step
    runs: list[Run] = []

    def watched(self: Run, batches: Iterator[Batch]) -> Any:
        runs.append(self)
        with mode:
            return original(self, batches)

    monkeypatch.setattr(Run, "step", watched)
    return runs


@pytest.mark.parametrize(
    ("stage", "offload", "ours"), [(0, "none", 1), (1, "cpu", 0), (2, "cpu", 0), (2, "none", 1), (3, "none", 0)]
)
def test_a_step_waits_for_the_check_of_its_gradient_alone(
    write_config: Callable[..., Path],
    llm_here: Llm,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    offload: str,
    ours: int,
) -> None:
    """Which is ours at stage 0, as one process runs 1 and 2 too, and DeepSpeed's elsewhere."""
    reads = Reads()
    watch_steps(monkeypatch, reads)
    config = write_config(
        deepspeed__zero_stage=stage, deepspeed__offload=offload, train__total_tokens=3 * 512, train__micro_batch=4
    )
    code, _, err = llm_here("train", "--config", config)
    assert code == 0, err
    assert reads.by_whom["llm"] == 3 * ours
    assert (reads.by_whom["deepspeed"] > 0) == (not ours)


class Sizes(TorchDispatchMode):
    """How many numbers the tensors have that ops make."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self.seen |= {made.numel() for made in tree_iter(out) if isinstance(made, torch.Tensor)}
        return out


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16")])
def test_one_process_gathers_its_gradients_nowhere(
    write_config: Callable[..., Path], llm_here: Llm, monkeypatch: pytest.MonkeyPatch, stage: int, precision: str
) -> None:
    """DeepSpeed would copy them all to one tensor and back."""
    sizes = Sizes()
    runs = watch_steps(monkeypatch, sizes)
    config = write_config(deepspeed__zero_stage=stage, train__precision=precision, train__total_tokens=2 * 512)
    code, _, err = llm_here("train", "--config", config)
    assert code == 0, err
    assert sizes.seen
    assert sum(parameter.numel() for parameter in runs[0].engine.parameters.values()) not in sizes.seen
