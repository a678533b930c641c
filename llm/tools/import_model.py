"""`llm import`: makes a checkpoint from a Hugging Face folder with a model of the Llama family.

The folder is checked as a whole, from its config, its tokenizer and the headers of its weights, before any weight is
read. The weights are then copied in blocks of rows, so that a model needs no more memory than its largest tensor.
"""

import itertools
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from llm.atomic import check_absent, output_directory
from llm.config import Config, ModelConfig, RopeScalingConfig, TrainConfig
from llm.config_file import validation_problems
from llm.data.shards import ORDER_VERSION
from llm.data.tokenizer import Tokenizer, load_tokenizer
from llm.display import Display, tell
from llm.errors import UserError
from llm.model.checkpoint import DataState, TrainState
from llm.model.checkpoint_path import MODEL_FILE, STATE_FILE, locate, saved
from llm.model.checksums import Checksums
from llm.model.hf import hf_shapes
from llm.model.hf_config import OUTPUT_BIAS_KEY, config_from_hf
from llm.model.hf_folder import write_hf_files
from llm.model.tensor_files import index_file, read_index, utf8_path, write_tensors
from llm.model.transformer import parameter_count
from llm.training.saving import write_description

ScalingKind = Literal["linear", "llama3", "yarn"]
TRAIN_FILE = "train.json"
USUAL_SEQ_LEN = 2048
"""Sequence length of the printed command, unless the model is for shorter ones."""
BLOCK_ELEMENTS = 1 << 24
"""Elements of a tensor that are converted at once: 64 MiB in fp32."""
DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Part:
    """Where a tensor is: rows of a tensor in a file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    first_row: int = 0


def import_hf(
    source: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    tok: str | os.PathLike[str] | None = None,
    max_seq_len: int | None = None,
    rope_scaling: ScalingKind | None = None,
) -> dict[str, Any]:
    """Makes a checkpoint, without optimizer state, from a Hugging Face folder with a model of the Llama family.

    `train.init_from` starts a run from it; `llm eval`, `generate` and `export` accept it as any other.

    Args:
        source: a folder with config.json and safetensors in any number of files, in fp32, bf16 or fp16. A checkpoint is
            such a folder; of a run's folder it is the latest one.
        out_dir: the checkpoint to make; it is complete or absent.
        tok: the model's tokenizer, as for `load_tokenizer`; default: the one in the folder.
        max_seq_len: longest sequence of the new model; None: that of the source.
        rope_scaling: how RoPE's frequencies are scaled for the longer sequences; None: as in the source.

    Returns out_dir, parameters, model (the config section to train it with) and command (which trains it on). Raises
    UserError, with every reason at once, for a folder without such a model, a model that ours cannot represent, or a
    tokenizer that does not fit.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; --from names a Hugging Face model folder")
    if not (source / "config.json").exists() and saved(source):
        source = locate(source)
    # Checked before the weights are read, which takes long.
    check_absent(Path(out_dir))
    model, tokenizer, parts = _examine(source, tok)
    model = _lengthened(model, max_seq_len, rope_scaling)
    length = model.max_seq_len
    state = TrainState(0, 0, DataState("", length, 0, ORDER_VERSION, 0))
    # A Config needs these two numbers, but no training used them.
    config = Config(model=model, train=TrainConfig(total_tokens=length, global_batch_tokens=length))
    shapes = hf_shapes(model)
    with output_directory(out_dir, last=STATE_FILE) as folder, Display("importing", len(shapes)) as display:
        write_hf_files(folder, model, tokenizer)
        done = itertools.count()

        def blocks(name: str) -> Iterator[torch.Tensor]:
            display.update(next(done), f"importing {name}")
            return _blocks(parts[name], shapes[name])

        tensors = write_tensors(folder / MODEL_FILE, shapes, blocks)
        write_description(folder, config, state, tokenizer, Checksums(tensors={"model": tensors}))
        # Without a checksum, because it is for the user to change.
        (folder / TRAIN_FILE).write_text(json.dumps(_training(Path(out_dir), model), indent=2) + "\n", "utf-8")
    command = _command(Path(out_dir), model)
    tell(f"{out_dir}: {parameter_count(model):,} parameters", sys.stderr)
    tell("to train it on a text of yours, in place of TEXT:", sys.stderr)
    tell(f"  {command}", sys.stderr)
    return {
        "out_dir": str(out_dir),
        "parameters": parameter_count(model),
        "model": model.model_dump(),
        "command": command,
    }


def _training(out_dir: Path, model: ModelConfig) -> dict[str, Any]:
    """Returns a config that goes on training the model; the rest follows from rules (llm.training.rules)."""
    return {
        "model": model.model_dump(exclude_defaults=True) | {"vocab_size": model.vocab_size, "qk_norm": model.qk_norm},
        "data": {"path": f"data/{out_dir.name}"},
        # As other projects train; a change to Muon would cost what the first steps unlearn.
        "optimizer": {"kind": "adamw"},
        "train": {"init_from": str(out_dir)},
        "checkpoint": {"dir": f"{out_dir}-trained"},
    }


