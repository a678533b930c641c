"""AdamW's parameter groups and the learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from llm.config import Config, OptimizerConfig, ScheduleConfig


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices are decayed; norms and embeddings are not (decay would only shrink what a norm undoes)."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in named:
        (free if "norm" in name or "embed" in name else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's fused AdamW over fp32 masters (Loshchilov & Hutter 2019, decoupled weight decay)."""
    return torch.optim.AdamW(
        parameter_groups(model.named_parameters(), config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def learning_rate(tokens: int, config: Config) -> float:
    """The rate of the step that begins after `tokens` training tokens.

    Linear from lr/warmup steps over schedule.warmup_tokens, then half a cosine down to min_lr_ratio * lr at
    train.total_tokens (Loshchilov & Hutter 2017).
    """
    schedule: ScheduleConfig = config.schedule
    peak, batch = config.optimizer.lr, config.train.global_batch_tokens
    if tokens + batch <= schedule.warmup_tokens:
        return peak * (tokens + batch) / schedule.warmup_tokens
    span = max(config.train.total_tokens - schedule.warmup_tokens, 1)
    progress = min(max(tokens - schedule.warmup_tokens, 0) / span, 1.0)
    low = schedule.min_lr_ratio
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
