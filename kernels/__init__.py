"""llm-from-scratch: the operations of the model. Each has a plain torch reference (kernels.reference) and backends.

kernels.dispatch chooses the backend.
"""

from kernels.attention import attention, attention_mask
from kernels.cached_attention import cached_attention, runs_in_place
from kernels.cross_entropy import cross_entropy
from kernels.dispatch import describe, set_backend
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.norm_rope import norm_rope
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope, rope_cos_sin, rope_periods
from kernels.sampling import drawn_tokens, likeliest_tokens
from kernels.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "attention",
    "attention_mask",
    "cached_attention",
    "cross_entropy",
    "describe",
    "drawn_tokens",
    "likeliest_tokens",
    "linear_cross_entropy",
    "norm_rope",
    "rms_norm",
    "rope",
    "rope_cos_sin",
    "rope_periods",
    "runs_in_place",
    "set_backend",
    "swiglu",
]
