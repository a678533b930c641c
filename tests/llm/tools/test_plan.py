"""`llm plan`: its memory against what really lives, and its arithmetic."""

import json

import pytest
import torch

from llm.config import Config, parse_config
from llm.model.transformer import Transformer
from llm.tools.plan import activation_bytes, state_bytes, traced_step

SHAPE = {"n_layers": 5, "d_model": 128, "n_heads": 4, "n_kv_heads": 2, "d_ff": 344, "vocab_size": 1024}
BF16, FP32 = torch.bfloat16, torch.float32


def config(layers: int = 5, checkpointing: str = "none", **changes: object) -> Config:
    train = {"total_tokens": 1, "global_batch_tokens": 1, "activation_checkpointing": checkpointing}
    return parse_config({"model": {**SHAPE, "n_layers": layers}, "train": train, **changes}, "test")


@pytest.mark.parametrize(("dtype", "processes"), [(FP32, 1), (BF16, 1), (BF16, 2)])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_activations_are_those_that_a_real_step_holds(checkpointing, dtype, processes):
    """Traced from two and three blocks without memory, against five that run. One process rounds fp32 weights."""
    predicted = activation_bytes(config(5, checkpointing), processes, 3, 256, dtype, "cpu")
    model = Transformer(config().model, activation_checkpointing=checkpointing, compute_dtype=dtype)
    model.init_weights(0)
    model.to(FP32 if processes == 1 else dtype)
    ids = torch.randint(900, (3, 256))
    doc_start = torch.zeros(3, 256, dtype=torch.int32)
    counted = traced_step(model, lambda: model(ids, labels=ids, doc_start=doc_start))
    assert predicted.held == pytest.approx(counted.held, rel=0.05)
    assert predicted.peak == pytest.approx(counted.peak, rel=0.05)


def test_activations_on_a_gpu_are_those_that_the_kernels_keep():
    """Of a block: two residual streams and their norms, q, k, v, attention's output, gate, up and their product."""
    one, two = (activation_bytes(config(n), 2, 3, 256, BF16, "cuda").held for n in (1, 2))
    width, heads, d_ff = 128, 4, 344
    elements = 2 * width + 2 * width + 2 * width + (width + width // 2) + width + 3 * d_ff
    statistics = 2 + heads  # fp32: of each norm, and of each head's softmax
    assert two - one == pytest.approx(3 * 256 * (2 * elements + 4 * statistics), rel=0.01)


def test_state_follows_the_stage():
    n = sum(p.numel() for p in Transformer(config().model).parameters())

    def total(stage: int, processes: int, dtype: torch.dtype = BF16, **changes: object) -> int:
        return state_bytes(config(**changes), stage, processes, dtype, "cpu").total

    assert total(0, 4, FP32) == total(0, 4) == n * (4 + 4 + 8)
    assert total(1, 1, torch.float16) == n * (2 + 4 + 4 + 8)
    for dtype in (BF16, FP32):
        assert total(1, 1, dtype) == total(2, 1, dtype) == total(0, 1, dtype), "one process has nothing to partition"
    assert total(1, 2, FP32) > n * (4 + 4 + (4 + 8) // 2)
    assert total(1, 1, FP32, deepspeed={"offload": "cpu"}) == n * (4 + 4) + 4
    assert total(1, 4) == n * (2 + 4 + (4 + 8) // 4)
    assert total(1, 1, deepspeed={"offload": "cpu"}) == n * (2 + 4)
    muon = {"optimizer": {"kind": "muon"}}
    assert n * (4 + 4 + 4) < total(0, 1, FP32, **muon) < total(0, 1, FP32)
    assert total(0, 1, FP32) - total(0, 1, FP32, **muon) == 2 * (total(1, 2) - total(1, 2, **muon)), "is partitioned"
    assert total(3, 4) < total(2, 4) < total(2, 1)


def test_plans_by_datasheet_without_data(llm_here, write_config):
    config = write_config(data__path="/nowhere", model__vocab_size=500, data__seq_len=64, train__total_tokens=10**9)
    arguments = ("plan", "--config", config, "--gpus", 4, "--device", "H100", "--mfu", 0.5, "--json")
    code, out, err = llm_here(*arguments)
    result = json.loads(out)
    assert code == 0
    assert result["tokens_per_second"] == pytest.approx(4 * 0.5 * 989.4e12 / result["flops_per_token"]["usual"])
    assert result["hours"] == pytest.approx(1e9 / result["tokens_per_second"] / 3600)
    assert result["memory_bytes"] == (sum(result["state_bytes"].values()) + result["activation_bytes"]["none"]["peak"])
    assert "assuming 50% of 989.4 TFLOP/s (H100's datasheet, dense bf16)" in err
    assert llm_here("plan", "--config", config)[0] == 0  # on this machine, measured


def test_a_plan_without_data_says_that_their_length_is_unknown(llm_here, write_config, small_shards):
    arguments = ("model.vocab_size=null", "train.total_tokens=null", "--device", "H100")
    _, out, _ = llm_here("plan", "--config", write_config(data__path="/nowhere"), *arguments)
    assert "assumed     as much text as a run needs" in out
    _, out, _ = llm_here("plan", "--config", write_config(data__path=str(small_shards)), *arguments)
    assert "assumed" not in out
    assert " minutes, without validation and saving" in out


def test_memory_lowers_the_micro_batch_or_says_what_would_help(llm_here, write_config):
    config = write_config(model__vocab_size=500, data__seq_len=64, deepspeed__zero_stage=0)
    arguments = ("plan", "--config", config, "--json", "--memory_gb")
    at_ease = json.loads(llm_here(*arguments, 100)[1])
    room = 0.8 * at_ease["memory_bytes"] / 0.9
    tight = json.loads(llm_here(*arguments, room / 1e9)[1])
    assert tight["micro_batch"] < at_ease["micro_batch"]
    assert tight["memory_bytes"] <= 0.9 * room
    code, _, err = llm_here(*arguments, 1e-3)
    assert code == 1
    assert "do not fit" in err
    assert "train.activation_checkpointing=selective" in err


def test_refuses_a_device_that_it_does_not_know(llm_here, write_config):
    code, _, err = llm_here("plan", "--config", write_config(model__vocab_size=500), "--device", "Banana")
    assert code == 1
    assert "choose from H200" in err
