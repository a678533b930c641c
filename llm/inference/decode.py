"""Generates tokens: a batch of prompts in one pass, then one token per sequence and step with a key-value cache."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.errors import UserError
from llm.inference import _decoder
from llm.inference.device_decoder import DeviceDecoder, workspace
from llm.inference.device_sampling import can_choose
from llm.inference.sampling import Sampler, Sampling
from llm.model.transformer import KVCache, Transformer, true_vocab_size

MAX_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.06}
"""Largest difference of logits that agree, relative to the largest logit. GELU for SiLU makes 0.1 or more. fp32
rounds by 1e-5, bf16 by 0.01 to 0.2: if bf16 exceeds its limit, `Decoder._agrees` compares in fp32.
"""

# Weak: remembering a model must not keep its weights in memory.
_told: WeakSet[Transformer] = WeakSet()
"""Models for which stderr already has the line that torch decodes them."""


class Token(NamedTuple):
    sequence: int  # index in the batch of the sequence that this token continues
    id: int
    logprob: float
    """Natural logarithm of the model's probability, before any option of Sampling."""


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    **sampling: float | None,
) -> Iterator[int]:
    """Yields the token ids that follow one prompt. sampling: fields of Sampling; the rest as for generate_batch."""
    options = Sampling(**sampling)  # type: ignore[arg-type]
    tokens = generate_batch(model, [prompt_ids], max_new_tokens=max_new_tokens, sampling=options, eos_ids=eos_ids)
    return (token.id for token in tokens)


def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: Sequence[int] = (),
    streams: Sequence[int] | None = None,
    finished: set[int] | None = None,
) -> Iterator[Token]:
    """Yields the tokens that follow each prompt, step by step: one token per step for each unfinished sequence.

    A sequence ends after max_new_tokens, before one of eos_ids, or when prompt and new tokens fill model.max_seq_len.
    Except for rounding, the tokens of a sequence do not depend on the other sequences.

    Args:
        prompts: token ids, at least one each; a document begins with BOS.
        streams: one number per sequence, added to sampling.seed. Sequences with the same number draw the same
            random numbers. None: 0 for all.
        finished: sequences that need no more tokens. The caller may add to it between tokens.

    Raises UserError for options out of range, for a prompt that leaves no room for a token, and, with the token, if
    the logits are not finite.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens}: must be at least 1")
    # This function is not a generator, so that the call itself raises errors, not the first token.
    check_fit(model, prompts)
    context = model.config.max_seq_len
    rooms = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    streams = [0] * len(prompts) if streams is None else streams
    sampler = Sampler(sampling, prompts, true_vocab_size(model.config), streams)
    return _generate(model, prompts, rooms, sampler, eos_ids, set() if finished is None else finished)


@torch.no_grad()
def greedy(model: torch.nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Returns the most likely `new_tokens` ids after each prompt, without a cache: one forward pass per token.

    It only calls the model's forward, always with the same shape, and never depends on a value. So ranks that hold
    parts of the weights can run it together, as ZeRO 3 needs. A prompt and its tokens must fit model.max_seq_len.
    """
    width = max(map(len, prompts)) + new_tokens
    device = next(model.parameters()).device
    # No token attends to tokens on its right, so the padding may have any id.
    ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device)
    sequences = torch.arange(len(prompts), device=device)
    ends = torch.tensor([len(prompt) for prompt in prompts], device=device)
    with torch.compiler.set_stance("force_eager"):  # compiling for this shape takes longer than it saves
        for step in range(new_tokens):
            ids[sequences, ends + step] = model(ids)[sequences, ends + step - 1].argmax(dim=-1)
    return [
        sequence[len(prompt) : len(prompt) + new_tokens] for sequence, prompt in zip(ids.tolist(), prompts, strict=True)
    ]


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
    sampler: Sampler,
    eos_ids: Sequence[int],
    finished: set[int],
) -> Iterator[Token]:
    counts = [0] * len(prompts)
    with _choices(model, prompts, max(rooms), sampler) as choose:
        while len(finished) < len(prompts):
            # All at once. The caller may finish a sequence between tokens, so this is asked again below. Finished
            # sequences stay in the batch, because its shape is fixed; their tokens are ignored.
            rows = [sequence for sequence in range(len(prompts)) if sequence not in finished]
            chosen = choose(rows)
            if any(math.isnan(logprob) for _, logprob in chosen):
                raise UserError(
                    "the model's logits are not finite: its weights are damaged, or too large for this precision; try "
                    "--precision fp32 or another checkpoint"
                )
            for sequence, (token, logprob) in zip(rows, chosen, strict=True):
                if sequence in finished:
                    continue
                if token in eos_ids:
                    finished.add(sequence)
                    continue
                counts[sequence] += 1
                yield Token(sequence, token, logprob)
                if counts[sequence] == rooms[sequence]:
                    finished.add(sequence)


