"""Maps our model config to Hugging Face's config.json and back.

Our model is the union of four of its classes: Llama, Mistral (a sliding window), Qwen2 (biases of queries, keys and
values) and Qwen3 (QK-norm). Of a family that needs more, `config_from_hf` says what it needs.
"""

from typing import Any

from pydantic import ValidationError

from llm.config import ModelConfig, RopeScalingConfig
from llm.config_file import validation_problems
from llm.model.rope import attention_factor, yarn_factor
from llm.model.transformer import MLP

HIDDEN_ACTS = {"swiglu": "silu"}
"""MLP.activation -> Hugging Face's hidden_act."""
HIDDEN_ACT = HIDDEN_ACTS[MLP.activation.__name__]  # a missing entry fails here, not at the first save after hours

OUTPUT_BIAS_KEY = "attention_out_bias"
"""False in a Llama's config: the biases of its output projections are zeros that a model of ours has not. Seed-OSS has
the same key; programs that read a Llama ignore it."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "internlm")
"""The model_types that `config_from_hf` reads. Yi, TinyLlama, SmolLM2, Falcon3 and others are llama."""

_MIXTURE = "a mixture of experts"
MISSING = {
    "gemma": "norms that multiply by 1 + weight, embeddings times the root of the width, GELU",
    "gemma2": "norms after attention and MLP, norms that multiply by 1 + weight, capped logits, GELU",
    "gemma3": "norms after attention and MLP, norms that multiply by 1 + weight, two kinds of layers, GELU, images",
    "gemma3_text": "norms after attention and MLP, norms that multiply by 1 + weight, two kinds of layers, GELU",
    "olmo": "norms without weights",
    "olmo2": "norms after attention and MLP instead of before, QK-norm over all heads together",
    "olmo3": "norms after attention and MLP instead of before, QK-norm over all heads together, two kinds of layers",
    "smollm3": "layers without RoPE",
    "internlm2": "queries, keys and values in one matrix, mixed by head",
    "internlm3": "biases that its own program adds",
    "cohere": "attention and MLP side by side, LayerNorm, scaled logits",
    "granite": "scaled embeddings, residuals, attention and logits",
    "gpt2": "learned positions, LayerNorm, GELU",
    "gpt_neox": "attention and MLP side by side, LayerNorm, GELU",
    "falcon": "attention and MLP side by side, LayerNorm, GELU",
    "phi": "attention and MLP side by side, LayerNorm, GELU",
    "stablelm": "LayerNorm, RoPE on a part of each head",
    "deepseek_v2": "latent attention, " + _MIXTURE,
    "deepseek_v3": "latent attention, " + _MIXTURE,
    "mixtral": _MIXTURE,
    "qwen2_moe": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "olmoe": _MIXTURE,
    "gpt_oss": _MIXTURE + ", attention sinks, two kinds of layers",
}
"""model_type -> what it has and our model lacks."""


def hf_class(config: ModelConfig) -> tuple[str, str]:
    """Returns Hugging Face's class and model_type for a model. ModelConfig rejects what has no class."""
    if config.qk_norm:
        return "Qwen3ForCausalLM", "qwen3"
    if config.attention_bias == "qkv":
        return "Qwen2ForCausalLM", "qwen2"
    if config.sliding_window is not None:
        return "MistralForCausalLM", "mistral"
    return "LlamaForCausalLM", "llama"


