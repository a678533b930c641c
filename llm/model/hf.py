"""The one mapping between our parameters and Hugging Face's: names, rows, and config.json of Llama and Qwen3."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llm.config import ModelConfig
from llm.model.transformer import VOCABULARY, parameter_shapes, true_vocab_size

_HF_NAMES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


_HF_LAYER_NAMES = {
    "attn_norm.weight": ("input_layernorm.weight",),
    "attn.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attn.q_norm.weight": ("self_attn.q_norm.weight",),
    "attn.k_norm.weight": ("self_attn.k_norm.weight",),
    "attn.o_proj.weight": ("self_attn.o_proj.weight",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down_proj.weight": ("mlp.down_proj.weight",),
}


def hf_names(name: str) -> tuple[str, ...]:
    """What Hugging Face's Llama and Qwen3 call the parts of our parameter `name`, in the order of its rows."""
    if name in _HF_NAMES:
        return (_HF_NAMES[name],)
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if match is None or match[2] not in _HF_LAYER_NAMES:
        raise KeyError(f"{name} is no parameter of this model")
    return tuple(f"model.layers.{match[1]}.{part}" for part in _HF_LAYER_NAMES[match[2]])


def row_split(config: ModelConfig, name: str) -> list[int]:
    """The rows of each part of hf_names(name); they leave out rows that pad the vocabulary."""
    if name in VOCABULARY:
        return [true_vocab_size(config)]
    if name.endswith("attn.qkv.weight"):
        return [heads * config.head_dim for heads in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
    if name.endswith("mlp.gate_up.weight"):
        return [config.d_ff, config.d_ff]
    return [parameter_shapes(config)[name][0]]


def to_hf(config: ModelConfig, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Our parameter, or a moment of it, as views by Hugging Face's names; without the vocabulary's padding."""
    names, rows = hf_names(name), row_split(config, name)
    return dict(zip(names, tensor[: sum(rows)].split(rows), strict=True))


def from_hf(config: ModelConfig, name: str, get: Callable[[str], Tensor]) -> Tensor:
    """Our parameter `name`, or a moment of it, from the tensors that `get` returns by Hugging Face's names.

    The inverse of to_hf; padding rows are zero. Raises ValueError where a tensor's shape does not fit the config.
    """
    names, split = hf_names(name), row_split(config, name)
    shape = parameter_shapes(config)[name]
    parts = []
    for hf_name, rows in zip(names, split, strict=True):
        part = get(hf_name)
        if part.shape != (rows, *shape[1:]):
            raise ValueError(f"{hf_name} has shape {list(part.shape)}, the configuration asks for {[rows, *shape[1:]]}")
        parts.append(part)
    padding = shape[0] - sum(part.shape[0] for part in parts)
    if padding:
        parts.append(parts[0].new_zeros(padding, *shape[1:]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def hf_config(config: ModelConfig, bos_token_id: int, eos_token_id: int) -> dict[str, Any]:
    """The config.json of a Hugging Face model folder with our weights: Llama, or Qwen3 where heads are normalised."""
    family = ("Qwen3ForCausalLM", "qwen3") if config.qk_norm else ("LlamaForCausalLM", "llama")
    return {
        "architectures": [family[0]],
        "model_type": family[1],
        "vocab_size": true_vocab_size(config),
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5
        "rope_theta": config.rope_theta,  # transformers 4
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def config_from_hf(tree: dict[str, Any]) -> ModelConfig:
    """The inverse of hf_config. Raises ValueError, naming the key, for what this model does not do."""
    family = tree.get("model_type")
    if family not in ("llama", "qwen3"):
        raise ValueError(f"model_type {family!r}: only llama and qwen3 are models of this shape")

    def need(key: str) -> Any:
        if tree.get(key) is None:
            raise ValueError(f"{key} is missing")
        return tree[key]

    head_dim = need("hidden_size") // need("num_attention_heads")
    rope = tree.get("rope_parameters") or tree.get("rope_scaling") or {}
    plain = {
        "hidden_act": (tree.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(tree.get("attention_bias")), False),
        "mlp_bias": (bool(tree.get("mlp_bias")), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
        "use_sliding_window": (bool(tree.get("use_sliding_window")), False),
        "head_dim": (tree.get("head_dim") or head_dim, head_dim),
    }
    for key, (found, supported) in plain.items():
        if found != supported:
            raise ValueError(f"{key} {found!r}: this model has {supported!r} only")
    return ModelConfig(
        n_layers=need("num_hidden_layers"),
        d_model=need("hidden_size"),
        n_heads=need("num_attention_heads"),
        n_kv_heads=tree.get("num_key_value_heads") or need("num_attention_heads"),
        d_ff=need("intermediate_size"),
        vocab_size=need("vocab_size"),
        max_seq_len=need("max_position_embeddings"),
        rope_theta=float(rope.get("rope_theta") or tree.get("rope_theta") or 10_000.0),
        norm_eps=need("rms_norm_eps"),
        qk_norm=family == "qwen3",
        tie_embeddings=bool(tree.get("tie_word_embeddings")),
    )
