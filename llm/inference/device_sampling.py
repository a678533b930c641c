"""Chooses tokens on the device of the logits, as csrc/decoder/sampler.cpp does, in two kernels around a sort.

The options are data, not code, so one CUDA graph serves all of them (kernels.sampling). No op waits for the device. The
repetition penalty is missing, because it needs each sequence's tokens: with it, the C++ chooses
(llm.inference.sampling.Sampler).

For the same logits and random number it is the C++'s token, because distances from the largest logit are rounded alike
and the sums of probabilities are of integers, thus exact. Only e^-distance may differ in its last bits. So the two
choose differently where a random number is within about 1e-6 of the border between two tokens, or top-p or min-p within
as much of a token's border.
"""

import numpy as np
import torch
from torch import Tensor

import kernels
from llm.inference.sampling import Sampling


def can_choose(sampling: Sampling) -> bool:
    """Whether DeviceSampler knows all options."""
    return sampling.repetition_penalty == 1


def is_greedy(sampling: Sampling) -> bool:
    # In fp32, as in the C++, which takes a temperature of 1e-300 for 0.
    return bool(np.float32(sampling.temperature) == 0)


class DeviceSampler:
    """The options and the choices of a batch of sequences, in memory that keeps its address.

    choices: uint8 [12 B], all that the host needs: the memory of `tokens`, then of `logprobs`.
    tokens: int64 [B], the chosen tokens.
    logprobs: fp32 [B], their log-probabilities before any option, in nats; NaN if a logit of the sequence is NaN or
        infinite, or if all are -infinite.
    uniforms: fp64 [B], for `draw`: a random number 0 <= u < 1 for each sequence.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        # Copied from the host: on the stub GPU of the tests, kernels write nothing, and any other byte is no token.
        self.choices = torch.zeros(12 * batch, dtype=torch.uint8).to(device)
        self.tokens = self.choices[: 8 * batch].view(torch.int64)
        self.logprobs = self.choices[8 * batch :].view(torch.float32)
        self.uniforms = torch.zeros(batch, dtype=torch.float64, device=device)
        self._options = (
            torch.ones(1, device=device),
            torch.ones(1, dtype=torch.int64, device=device),
            torch.ones(1, dtype=torch.float64, device=device),
            torch.zeros(1, device=device),
        )

    def set(self, sampling: Sampling, vocab_size: int) -> None:
        """Sets the options of later calls of `draw`."""
        temperature, top_k, top_p, min_p = self._options
        temperature.fill_(sampling.temperature)
        top_k.fill_(vocab_size if sampling.top_k is None else min(sampling.top_k, vocab_size))
        top_p.fill_(1.0 if sampling.top_p is None else sampling.top_p)
        min_p.fill_(0.0 if sampling.min_p is None else sampling.min_p)

    def take_likeliest(self, logits: Tensor) -> None:
        """Chooses the most likely token of each row, and of equal ones that with the smallest id. logits: [B, V]."""
        kernels.likeliest_tokens(logits, (self.tokens, self.logprobs))

    def draw(self, logits: Tensor) -> None:
        """Chooses by `uniforms` among the tokens that the options leave. logits: [B, V], V at most 2^20."""
        kernels.drawn_tokens(logits, self.uniforms, *self._options, (self.tokens, self.logprobs))
