"""The engine at stage 0 in mixed precision as on a GPU: weights rounded once a step, gradients added by the products.

A CPU has no product of bf16 factors that writes fp32, so products of fp32 copies are in its place.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import read_losses

from kernels.linear import MasterWeights

Llm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def losses(llm_here: Llm, write_config, tmp_path: Path) -> Callable[..., list[float]]:
    """losses(name, *overrides): those of a run of eight steps of two micro-batches."""
    config = write_config(
        train__precision="bf16",
        train__micro_batch=2,
        train__global_batch_tokens=256,
        train__total_tokens=8 * 256,
        deepspeed__zero_stage=0,
    )

    def call(name: str, *overrides: str) -> list[float]:
        code, _, err = llm_here("train", "--config", config, f"checkpoint.dir={tmp_path / name}", *overrides)
        assert code == 0, err
        return read_losses(tmp_path / name)

    return call


def emulate(patch: pytest.MonkeyPatch) -> None:
    module = sys.modules["kernels.linear"]
    patch.setattr(module, "_is_master", lambda w, dtype: w.dtype == torch.float32 and dtype == torch.bfloat16)
    patch.setattr(module, "product", lambda a, b: a.float() @ b.float())


@pytest.mark.parametrize("settings", [(), ("optimizer.kind=muon",), ("train.same_bits=true",)], ids=str)
def test_each_step_computes_with_the_weights_of_the_last_update(
    losses: Callable[..., list[float]], settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = losses("plain", *settings)
    assert expected[-1] < expected[0] - 0.1
    emulate(monkeypatch)
    ours = losses("emulated", *settings)
    assert ours[0] == expected[0]
    assert ours != expected  # it was emulated
    assert ours == pytest.approx(expected, rel=0, abs=0.02)
    monkeypatch.setattr(MasterWeights, "changed", lambda self: None)
    assert losses("never changed", *settings) != pytest.approx(expected, rel=0, abs=0.04)
