"""The files of a Hugging Face model folder besides its weights; checkpoints and exports are such folders."""

import json
from pathlib import Path

import torch

from llm.config import ModelConfig
from llm.data.base_tokenizer import Tokenizer
from llm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llm.model import hf_tokenizer
from llm.model.hf_config import hf_config


def write_hf_files(folder: Path, model: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> None:
    """Writes config.json and the tokenizer's files; of a tokenizer of ours, also a copy in Hugging Face's format.

    dtype: dtype of the weights in the folder.
    """
    described = hf_config(model, tokenizer.bos_id, tokenizer.eos_id)
    if len(tokenizer.eos_ids) > 1:
        described["eos_token_id"] = list(tokenizer.eos_ids)
    described["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")
    tokenizer.save(folder)
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.cuttable:
        hf_tokenizer.write_files(tokenizer, folder, model.max_seq_len)
