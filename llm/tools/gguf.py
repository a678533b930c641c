"""Writes the model as one GGUF file, for llama.cpp and programs built on it. Needs the package gguf.

For Llama, llama.cpp's RoPE rotates neighbouring dimensions; ours (as for Qwen3) rotates the two halves of a head, so
the rows of a Llama's query and key weights are reordered. llama.cpp's SentencePiece tokenizer takes our pieces and
scores unchanged, but it reads a U+2581 in a text as a blank. Its Llama and Qwen3 support only SwiGLU.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from llm.config import ModelConfig
from llm.data.tokenizer import Tokenizer
from llm.errors import UserError
from llm.model.hf import HIDDEN_ACT, gguf_names, to_hf


def write_gguf(
    path: Path,
    model: ModelConfig,
    tokenizer: Tokenizer,
    weights: Iterator[tuple[str, torch.Tensor]],
    precision: str,
) -> None:
    """Writes weights (with our names) and tokenizer. precision: "fp32", or "bf16" with norms in fp32.

    Raises UserError if the package gguf is not installed, or if llama.cpp lacks the model's activation.
    """
    # gguf is an optional extra.
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError("--format gguf needs the package gguf: pip install gguf") from None
    architecture = "qwen3" if model.qk_norm else "llama"
    if HIDDEN_ACT != "silu":
        raise UserError(f"--format gguf: llama.cpp's {architecture} computes SwiGLU, this model {HIDDEN_ACT}; use hf")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(model.max_seq_len)
    writer.add_embedding_length(model.d_model)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(model.d_ff)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.n_kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_vocab_size(tokenizer.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if precision == "fp32" else gguf.LlamaFileType.MOSTLY_BF16)

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    ids = range(tokenizer.vocab_size)
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(i).encode() for i in ids])
    writer.add_token_scores([processor.get_score(i) for i in ids])
    writer.add_token_types(
        [
            kinds.UNKNOWN
            if processor.is_unknown(i)
            else kinds.CONTROL
            if processor.is_control(i)
            else kinds.BYTE
            if processor.is_byte(i)
            else kinds.NORMAL
            for i in ids
        ]
    )
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(True)
    # By default llama.cpp puts a blank before each text, as Llama's tokenizer does; ours does not.
    writer.add_add_space_prefix(False)
    writer.add_remove_extra_whitespaces(False)

    # to_hf leaves the padding rows out, because llama.cpp needs one row per token.
    # Tied weights are written once; without output.weight llama.cpp uses the embedding.
    for ours, value in weights:
        for name, tensor in zip(gguf_names(ours), to_hf(model, ours, value).values(), strict=True):
            array = tensor.float().numpy()
            if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
                array = _interleave_halves(array, model.head_dim)
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


def _interleave_halves(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows (half, pair) of each head [heads * head_dim, D] to (pair, half)."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)
