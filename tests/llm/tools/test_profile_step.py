"""`llm profile`: its figures add up, on real sequences and on random ones, and it leaves no run behind."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

import kernels
from kernels import work
from kernels.work import Work
from llm.config_file import parse_config
from llm.model.transformer import parameter_count
from llm.tools import step_trace
from llm.tools.roofline import adamw_work

Llm = Callable[..., tuple[int, str, str]]
WriteConfig = Callable[..., Path]


def profiled(llm_here: Llm, config: Path, out_dir: Path, *overrides: str) -> tuple[dict[str, Any], str]:
    options = ["--steps", 2, "--out_dir", out_dir, "--json"]
    code, out, err = llm_here("profile", "--config", config, *overrides, *options)
    assert code == 0, err
    return json.loads(out), err


def test_a_profile_says_where_a_step_goes(write_config: WriteConfig, llm_here: Llm, tmp_path: Path) -> None:
    config = write_config(model__qk_norm=True, train__micro_batch=4)
    result, shown = profiled(llm_here, config, tmp_path / "out")
    assert not (tmp_path / "run").exists()
    assert json.loads((tmp_path / "out/profile.json").read_text()) == result
    with gzip.open(result["trace"], "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"llm.forward", "llm.backward", "llm.optimizer", "llm.attention", "[memory]"} <= names
    assert Path(result["memory_png"]).read_bytes().startswith(b"\x89PNG")

    split = ("data_wait_ms", "forward_ms", "backward_ms", "optimizer_ms", "communication_ms")
    assert 0.5 * result["step_ms"] < sum(result[key] for key in split) <= result["step_ms"]
    shares = {(share["phase"], share["kind"]): share for share in result["work"]}
    kinds = {"matmul", "attention", "norm", "norm_rope", "swiglu", "cross-entropy"}
    assert {(phase, kind) for phase in ("forward", "backward") for kind in kinds} <= shares.keys()
    assert 0.3 * result["profiled_step_ms"] < sum(share["ms"] for share in shares.values())
    assert sum(share["ms"] for share in shares.values()) + result["idle_ms"] == pytest.approx(
        result["profiled_step_ms"], rel=0.02
    )
    assert shares["backward", "attention"]["least_ms"] > shares["forward", "attention"]["least_ms"] > 0
    shapes = [(32, 32 + 2 * 16), (32, 32), (32, 128), (64, 32)]  # in 2 layers and 2 micro-batches of 256 tokens
    products = sum((work.linear(4, 256, *shape)[0] for shape in shapes), Work()) * 4
    least = products.seconds(result["copy_bytes_per_second"], result["matmul_flops"])
    assert shares["forward", "matmul"]["least_ms"] == pytest.approx(1e3 * least)
    assert shares["backward", "cross-entropy"]["least_ms"] is None  # the loss computes its gradients with itself
    assert all(share["ms"] > 0 for share in shares.values())

    assert all(gap["saves_ms"] == gap["ms"] - (gap["least_ms"] or 0) for gap in result["gaps"])
    all_gaps = [share["ms"] - (share["least_ms"] or 0) for share in shares.values()] + [result["idle_ms"]]
    assert [gap["saves_ms"] for gap in result["gaps"]] == sorted(all_gaps, reverse=True)[:3]
    assert {operator["phase"] for operator in result["operators"]} >= {"forward", "backward", "optimizer"}
    assert result["our_kernels"] is None
    assert "closing it would save" in shown
    assert "launch gaps say nothing of a CPU" in shown


def test_random_tokens_stand_for_data_that_is_not_there(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path
) -> None:
    overrides = [f"data.path={tmp_path / 'none'}", "model.vocab_size=300", "model.max_seq_len=32"]
    result, shown = profiled(llm_here, write_config(), tmp_path / "out", *overrides, "train.precision=bf16")
    assert "random tokens, a vocabulary of 300" in result["data"]
    assert "none does not exist" in shown
    assert llm_here("profile", "--config", write_config(), "--steps", 0)[2] == "error: --steps 0: must be at least 1\n"


def test_the_backward_of_an_op_is_counted_as_that_op() -> None:
    """Of two chains of the same operators the one inside an op is the op's, the other is not."""
    x = torch.randn(64, 64, requires_grad=True)
    cos, sin = kernels.rope_cos_sin(0, 64, 16, 1e4)
    with step_trace.marked_ops(), torch.profiler.profile(acc_events=True) as profiler:
        with step_trace.marked_phase("forward"):
            q = kernels.rope(x.view(1, 64, 4, 16), x.view(1, 64, 4, 16), cos, sin, backend="torch")[0]
            y = (q.reshape(64, 64) @ x).cos().sum()
        with step_trace.marked_phase("backward"):
            y.backward()
        x.detach().cos()  # in no phase
    kinds, names = step_trace.Attribution(profiler.events(), on_device=False).milliseconds()
    assert {("forward", "rope"), ("backward", "rope"), ("forward", "matmul"), ("backward", "matmul")} <= kinds.keys()
    assert names["forward", "aten::cos"][1] == 1
    assert kinds["backward", "other"] > 0


