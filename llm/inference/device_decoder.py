"""Decodes on a GPU: a step is one CUDA graph, which computes the model, chooses the tokens and feeds them to the next.

The host starts a step before it waits for the tokens of the last one, so the GPU does not wait for it. A step is a
launch of the graph, a copy of 12 bytes a sequence to pinned memory (and one of 8 bytes with the random numbers, unless
the choice is greedy), and one wait.

**What is kept.** Making the cache and capturing graphs takes far longer than a step. So a model's last `Workspace` is
kept when its request ends, and the next request of as many sequences takes it, if it fits. Otherwise a new one replaces
it, with twice as many slots if they were too few. Its memory is that of one key-value cache (2 n_layers B Hkv slots
head_dim elements, slots a multiple of GRAPH_SLOTS) and of the activations of one step. It ends with the model, with
`forget`, or when the next request finds other weights (another address, dtype or device) or other modules. Weights that
change in place are seen, because graphs read their addresses. A second request at the same time makes its own.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.dispatch import requested
from llm.inference.device_sampling import DeviceSampler, is_greedy
from llm.inference.sampling import Sampler
from llm.model.transformer import KVCache, Transformer

GRAPH_SLOTS = 256  # cache slots per CUDA graph; a larger number reads more slots that are still empty

Signature = tuple[object, ...]


class Workspace:
    """The cache, the buffers and the graphs of a batch of `batch` sequences of up to `slots` tokens.

    It has no reference to the model, so that it can be kept by the model.
    """

    def __init__(self, model: Transformer, batch: int, slots: int) -> None:
        weight = model.embed_tokens.weight
        device = weight.device
        self.batch = batch
        self.cache = KVCache.empty(model.config, batch, slots, device, weight.dtype)
        self.sampler = DeviceSampler(batch, device)
        # Written in place, because a graph reads fixed addresses.
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.first = torch.zeros(batch, dtype=torch.int64, device=device)
        # Two of each, because the host reads or writes one while the device still uses the other.
        self.choices = [torch.empty_like(self.sampler.choices, device="cpu").pin_memory() for _ in range(2)]
        self.uniforms = [torch.empty_like(self.sampler.uniforms, device="cpu").pin_memory() for _ in range(2)]
        self.copied = [torch.cuda.Event() for _ in range(2)]
        # Graphs share their memory, because one runs after another, and nobody needs the logits of an earlier one.
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[str, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def replay(self, model: Transformer, choice: str, visible: int) -> Tensor:
        """Adds a token to each sequence and chooses the next one; see `_compute`.

        A graph has fixed shapes, so each number of visible slots needs a graph of its own.
        """
        if (choice, visible) not in self._graphs:
            self._graphs[choice, visible] = self._capture(model, choice, visible)
        graph, logits = self._graphs[choice, visible]
        graph.replay()
        return logits

    def _capture(self, model: Transformer, choice: str, visible: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        current, state = torch.cuda.current_stream(), (self.sampler.choices, self.position, self.first)
        before = [tensor.clone() for tensor in state]
        self._stream.wait_stream(current)
        # Compiles kernels and fills caches, which is not possible during a capture.
        with torch.cuda.stream(self._stream):
            self._compute(model, choice, visible)
        current.wait_stream(self._stream)
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)
        graph = torch.cuda.CUDAGraph()
        # A capture only records. Its stream is given, because torch's default one belongs to the first device.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            logits = self._compute(model, choice, visible)
        return graph, logits

    def _compute(self, model: Transformer, choice: str, visible: int) -> Tensor:
        """Computes the logits after `sampler.tokens`, the next tokens unless choice is "none", and the next position.

        Returns the logits [B, V].
        """
        window = model.config.sliding_window
        if window is not None:
            torch.maximum(self.first, self.position - (window - 1), out=self.first)
        logits = model.step(self.sampler.tokens[:, None], self.cache, self.position, visible, self.first)[:, -1]
        self.choose(choice, logits)
        self.position.add_(1)
        return logits

    def choose(self, choice: str, logits: Tensor) -> None:
        if choice == "greedy":
            self.sampler.take_likeliest(logits)
        elif choice == "draw":
            self.sampler.draw(logits)


# Weak: remembering a model must not keep its weights in memory.
_kept: WeakKeyDictionary[Transformer, tuple[Signature, Workspace]] = WeakKeyDictionary()


def forget(model: Transformer) -> None:
    """Frees what is kept for this model. Needed after a change that its weights and modules do not show."""
    _kept.pop(model, None)


@contextmanager
def workspace(model: Transformer, batch: int, slots: int) -> Iterator[Workspace]:
    """Lends the kept workspace, or a new one, which is then kept."""
    slots = _round_up(slots)
    signature = _signature(model)
    # Taken out, so that another request at the same time does not get it too.
    held_signature, lent = _kept.pop(model, (None, None))
    if lent is not None and (held_signature != signature or lent.batch != batch):
        lent = None
    if lent is None or lent.cache.max_len < slots:
        if lent is not None:
            # Doubled, so that a text that grows from request to request captures few times.
            slots = max(slots, min(2 * lent.cache.max_len, _round_up(model.config.max_seq_len)))
        lent = None  # its memory is free before the new one takes more
        with torch.cuda.device(model.embed_tokens.weight.device):
            lent = Workspace(model, batch, slots)
    keep = _can_be_kept(model)
    try:
        yield lent
    except Exception:
        keep = False
        raise
    finally:
        if keep:
            # The last step may still run, and the next request may come on another stream.
            torch.cuda.current_stream(lent.position.device).synchronize()
            _kept[model] = signature, lent


def _signature(model: Transformer) -> Signature:
    """What the graphs depend on, besides the values of the weights."""
    weights = tuple((p.data_ptr(), p.dtype, p.shape, p.device) for p in model.parameters())
    modules = tuple((id(module), type(module)) for module in model.modules())
    return weights, modules, id(model.config), requested()


def _can_be_kept(model: Transformer) -> bool:
    """Whether a step reads the weights themselves, not rounded copies, which change later than they do."""
    dtype = model.embed_tokens.weight.dtype
    return model.embed_tokens.compute_dtype in (None, dtype) and all(p.dtype == dtype for p in model.parameters())


def _round_up(slots: int) -> int:
    return math.ceil(slots / GRAPH_SLOTS) * GRAPH_SLOTS


class DeviceDecoder:
    """A request: a batch of sequences, padded on the left to one length. Every step adds a token to each of them.

    The padding is a separate document, which no other token attends to. RoPE is relative, so the offset of a sequence
    changes nothing.

    Args:
        new_tokens: the most tokens of a sequence. The workspace has slots for them and the longest prompt.
    """

    def __init__(
        self, model: Transformer, held: Workspace, prompts: Sequence[Sequence[int]], new_tokens: int, sampler: Sampler
    ) -> None:
        self._model, self._held, self._prompts = model, held, prompts
        self._new_tokens, self._sampler = new_tokens, sampler
        self._choice = "greedy" if is_greedy(sampler.sampling) else "draw"
        self._begun = self._read = 0  # numbers of tokens per sequence

    def prefill(self) -> NDArray[np.float32]:
        """Computes the prompts in one pass. Returns the logits after them [B, V], for a choice on the host."""
        with torch.cuda.device(self._held.position.device):
            return self._read_prompts().float().cpu().numpy()

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Adds one token to each sequence. Returns the logits after them [B, V], for a choice on the host."""
        with torch.cuda.device(self._held.position.device):
            self._held.sampler.tokens.copy_(torch.tensor(tokens))
            return self._replay("none").float().cpu().numpy()

    def _read_prompts(self) -> Tensor:
        """Computes the prompts in one pass. Returns the logits after them [B, V], on the device."""
        held, device = self._held, self._held.position.device
        width = max(map(len, self._prompts))
        # What an earlier request left there is masked, but 0 times a NaN of it would be NaN.
        held.cache.k.zero_()
        held.cache.v.zero_()
        held.cache.length = 0
        first = [width - len(prompt) for prompt in self._prompts]
        ids = [[0] * padding + list(prompt) for padding, prompt in zip(first, self._prompts, strict=True)]
        held.first.copy_(torch.tensor(first))
        held.position.fill_(width)
        doc_start: Tensor | None = None
        if any(first):
            slot, begin = torch.arange(width, device=device), held.first[:, None]
            doc_start = torch.where(slot < begin, 0, begin).int()
        prompts = torch.tensor(ids, device=device)
        return self._model(prompts, doc_start=doc_start, cache=held.cache, last_only=True)[:, -1]

    def choose(self, sequences: Sequence[int]) -> list[tuple[int, float]]:
        """Returns the next token of each of these sequences, and its log-probability before any option, in nats."""
        # A capture and its streams belong to the current device, which need not be the model's.
        with torch.cuda.device(self._held.position.device):
            if not self._begun:
                self._held.sampler.set(self._sampler.sampling, self._sampler.vocab_size)
                self._begin(self._read_prompts())
            else:
                # One step ahead of what is read.
                while self._begun < min(self._read + 2, self._new_tokens):
                    self._begin(None)
        slot = self._read % 2
        self._read += 1
        self._held.copied[slot].synchronize()
        choices, batch = self._held.choices[slot], self._held.batch
        tokens = choices[: 8 * batch].view(torch.int64).tolist()
        logprobs = choices[8 * batch :].view(torch.float32).tolist()
        return [(tokens[sequence], logprobs[sequence]) for sequence in sequences]

    def _begin(self, logits: Tensor | None) -> None:
        """Starts to choose the next tokens, from the prompt's logits or from those of a step, and to copy them."""
        held, slot = self._held, self._begun % 2
        self._begun += 1
        if self._choice == "draw":
            held.uniforms[slot].numpy()[:] = self._sampler.uniforms(range(held.batch))
            held.sampler.uniforms.copy_(held.uniforms[slot], non_blocking=True)
        if logits is None:
            self._replay(self._choice)
        else:
            held.choose(self._choice, logits)
        held.choices[slot].copy_(held.sampler.choices, non_blocking=True)
        held.copied[slot].record()

    def _replay(self, choice: str) -> Tensor:
        cache = self._held.cache
        cache.length += 1
        return self._held.replay(self._model, choice, _round_up(cache.length))
