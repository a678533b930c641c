"""The optimizers, AdamW and Muon, and the learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llm.config import Config, OptimizerConfig, ScheduleConfig
from llm.model.transformer import Transformer, row_split
from llm.training.muon import Muon

ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)


def moments(name: str, config: OptimizerConfig) -> tuple[str, ...]:
    """Returns the names of the optimizer's state tensors for a parameter; they are torch's own."""
    return MUON_MOMENTS if config.kind == "muon" and is_block_matrix(name) else ADAMW_MOMENTS


def all_moments(config: OptimizerConfig) -> tuple[str, ...]:
    """Returns the names of all state tensors that some parameter has; a checkpoint has one file for each."""
    return ADAMW_MOMENTS + MUON_MOMENTS if config.kind == "muon" else ADAMW_MOMENTS


def is_block_matrix(name: str) -> bool:
    """Whether a parameter is a matrix inside a block: not the embedding, the LM head or a norm."""
    return name.startswith("layers.") and "norm" not in name


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, object]]:
    """Makes two groups: decayed matrices, and norms and embeddings without decay (norms undo its shrinking)."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in named:
        (free if "norm" in name or "embed" in name else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def make_optimizer(
    model: Transformer, config: OptimizerConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.AdamW:
    """Makes torch's fused AdamW (Loshchilov & Hutter 2019, decoupled weight decay), or Muon with AdamW.

    dtype: Muon orthogonalises in it.
    """
    named = list(model.named_parameters())
    options: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}
    if config.kind == "adamw":
        return torch.optim.AdamW(parameter_groups(named, config.weight_decay), **options)
    matrices = {name: parameter for name, parameter in named if is_block_matrix(name)}
    muon_lr = config.muon_lr or config.lr
    muon = {
        "params": list(matrices.values()),
        "shapes": [[(rows, p.shape[1]) for rows in row_split(model.config, name)] for name, p in matrices.items()],
        "momentum": config.muon_momentum,
        "weight_decay": config.weight_decay,
        "lr": muon_lr,
        "lr_ratio": muon_lr / config.lr,  # because the schedule yields a rate for optimizer.lr
        "dtype": dtype,
    }
    others = [(name, parameter) for name, parameter in named if name not in matrices]
    return Muon([*parameter_groups(others, config.weight_decay), muon], **options)


def learning_rate(tokens: int, config: Config) -> float:
    """Returns the learning rate of the step that begins after `tokens` training tokens.

    It rises linearly over schedule.warmup_tokens and then falls to min_lr_ratio * lr at train.total_tokens: by half a
    cosine (Loshchilov & Hutter 2017), linearly, or only over the last decay_tokens, linearly ("wsd", Hu et al. 2024).
    """
    schedule: ScheduleConfig = config.schedule
    peak, batch, total = config.optimizer.lr, config.train.global_batch_tokens, config.train.total_tokens
    # The rate at the end of the step: at its beginning the first step's would be 0.
    if tokens + batch <= schedule.warmup_tokens:
        return peak * (tokens + batch) / schedule.warmup_tokens
    begin = schedule.warmup_tokens
    if schedule.kind == "wsd":
        # `is None`, since 0 is a value, too: no decay.
        decay = total // 5 if schedule.decay_tokens is None else schedule.decay_tokens
        begin = max(begin, total - decay)
    # The bounds are for the last step of warmup, and for a decay or a horizon of no length.
    progress = min(max(tokens - begin, 0) / max(total - begin, 1), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * share)