def event(name: str, begin: float, end: float, *, on: Any = DeviceType.CPU, **more: Any) -> Any:
    """Of a profiler, in microseconds."""
    fixed = {"sequence_nr": -1, "cpu_parent": None, "self_device_time_total": 0.0}
    return SimpleNamespace(name=name, device_type=on, time_range=SimpleNamespace(start=begin, end=end), **fixed | more)


def test_a_device_is_busy_while_any_kernel_runs() -> None:
    spans = [("a", 5_000, 7_000), ("b", 6_000, 9_000), ("c", 6_500, 8_000), ("d", 12_000, 13_000)]
    kernels_run = [event(name, begin, end, on=DeviceType.CUDA) for name, begin, end in spans]
    around = event("llm.forward", 0, 20_000, on=DeviceType.CUDA)  # a mark's span on the device
    assert step_trace.device_busy([around, event("aten::mm", 0, 30_000), *reversed(kernels_run)]) == (5.0, 8.0)
    assert step_trace.device_busy([event("aten::mm", 0, 30_000)]) == (0.0, 0.0)


def test_our_kernels_are_those_that_our_ops_launched() -> None:
    forward = event("llm.forward", 0, 100)
    op = event("llm::swiglu_forward", 1, 9, cpu_parent=forward, self_device_time_total=2_000.0)
    launch = event("cuLaunchKernel", 2, 3, cpu_parent=op, self_device_time_total=500.0)
    node = event("_SwiGLUBackward", 20, 40, cpu_parent=forward, sequence_nr=7, self_device_time_total=100.0)
    back = event("llm::swiglu_backward", 21, 39, cpu_parent=node, self_device_time_total=3_000.0)
    product = event("aten::mm", 50, 60, cpu_parent=forward, self_device_time_total=9_000.0)
    kernel = event("_swiglu_kernel", 10, 20, on=DeviceType.CUDA, self_device_time_total=2_000.0)  # counted by its op
    events = [forward, op, launch, node, back, product, kernel]
    assert step_trace.Attribution(events, on_device=True).our_kernels() == 5.5


def test_the_least_work_of_a_linear_layer() -> None:
    forward, backward = work.linear(2, 8, 4, 16)
    assert forward == Work(2 * (8 * 4 + 4 * 16 + 8 * 16), 2 * 8 * 4 * 16)
    assert backward == forward * 2
    assert Work(100, 50).seconds(10, 10) == 10
    assert Work(50, 100).seconds(10, 1) == 100


@pytest.mark.parametrize(
    ("stage", "processes", "dtype", "share", "copy"),
    [
        (1, 1, torch.bfloat16, 1, 0),  # one process has nothing to share: stage 0, whose fp32 weights compute
        (0, 4, torch.bfloat16, 1, 0),
        (1, 4, torch.bfloat16, 4, 2),
        (1, 4, torch.float32, 4, 0),
        (3, 1, torch.bfloat16, 1, 2),
    ],
)
def test_the_least_work_of_an_update_is_that_of_the_stage_that_runs(
    stage: int, processes: int, dtype: torch.dtype, share: int, copy: int
) -> None:
    shape = {"n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96, "vocab_size": 300}
    train = {"total_tokens": 1, "global_batch_tokens": 1}
    config = parse_config({"model": shape, "train": train, "deepspeed": {"zero_stage": stage}}, "test")
    assert adamw_work(config, processes, dtype) == Work(parameter_count(config.model) / share * (40 + copy))