@contextmanager
def _choices(
    model: Transformer, prompts: Sequence[Sequence[int]], new_tokens: int, sampler: Sampler
) -> Iterator[Callable[[Sequence[int]], list[tuple[int, float]]]]:
    """Gives the function that computes the next token of every sequence, and returns (token, logprob) of some."""
    if not is_on_gpu(model):
        yield _on_host(Decoder(model, prompts, new_tokens), sampler, len(prompts))
        return
    with workspace(model, len(prompts), max(map(len, prompts)) + new_tokens) as held:
        decoder = DeviceDecoder(model, held, prompts, new_tokens, sampler)
        yield decoder.choose if can_choose(sampler.sampling) else _on_host(decoder, sampler, len(prompts))


def is_on_gpu(model: Transformer) -> bool:
    return model.embed_tokens.weight.device.type == "cuda"


def _on_host(
    decoder: "Decoder | DeviceDecoder", sampler: Sampler, batch: int
) -> Callable[[Sequence[int]], list[tuple[int, float]]]:
    """Returns a function that chooses on the CPU from the decoder's logits."""
    last: list[int] = []

    def choose(sequences: Sequence[int]) -> list[tuple[int, float]]:
        logits: NDArray[np.float32] = decoder.step(last) if last else decoder.prefill()
        last.extend([0] * (batch - len(last)))
        chosen = sampler.choose(logits, sequences)
        for sequence, (token, _) in zip(sequences, chosen, strict=True):
            last[sequence] = token
        return chosen

    return choose


class Decoder:
    """A batch of sequences, padded on the left to one length. Every step adds a token to each of them.

    The padding is a separate document, which no other token attends to. RoPE is relative, so the offset of a sequence
    changes nothing. torch computes the prompts. The steps are computed by csrc/decoder/ on a CPU in fp32 and bf16, and
    otherwise by Transformer.step. GPUs have a decoder of their own (llm.inference.device_decoder).

    The C++ computes what the model's modules describe (llm.model.transformer.decoder_steps). Somebody may change a
    forward without its description, so both compute the prompt's last token. If their logits differ, or if the C++ does
    not know an op, torch decodes instead, with one line on stderr per model.

    Args:
        bucket: a torch step reads a multiple of this many slots. None: the fewest.
    """

    def __init__(
        self, model: Transformer, prompts: Sequence[Sequence[int]], new_tokens: int, bucket: int | None = None
    ) -> None:
        weight = model.embed_tokens.weight
        device = weight.device
        width = max(map(len, prompts))
        self._model = model
        self._window = model.config.sliding_window
        # In a step, query heads that share keys are queries of one head (Attention.forward), and need as many slots.
        group = model.config.n_heads // model.config.n_kv_heads
        self._bucket = bucket or group
        self._first = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
        self._is_padded = bool(self._first.any())
        self._prompts = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        # Rounded up, because the last step reads a whole bucket too.
        self._cache = KVCache.empty(
            model.config, len(prompts), self._round_up(width + new_tokens), device, weight.dtype
        )
        self._tokens = torch.zeros(len(prompts), 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._native: _decoder.Decoder | None = None
        # A caller who gives a bucket wants torch's steps. The C++ has no fp16.
        if bucket is None and device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16):
            try:
                self._native = native_decoder(model, self._cache, self._first)
            except ValueError as error:
                _decode_in_torch(model, str(error))

    def prefill(self) -> NDArray[np.float32]:
        """Computes the prompts in one pass. Returns the logits after them [B, V]."""
        doc_start: Tensor | None = None
        if self._is_padded:
            slot = torch.arange(self._prompts.shape[1], device=self._prompts.device)
            first = self._first[:, None]
            doc_start = torch.where(slot < first, 0, first).int()
        logits = _to_host(self._model(self._prompts, doc_start=doc_start, cache=self._cache, last_only=True))
        if self._native is not None and not self._agrees(self._native, logits):
            self._native = None
            _decode_in_torch(
                self._model, "its logits differ from the model's; does decoder_steps() tell what forward does?"
            )
        return logits.numpy()

    def _agrees(self, native: _decoder.Decoder, expected: Tensor) -> bool:
        """Whether the C++ computes the same logits for the prompts' last tokens, except for rounding."""
        last = self._cache.length - 1
        slots = [cached[:, :, :, last] for cached in (self._cache.k, self._cache.v)]
        # Both computations below overwrite this slot. The values of prefill are restored after the check.
        before = [slot.clone() for slot in slots]
        self._set_position(last)
        logits = torch.from_numpy(native.step(self._prompts[:, -1].numpy(), last))
        difference = (logits - expected).abs().max()
        limit = MAX_DIFFERENCE[self._model.embed_tokens.weight.dtype] * expected.abs().max()
        if difference > limit:  # possibly only bf16 rounding: the C++ keeps activations in fp32
            exact = self._compute_in_fp32(self._prompts[:, -1:])
            difference = (logits - exact).abs().max()
            limit = MAX_DIFFERENCE[torch.float32] * exact.abs().max()
        for slot, old in zip(slots, before, strict=True):
            slot.copy_(old)
        return bool(difference <= limit)  # False if one of them is not finite

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Adds one token to each sequence. Returns the logits after them [B, V].

        As an array, because a tensor would take longer to make and to unpack than greedy sampling takes.
        """
        position = self._cache.length
        # Set before the computation, because the new token attends to itself.
        self._cache.length += 1
        self._set_position(position)
        if self._native is not None:
            return self._native.step(np.array(tokens, np.int64), position)
        self._tokens.copy_(torch.tensor(tokens)[:, None])
        return _to_host(self._compute(self._round_up(self._cache.length))).numpy()

    def _set_position(self, position: int) -> None:
        """Sets the slot of a step's tokens, and the first slot that they see with a sliding window."""
        self._position.fill_(position)
        if self._window is not None:
            # In place, because the C++ reads a fixed address.
            self._first.clamp_(min=position - self._window + 1)

    def _compute(self, visible: int) -> Tensor:
        # None: no mask, which is faster.
        first = self._first if self._is_padded or self._bucket > 1 or self._window is not None else None
        return self._model.step(self._tokens, self._cache, self._position, visible, first)

    def _compute_in_fp32(self, tokens: Tensor) -> Tensor:
        """Returns the logits of a step in torch with fp32 activations and unchanged weights."""
        embedding = self._model.embed_tokens
        self._tokens.copy_(tokens)
        dtype, embedding.compute_dtype = embedding.compute_dtype, torch.float32
        try:
            return _to_host(self._compute(self._round_up(self._cache.length)))
        finally:
            embedding.compute_dtype = dtype

    def _round_up(self, length: int) -> int:
        return math.ceil(length / self._bucket) * self._bucket


