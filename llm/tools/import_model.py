"""`llm import`: makes a checkpoint from a Hugging Face folder with a Llama or Qwen3 model."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from llm.atomic import check_absent
from llm.config import Config, ModelConfig, TrainConfig, validation_problems
from llm.data.shards import ORDER_VERSION
from llm.data.tokenizer import Tokenizer, load_tokenizer
from llm.errors import UserError
from llm.model.checkpoint import MODEL_FILE, DataState, TrainState
from llm.model.hf import config_from_hf, from_hf, hf_names, to_hf
from llm.model.tensor_files import index_file, read_index
from llm.model.transformer import parameter_count, parameter_shapes
from llm.training.saving import write_checkpoint

Weights = Iterator[tuple[str, torch.Tensor]]


def import_hf(
    source: str | os.PathLike[str], out_dir: str | os.PathLike[str], *, tok: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Makes a checkpoint, without optimizer state, from a Hugging Face folder with a Llama or Qwen3 model.

    `train.init_from` starts a run from it; `llm eval`, `generate` and `export` accept it as any other.

    Args:
        source: a folder with config.json and safetensors in any number of files, in fp32, bf16 or fp16.
        out_dir: the checkpoint to make; it is complete or absent.
        tok: the model's SentencePiece tokenizer; default: tokenizer.model in the folder.

    Returns out_dir, parameters and model (the config section to train it with). Raises UserError for a folder without
    such a model, a model that ours cannot represent, or a tokenizer that does not fit.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; --from names a Hugging Face model folder")
    # Checked before the weights are read, which takes long.
    check_absent(Path(out_dir))
    described = _read_json(source / "config.json")
    try:
        model = config_from_hf(described)
    except ValidationError as error:
        raise UserError(f"{source / 'config.json'}: {'; '.join(validation_problems(error))}") from None
    # A broken file may have any type in any place, and numbers beyond the range of a float.
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{source / 'config.json'}: {error}") from None
    tokenizer = _tokenizer_of(source, tok, model)
    tensors: dict[str, torch.Tensor] = {}
    # Converted to our layout and back, because from_hf checks every shape.
    for name, value in _hf_weights(source, model):
        # A checkpoint is fp32 (tensor_files), and safetensors saves only contiguous tensors.
        tensors |= {key: part.float().contiguous() for key, part in to_hf(model, name, value).items()}
    length = model.max_seq_len
    state = TrainState(0, 0, DataState("", length, 0, ORDER_VERSION, 0))
    # A Config needs these two numbers, but no training used them.
    config = Config(model=model, train=TrainConfig(total_tokens=length, global_batch_tokens=length))
    write_checkpoint(Path(out_dir), {"model": tensors}, config, state, tokenizer)
    shape = " ".join(f"model.{key}={str(value).lower()}" for key, value in model.model_dump().items())
    print(f"{out_dir}: {parameter_count(model):,} parameters", file=sys.stderr)
    print(f"to train it: train.init_from={out_dir} {shape}", file=sys.stderr)
    return {"out_dir": str(out_dir), "parameters": parameter_count(model), "model": model.model_dump()}


def _read_json(path: Path) -> dict[str, Any]:
    # Checked first, because reading a pipe would wait for ever.
    if not path.is_file():
        raise UserError(f"{path.parent}: is no Hugging Face model folder (no {path.name} in it)")
    try:
        tree = json.loads(path.read_text("utf-8"))
    # RecursionError: nested too deeply.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a JSON object")
    return tree


def _tokenizer_of(source: Path, tok: str | os.PathLike[str] | None, model: ModelConfig) -> Tokenizer:
    own = source / "tokenizer.model"
    path = own if tok is None else Path(tok)
    if tok is None and not own.is_file():
        raise UserError(f"{source}: has no tokenizer.model; name the model's SentencePiece tokenizer with --tok")
    # load_tokenizer below reports a missing file.
    if tok is not None and own.is_file() and path.is_file() and path.read_bytes() != own.read_bytes():
        raise UserError(f"{tok}: not the tokenizer of {source}; leave --tok out to use its own")
    tokenizer = load_tokenizer(path)
    # A tokenizer with more ids than the embedding has rows would fail only when such an id occurs.
    if tokenizer.vocab_size != model.vocab_size:
        raise UserError(
            f"{path}: has {tokenizer.vocab_size:,} pieces and the model a vocabulary of {model.vocab_size:,}; "
            "name the model's own tokenizer with --tok"
        )
    return tokenizer


def _hf_weights(source: Path, model: ModelConfig) -> Weights:
    """Reads our parameters from one safetensors file, or several with an index. Every tensor there must be used."""
    if (source / index_file("model")).is_file():
        paths = {name: source / file for name, file in read_index(source / index_file("model")).items()}
    elif (source / MODEL_FILE).is_file():
        paths = dict.fromkeys(_names_in(source / MODEL_FILE), source / MODEL_FILE)
    else:
        # Unpickling a foreign file can run any code.
        raise UserError(f"{source}: has no {MODEL_FILE}; other formats, such as pickles, are not read")
    known = {part for name in parameter_shapes(model) for part in hf_names(name)}
    if model.tie_embeddings:
        known.add("lm_head.weight")  # some programs write the shared weight twice
    # A tensor that we cannot use, such as a bias, means that the model computes something else.
    # Old versions of transformers saved inv_freq, which follows from rope_theta.
    strange = sorted(name for name in paths if name not in known and not name.endswith("rotary_emb.inv_freq"))
    if strange:
        raise UserError(f"{source}: {len(strange)} tensors have no place in this model, such as {strange[0]}")

    def get(name: str) -> torch.Tensor:
        if name not in paths:
            raise UserError(f"{source}: no tensor {name}")
        if not paths[name].is_file():
            raise UserError(f"{paths[name]}: missing; the folder is incomplete")
        try:
            with safe_open(paths[name], framework="pt") as opened:
                tensor: torch.Tensor = opened.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{paths[name]}: damaged ({error})") from None
        # Quantised weights have no meaning without their scales, which our format does not have.
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{paths[name]}: {name} is {tensor.dtype}; only fp32, bf16 and fp16 weights are read")
        return tensor

    for name in parameter_shapes(model):
        try:
            value = from_hf(model, name, get)
        except ValueError as error:
            raise UserError(f"{source}: {error}") from None
        # A checkpoint with such a number would be refused as damaged when it is read.
        if not value.isfinite().all():
            raise UserError(f"{source}: damaged ({' or '.join(hf_names(name))} holds a number that is not finite)")
        yield name, value


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error})") from None
