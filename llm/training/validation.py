"""What a run does at a validation: it scores the validation sequences, and continues train.sample_prompts."""

import math
from collections.abc import Callable

import torch
from torch import nn

from llm import metrics
from llm.config import Config
from llm.data.mixture import Mixture
from llm.data.tokenizer import Tokenizer
from llm.inference.decode import greedy
from llm.training.batch_plan import Plan
from llm.training.setup import on_device, open_loader, validation_sources
from llm.world import World

SAMPLE_TOKENS = 32


def score_validation(
    module: nn.Module,
    config: Config,
    data: Mixture,
    plan: Plan,
    world: World,
    tokenizer: Tokenizer,
    stops: Callable[[], bool],
) -> tuple[metrics.Score, dict[str, metrics.Score]] | None:
    """Returns the score of all sequences and, for several sources, of each. Collective.

    Each rank scores the same number of batches.

    stops: whether a signal asks to stop; then the result is None.
    """
    sequences, limit = data.sequences("val", plan.seq_len), config.train.eval_tokens
    end = sequences if limit is None else min(sequences, math.ceil(limit / plan.seq_len))
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(world.device)
    if (factor := data.bytes_per_piece_byte) != 1:
        token_bytes = token_bytes * factor
    # Summed at the end, because a mean of means would weight targets unequally.
    mine: list[torch.Tensor] = []
    with torch.no_grad(), open_loader(config, data, plan, world, "val", end=end) as loader:
        for batch in on_device(loader, world.device):
            # At each batch, because a validation can take longer than a launcher waits before it kills.
            if stops():
                return None
            losses = module(**batch._asdict(), reduction="none")
            mine.append(metrics.score_sums(losses, batch.labels, token_bytes, tokenizer.eos_id))
    # In the order of the positions.
    sums = torch.zeros(len(mine), world.size, *mine[0].shape, dtype=torch.float64, device=world.device)
    sums[:, world.rank] = torch.stack(mine)
    sums = world.sum(sums).flatten(0, 2)[:end].cpu()
    by_source = {}
    if len(data.sources) > 1:
        positions = validation_sources(data, plan.seq_len, end)
        for number, source in enumerate(data.sources):
            part = metrics.score_from_sums(sums[positions == number])
            if part.tokens:
                by_source[source.name] = part
    return metrics.score_from_sums(sums), by_source


def continue_prompts(module: nn.Module, config: Config, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Continues train.sample_prompts greedily, each by up to SAMPLE_TOKENS tokens or to its document's end. Collective.

    Every rank computes the same, because at ZeRO 3 each holds a part of the weights. There is no cache for the same
    reason: each token takes a forward pass over all prompts.
    """
    prompts = config.train.sample_prompts
    if not prompts:
        return []
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    room = config.model.max_seq_len - max(map(len, ids))
    written = greedy(module, ids, min(SAMPLE_TOKENS, room))
    ends = [next((at for at, i in enumerate(ids) if i in tokenizer.eos_ids), len(ids)) for ids in written]
    texts = [tokenizer.decode(ids[:end]) for ids, end in zip(written, ends, strict=True)]
    return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
