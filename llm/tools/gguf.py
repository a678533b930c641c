"""Writes the model as one GGUF file, for llama.cpp and programs built on it. Needs the package gguf.

For Llama, llama.cpp's RoPE rotates neighbouring dimensions; ours (as for Qwen2 and Qwen3) rotates the two halves of a
head, so the rows of a Llama's query and key weights are reordered. llama.cpp's SentencePiece tokenizer takes our pieces
and scores unchanged, but it reads a U+2581 in a text as a blank. Its Llama, Qwen2 and Qwen3 support only SwiGLU, and no
sliding window: within the window a model without one computes the same, so the file's context ends there.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kernels
from llm.config import ModelConfig
from llm.data.tokenizer import Tokenizer
from llm.display import tell
from llm.errors import UserError
from llm.model.hf import gguf_names, to_hf
from llm.model.hf_config import HIDDEN_ACT, hf_class
from llm.model.rope import attention_factor, scaled_frequency, yarn_factor
from llm.tools.gguf_tokenizer import add_tokenizer


def write_gguf(
    path: Path,
    model: ModelConfig,
    tokenizer: Tokenizer,
    weights: Iterator[tuple[str, torch.Tensor]],
    precision: str,
) -> None:
    """Writes weights (with our names) and tokenizer. precision: "fp32", or "bf16" with norms in fp32.

    Raises UserError if the package gguf is not installed, or if llama.cpp lacks something that model or tokenizer have.
    """
    # gguf is an optional extra.
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError("--format gguf needs the package gguf: pip install gguf") from None
    family = hf_class(model)[1]
    architecture = "llama" if family == "mistral" else family  # Mistral's models are Llamas to llama.cpp
    if lacks := _lacks(model, architecture):
        raise UserError(f"--format gguf: llama.cpp's {architecture} {lacks}; use hf")
    context = min(model.max_seq_len, model.sliding_window or model.max_seq_len)
    if context < model.max_seq_len:
        tell(
            f"{path.name}: for {context:,} tokens, the model's sliding window, which llama.cpp's {architecture} lacks",
            sys.stderr,
        )
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(context)
    writer.add_embedding_length(model.d_model)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(model.d_ff)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.n_kv_heads)
    writer.add_key_length(model.head_size)
    writer.add_value_length(model.head_size)
    writer.add_rope_dimension_count(model.head_size)
    writer.add_rope_freq_base(model.rope_theta)
    _add_rope_scaling(writer, model)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_vocab_size(model.rows)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if precision == "fp32" else gguf.LlamaFileType.MOSTLY_BF16)
    add_tokenizer(writer, tokenizer, model.rows)

    # to_hf leaves the padding rows out, because llama.cpp needs one row per token.
    # Tied weights are written once; without output.weight llama.cpp uses the embedding.
    for ours, value in weights:
        for name, tensor in zip(gguf_names(ours), to_hf(model, ours, value).values(), strict=True):
            array = tensor.float().numpy()
            if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
                array = _interleave_halves(array, model.head_size)
            # Norms stay in fp32, as llama.cpp's own converter keeps vectors.
            if precision == "bf16" and array.ndim == 2:
                # numpy has no bf16, so the package packs it into bytes.
                kind = gguf.GGMLQuantizationType.BF16
                writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, np.ascontiguousarray(array))
    # The order of the file; the writer rejects any other.
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _lacks(model: ModelConfig, architecture: str) -> str | None:
    """Returns what llama.cpp's architecture does not do as the model needs it; None: nothing."""
    scaling = model.rope_scaling
    if HIDDEN_ACT != "silu":
        return f"computes SwiGLU, this model {HIDDEN_ACT}"
    if architecture == "qwen3" and model.attention_bias != "none":
        return f"has no biases, this model model.attention_bias={model.attention_bias}"
    if architecture == "qwen2" and model.n_heads * model.head_size != model.d_model:
        return f"has heads of d_model / n_heads, this model model.head_dim={model.head_dim}"
    if scaling is not None and scaling.kind == "llama3" and architecture != "llama":
        return "has no factors of the frequencies, this model model.rope_scaling.kind=llama3"
    if scaling is not None and (scaling.beta_fast, scaling.beta_slow, scaling.truncate) != (None, None, None):
        return "has YaRN with the usual limits, this model others (model.rope_scaling)"
    return None


def _add_rope_scaling(writer: Any, model: ModelConfig) -> None:
    import gguf

    scaling = model.rope_scaling
    if scaling is None:
        return
    if scaling.kind == "llama3":
        # llama.cpp divides each frequency by such a factor.
        periods = kernels.rope_periods(model.head_size, model.rope_theta)
        factors = 1.0 / (periods * scaled_frequency(scaling, periods, model.rope_theta))
        writer.add_tensor("rope_freqs.weight", factors.numpy())
        return
    types = gguf.RopeScalingType
    writer.add_rope_scaling_type(types.LINEAR if scaling.kind == "linear" else types.YARN)
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_seq_len)
        # llama.cpp multiplies it by the usual factor.
        writer.add_rope_scaling_attn_factors(attention_factor(scaling) / yarn_factor(scaling.factor))


def _interleave_halves(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows (half, pair) of each head [heads * head_dim, ...] to (pair, half)."""
    halves = array.reshape(-1, 2, head_dim // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)
