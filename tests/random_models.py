"""Checkpoints of small models with given weights, in the shape that tests of other programs use."""

from pathlib import Path
from typing import Any

import torch

from llm.config import Config, OptimizerConfig, ScheduleConfig, TrainConfig
from llm.data.tokenizer import Tokenizer
from llm.model.checkpoint import DataState, TrainState
from llm.model.hf import to_hf
from llm.model.transformer import Transformer
from llm.training import saving

SHAPE: dict[str, Any] = {"n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96, "max_seq_len": 64}


def write_checkpoint(run_dir: Path, weights: Transformer, tokenizer: Tokenizer, **optimizer: Any) -> Path:
    """The weights as a checkpoint at step 8."""
    tensors: dict[str, dict[str, torch.Tensor]] = {"model": {}}
    for name, value in weights.named_parameters():
        parts = to_hf(weights.config, name, value.detach())
        tensors["model"] |= {key: part.clone() for key, part in parts.items()}
    config = Config(
        model=weights.config,
        optimizer=OptimizerConfig(**{"kind": "adamw", "lr": 6e-4, "beta2": 0.95, "weight_decay": 0.1} | optimizer),
        schedule=ScheduleConfig(warmup_tokens=512),
        train=TrainConfig(total_tokens=4096, global_batch_tokens=512),
    )
    state = TrainState(8, 4096, DataState("feed", 64, 1, "order", 64))
    saving.write_checkpoint(run_dir / "step-00000008", tensors, config, state, tokenizer)
    return run_dir / "step-00000008"
