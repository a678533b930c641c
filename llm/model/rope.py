"""The angles of RoPE for a model, plain or scaled for longer sequences, bit for bit as transformers computes them.

The frequency of pair i is f_i = theta^(-2i / D). Over L = original_max_seq_len positions it has L f_i / (2 pi) periods.

    linear   f_i / factor (Chen et al. 2023, "Position Interpolation")
    llama3   f_i / factor below low_freq_factor periods, f_i above high_freq_factor, interpolated between (Llama 3.1)
    yarn     f_i / factor below beta_slow periods, f_i above beta_fast, interpolated between, linearly in i; cos and
             sin are multiplied by attention_factor (Peng et al. 2023, "YaRN")
"""

import math

import torch
from torch import Tensor

import kernels
from llm.config import ModelConfig, RopeScalingConfig


def cos_sin(config: ModelConfig, start: int, length: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, fp32 [length, head_size / 2], for positions start .. start + length - 1."""
    scaling, theta = config.rope_scaling, config.rope_theta
    if scaling is None:
        return kernels.rope_cos_sin(start, length, config.head_size, theta, device)
    frequency = scaled_frequency(scaling, kernels.rope_periods(config.head_size, theta), theta)
    cos, sin = kernels.rope_cos_sin(start, length, config.head_size, theta, device, frequency=frequency)
    factor = attention_factor(scaling)
    return cos * factor, sin * factor


def attention_factor(scaling: RopeScalingConfig) -> float:
    """Returns the factor of cos and sin."""
    return (scaling.attention_factor or yarn_factor(scaling.factor)) if scaling.kind == "yarn" else 1.0


def yarn_factor(factor: float, weight: float = 1.0) -> float:
    """Returns 1 + 0.1 weight ln(factor), the usual factor of cos and sin in YaRN (section 3.4 there)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def scaled_frequency(scaling: RopeScalingConfig, periods: Tensor, theta: float) -> Tensor:
    """Returns the frequencies, fp32 [D / 2]. periods: kernels.rope_periods, whose inverse is scaled."""
    # The order of the operations is that of transformers, because the last bits differ otherwise.
    frequency, factor = 1.0 / periods, scaling.factor
    if scaling.kind == "linear":
        return frequency / factor
    assert scaling.original_max_seq_len is not None
    length = scaling.original_max_seq_len
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 4.0
        wavelength = 2 * math.pi / frequency
        slow, fast = wavelength > length / low, wavelength < length / high
        scaled = torch.where(slow, frequency / factor, frequency)
        kept = (length / wavelength - low) / (high - low)
        between = (1 - kept) * scaled / factor + kept * scaled
        return torch.where(~slow & ~fast, between, scaled)
    dim = 2 * len(periods)
    # The (fractional) pair whose frequency has so many periods.
    first, last = (
        dim * math.log(length / (count * 2 * math.pi)) / (2 * math.log(theta))
        for count in (scaling.beta_fast or 32, scaling.beta_slow or 1)
    )
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    pair = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    kept = 1 - ((pair - first) / (last - first)).clamp(0, 1)
    return 1.0 / (factor * periods) * (1 - kept) + frequency * kept
