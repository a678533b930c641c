"""The files of a Hugging Face model folder besides its weights; checkpoints and exports are such folders."""

import json
from pathlib import Path

import torch

from llm.config import ModelConfig
from llm.data.tokenizer import Tokenizer
from llm.model import hf_tokenizer
from llm.model.hf_config import hf_config


def write_hf_files(folder: Path, model: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> None:
    """Writes config.json, tokenizer.model and, if it gives the same ids there, the tokenizer in Hugging Face's format.

    dtype: dtype of the weights in the folder.
    """
    described = hf_config(model, tokenizer.bos_id, tokenizer.eos_id)
    described["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")
    # Not copied from its path, where another tokenizer may be by now.
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    if hf_tokenizer.is_supported(tokenizer):
        hf_tokenizer.write_files(tokenizer, folder, model.max_seq_len)
