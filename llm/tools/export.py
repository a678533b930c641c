"""Models for others, and from others: a checkpoint becomes a Hugging Face model folder, and the other way round."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llm.atomic import atomic_directory, check_absent
from llm.config import Config, ModelConfig
from llm.data.tokenizer import Tokenizer, load_tokenizer
from llm.errors import UserError
from llm.metrics import read_metrics
from llm.model import hf_tokenizer
from llm.model.checkpoint import (
    MODEL_FILE,
    TrainState,
    locate,
    read_state,
    read_weights,
)
from llm.model.hf import hf_config, to_hf
from llm.model.tensor_files import index_file
from llm.model.transformer import parameter_count
from llm.world import DTYPES

MAX_FILE_BYTES = 5_000_000_000

Weights = Iterator[tuple[str, torch.Tensor]]


def export(
    ckpt: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    format: str = "hf",
    precision: str = "fp32",
    max_file_bytes: int = MAX_FILE_BYTES,
) -> dict[str, Any]:
    """Writes a checkpoint's model for other programs.

    Args:
        ckpt: a checkpoint, or a run's folder.
        out_dir: the folder to make; it is complete or not there.
        format: "hf", a Hugging Face model folder (Llama; with QK-norm Qwen3) with tokenizer, generation config and a
            model card; or "gguf", one file for llama.cpp.
        precision: of the weights: "fp32", as they were trained, or "bf16", rounded.
        max_file_bytes: of the weights in one file, unless a single tensor is larger ("hf" only).

    Returns out_dir, format, precision, parameters, files and bytes. Raises UserError for a checkpoint that is not
    whole, a folder that is in use, or a tokenizer that others would read differently.
    """
    if max_file_bytes < 1:
        raise UserError(f"--max_file_bytes {max_file_bytes}: must be at least 1")
    folder = locate(ckpt)
    state, config = read_state(folder)
    tokenizer = load_tokenizer(folder)
    if not hf_tokenizer.is_supported(tokenizer):
        raise UserError(
            f"{tokenizer.path}: other programs would give other ids than this tokenizer, which was not made by "
            "`llm train_tokenizer`; export its model with the tokenizer's own tools"
        )
    check_absent(Path(out_dir))
    with atomic_directory(out_dir) as made:
        if format == "gguf":
            from llm.tools.gguf import write_gguf

            write_gguf(made / "model.gguf", config.model, tokenizer, read_weights(folder, config.model), precision)
        else:
            described = hf_config(config.model, tokenizer.bos_id, tokenizer.eos_id)
            described["torch_dtype"] = str(DTYPES[precision]).removeprefix("torch.")
            _write_json(made / "config.json", described)
            _write_json(made / "generation_config.json", _generation_config(tokenizer))
            hf_tokenizer.write_files(tokenizer, made, config.model.max_seq_len)
            shutil.copyfile(tokenizer.path, made / "tokenizer.model")
            tensors = _hf_tensors(config.model, read_weights(folder, config.model), DTYPES[precision])
            _write_weights(made, tensors, max_file_bytes)
            _write_card(made, folder, state, config, tokenizer, precision)
        sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
    return {
        "out_dir": str(out_dir),
        "format": format,
        "precision": precision,
        "parameters": parameter_count(config.model),
        "files": list(sizes),
        "bytes": sum(sizes.values()),
    }


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", "utf-8")


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """What others sample with when they are told nothing: as `llm generate` does."""
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 0,
        "top_p": 1.0,
    }


def _hf_tensors(model: ModelConfig, weights: Weights, dtype: torch.dtype) -> Weights:
    for name, value in weights:
        for key, part in to_hf(model, name, value).items():
            yield key, part.to(dtype).contiguous()


def _write_weights(folder: Path, tensors: Weights, max_file_bytes: int) -> None:
    """model.safetensors; or several files and the index of what is where. One file's tensors are held at a time."""
    files: list[list[str]] = []
    group: dict[str, torch.Tensor] = {}
    total = held = 0

    def part(number: int) -> Path:
        return folder / f"model-{number:05d}.safetensors"

    def flush() -> None:
        nonlocal held
        files.append(list(group))
        save_file(group, part(len(files)), {"format": "pt"})
        shutil.copymode(folder / "config.json", part(len(files)))  # safetensors lets only their owner read its files
        group.clear()
        held = 0

    for name, tensor in tensors:
        if group and held + tensor.nbytes > max_file_bytes:
            flush()
        group[name] = tensor.clone()
        held += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        part(1).rename(folder / MODEL_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        part(number).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    _write_json(folder / index_file("model"), {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_card(
    made: Path, folder: Path, state: TrainState, config: Config, tokenizer: Tokenizer, precision: str
) -> None:
    """README.md, in the form that model hubs show, and the loss curve where the run's metrics are beside it."""
    from llm.tools.report import loss_curve

    metrics = folder.parent / "metrics.jsonl"
    lines = [line for line in read_metrics(metrics) if line["step"] <= state.step] if metrics.is_file() else []
    measured = _last(lines, "loss") | _last(lines, "val_loss")
    if measured:
        loss_curve(metrics, made / "loss_curve.png")
    model, train = config.model, config.train
    shape = "Qwen3" if model.qk_norm else "Llama"
    facts = {
        "parameters": f"{parameter_count(model):,}",
        "shape": f"{shape}: {model.n_layers} layers of {model.d_model}, {model.n_heads} heads of {model.head_dim} "
        f"({model.n_kv_heads} for keys and values), SwiGLU of {model.d_ff}",
        "context": f"{model.max_seq_len:,} tokens",
        "vocabulary": f"{tokenizer.vocab_size:,} pieces (SentencePiece BPE with byte fallback)",
        "weights": precision,
    }
    if state.tokens:
        facts |= {
            "trained on": f"{state.tokens:,} tokens, in {state.step:,} steps of {train.global_batch_tokens:,}",
            "rows": f"{state.data.seq_len:,} tokens",
            "data": f"`{state.data.dataset_hash}` (hash of the prepared data set)",
            "learning rate": f"{config.optimizer.lr:g} at its peak, AdamW",
        }
    names = {
        "loss": "training loss (nats a token)",
        "val_loss": "validation loss (nats a token)",
        "perplexity": "validation perplexity",
        "bits_per_byte": "validation bits per byte of text",
    }
    results = {title: f"{measured[key]:.4f}" for key, title in names.items() if measured.get(key) is not None}
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        "# A language model trained from scratch",
        "A base model: it continues text, and follows no instructions. What it knows and how it speaks come from its "
        "training text alone; nothing was filtered out of its answers.",
        _table(facts),
        "## Measured\n\n" + (_table(results) if results else "The run's metrics were not beside the checkpoint."),
    ]
    if measured:
        parts.append("![training and validation loss over tokens](loss_curve.png)")
    parts.append(
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")\nmodel = AutoModelForCausalLM.from_pretrained(".")\n'
        'prompt = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0], skip_special_tokens=True))\n```"
    )
    settings = config.model_dump(include={"model", "optimizer", "schedule"})  # no path of the host's
    parts.append("## Configuration\n\n```json\n" + json.dumps(settings, indent=2) + "\n```")
    (made / "README.md").write_text("\n\n".join(parts) + "\n", "utf-8")


def _last(lines: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return next((line for line in reversed(lines) if key in line), {})


def _table(facts: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())])