def _command(out_dir: Path, model: ModelConfig) -> str:
    seq_len = min(model.max_seq_len, USUAL_SEQ_LEN)
    prepare = f"llm prepare_data --input TEXT --tok {shlex.quote(str(out_dir))} --seq_len {seq_len}"
    data, config = shlex.quote(f"data/{out_dir.name}"), shlex.quote(str(out_dir / TRAIN_FILE))
    return f"{prepare} --out_dir {data} && llm train --config {config}"


def _lengthened(model: ModelConfig, max_seq_len: int | None, kind: ScalingKind | None) -> ModelConfig:
    """Returns the model for sequences of another length. Raises UserError if the two do not go together."""
    if max_seq_len is None:
        if kind is not None:
            raise UserError(f"--rope_scaling {kind}: needs --max_seq_len, the length to scale to")
        return model
    now, scaling = model.max_seq_len, model.rope_scaling
    if kind is not None:
        if scaling is not None and scaling.kind != kind:
            raise UserError(f"--rope_scaling {kind}: the model has {scaling.kind} already; name that one")
        if max_seq_len <= now:
            raise UserError(f"--max_seq_len {max_seq_len}: not above the model's {now}; leave --rope_scaling out")
        if scaling is None:
            original = None if kind == "linear" else now
            scaling = RopeScalingConfig(kind=kind, factor=max_seq_len / now, original_max_seq_len=original)
        else:
            longest = scaling.original_max_seq_len or now / scaling.factor
            scaling = scaling.model_copy(update={"factor": max_seq_len / longest})
    try:
        return ModelConfig.model_validate(
            model.model_dump() | {"max_seq_len": max_seq_len, "rope_scaling": scaling and scaling.model_dump()}
        )
    except ValidationError as error:
        raise UserError(f"--max_seq_len: {'; '.join(validation_problems(error))}") from None


def _examine(source: Path, tok: str | os.PathLike[str] | None) -> tuple[ModelConfig, Tokenizer, dict[str, Part]]:
    """Returns the model, its tokenizer and where its tensors are. Raises UserError with all that is wrong."""
    described = _read_json(source / "config.json")
    problems: list[str] = []
    model: ModelConfig | None = None
    tokenizer: Tokenizer | None = None
    parts: dict[str, Part] = {}
    try:
        model = config_from_hf(described)
    # A broken file may have any type in any place, and numbers beyond the range of a float.
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        problems.append(f"{source / 'config.json'}: {error}")
    try:
        tokenizer = _tokenizer_of(source, tok)
    except UserError as error:
        problems.append(str(error))
    try:
        parts = _split(_read_headers(source), model)
    except UserError as error:
        problems.append(str(error))
    if model is not None and parts:
        problems += [f"{source}: {problem}" for problem in _misfits(parts, model)]
        if described.get(OUTPUT_BIAS_KEY) is False and model.attention_bias == "qkvo" and not problems:
            model = _without_zeros(model, parts)
    if model is not None and tokenizer is not None:
        rows = model.rows
        # A tokenizer with more ids than the embedding has rows would fail only when such an id occurs.
        if tokenizer.vocab_size > rows:
            problems.append(
                f"{tokenizer.path}: has {tokenizer.vocab_size:,} pieces and the model a vocabulary of {rows:,}; "
                "name the model's own tokenizer with --tok"
            )
        elif tokenizer.vocab_size < rows:
            model = model.model_copy(update={"vocab_size": tokenizer.vocab_size, "embedding_rows": rows})
            tell(
                f"{source}: {rows:,} rows of the embedding for {tokenizer.vocab_size:,} tokens; the others are kept "
                "and take no part in the loss",
                sys.stderr,
            )
    if model is None or tokenizer is None or problems:
        raise UserError("; ".join(problems))
    return model, tokenizer, parts


def _without_zeros(model: ModelConfig, parts: Mapping[str, Part]) -> ModelConfig:
    """Returns the model that export wrote as a Llama with biases in the output projections, unless they are not 0.

    Another program may have trained them.
    """
    without = model.model_copy(update={"attention_bias": "qkv"})
    ours, shapes = hf_shapes(without), hf_shapes(model)
    added = [name for name in shapes if name not in ours]
    zero = not any(block.any() for name in added for block in _blocks(parts[name], shapes[name]))
    return without if zero else model


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


