"""How much a model computes: sums over the `work` of its modules."""

from collections import defaultdict
from dataclasses import dataclass

from kernels.work import Work
from llm.config import ActivationCheckpointing, ModelConfig
from llm.model.transformer import meta_model, parameter_shapes


@dataclass(frozen=True)
class Flops:
    """FLOPs of forward and backward for one token of a sequence of `seq_len`."""

    usual: int
    """6N + 12 L d T (Chowdhery et al. 2022, appendix B), attention counted as if it were not causal: for MFU. With a
    sliding window, T is at most the window."""
    causal: int
    """The same with the half of the attention matrix that a causal model computes."""


def model_work(config: ModelConfig, tokens: int, pairs: float, item: int) -> dict[tuple[str, str], Work]:
    """The least work of one forward and backward pass, by (phase, op).

    Args:
        tokens: number of tokens.
        pairs: number of (query, key that it attends to), over all sequences, in one layer.
        item: bytes per element.

    Raises TypeError for a module with weights but without `work`.
    """
    total: dict[tuple[str, str], Work] = defaultdict(Work)
    for module in meta_model(config).modules():
        tell = getattr(module, "work", None)
        # Without this check a new layer would count as no work, and the MFU would come out too low.
        if tell is None and any(True for _ in module.parameters(recurse=False)):
            raise TypeError(f"{type(module).__name__} has weights and no work(): what does its forward compute?")
        for op, both in tell(tokens, pairs, item).items() if tell else ():
            total["forward", op] += both.forward
            total["backward", op] += both.backward
    return dict(total)


def recomputed_work(
    config: ModelConfig, tokens: int, pairs: float, item: int, checkpointing: ActivationCheckpointing
) -> dict[str, Work]:
    """The least work of what activation checkpointing computes again in a backward pass, by op.

    "full" repeats the forward pass of all blocks, "selective" all of it but matrix products and attention. The
    arguments are those of `model_work`.
    """
    # What a second block adds: the embedding and the LM head are not computed again.
    one, two = (model_work(config.model_copy(update={"n_layers": layers}), tokens, pairs, item) for layers in (1, 2))
    again = {op: work + one.get((phase, op), Work()) * -1 for (phase, op), work in two.items() if phase == "forward"}
    kept = {"none": set(again), "selective": {"matmul", "attention"}, "full": set[str]()}[checkpointing]
    return {op: work * config.n_layers for op, work in again.items() if op not in kept and work != Work()}


def flops_per_token(config: ModelConfig, seq_len: int) -> Flops:
    """Three times the forward pass, because backward has two products for each product of forward.

    N counts every weight that multiplies a token: the LM head, but not the input embedding, which is a look-up.
    """
    # 6N counts the weights of norms too, once per token, although a norm is not a matrix product.
    vectors = sum(shape.numel() for shape in parameter_shapes(config).values() if len(shape) == 1)

    def flops(pairs: float) -> int:
        # item=0: only FLOPs are used here, not bytes.
        works = model_work(config, tokens=1, pairs=pairs, item=0)
        return int(3 * (2 * vectors + sum(work.flops for (phase, _), work in works.items() if phase == "forward")))

    # A token attends to at most the window. The first ones have fewer tokens before them: half of it on average.
    window = min(seq_len, config.sliding_window or seq_len)
    return Flops(usual=flops(window), causal=flops(window - window**2 / (2 * seq_len)))
