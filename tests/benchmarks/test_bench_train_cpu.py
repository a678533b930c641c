"""The comparison on a CPU: all contestants compute the same function, and the table says what was measured."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from benchmarks import bench_train_cpu
from llm.config import ModelConfig
from llm.errors import UserError
from llm.model.transformer import Transformer

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "tiny.json")
MODEL = ModelConfig(
    n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, vocab_size=300, max_seq_len=64, qk_norm=False
)


def test_all_compute_the_same_loss_from_the_same_weights():
    weights = bench_train_cpu.transformers_weights(MODEL)
    tokens = torch.randint(300, (2, 65), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    ours = Transformer(MODEL)
    ours.init_weights(0)
    expected = float(ours(**batch, reduction="mean"))
    plain = bench_train_cpu.plain_loss(bench_train_cpu.plain_model(MODEL, 64, weights), batch)
    llama = bench_train_cpu.llama_loss(bench_train_cpu.llama_model(MODEL, weights), batch)
    assert float(plain) == pytest.approx(expected, abs=1e-5)
    assert float(llama) == pytest.approx(expected, abs=1e-5)


def test_a_slow_round_is_held_against_nobody():
    ours, other = {"step_seconds": [1.0, 2.0, 9.0]}, {"step_seconds": [1.5, 3.0, 9.0]}
    assert bench_train_cpu.times_as_fast(ours, other) == 1.5


@pytest.mark.slow
def test_contestants_take_turns_and_the_table_holds_them_against_ours(tmp_path, capsys):
    output = tmp_path / "result.json"
    arguments = ["--config", CONFIG, "--vocab_size", "500", "--seq_len", "64", "--rounds", "2", "--precision", "fp32"]
    arguments += ["--contestants", "ours", "plain", "--output", str(output), "model.n_layers=1"]
    assert bench_train_cpu.main(arguments) == 0
    result = json.loads(output.read_text())
    ours, plain = (result["contestants"][name] for name in ("ours", "plain"))
    assert len(ours["step_seconds"]) == len(plain["step_seconds"]) == result["rounds"] == 2
    assert plain["losses"] == pytest.approx(ours["losses"], abs=0.05)  # ours sees documents
    first, second = (b / a for a, b in zip(ours["step_seconds"], plain["step_seconds"], strict=True))
    assert f"{(first + second) / 2:.2f}" in capsys.readouterr().out.splitlines()[-1]


def test_a_contestant_that_has_ended_is_named_and_not_waited_for():
    orders, other = multiprocessing.Pipe()
    other.close()
    with pytest.raises(UserError, match="plain has ended before its turn"):
        bench_train_cpu.answer("plain", orders)
