"""Maps our parameters to Hugging Face's Llama and Qwen3 and back: names, rows, and config.json."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llm.config import ModelConfig
from llm.model.transformer import MLP, parameter_shapes, row_split, true_vocab_size

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
"""Each module with a weight -> Hugging Face's and GGUF's name for each matrix of its row_split, in that order."""

HIDDEN_ACTS = {"swiglu": "silu"}
"""MLP.activation -> Hugging Face's hidden_act."""
HIDDEN_ACT = HIDDEN_ACTS[MLP.activation.__name__]  # a missing entry fails here, not at the first save after hours


def _names(name: str) -> tuple[str | None, dict[str, str]]:
    """Returns (number of the layer of parameter `name`, its entry in NAMES)."""
    match = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.weight", name)
    if match is None or match[2] not in NAMES:
        raise KeyError(f"{name} is no parameter of this model")
    return match[1], NAMES[match[2]]


def hf_names(name: str) -> tuple[str, ...]:
    """Returns Hugging Face's names of the parts of our parameter `name`, in the order of its row_split."""
    layer, names = _names(name)
    prefix = "" if layer is None else f"model.layers.{layer}."
    return tuple(f"{prefix}{part}.weight" for part in names)


def gguf_names(name: str) -> tuple[str, ...]:
    """Returns GGUF's names of the same parts."""
    layer, names = _names(name)
    prefix = "" if layer is None else f"blk.{layer}."
    return tuple(f"{prefix}{part}.weight" for part in names.values())


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


def hf_config(config: ModelConfig, bos_token_id: int, eos_token_id: int) -> dict[str, Any]:
    """Makes the config.json of a Hugging Face model folder with our weights. Qwen3 is Llama with QK-norm."""
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
        "hidden_act": HIDDEN_ACT,
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
    """The inverse of hf_config. Raises ValueError, naming the key, for a feature that this model does not have."""
    family = tree.get("model_type")
    if family not in ("llama", "qwen3"):
        raise ValueError(f"model_type {family!r}: only llama and qwen3 are models of this shape")

    def need(key: str) -> Any:
        value = tree.get(key)
        if value is None:
            raise ValueError(f"{key} is missing")
        # Checked here, because the numbers are divided before ModelConfig checks them. A bool is an int to Python.
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"{key} is {value!r}, not a number above 0")
        return value

    # Some Qwen3 models have wider heads than this; the check of head_dim below rejects them.
    head_dim = need("hidden_size") // need("num_attention_heads")
    # transformers 5 writes rope_parameters; transformers 4 writes rope_scaling, null for plain RoPE. transformers 5
    # reads both, and rope_scaling wins.
    rope_key = "rope_scaling" if tree.get("rope_scaling") else "rope_parameters"
    rope = tree.get(rope_key) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{rope_key} is {rope!r}, not an object")
    # A missing key has the value that transformers assumes.
    plain = {
        "hidden_act": (tree.get("hidden_act", "silu"), HIDDEN_ACT),
        "attention_bias": (bool(tree.get("attention_bias")), False),
        "mlp_bias": (bool(tree.get("mlp_bias")), False),
        # In older configs the key is `type`.
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
        # Configs from before grouped-query attention lack the key.
        n_kv_heads=tree.get("num_key_value_heads") or need("num_attention_heads"),
        d_ff=need("intermediate_size"),
        vocab_size=need("vocab_size"),
        max_seq_len=need("max_position_embeddings"),
        # 10,000 is transformers' default for both families.
        rope_theta=float(rope.get("rope_theta") or tree.get("rope_theta") or 10_000.0),
        norm_eps=need("rms_norm_eps"),
        qk_norm=family == "qwen3",
        tie_embeddings=bool(tree.get("tie_word_embeddings")),
    )
