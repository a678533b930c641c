"""Tokens from a model: a batch of prompts in one pass, then one token a row at a time against a key-value cache."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from llm.errors import UserError
from llm.inference import _decoder
from llm.model.transformer import Block, KVCache, RMSNorm, Transformer, true_vocab_size

GRAPH_SLOTS = 256  # a GPU replays one CUDA graph for this many tokens; more would read more of the cache than is filled


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the logits; each option narrows what those above it leave.

    Raises UserError for an option out of range.
    """

    repetition_penalty: float = 1.0
    """Logits of tokens that the row already holds are divided by this where positive, else multiplied (Keskar et al.
    2019)."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Sample among the K likeliest tokens only."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together hold this much probability (Holtzman et al. 2020)."""
    min_p: float | None = None
    """Sample among the tokens with at least this fraction of the likeliest one's probability (Nguyen et al. 2024)."""
    seed: int = 0
    """Of the sampling, which is done on the CPU: the same logits give the same tokens on every device."""

    def __post_init__(self) -> None:
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"--repetition_penalty {self.repetition_penalty}: must be above 0 (1: no penalty)")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature}: must be 0 (always the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top_k {self.top_k}: must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"--min_p {self.min_p}: must be at least 0 and at most 1")
        if not 0 <= self.seed < 2**62:
            raise UserError(f"--seed {self.seed}: must be at least 0 and below 2^62")


class Token(NamedTuple):
    row: int
    id: int
    logprob: float
    """Natural logarithm of the model's own probability, before any option of Sampling."""


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    **sampling: float | None,
) -> Iterator[int]:
    """The token ids that follow one prompt, one by one; `sampling` are fields of Sampling, the rest as below."""
    options = Sampling(**sampling)  # type: ignore[arg-type]
    tokens = generate_batch(model, [prompt_ids], max_new_tokens=max_new_tokens, sampling=options, eos_id=eos_id)
    return (token.id for token in tokens)


