"""The optimizers, AdamW and Muon, and the learning-rate schedule."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llm.config import Config, ModelConfig, OptimizerConfig, ScheduleConfig
from llm.model.transformer import Transformer, parameter_shapes, row_split
from llm.training.muon import Muon, Shape

ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)


def moments(name: str, config: OptimizerConfig) -> tuple[str, ...]:
    """Returns the names of the optimizer's state tensors for a parameter; they are torch's own."""
    return MUON_MOMENTS if config.kind == "muon" and is_block_matrix(name) else ADAMW_MOMENTS


def all_moments(config: OptimizerConfig) -> tuple[str, ...]:
    """Returns the names of all kinds of state tensors; a checkpoint has one file per name."""
    return ADAMW_MOMENTS + MUON_MOMENTS if config.kind == "muon" else ADAMW_MOMENTS


def is_block_matrix(name: str) -> bool:
    """Whether a parameter is a matrix inside a block: not the embedding, the LM head, a norm or a bias."""
    return name.startswith("layers.") and name.endswith(".weight") and "norm" not in name


def matrix_shapes(config: ModelConfig) -> list[Shape]:
    """Returns the shapes of the matrices that Muon updates, in their order."""
    return [
        (rows, shape[1])
        for name, shape in parameter_shapes(config).items()
        if is_block_matrix(name)
        for rows in row_split(config, name)
    ]


def peak_lr(name: str, config: OptimizerConfig) -> float:
    """Returns a parameter's peak learning rate."""
    if is_block_matrix(name):
        own = config.muon_lr if config.kind == "muon" else None
    elif "norm" in name:
        own = config.norm_lr
    elif name.endswith(".bias"):
        own = config.lr
    else:
        own = config.embed_lr if "embed" in name else config.head_lr
    # Older checkpoints have null for these rates, which meant optimizer.lr.
    return own or config.peak_lr


def own_rates(lr: float, config: OptimizerConfig) -> dict[str, float]:
    """Returns the rates of a step of those parameters that have one of their own, by its key in the config.

    lr: that for optimizer.lr; the others are in proportion.
    """
    names = {"embed_lr": "embed_tokens.weight", "head_lr": "lm_head.weight", "norm_lr": "norm.weight"}
    if config.kind == "muon":
        names["muon_lr"] = "layers.0.mlp.down_proj.weight"
    peaks = {key: peak_lr(name, config) for key, name in names.items()}
    return {key: lr * peak / config.peak_lr for key, peak in peaks.items()}


def weight_decay(name: str, config: OptimizerConfig) -> float:
    """Returns a parameter's weight decay. Norms, biases and the embedding have none, because norms undo the effect.

    The LM head shrinks by the same factor per step as the matrices inside the blocks, for every rate of its own.
    """
    assert config.weight_decay is not None  # `resolve` has set it
    if "norm" in name or "embed" in name or name.endswith(".bias"):
        return 0.0
    if is_block_matrix(name) or config.head_lr is None:
        return config.weight_decay
    blocks_lr = (config.muon_lr if config.kind == "muon" else None) or config.peak_lr
    return config.weight_decay * blocks_lr / config.head_lr


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, model: ModelConfig
) -> list[dict[str, Any]]:
    """Makes one AdamW group per pair of rate and decay.

    lr_ratio of a group is its peak rate / optimizer.lr, because the schedule gives the rate for optimizer.lr.
    """
    # Such rows have no gradient, and must stay as they are (model.embedding_rows).
    keeps_rows = model.embedding_rows is not None
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        decay = 0.0 if keeps_rows and name == "lm_head.weight" else weight_decay(name, config)
        groups[peak_lr(name, config), decay].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr": lr, "lr_ratio": lr / config.peak_lr}
        for (lr, decay), parameters in groups.items()
    ]


def make_optimizer(
    model: Transformer, config: OptimizerConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.AdamW:
    """Makes torch's fused AdamW (Loshchilov & Hutter 2019, decoupled weight decay), or Muon with AdamW.

    config: from `resolve`.
    dtype: the dtype in which Muon orthogonalises.
    """
    named = list(model.named_parameters())
    assert config.beta2 is not None  # `resolve` has set it
    options: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}
    if config.kind != "muon":
        return torch.optim.AdamW(parameter_groups(named, config, model.config), **options)
    matrices = [(name, parameter) for name, parameter in named if is_block_matrix(name)]
    others = [(name, parameter) for name, parameter in named if not is_block_matrix(name)]
    (muon,) = parameter_groups(matrices, config, model.config)  # all have one rate and one decay
    muon |= {
        "shapes": [[(rows, p.shape[1]) for rows in row_split(model.config, name)] for name, p in matrices],
        "momentum": config.muon_momentum,
        "dtype": dtype,
    }
    return Muon([*parameter_groups(others, config, model.config), muon], **options)


def learning_rate(tokens: int, config: Config) -> float:
    """Returns the learning rate of the step that begins after `tokens` training tokens.

    config: from `resolve`. The rate is the one for optimizer.lr; the others are in proportion.

    It rises linearly over schedule.warmup_tokens and then falls to min_lr_ratio * lr at train.total_tokens: by half a
    cosine (Loshchilov & Hutter 2017), linearly, or only over the last decay_tokens, linearly ("wsd", Hu et al. 2024).
    """
    schedule: ScheduleConfig = config.schedule
    peak, batch, total, warmup = config.optimizer.peak_lr, config.train.batch, config.train.horizon, schedule.warmup
    # The rate at the end of the step, because at its start the first rate would be 0.
    if tokens + batch <= warmup:
        return peak * (tokens + batch) / warmup
    begin = decay_begin(config)
    # The limits are for the last step of warmup, and for a decay of length 0.
    progress = min(max(tokens - begin, 0) / max(total - begin, 1), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * share)


def decay_begin(config: Config) -> int:
    """Returns the training tokens after which the rate falls: after the warmup, or with "wsd" before the decay."""
    schedule, total = config.schedule, config.train.horizon
    if schedule.kind != "wsd":
        return schedule.warmup
    # `is None`, because 0 is a value too: no decay.
    decay = total // 5 if schedule.decay_tokens is None else schedule.decay_tokens
    return max(schedule.warmup, total - decay)


def decay_begins(tokens: int, config: Config) -> bool:
    """Whether the step that ends after `tokens` training tokens is the last with the constant rate of "wsd"."""
    last = tokens - config.train.batch < decay_begin(config) <= tokens < config.train.horizon
    return config.schedule.kind == "wsd" and last
