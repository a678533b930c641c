"""What only a GPU can show: the ops against their twins in bf16, and training, killed and resumed, on the device."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from running import read_losses, small_config

import kernels
from kernels import parity, reference

pytestmark = pytest.mark.gpu

Llm = Callable[..., tuple[int, str, str]]


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_ops_agree_with_their_twins(dtype: torch.dtype) -> None:
    rows, width, vocab = 384, 256, 1000
    doc_start = torch.tensor([[0] * 100 + [100] * 156, [0] * 255 + [255]], dtype=torch.int32, device="cuda")
    target = torch.arange(rows, device="cuda") * 7 % vocab
    target[::5] = -100
    cases = {
        "attention": (
            partial(kernels.attention, doc_start=doc_start),
            partial(reference.attention, doc_start=doc_start),
            [normal(2, 256, heads, 64, dtype=dtype) for heads in (6, 2, 2)],
            {},
        ),
        "rms_norm": (
            kernels.rms_norm,
            reference.rms_norm,
            [normal(rows, width, dtype=dtype), normal(width, dtype=dtype)],
            {"gradient 1": rows},
        ),
        "swiglu": (kernels.swiglu, reference.swiglu, [normal(rows, 2 * width, dtype=dtype)], {}),
        "linear_cross_entropy": (
            lambda x, weight: kernels.linear_cross_entropy(x, weight, target, reduction="sum"),
            lambda x, weight, **upcast: reference.linear_cross_entropy(x, weight, target, reduction="sum", **upcast),
            [normal(rows, width, dtype=dtype) / width**0.5, normal(vocab, width, dtype=dtype)],
            {"output 0": rows, "gradient 1": rows},
        ),
    }
    failed = [
        (op, result)
        for op, (function, twin, inputs, summed) in cases.items()
        for result in parity.check(function, twin, inputs, rows=summed)
        if not result.agrees
    ]
    assert not failed


def test_stages_agree_and_a_resume_changes_no_bit(llm_here: Llm, small_shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")

    def train(name: str, *overrides: str, tokens: int = 20 * 512) -> list[float]:
        tree = small_config(small_shards, tmp_path / name, train__device="cuda", checkpoint__every_steps=8)
        (tmp_path / "config.json").write_text(json.dumps(tree))
        arguments = [f"train.total_tokens={tokens}", *overrides]
        code, _, err = llm_here("train", "--config", tmp_path / "config.json", *arguments)
        assert code == 0, err
        return read_losses(tmp_path / name)

    expected = train("fp32-1")
    for stage in (0, 2, 3):
        losses = train(f"fp32-{stage}", f"deepspeed.zero_stage={stage}")
        assert losses == pytest.approx(expected, rel=0, abs=1e-5)
    for stage in (1, 2, 3):
        settings = ["train.precision=bf16", f"deepspeed.zero_stage={stage}"]
        whole = train(f"bf16-{stage}", *settings)
        assert whole == pytest.approx(expected, rel=0, abs=0.05)
        # The schedule looks ahead to the horizon, so the stop is by the clock, after the first step.
        train(f"stopped-{stage}", *settings, "train.max_minutes=1e-9")
        assert train(f"stopped-{stage}", *settings) == whole
        host = [*settings, "deepspeed.offload=cpu"]
        offloaded = train(f"offloaded-{stage}", *host)
        assert offloaded == pytest.approx(whole, rel=0, abs=1e-3)
        for name, first, then in (("to", settings, host), ("from", host, settings)):  # the host
            train(f"{name}-{stage}", *first, "train.max_minutes=1e-9")
            assert train(f"{name}-{stage}", *then) == pytest.approx(whole, rel=0, abs=1e-3)
    for kind, precision in (("adamw", "bf16"), ("muon", "fp32"), ("muon", "bf16")):
        settings = [f"train.precision={precision}", f"optimizer.kind={kind}", "deepspeed.zero_stage=0"]
        whole = train(f"{kind}-{precision}-0", *settings)
        assert whole[-1] < whole[0] - 0.3
        train(f"stopped-{kind}-{precision}-0", *settings, "train.max_minutes=1e-9")
        assert train(f"stopped-{kind}-{precision}-0", *settings) == whole
    for stage in (1, 2, 3):
        losses = train(f"fp16-{stage}", "train.precision=fp16", f"deepspeed.zero_stage={stage}")
        assert losses == pytest.approx(expected, rel=0, abs=0.05)
