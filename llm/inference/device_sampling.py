"""Chooses tokens on the device of the logits: those that csrc/decoder/sampler.cpp chooses, in a fixed number of ops.

The options are data, not code, so one CUDA graph serves all of them. No op waits for the device. The repetition penalty
is missing, because it needs each sequence's tokens: with it, the C++ chooses (llm.inference.sampling.Sampler).

For the same logits and random number it is the C++'s token, because distances from the largest logit are rounded alike
and the sums of probabilities are of integers, thus exact. Only e^-distance may differ in its last bits. So the two
choose differently where a random number is within about 1e-6 of the border between two tokens, or top-p or min-p within
as much of a token's border.
"""

import numpy as np
import torch
from torch import Tensor

from llm.inference.sampling import Sampling

UNIT = float(2**42)
"""Probabilities are multiples of its inverse, relative to the largest. 2^20 of them add up to less than 2^63."""
SIGNLESS = 2**31 - 1


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
        self.choices = torch.zeros(12 * batch, dtype=torch.uint8, device=device)
        self.tokens = self.choices[: 8 * batch].view(torch.int64)
        self.logprobs = self.choices[8 * batch :].view(torch.float32)
        self.uniforms = torch.zeros(batch, dtype=torch.float64, device=device)
        self._temperature = torch.ones(1, device=device)
        self._top_k = torch.ones(1, dtype=torch.int64, device=device)
        self._top_p = torch.ones(1, dtype=torch.float64, device=device)
        self._min_p = torch.zeros(1, device=device)

    def set(self, sampling: Sampling, vocab_size: int) -> None:
        """Sets the options of later calls of `draw`."""
        self._temperature.fill_(sampling.temperature)
        self._top_k.fill_(vocab_size if sampling.top_k is None else min(sampling.top_k, vocab_size))
        self._top_p.fill_(1.0 if sampling.top_p is None else sampling.top_p)
        self._min_p.fill_(0.0 if sampling.min_p is None else sampling.min_p)

    def take_likeliest(self, logits: Tensor) -> None:
        """Chooses the most likely token of each row, and of equal ones that with the smallest id. logits: [B, V]."""
        logits = logits.float()
        torch.argmax(logits, dim=-1, out=self.tokens)
        self._set_logprobs(logits)

    def draw(self, logits: Tensor) -> None:
        """Chooses by `uniforms` among the tokens that the options leave. logits: [B, V], V at most 2^20."""
        logits = logits.float()
        batch, width = logits.shape
        # The difference first: a tiny temperature must not overflow. + 0: of -0.0 and 0.0 it is -0.0, whose bits are
        # large. The temperature is a tensor, because a GPU multiplies by the inverse of a number.
        distances = (logits.amax(dim=-1, keepdim=True) - logits + 0.0) / self._temperature
        # The order of numbers >= 0 is that of their bits. One sort for the whole batch, because torch sorts a few long
        # rows one after another. The sign of a NaN must not bring its row among the others.
        row = torch.arange(batch, device=logits.device)[:, None]
        keys = (distances.view(torch.int32) & SIGNLESS) | (row << 32)
        order = torch.sort(keys.flatten(), stable=True).indices  # stable: of equal tokens the smallest id comes first
        distances = distances.flatten()[order].view(batch, width)
        weights = torch.exp(-distances)
        border = distances.index_select(1, self._top_k - 1)
        masses = torch.where(distances <= border, weights * UNIT, 0).to(torch.int64)
        sums = masses.cumsum(dim=-1)
        total = sums[:, -1:]
        wanted = torch.ceil(self._top_p * total).to(torch.int64).clamp_(min=1)
        left = sums.gather(1, _reached(sums, torch.minimum(wanted, total)))  # after top-p
        likely = torch.where(weights >= self._min_p, masses, 0).sum(dim=-1, keepdim=True)
        left = torch.minimum(left, likely)
        target = (self.uniforms[:, None] * left).to(torch.int64) + 1
        chosen = _reached(sums, torch.minimum(target, left))  # the product may have been rounded up to `left`
        self.tokens.copy_((order.view(batch, width).gather(1, chosen) - row * width)[:, 0])
        self._set_logprobs(logits)

    def _set_logprobs(self, logits: Tensor) -> None:
        torch.gather(logits.log_softmax(dim=-1), 1, self.tokens[:, None], out=self.logprobs[:, None])


def _reached(sums: Tensor, target: Tensor) -> Tensor:
    """Returns the first place [B, 1] of each row at which the sum reaches the target [B, 1]."""
    # Beyond the end only in a row that is not finite.
    return torch.searchsorted(sums, target).clamp_(max=sums.shape[1] - 1)
