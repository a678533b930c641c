"""A model learns the same with the Triton kernels as with torch: gradients that parity tests pass may still drift."""

from pathlib import Path

import pytest
from running import environment, read_losses, run_llm

from llm.metrics import read_metrics

STEPS = 100


@pytest.mark.slow
def test_training_curves_agree_across_backends(write_config, tmp_path: Path) -> None:
    config = write_config(
        model__n_layers=1,
        data__seq_len=32,
        optimizer__lr=1e-2,
        train__global_batch_tokens=32,
        train__total_tokens=STEPS * 32,
        train__eval_tokens=32,
    )

    def train(backend: str) -> list[float]:
        env = environment() | {"LLM_KERNELS": backend, "TRITON_INTERPRET": "1"}
        run_llm("train", "--config", config, f"checkpoint.dir={tmp_path / backend}", env=env)
        return read_losses(tmp_path / backend)

    torch_losses, triton_losses = train("torch"), train("triton")
    assert len(torch_losses) == len(triton_losses) == STEPS
    assert sum(torch_losses[-10:]) < sum(torch_losses[:10]) - 5
    # The two round differently in the last bit of fp32; a hundred steps of AdamW multiply that.
    assert triton_losses == pytest.approx(torch_losses, rel=0, abs=1e-3)
    assert triton_losses[:10] == pytest.approx(torch_losses[:10], rel=0, abs=1e-5)
    assert triton_losses != torch_losses  # else the kernels were not used


@pytest.mark.slow
def test_zero_3_and_tied_embeddings_train_alike_on_both_backends(write_config, tmp_path: Path) -> None:
    """A weight that exists only inside its module's forward and backward, and gets its gradient from two places."""
    config = write_config(
        model__n_layers=1,
        model__tie_embeddings=True,
        model__qk_norm=True,
        deepspeed__zero_stage=3,
        data__seq_len=32,
        train__global_batch_tokens=64,
        train__total_tokens=5 * 64,
        train__eval_tokens=64,
    )
    losses, norms = [], []
    for backend in ("torch", "triton"):
        env = environment() | {"LLM_KERNELS": backend, "TRITON_INTERPRET": "1"}
        run_llm("train", "--config", config, f"checkpoint.dir={tmp_path / backend}", env=env)
        losses.append(read_losses(tmp_path / backend))
        lines = read_metrics(tmp_path / backend / "metrics.jsonl")
        norms.append([line["grad_norm"] for line in lines if "grad_norm" in line])
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=1e-5)
    assert norms[1] != norms[0]  # in the last bit somewhere, else the kernels were not used