def _to_host(logits: Tensor) -> Tensor:
    return logits[:, -1].float().cpu()


def native_decoder(model: Transformer, cache: KVCache, first: Tensor) -> _decoder.Decoder:
    """Makes the C++ decoder of the ops that the model describes. It reads the model's own weights and the cache.

    first: int64 [B], each sequence's first slot, read again at each step.

    Raises ValueError for an op or a size that the C++ does not support.
    """
    config, dtype = model.config, model.embed_tokens.weight.dtype
    # The C++ gets addresses and keeps this list, so that the tensors live as long as the decoder.
    memory: list[Tensor] = []

    def address(tensor: Tensor) -> int:
        # The cache is contiguous, so contiguous() returns it without a copy: the C++ must write into it.
        memory.append(tensor.detach().contiguous())
        return memory[-1].data_ptr()

    def sized(weight: Tensor | None) -> tuple[int, int]:
        if weight is None:
            return 0, 0
        # The C++ needs norms in fp32 and all matrices in one dtype.
        return address(weight.to(torch.float32 if weight.dim() == 1 else dtype)), weight.numel()

    steps = model.decoder_steps()
    # Each attention step uses one layer of the cache: one more would write past its end.
    if sum(step.op == "attention" for step in steps) != config.n_layers:
        raise ValueError(f"its cache has {config.n_layers} layers, and the model another number of 'attention'")
    return _decoder.Decoder(
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_size,
        d_model=config.d_model,
        d_ff=config.d_ff,
        vocab_size=true_vocab_size(config),
        batch=len(first),
        max_len=cache.max_len,
        norm_eps=config.norm_eps,
        bf16=dtype == torch.bfloat16,
        steps=[(step.op, [sized(weight) for weight in step.weights]) for step in steps],
        cache=[address(tensor) for tensor in (cache.k, cache.v, cache.cos, cache.sin, first)],
        threads=torch.get_num_threads(),
        memory=memory,
    )


def _decode_in_torch(model: Transformer, reason: str) -> None:
    if model not in _told:
        _told.add(model)
        print(f"decoding    in torch, not in C++: {reason}", file=sys.stderr, flush=True)
