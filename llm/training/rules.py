"""Rules for the settings that the config leaves null: they follow from the model and the text. With sources.

N: parameters without the embedding and the LM head, d: model.d_model, D: train.total_tokens. A stated value wins, and
later rules use it. `follow` is called at the first start of a run; later starts take what the checkpoint holds.

Sources:
    [H] Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", arXiv 2203.15556: tokens a parameter
    [M] Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", arXiv 2305.16264: epochs
    [S] Li et al. 2025, "Step Law", arXiv 2503.04715: the batch. [B] Marek et al. 2025, arXiv 2507.07101: beta2
    [P] Bergsma et al. 2025, "Power Lines", arXiv 2505.13738: weight decay
    [J] Jordan et al. 2024, "Muon", and Liu et al. 2025, arXiv 2502.16982: the optimizer and the scale of its update
    [T] tuned rates at 124M parameters and above: modded-nanogpt, nanochat, OLMo 2 (arXiv 2501.00656), SmolLM3, Marin
    [L] trials at 0.2M to 1.2M parameters on the text of benchmarks/bench_ladder.py, and short texts: benchmarks/LOG.md
    [G] Gupta et al. 2023, arXiv 2308.04014, and Ibrahim et al. 2024, arXiv 2403.08763: going on from trained weights

A run with train.init_from goes on from trained weights, whose rate has fallen. With too low a rate it hardly learns the
new text, at the full rate it first forgets much of the old one [G]: it has a tenth. Under AdamW all parameters have it,
as in other projects, because rates of their own fit initial values.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm.config import Config
from llm.config_file import parse_config
from llm.model.transformer import parameter_count

TOKENS_A_PARAMETER = 20
EPOCHS = 4
"""More epochs of a text are much less useful than new text [M]."""
OF_AN_EPOCH = 0.7
"""With a longer memory, a model learns a text that it reads again by heart: three sizes, 4 and 8 epochs [L]."""
GOING_ON = 0.1
"""Rate of a run that goes on from trained weights, relative to that of a new model."""


@dataclass(frozen=True)
class Followed:
    """A setting that followed from a rule."""

    key: str
    value: Any
    rule: str
    """One line, with the source."""


def total_tokens(parameters: int, text_tokens: int | None) -> int:
    """Returns D for a model with this number of parameters in total, and this many tokens per epoch (None: unknown)."""
    wanted = TOKENS_A_PARAMETER * parameters
    return wanted if text_tokens is None else max(1, min(wanted, EPOCHS * text_tokens))


def batch_tokens(total: int, seq_len: int) -> int:
    """Returns B = 0.58 D^0.571 [S] as a power of two of sequences."""
    sequences = 0.58 * total**0.571 / seq_len
    return seq_len * 2 ** max(0, round(math.log2(sequences)))


def adamw_lr(matrices: int) -> float:
    """Returns AdamW's peak rate, 2.4e-3 at N = 75 million (a model of 124M), falling as N^-0.2 [T, L]."""
    return 2.4e-3 * (matrices / 75e6) ** -0.2


def muon_lr(matrices: int) -> float:
    """Returns the peak rate of the matrices inside the blocks under Muon, 4.5e-3 at N = 75 million [T, L].

    It hardly depends on the size, because the scale of the update already does [J].
    """
    return 4.5e-3 * (matrices / 75e6) ** -0.1


def embed_lr(d_model: int) -> float:
    """Returns the peak rate of the embedding and of the norms, 1.6e-2 at a width of 768 [T, L].

    It falls with the width as the embedding's initial values do.
    """
    return 0.45 / math.sqrt(d_model)


def head_lr(d_model: int) -> float:
    """Returns the peak rate of the LM head, 6.5e-3 at a width of 768 [T, L].

    A logit is a sum over the width, so the head's rate falls as the width grows (Yang et al. 2022, arXiv 2203.03466).
    """
    return 5 / d_model


def weight_decay(lr: float, steps: int, tokens_a_parameter: float, epochs: float = 0.0) -> float:
    """Returns the decay for which 1 / (lr * decay) is 1.084 (D/N)^-0.527 of the steps [P], or OF_AN_EPOCH if less.

    epochs: how often the run reads its text; below 1: the part that it reads; 0: unknown.
    """
    share = min(1.084 * tokens_a_parameter**-0.527, OF_AN_EPOCH / epochs if epochs else math.inf)
    return _rounded(1 / (share * lr * steps))


