"""The files of a Hugging Face model folder besides its weights; checkpoints and exports are such folders."""

import json
from pathlib import Path

import torch

from llm.config import ModelConfig
from llm.data.base_tokenizer import Tokenizer
from llm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llm.model import hf_tokenizer
from llm.model.hf_config import OUTPUT_BIAS_KEY, hf_config


def model_to_export(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Returns the model to write for other programs: itself, or a Llama in place of a Qwen2.

    transformers 5 reads the text for a Qwen2 with Qwen2Tokenizer, whatever the folder names, so other tokenizers would
    give other ids, silently. A Llama with biases also has them in the output projections, where zeros change nothing:
    they are the tensors that the result has and the model lacks.
    """
    if model.attention_bias == "qkv" and model.sliding_window is None and not tokenizer.is_read_beside("qwen2"):
        return model.model_copy(update={"attention_bias": "qkvo"})
    return model


def write_hf_files(
    folder: Path,
    model: ModelConfig,
    tokenizer: Tokenizer,
    dtype: torch.dtype = torch.float32,
    written: ModelConfig | None = None,
) -> None:
    """Writes config.json and the tokenizer's files; of a tokenizer of ours, also a copy in Hugging Face's format.

    dtype: dtype of the weights in the folder. written: the model whose weights it has; None: the model itself.
    """
    described = hf_config(written or model, tokenizer.bos_id, tokenizer.eos_id)
    if written is not None and written.attention_bias != model.attention_bias:
        described[OUTPUT_BIAS_KEY] = False
    if len(tokenizer.eos_ids) > 1:
        described["eos_token_id"] = list(tokenizer.eos_ids)
    described["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")
    tokenizer.save(folder)
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.cuttable:
        hf_tokenizer.write_files(tokenizer, folder, model.max_seq_len)
