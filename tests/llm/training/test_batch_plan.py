"""The micro-batch: the config's, or the largest that a GPU's memory holds by prediction."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llm import device_rates
from llm.config import Config
from llm.config_file import parse_config
from llm.errors import UserError
from llm.training.batch_plan import FILLED, choose_micro_batch, make_plan, ways_out_of_memory
from llm.training.engine import Engine
from llm.training.memory import activation_bytes, state_bytes

BF16 = torch.bfloat16
GPU = torch.device("cuda")


def config(**train: object) -> Config:
    shape = {"n_layers": 2, "d_model": 128, "n_heads": 4, "n_kv_heads": 2, "d_ff": 344, "vocab_size": 1024}
    settings = {"total_tokens": 1, "global_batch_tokens": 64 * 512, "activation_checkpointing": "none", **train}
    return parse_config({"model": shape, "data": {"path": "none", "seq_len": 512}, "train": settings}, "test")


def needed(size: int) -> int:
    return state_bytes(config(), 1, 1, BF16).peak(activation_bytes(config(), 1, size, 512, BF16))


def test_the_largest_power_of_two_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 8, 64):
        monkeypatch.setattr(device_rates, "device_memory", lambda device, size=size: needed(size) / FILLED + 1)
        assert choose_micro_batch(config(), 1, GPU, dtype=BF16) == size
    monkeypatch.setattr(device_rates, "device_memory", lambda device: needed(8) / FILLED - 1)
    assert choose_micro_batch(config(), 1, GPU, dtype=BF16) == 4


def test_what_does_not_fit_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_rates, "device_memory", lambda device: needed(1) / FILLED - 1)
    with pytest.raises(UserError, match=r"train.micro_batch=1 needs about .* GB .* `llm plan`"):
        choose_micro_batch(config(), 1, GPU, dtype=BF16)
    # A stated size may fill the whole memory, and is not lowered.
    monkeypatch.setattr(device_rates, "device_memory", lambda device: needed(8) + 1)
    assert choose_micro_batch(config(micro_batch=8), 1, GPU, dtype=BF16) == 8
    with pytest.raises(UserError, match=r"train\.micro_batch=16 needs"):
        choose_micro_batch(config(micro_batch=16), 1, GPU, dtype=BF16)


def test_a_cpu_takes_the_limit_in_tokens_and_a_share_of_the_step() -> None:
    cpu = torch.device("cpu")
    assert choose_micro_batch(config(), 1, cpu, dtype=BF16) == 16
    assert choose_micro_batch(config(), 16, cpu, dtype=BF16) == 4
    assert make_plan(config(), 1, cpu, dtype=torch.float32, micro_batch=3).accumulation == 22


def test_a_full_gpu_gets_the_predicted_sizes_and_what_needs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    total = needed(8) + 2 * 10**9
    monkeypatch.setattr(device_rates, "device_memory", lambda device: total)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: needed(8))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (0, total))
    text = ways_out_of_memory(config(micro_batch=8), 1, GPU, dtype=BF16)
    size, half = (f"{needed(micro_batch) / 1e9:.1f}" for micro_batch in (8, 4))
    assert text.startswith(f"train.micro_batch=8 was predicted to need {size} of its {total / 1e9:.1f} GB")
    assert "other programs and the CUDA context hold 2.0 GB" in text
    assert f"train.micro_batch=4 needs {half} GB" in text
    assert "train.activation_checkpointing=full needs " in text
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1.5e9, total))
    text = ways_out_of_memory(config(micro_batch=1, activation_checkpointing="full"), 2, GPU, dtype=BF16)
    assert "other programs" not in text
    assert text.endswith("GB; deepspeed.zero_stage=2 divides more of the state among the GPUs")


def test_a_run_whose_gpu_is_full_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, llm_here: Callable[..., tuple[int, str, str]], write_config: Callable[..., Path]
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore.")

    monkeypatch.setattr(Engine, "backward", full)
    code, _, err = llm_here("train", "--config", write_config())
    assert code == 1
    last = "error: the GPU's memory is full; lower train.micro_batch or set train.activation_checkpointing="
    assert err.splitlines()[-1].startswith(last)
    assert err.endswith("(CUDA out of memory. Tried to allocate 9 GiB.)\n")
