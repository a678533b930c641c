"""Maps our parameters to those of Hugging Face's Llama family and back: names and rows."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from llm.config import ModelConfig
from llm.model.transformer import parameter_shapes, row_split

NAMES = {
    "embed_tokens": {"model.embed_tokens": "token_embd"},
    "attn_norm": {"input_layernorm": "attn_norm"},
    "attn.qkv": {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    "attn.q_norm": {"self_attn.q_norm": "attn_q_norm"},
    "attn.k_norm": {"self_attn.k_norm": "attn_k_norm"},
    "attn.o_proj": {"self_attn.o_proj": "attn_output"},
    "mlp_norm": {"post_attention_layernorm": "ffn_norm"},
    "mlp.gate_up": {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    "mlp.down_proj": {"mlp.down_proj": "ffn_down"},
    "norm": {"model.norm": "output_norm"},
    "lm_head": {"lm_head": "output"},
}
"""Each module with parameters -> Hugging Face's and GGUF's name for each part of its row_split, in that order."""


def _names(name: str) -> tuple[str | None, dict[str, str], str]:
    """Returns (number of the layer of parameter `name`, its module's entry in NAMES, "weight" or "bias")."""
    match = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
    if match is None or match[2] not in NAMES:
        raise KeyError(f"{name} is no parameter of this model")
    return match[1], NAMES[match[2]], match[3]


def hf_names(name: str) -> tuple[str, ...]:
    """Returns Hugging Face's names of the parts of our parameter `name`, in the order of its row_split."""
    layer, names, kind = _names(name)
    prefix = "" if layer is None else f"model.layers.{layer}."
    return tuple(f"{prefix}{part}.{kind}" for part in names)


def gguf_names(name: str) -> tuple[str, ...]:
    """Returns GGUF's names of the same parts."""
    layer, names, kind = _names(name)
    prefix = "" if layer is None else f"blk.{layer}."
    return tuple(f"{prefix}{part}.{kind}" for part in names.values())


def to_hf(config: ModelConfig, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Returns {Hugging Face's name: view} of our parameter or its moment, without the padding of the vocabulary."""
    names, rows = hf_names(name), row_split(config, name)
    return dict(zip(names, tensor[: sum(rows)].split(rows), strict=True))


def from_hf(config: ModelConfig, name: str, get: Callable[[str], Tensor]) -> Tensor:
    """Makes our parameter `name`, or its moment, from tensors that `get` returns by Hugging Face's names.

    The inverse of to_hf. Padding rows are zero. Raises ValueError if a tensor's shape does not fit the config.
    """
    names, split = hf_names(name), row_split(config, name)
    shape = parameter_shapes(config)[name]
    parts = []
    for hf_name, rows in zip(names, split, strict=True):
        part = get(hf_name)
        # Each part is checked, because torch.cat accepts wrong heights if their sum happens to be right.
        if part.shape != (rows, *shape[1:]):
            raise ValueError(f"{hf_name} has shape {list(part.shape)}, the configuration asks for {[rows, *shape[1:]]}")
        parts.append(part)
    padding = shape[0] - sum(part.shape[0] for part in parts)
    if padding:
        parts.append(parts[0].new_zeros(padding, *shape[1:]))
    # torch.cat would copy even a single tensor.
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def hf_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Returns {Hugging Face's name: shape} of every tensor of a checkpoint, in the model's order."""
    shapes: dict[str, torch.Size] = {}
    for name, shape in parameter_shapes(config).items():
        # meta, because only the shapes are needed here.
        shapes |= {key: part.shape for key, part in to_hf(config, name, torch.empty(shape, device="meta")).items()}
    return shapes