def _tokenizer_of(source: Path, tok: str | os.PathLike[str] | None) -> Tokenizer:
    has_own = any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    if tok is None and not has_own:
        raise UserError(f"{source}: has no tokenizer.json or tokenizer.model; name its tokenizer with --tok")
    tokenizer = load_tokenizer(source if tok is None else tok)
    if tok is not None and has_own and tokenizer.sha256 != load_tokenizer(source).sha256:
        raise UserError(f"{tok}: not the tokenizer of {source}; leave --tok out to use its own")
    return tokenizer


def _read_headers(source: Path) -> dict[str, Part]:
    """Returns every tensor of one safetensors file, or of several with an index, by its name."""
    index, only = source / index_file("model"), source / MODEL_FILE
    if index.is_file():
        files = read_index(index)
    elif only.is_file():
        files = dict.fromkeys(_header(only), only.name)
    else:
        # Unpickling a foreign file can run any code.
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in source.glob(pattern))
        found = f"; {pickles[0]} is a pickle, which can run any code when it is read" if pickles else ""
        raise UserError(
            f"{source}: has no {MODEL_FILE}{found}; other formats are not read: let transformers write it again, with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    headers = {file: _header(source / file) for file in dict.fromkeys(files.values())}
    absent = [f"{source / file}: no tensor {name}" for name, file in files.items() if name not in headers[file]]
    if absent:
        raise UserError(f"{absent[0]}, which {index.name} names there")
    return {name: headers[file][name] for name, file in files.items()}


def _header(path: Path) -> dict[str, Part]:
    if not path.is_file():
        raise UserError(f"{path}: missing; the folder is incomplete")
    try:
        with utf8_path(path) as readable, safe_open(readable, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in list(opened.keys())}
            return {name: Part(path, name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error})") from None


def _split(parts: Mapping[str, Part], model: ModelConfig | None) -> dict[str, Part]:
    """Returns the parts with the fused matrices of Phi-3 as rows of the separate ones."""
    if model is None:
        return dict(parts)
    q, kv, inner = model.n_heads * model.head_size, model.n_kv_heads * model.head_size, model.d_ff
    fused = {
        "self_attn.qkv_proj": {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv},
        "mlp.gate_up_proj": {"mlp.gate_proj": inner, "mlp.up_proj": inner},
    }
    result: dict[str, Part] = {}
    for name, part in parts.items():
        split = next((key for key in fused if f".{key}." in name), None)
        if split is None or not part.shape or part.shape[0] != sum(fused[split].values()):
            result[name] = part
            continue
        first = 0
        for key, rows in fused[split].items():
            shape = (rows, *part.shape[1:])
            result[name.replace(split, key)] = Part(part.file, part.name, part.dtype, shape, first)
            first += rows
    return result


def _misfits(parts: Mapping[str, Part], model: ModelConfig) -> Iterator[str]:
    """Yields what is wrong with the tensors of a model: each kind once, with the first tensor of it."""
    shapes = hf_shapes(model)
    known = set(shapes)
    if model.tie_embeddings:
        known.add("lm_head.weight")  # some programs write the shared weight twice
    # A tensor that we cannot use, such as a bias, means that the model computes something else.
    # Old versions of transformers saved inv_freq, which follows from rope_theta.
    strange = sorted(name for name in parts if name not in known and not name.endswith("rotary_emb.inv_freq"))
    if strange:
        yield f"{len(strange)} tensors have no place in this model, such as {strange[0]}"
    missing = [name for name in shapes if name not in parts]
    if missing:
        yield f"no tensor {missing[0]}{f', and {len(missing) - 1} others' if missing[1:] else ''}"
    found = {name: parts[name] for name in shapes if name in parts}
    for name, part in found.items():
        if part.shape != tuple(shapes[name]):
            yield f"{name} has shape {list(part.shape)}, the configuration asks for {list(shapes[name])}"
            break
    for name, part in found.items():
        # Quantised weights have no meaning without their scales, which our format does not have.
        if part.dtype not in DTYPES:
            yield f"{part.file.name}: {name} is {part.dtype}; only fp32, bf16 and fp16 weights are read"
            break


def _blocks(part: Part, shape: torch.Size) -> Iterator[torch.Tensor]:
    """Yields a tensor in blocks of rows, in fp32, the dtype of a checkpoint."""
    rows = max(1, BLOCK_ELEMENTS // max(1, shape[1:].numel()))
    try:
        # Opened for each tensor, so that the memory of the mapped file is given back.
        with utf8_path(part.file) as readable, safe_open(readable, framework="pt") as opened:
            whole = opened.get_slice(part.name)
            for first in range(part.first_row, part.first_row + shape[0], rows):
                block: torch.Tensor = whole[first : min(first + rows, part.first_row + shape[0])].float()
                # A checkpoint with such a number would be refused as damaged when it is read.
                if not block.isfinite().all():
                    raise UserError(f"{part.file}: damaged ({part.name} holds a number that is not finite)")
                yield block
    except SafetensorError as error:
        raise UserError(f"{part.file}: damaged ({error})") from None
