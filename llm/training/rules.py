"""Settings that follow from the model and the text where the config leaves them null: the rules, and their sources.

N is the number of parameters without the embedding and the LM head, D = train.total_tokens, B = the tokens of a step.
A stated value always wins, and the rules below use it: they give the peak rate for the batch that is stated, too.
`follow` is called once, at the first start; later starts take what the checkpoint holds (llm.training.resolve).

Sources:
    [S] Li et al. 2025, "Predictable Scale: Part I, Step Law", arXiv 2503.04715: learning rate and batch of AdamW
    [P] Bergsma et al. 2025, "Power Lines", arXiv 2505.13738: weight decay
    [H] Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", arXiv 2203.15556: tokens a parameter
    [M] Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", arXiv 2305.16264: epochs
    [J] Jordan et al. 2024, "Muon", and Liu et al. 2025, arXiv 2502.16982: the optimizer and the scale of its update
    [L] measured with benchmarks/bench_ladder.py; the figures are in benchmarks/LOG.md
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llm.config import Config
from llm.model.transformer import parameter_count

TOKENS_A_PARAMETER = 20
EPOCHS = 4
"""More passes over a text are worth much less than new text [M]."""
EMBED_RATIO, HEAD_RATIO, NORM_RATIO = 4.0, 2.0, 4.0
"""Peak rates of the embedding, the LM head and the norms, as multiples of optimizer.lr [L]."""


@dataclass(frozen=True)
class Followed:
    """A setting that followed from a rule."""

    key: str
    value: Any
    rule: str
    """One line, with the source."""


def total_tokens(parameters: int, text_tokens: int | None) -> int:
    """Returns D for a model of so many parameters, all counted, and an epoch of so many tokens (None: unknown)."""
    wanted = TOKENS_A_PARAMETER * parameters
    return wanted if text_tokens is None else max(1, min(wanted, EPOCHS * text_tokens))


def batch_tokens(total: int, seq_len: int) -> int:
    """Returns B = 0.58 D^0.571 [S] as a power of two of sequences."""
    sequences = 0.58 * total**0.571 / seq_len
    return seq_len * 2 ** max(0, round(math.log2(sequences)))


def adamw_lr(matrices: int, total: int, batch: int) -> float:
    """Returns the peak rate of the matrices under AdamW: 1.79 N^-0.713 D^0.307 [S] at the batch of `batch_tokens`.

    At another batch it is multiplied by the square root of the batches' ratio (Malladi et al. 2022, arXiv 2205.10287).
    """
    return _rounded(1.79 * matrices**-0.713 * total**0.307 * math.sqrt(batch / (0.58 * total**0.571)))


def weight_decay(lr: float, steps: int, tokens_a_parameter: float) -> float:
    """Returns the decay whose memory 1 / (lr * decay) is a share 1.084 (D/N)^-0.527 of the run's steps [P]."""
    return _rounded(1 / (1.084 * tokens_a_parameter**-0.527 * lr * steps))


def muon_lr(total: int, batch: int) -> float:
    """Returns the peak rate of the matrices inside the blocks under Muon."""
    return 5e-3


def follow(config: Config, text_tokens: int | None) -> tuple[Config, list[Followed]]:
    """Fills in every null that has a rule.

    Args:
        config: with model.vocab_size and data.seq_len.
        text_tokens: the training tokens of an epoch, of a mixture until its first source ends; None: unknown.

    Returns the config and what followed, in the order in which the rules were applied.
    """
    assert config.data.seq_len is not None
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
        f"{TOKENS_A_PARAMETER} tokens a parameter [Hoffmann 2022], at most {EPOCHS} epochs [Muennighoff 2023]",
    )
    batch = settle(
        "train.global_batch_tokens",
        lambda: batch_tokens(total, config.data.seq_len or 1),
        "0.58 D^0.571, as a power of two of sequences [Step Law, 2503.04715]",
    )
    steps, rate = max(1, total // batch), adamw_lr(n, total, batch)
    kind = settle("optimizer.kind", lambda: _optimizer(config), "Muon where the ZeRO stage has it [benchmarks/LOG.md]")
    settle(
        "schedule.warmup_tokens",
        lambda: min(parameters, total // 50),
        "a token a parameter [OLMo 2, 2501.00656], at most a fiftieth of the run",
    )
    lr = settle(
        "optimizer.lr", lambda: rate, "1.79 N^-0.713 D^0.307, times the root of the batch over the rule's [2503.04715]"
    )
    settle("optimizer.embed_lr", lambda: _rounded(EMBED_RATIO * lr), f"{EMBED_RATIO:g} lr [benchmarks/LOG.md]")
    settle("optimizer.head_lr", lambda: _rounded(HEAD_RATIO * lr), f"{HEAD_RATIO:g} lr [benchmarks/LOG.md]")
    settle("optimizer.norm_lr", lambda: _rounded(NORM_RATIO * lr), f"{NORM_RATIO:g} lr [benchmarks/LOG.md]")
    blocks_lr = lr
    if kind == "muon":
        blocks_lr = settle("optimizer.muon_lr", lambda: muon_lr(total, batch), "[benchmarks/LOG.md]")
    settle(
        "optimizer.weight_decay",
        lambda: weight_decay(blocks_lr, steps, total / n),
        "its memory is 1.084 (D/N)^-0.527 of the run [Power Lines, 2505.13738]",
    )
    return Config.model_validate(tree), followed


def matrix_parameters(config: Config) -> int:
    """Returns N: the parameters without the embedding and the LM head."""
    model = config.model
    assert model.vocab_size is not None
    return parameter_count(model) - model.vocab_size * model.d_model * (1 if model.tie_embeddings else 2)


def _optimizer(config: Config) -> str:
    if config.optimizer.muon_lr is not None:
        return "muon"
    partitioned = config.deepspeed.zero_stage == 3 or config.deepspeed.offload == "cpu"
    return "adamw" if partitioned or config.train.precision == "fp16" else "muon"


def _rounded(value: float) -> float:
    """Three significant digits: what a log shows is what is used."""
    return float(f"{value:.3g}")
