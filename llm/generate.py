"""Text from a trained model: prefill once, then one token at a time against a key-value cache."""

import codecs
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llm.errors import UserError
from llm.model import KVCache, Transformer


def run(
    ckpt: str | os.PathLike[str],
    prompt: str,
    *,
    tok: str | os.PathLike[str] | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
    stream: bool = True,
) -> dict[str, Any]:
    """`llm generate`: continues `prompt` with the model of a checkpoint.

    Args:
        ckpt: a checkpoint, or a run's folder.
        tok: the tokenizer; must be the checkpoint's own, which is the default.
        stream: write the prompt and the text, as it comes, to stdout.
        max_new_tokens, temperature, top_k, top_p, seed: as for `generate`.
        device: "auto", "cpu" or "cuda"; precision: "fp32" or "bf16".

    Returns text (what follows the prompt), tokens (how many were generated) and tokens_per_second (of those, prefill
    included). Raises UserError for options, files or a prompt that do not fit.
    """
    from llm.checkpoint import load_model
    from llm.engine import pick_device

    check_options(max_new_tokens, temperature, top_k, top_p, seed)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid UTF-8 (character {error.start})") from None
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model, tokenizer = load_model(ckpt, pick_device(device), dtype, tok=tok)

    prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back a character until its bytes are all there
    pieces: list[str] = []
    tokens = 0

    def emit(data: bytes, final: bool = False) -> None:
        pieces.append(decoder.decode(data, final))
        show(pieces[-1])

    def show(text: str) -> None:
        if stream and text:
            sys.stdout.write(text)
            sys.stdout.flush()

    following = generate(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_id=tokenizer.eos_id,
    )
    show(prompt)
    started = time.perf_counter()
    for token in following:
        tokens += 1
        emit(tokenizer.decode_bytes([token]))
    seconds = time.perf_counter() - started
    emit(b"", final=True)
    show("\n")
    if tokens < max_new_tokens and len(prompt_ids) + tokens == model.config.max_seq_len:
        print(
            f"stopped after {tokens} of {max_new_tokens} tokens: the model's context of {model.config.max_seq_len} "
            "tokens (model.max_seq_len) is full",
            file=sys.stderr,
        )
    return {"text": "".join(pieces), "tokens": tokens, "tokens_per_second": tokens / seconds}


def generate(
    model: Transformer,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | None = None,
) -> Iterator[int]:
    """Yields the tokens that follow a prompt, one by one.

    It ends after max_new_tokens, before eos_id, or when prompt and new tokens together fill model.max_seq_len.

    Args:
        prompt_ids: at least one token; a document begins with BOS.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: sample among the K likeliest tokens only; None: all.
        top_p: sample among the likeliest tokens that together hold this much probability (Holtzman et al. 2020), after
            top_k; None: all.
        seed: of the sampling, which is done on the CPU: the same logits give the same tokens on every device.

    Raises UserError for options out of range, or for a prompt that leaves no room for a token.
    """
    check_options(max_new_tokens, temperature, top_k, top_p, seed)
    room = model.config.max_seq_len - len(prompt_ids)
    if room <= 0:
        raise UserError(
            f"the prompt is {len(prompt_ids)} tokens long and the model holds {model.config.max_seq_len} "
            "(model.max_seq_len): shorten it"
        )
    generator = torch.Generator("cpu").manual_seed(seed)

    def choose(logits: Tensor) -> int:
        return sample(logits, generator, temperature, top_k, top_p)

    return _decode(model, prompt_ids, min(max_new_tokens, room), choose, eos_id)


@torch.inference_mode()
def _decode(
    model: Transformer, prompt_ids: list[int], new_tokens: int, choose: Callable[[Tensor], int], eos_id: int | None
) -> Iterator[int]:
    """The prompt in one pass, then a token at a time against the cache."""
    weight = model.lm_head.weight
    cache = KVCache.empty(model.config, 1, len(prompt_ids) + new_tokens, weight.device, weight.dtype)
    ids = prompt_ids
    for _ in range(new_tokens):
        logits = model(torch.tensor([ids], device=weight.device), cache=cache, last_only=True)
        token = choose(logits[0, -1].float().cpu())
        if token == eos_id:
            return
        yield token
        ids = [token]


def sample(
    logits: Tensor, generator: torch.Generator, temperature: float, top_k: int | None, top_p: float | None
) -> int:
    """One token from logits, fp32 [V]; the options are those of `generate`."""
    if temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()) / temperature  # the maximum first: a tiny temperature must not overflow
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probability = logits.softmax(dim=-1)
    if top_p is not None:
        ordered, index = probability.sort(descending=True, stable=True)
        likelier = ordered.cumsum(dim=-1) - ordered  # probability of the tokens before each one
        probability[index[likelier >= top_p]] = 0.0
    return int(torch.multinomial(probability, 1, generator=generator))


def check_options(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int) -> None:
    """Raises UserError for an option out of range."""
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens}: must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {temperature}: must be 0 (always the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"--top_k {top_k}: must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top_p {top_p}: must be above 0 and at most 1")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: must be at least 0 and below 2^63")