def hf_config(config: ModelConfig, bos_token_id: int, eos_token_id: int) -> dict[str, Any]:
    """Makes the config.json of a Hugging Face model folder with our weights."""
    name, family = hf_class(config)
    described: dict[str, Any] = {
        "architectures": [name],
        "model_type": family,
        "vocab_size": config.rows,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": HIDDEN_ACT,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {**_hf_rope(config.rope_scaling), "rope_theta": config.rope_theta},  # transformers 5
        "rope_theta": config.rope_theta,  # transformers 4
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias == "qkvo",
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    if config.rope_scaling is not None:
        described["rope_scaling"] = _hf_rope(config.rope_scaling)  # transformers 4
    if config.sliding_window is not None:
        described["sliding_window"] = config.sliding_window
        if family in ("qwen2", "qwen3"):
            layers = {"layer_types": ["sliding_attention"] * config.n_layers, "max_window_layers": 0}
            described |= {"use_sliding_window": True, **layers}
    return described


def _hf_rope(scaling: RopeScalingConfig | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        rope["original_max_position_embeddings"] = scaling.original_max_seq_len
    if scaling.kind == "llama3":
        rope["low_freq_factor"] = scaling.low_freq_factor or 1.0
        rope["high_freq_factor"] = scaling.high_freq_factor or 4.0
    if scaling.kind == "yarn":
        # Written out, because programs have several formulas for a missing one.
        rope["attention_factor"] = attention_factor(scaling)
        stated = {key: getattr(scaling, key) for key in ("beta_fast", "beta_slow", "truncate")}
        rope |= {key: value for key, value in stated.items() if value is not None}
    return rope


def config_from_hf(tree: dict[str, Any]) -> ModelConfig:
    """The inverse of hf_config, for every folder of these classes.

    A missing key has the value that transformers assumes. vocab_size is the number of rows of the embedding. Raises
    ValueError with everything that our model lacks, each with its key.
    """
    family = tree.get("model_type")
    problems = _unsupported(tree, family)
    if family not in FAMILIES:
        # Its other keys may be named otherwise, so that they would be reported as missing.
        raise ValueError("; ".join(problems))

    def number(key: str, default: Any = None) -> Any:
        value = default if tree.get(key) is None else tree[key]
        # A bool is an int to Python.
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return value
        problems.append(f"{key} is missing" if value is None else f"{key} is {value!r}, not a number above 0")
        return 1

    heads, d_model = number("num_attention_heads"), number("hidden_size")
    # Only Qwen3 has a default other than this, and only Llama 1 has no num_key_value_heads.
    head_dim = number("head_dim", 128 if family == "qwen3" and "head_dim" not in tree else max(1, d_model // heads))
    rope = _rope(tree, problems)
    biased = (
        bool(tree.get("attention_bias"))
        if family in ("llama", "qwen3")
        else family == "internlm" and bool(tree.get("bias", True))
    )
    keys = {
        "n_layers": number("num_hidden_layers"),
        "d_model": d_model,
        "n_heads": heads,
        "n_kv_heads": number("num_key_value_heads", heads),
        "head_dim": head_dim,
        "d_ff": number("intermediate_size"),
        "vocab_size": number("vocab_size"),
        "max_seq_len": number("max_position_embeddings"),
        "rope_theta": rope.pop("theta"),
        "rope_scaling": rope or None,
        "sliding_window": _window(tree, family, problems),
        "norm_eps": number("rms_norm_eps", 1e-5 if family == "phi3" else 1e-6),
        "qk_norm": family == "qwen3",
        "attention_bias": "qkv" if family == "qwen2" else "qkvo" if biased else "none",
        "tie_embeddings": bool(tree.get("tie_word_embeddings")),
    }
    try:
        if not problems:
            return ModelConfig.model_validate(keys)
    except ValidationError as error:
        problems += validation_problems(error)
    raise ValueError("; ".join(problems))


def _unsupported(tree: dict[str, Any], family: Any) -> list[str]:
    """Returns what a config asks for that our model lacks, whatever its family."""
    problems = []
    if isinstance(family, str) and family in MISSING:
        problems.append(f"model_type {family!r}: this model has no {MISSING[family]}")
    elif family not in FAMILIES:
        problems.append(f"model_type {family!r}: only {', '.join(FAMILIES)} are models of this shape")
    expert_keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    # A missing key has the value that transformers assumes.
    plain = {
        "hidden_act": (tree.get("hidden_act") or tree.get("hidden_activation") or HIDDEN_ACT, HIDDEN_ACT),
        "mlp_bias": (bool(tree.get("mlp_bias")), False),
        "quantization_config": (tree.get("quantization_config") is not None, False),
        "is_encoder_decoder": (bool(tree.get("is_encoder_decoder")), False),
        "no_rope_layers": (_has_layers_without_rope(tree.get("no_rope_layers")), False),
        **{key: (tree.get(key) or 0, 0) for key in expert_keys},
        **{key: (tree.get(key), None) for key in ("attn_logit_softcapping", "final_logit_softcapping")},
    }
    different = {key: pair for key, pair in plain.items() if pair[0] != pair[1]}
    return problems + [f"{key} {found!r}: this model has {ours!r} only" for key, (found, ours) in different.items()]


def _has_layers_without_rope(layers: Any) -> bool:
    # A list with 0 for each layer without RoPE.
    return isinstance(layers, list) and not all(layers)


def _window(tree: dict[str, Any], family: str, problems: list[str]) -> int | None:
    """Returns the sliding window; None: none. Adds to the problems if not all layers have the same one."""
    if family in ("llama", "internlm"):
        return None
    types = tree.get("layer_types")
    if family in ("mistral", "phi3"):
        window = tree.get("sliding_window", 4096 if family == "mistral" else None)
        sliding = [True] if types is None else [kind == "sliding_attention" for kind in types]
    else:
        window = tree.get("sliding_window", 4096) if tree.get("use_sliding_window") else None
        first, layers = tree.get("max_window_layers", 28), tree.get("num_hidden_layers")
        if types is not None:
            sliding = [kind == "sliding_attention" for kind in types]
        else:
            # The layers from this one on have the window.
            sliding = [number >= first for number in range(layers if isinstance(layers, int) else 0)]
    if window is None or not any(sliding):
        return None
    if not all(sliding):
        problems.append("sliding_window: this model has it in all layers or in none, not in some (max_window_layers)")
    return window  # type: ignore[no-any-return]


def _rope(tree: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Returns the keys of model.rope_scaling, none if RoPE is plain, and "theta"."""
    # transformers 5 writes rope_parameters; transformers 4 writes rope_scaling, null for plain RoPE. transformers 5
    # reads both, and rope_scaling wins.
    key = "rope_scaling" if tree.get("rope_scaling") else "rope_parameters"
    rope = tree.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        problems.append(f"{key} is {rope!r}, not an object of numbers for all layers")
        rope = {}
    theta = rope.get("rope_theta") or tree.get("rope_theta") or 10_000.0
    part = rope.get("partial_rotary_factor") or tree.get("partial_rotary_factor") or 1.0
    if part != 1.0:
        problems.append(f"partial_rotary_factor {part!r}: this model rotates whole heads only")
    # In older configs the key is `type`.
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"theta": theta}
    if kind not in ("linear", "llama3", "yarn"):
        problems.append(f"rope_type {kind!r}: this model has default, linear, llama3 and yarn only")
        return {"theta": theta}
    scaling = {"kind": kind, "factor": rope.get("factor")}
    defaults: dict[str, Any] = {}
    if kind != "linear":
        longest = tree.get("max_position_embeddings")
        # In this order in transformers.
        original = tree.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        scaling["original_max_seq_len"] = original or longest
        if kind == "yarn" and scaling["factor"] is None and original and longest:
            scaling["factor"] = longest / original
    if kind == "llama3":
        defaults = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        problems += [f"{key}: rope_type llama3 needs {name}" for name in defaults if rope.get(name) is None]
    elif kind == "yarn" and isinstance(scaling["factor"], int | float) and scaling["factor"] > 0:
        usual = yarn_factor(scaling["factor"])
        defaults = {"attention_factor": usual, "beta_fast": 32, "beta_slow": 1, "truncate": True}
    scaling |= {name: rope.get(name) for name in defaults}
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    if "attention_factor" in defaults and scaling["attention_factor"] is None and above and below:
        # DeepSeek's form of the factor.
        scaling["attention_factor"] = yarn_factor(scaling["factor"], above) / yarn_factor(scaling["factor"], below)
    # Null where the value is the default, so that equal models have equal configs.
    return {"theta": theta} | {name: None if defaults.get(name) == value else value for name, value in scaling.items()}