def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int | None = None,
    streams: Sequence[int] | None = None,
    finished: set[int] | None = None,
) -> Iterator[Token]:
    """The tokens that follow each prompt, step by step: in each step one of every row that goes on.

    A row ends after max_new_tokens, before eos_id, or when prompt and new tokens together fill model.max_seq_len.
    But for rounding, what a row gets does not depend on the other rows.

    Args:
        prompts: token ids, at least one each; a document begins with BOS.
        streams: for each row a number that is added to sampling.seed; rows with the same number draw the same random
            numbers. None: 0 for all.
        finished: rows that need no more tokens; the caller may add to it between tokens.

    Raises UserError for options out of range, or for a prompt that leaves no room for a token.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens}: must be at least 1")
    check_fit(model, prompts)
    context = model.config.max_seq_len
    rooms = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    streams = [0] * len(prompts) if streams is None else streams
    generators = [torch.Generator("cpu").manual_seed(sampling.seed + stream) for stream in streams]
    return _generate(model, prompts, rooms, sampling, generators, eos_id, set() if finished is None else finished)


@torch.no_grad()
def greedy(model: torch.nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """The likeliest `new_tokens` ids after each prompt, without a cache: one whole forward pass a token.

    It takes nothing but the model's forward, always of the same shape, and waits for no value. So the ranks that share
    out a model's weights may run it together, as ZeRO 3 needs. A prompt and its tokens must fit model.max_seq_len.
    """
    width = max(map(len, prompts)) + new_tokens
    device = next(model.parameters()).device
    # What stands to the right of a token is not seen by it: padding is free to hold anything.
    ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device)
    rows = torch.arange(len(prompts), device=device)
    ends = torch.tensor([len(prompt) for prompt in prompts], device=device)
    with torch.compiler.set_stance("force_eager"):  # a compilation for this shape would take longer than it saves
        for step in range(new_tokens):
            ids[rows, ends + step] = model(ids)[rows, ends + step - 1].argmax(dim=-1)
    return [row[len(prompt) : len(prompt) + new_tokens] for row, prompt in zip(ids.tolist(), prompts, strict=True)]


def check_fit(model: Transformer, prompts: Sequence[Sequence[int]]) -> None:
    """Raises UserError for a prompt that leaves no room for a token."""
    context = model.config.max_seq_len
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) >= context:
            which = "the prompt" if len(prompts) == 1 else f"prompt {number}"
            raise UserError(
                f"{which} is {len(prompt)} tokens long and the model holds {context} (model.max_seq_len): shorten it"
            )


@torch.inference_mode()
def _generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    rooms: list[int],
    sampling: Sampling,
    generators: list[torch.Generator],
    eos_id: int | None,
    finished: set[int],
) -> Iterator[Token]:
    decoder = Decoder(model, prompts, max(rooms))
    held = [list(prompt) for prompt in prompts]
    logits = decoder.prefill()
    while True:
        normalisers = logits.logsumexp(dim=-1)
        for row, ids in enumerate(held):
            if row in finished:
                continue
            token = sample(logits[row], generators[row], sampling, ids)
            if token == eos_id:
                finished.add(row)
                continue
            ids.append(token)
            yield Token(row, token, float(logits[row, token] - normalisers[row]))
            if len(ids) == len(prompts[row]) + rooms[row]:
                finished.add(row)
        if len(finished) == len(prompts):
            return
        logits = decoder.step([ids[-1] for ids in held])


def sample(logits: Tensor, generator: torch.Generator, sampling: Sampling, held: Sequence[int] = ()) -> int:
    """One token from logits, fp32 [V]; `held` are the tokens before it."""
    if sampling.repetition_penalty != 1 and held:
        index = torch.tensor(held).unique()
        value = logits[index]
        penalty = sampling.repetition_penalty
        logits = logits.index_copy(0, index, torch.where(value > 0, value / penalty, value * penalty))
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()) / sampling.temperature  # the maximum first: a tiny temperature must not overflow
    if sampling.top_k is not None:
        smallest = logits.topk(min(sampling.top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probability = logits.softmax(dim=-1)
    if sampling.top_p is not None:
        ordered, index = probability.sort(descending=True, stable=True)
        likelier = ordered.cumsum(dim=-1) - ordered  # probability of the tokens before each one
        probability[index[likelier >= sampling.top_p]] = 0.0
    if sampling.min_p is not None:
        probability[probability < sampling.min_p * probability.max()] = 0.0
    return int(torch.multinomial(probability, 1, generator=generator))


class Decoder:
    """A batch of rows, padded on the left to one length, that grow together by a token each.

    The padding is a document of its own, which no other token sees. RoPE is relative, so a row's offset changes
    nothing. The prompts are torch's; the steps are csrc/decoder/'s on a CPU, in fp32 and bf16, and on a GPU the
    replay of a CUDA graph, one for each `bucket` of slots.

    Args:
        bucket: None, or how many slots at a time a torch step reads, whatever the device.
    """

    def __init__(
        self, model: Transformer, prompts: Sequence[Sequence[int]], new_tokens: int, bucket: int | None = None
    ) -> None:
        weight = model.embed_tokens.weight
        device = weight.device
        width = max(map(len, prompts))
        first = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
        native = bucket is None and device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
        self._model = model
        self._bucket = bucket or (GRAPH_SLOTS if device.type == "cuda" else 1)
        self._padded = bool(first.any())
        self._first = first if self._padded or self._bucket > 1 else None
        self._prompts = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        self._cache = KVCache.empty(
            model.config, len(prompts), self._round_up(width + new_tokens), device, weight.dtype
        )
        self._native = _native_decoder(model, self._cache, first) if native else None
        self._tokens = torch.zeros(len(prompts), 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def prefill(self) -> Tensor:
        """The prompts in one pass. Returns the logits after them, fp32 [B, V] on the CPU."""
        doc_start: Tensor | None = None
        if self._padded:
            assert self._first is not None
            slot = torch.arange(self._prompts.shape[1], device=self._prompts.device)
            first = self._first[:, None]
            doc_start = torch.where(slot < first, 0, first).int()
        return _on_host(self._model(self._prompts, doc_start=doc_start, cache=self._cache, last_only=True))

    def step(self, tokens: Sequence[int]) -> Tensor:
        """One more token in each row. Returns the logits after them, fp32 [B, V] on the CPU."""
        position = self._cache.length
        self._cache.length += 1
        if self._native is not None:
            return torch.from_numpy(self._native.step(np.array(tokens, np.int64), position))
        self._tokens.copy_(torch.tensor(tokens)[:, None])
        self._position.fill_(position)
        visible = self._round_up(self._cache.length)
        return _on_host(self._replay(visible) if self._tokens.is_cuda else self._compute(visible))

    def _compute(self, visible: int) -> Tensor:
        return self._model.step(self._tokens, self._cache, self._position, visible, self._first)

    def _replay(self, visible: int) -> Tensor:
        if visible not in self._graphs:
            beside = torch.cuda.Stream(self._tokens.device)
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(
                beside
            ):  # compiles kernels and fills caches, which a capture cannot; writes the same
                self._compute(visible)
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._compute(visible)
            self._graphs[visible] = graph, logits
        graph, logits = self._graphs[visible]
        graph.replay()
        return logits

    def _round_up(self, length: int) -> int:
        return math.ceil(length / self._bucket) * self._bucket


def _on_host(logits: Tensor) -> Tensor:
    return logits[:, -1].float().cpu()


def _native_decoder(model: Transformer, cache: KVCache, first: Tensor) -> _decoder.Decoder:
    """The step in C++, on the model's own weights and the cache."""
    config = model.config
    memory: list[Tensor] = []

    def address(tensor: Tensor) -> int:
        memory.append(tensor.detach().contiguous())
        return memory[-1].data_ptr()

    def norm(module: RMSNorm | None) -> int:
        return 0 if module is None else address(module.weight.float())

    layers = [
        [
            *(norm(module) for module in (layer.attn_norm, layer.mlp_norm, layer.attn.q_norm, layer.attn.k_norm)),
            *(address(module.weight) for module in (layer.attn.qkv, layer.attn.o_proj)),
            *(address(module.weight) for module in (layer.mlp.gate_up, layer.mlp.down_proj)),
        ]
        for layer in cast(Sequence[Block], model.layers)
    ]
    weights = (address(model.embed_tokens.weight), address(model.lm_head.weight), norm(model.norm))
    return _decoder.Decoder(
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        d_model=config.d_model,
        d_ff=config.d_ff,
        vocab_size=true_vocab_size(config),
        batch=len(first),
        max_len=cache.max_len,
        norm_eps=config.norm_eps,
        bf16=model.embed_tokens.weight.dtype == torch.bfloat16,
        layers=layers,
        rest=[*weights, *map(address, (cache.k, cache.v, cache.cos, cache.sin, first))],
        threads=torch.get_num_threads(),
        memory=memory,
    )
