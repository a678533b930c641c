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

    Linear from lr/warmup steps over schedule.warmup_tokens, then down to min_lr_ratio * lr at train.total_tokens: by
    half a cosine (Loshchilov & Hutter 2017), linearly, or level until the last decay_tokens and linearly from there
    ("wsd", Hu et al. 2024).
    """
    schedule: ScheduleConfig = config.schedule
    peak, batch, total = config.optimizer.lr, config.train.global_batch_tokens, config.train.total_tokens
    if tokens + batch <= schedule.warmup_tokens:
        return peak * (tokens + batch) / schedule.warmup_tokens
    begin = schedule.warmup_tokens
    if schedule.kind == "wsd":
        decay = total // 5 if schedule.decay_tokens is None else schedule.decay_tokens
        begin = max(begin, total - decay)
    progress = min(max(tokens - begin, 0) / max(total - begin, 1), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * share)