def follow(config: Config, text_tokens: int | None) -> tuple[Config, list[Followed]]:
    """Fills in every null that has a rule.

    Args:
        config: with model.vocab_size and data.seq_len.
        text_tokens: training tokens per epoch; for a mixture, until its first source ends; None: unknown.

    Returns the config and what followed, in the order in which the rules were applied.
    """
    seq_len = config.data.seq_len
    assert seq_len is not None
    tree, followed = config.model_dump(), list[Followed]()

    def settle(key: str, value: Callable[[], Any], rule: str) -> Any:
        """Returns the stated value of a key, or the rule's."""
        section, name = key.split(".")
        if tree[section][name] is None:
            tree[section][name] = value()
            followed.append(Followed(key, tree[section][name], rule))
        return tree[section][name]

    parameters, n = parameter_count(config.model), matrix_parameters(config)
    total = settle(
        "train.total_tokens",
        lambda: total_tokens(parameters, text_tokens),
        f"{TOKENS_A_PARAMETER} tokens per parameter [Hoffmann 2022], at most {EPOCHS} epochs [Muennighoff 2023]",
    )
    batch = settle(
        "train.global_batch_tokens",
        lambda: batch_tokens(total, seq_len),
        "0.58 D^0.571, as a power of two of sequences [Step Law, arXiv 2503.04715]",
    )
    # The fewer tokens a step has, the more steps the second moment must remember [B, L].
    beta2 = 0.95 if batch >= 2**19 else 0.99
    settle("optimizer.beta2", lambda: beta2, "0.99 below 524,288 tokens a step, else 0.95 [arXiv 2507.07101, LOG.md]")
    settle(
        "optimizer.kind",
        lambda: _optimizer(config),
        "Muon where the ZeRO stage has it, else AdamW [arXiv 2502.16982, LOG.md]",
    )
    settle(
        "schedule.warmup_tokens",
        lambda: min(parameters, total // 50),
        "one token per parameter [OLMo 2, arXiv 2501.00656], at most a fiftieth of the run",
    )
    goes_on = config.train.init_from is not None
    share, tenth = (GOING_ON, ", a tenth of it from trained weights [arXiv 2403.08763]") if goes_on else (1.0, "")
    lr = settle("optimizer.lr", lambda: _rounded(share * adamw_lr(n)), f"2.4e-3 (N / 75M)^-0.2 [tuned, LOG.md]{tenth}")
    # A stated lr also scales the rates that depend on it.
    factor, d = lr / _rounded(share * adamw_lr(n)), config.model.d_model
    times = "" if factor == 1 else f", times {factor:.3g}, the stated lr over the rule's"
    factor, times = factor * share, tenth + times
    # High rates learn a text by heart that is read again: measured on one megabyte, four times [L].
    epochs = 0.0 if text_tokens is None else total / max(1, text_tokens)
    if epochs > 1:
        factor, times = factor / epochs, f"{times}, over {epochs:.3g} epochs"
    by_width, for_head = "0.45 d^-0.5 [tuned, LOG.md]", "5 / d [mu-parametrization, arXiv 2203.03466]"
    if goes_on and tree["optimizer"]["kind"] == "adamw":
        for key in ("embed_lr", "head_lr", "norm_lr"):
            settle(f"optimizer.{key}", lambda: lr, "optimizer.lr, as usual from trained weights [arXiv 2403.08763]")
    settle("optimizer.embed_lr", lambda: _rounded(factor * embed_lr(d)), by_width + times)
    settle("optimizer.head_lr", lambda: _rounded(factor * head_lr(d)), for_head + times)
    settle("optimizer.norm_lr", lambda: _rounded(factor * embed_lr(d)), by_width + times)
    blocks_lr = lr
    if tree["optimizer"]["kind"] == "muon":
        rule = "4.5e-3 (N / 75M)^-0.1 [tuned, LOG.md]" + tenth
        blocks_lr = settle("optimizer.muon_lr", lambda: _rounded(share * muon_lr(n)), rule)
    if goes_on:
        settle("optimizer.weight_decay", lambda: 0.1, "as usual from trained weights [arXiv 2403.08763]")
    settle(
        "optimizer.weight_decay",
        lambda: weight_decay(blocks_lr, max(1, total // batch), total / n, epochs),
        f"its memory is 1.084 (D/N)^-0.527 of the run [arXiv 2505.13738], at most {OF_AN_EPOCH} of an epoch [LOG.md]",
    )
    return parse_config(tree, "the config with what follows from it"), followed


def describe(followed: Sequence[Followed]) -> Iterator[str]:
    """Yields a line for each setting, as the command line takes it, and one that explains the letters of the rules."""
    for setting in followed:
        value = f"{setting.value:_}" if isinstance(setting.value, int) else setting.value
        yield f"by rule     {setting.key}={value}: {setting.rule}"
    if followed:
        yield (
            "by rule     N: parameters without embedding and LM head, D: train.total_tokens, d: model.d_model; "
            "docs/training.md explains the rules (Settings that follow)"
        )


def matrix_parameters(config: Config) -> int:
    """Returns N: the parameters without the embedding and the LM head."""
    model = config.model
    return parameter_count(model) - model.rows * model.d_model * (1 if model.tie_embeddings else 2)


def _optimizer(config: Config) -> str:
    return "adamw" if config.deepspeed.zero_stage == 3 and config.optimizer.muon_lr is None else "muon"


def _rounded(value: float) -> float:
    """Rounds to three significant digits, so that the log shows the exact value."""
    return float(f"{value:.3g}")
