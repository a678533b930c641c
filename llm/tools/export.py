"""`llm export`: makes a Hugging Face model folder or a GGUF file from a checkpoint."""

import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llm.atomic import output_directory
from llm.config import Config, ModelConfig
from llm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llm.data.tokenizer import Tokenizer
from llm.display import Display, tell
from llm.errors import DamagedCheckpoint, UserError
from llm.inference.generate import TEMPERATURE
from llm.metrics import read_metrics
from llm.model.checkpoint import TrainState, read_checksums, read_state, read_tokenizer, read_weights
from llm.model.checkpoint_path import locate
from llm.model.hf import hf_shapes
from llm.model.hf_config import HIDDEN_ACT, hf_class
from llm.model.hf_folder import model_to_export, write_hf_files
from llm.model.tensor_files import open_tensors, part_file, save_tensors, write_index
from llm.model.transformer import parameter_count, parameter_shapes
from llm.training.optim import peak_lr
from llm.world import DTYPES


def export(
    ckpt: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    format: str = "hf",
    precision: str = "fp32",
    max_file_bytes: int = 5_000_000_000,
) -> dict[str, Any]:
    """Writes a checkpoint's model for other programs.

    Args:
        ckpt: a checkpoint, or a run's folder.
        out_dir: the folder to make; it is complete or absent.
        format: "hf", a Hugging Face model folder (Llama, Mistral, Qwen2 or Qwen3: `model_to_export`, `hf_class`) with
            tokenizer, generation config and a model card; or "gguf", one file for llama.cpp.
        precision: dtype of the weights: "fp32" as in training, or "bf16", rounded.
        max_file_bytes: bytes of weights per file, unless a single tensor is larger ("hf" only).

    Returns out_dir, format, precision, parameters, files and bytes. Raises UserError for an incomplete checkpoint, and
    for a folder that is not empty.
    """
    if max_file_bytes < 1:
        raise UserError(f"--max_file_bytes {max_file_bytes}: must be at least 1")
    folder = locate(ckpt)
    state, config = read_state(folder)
    tokenizer = read_tokenizer(folder)
    with output_directory(out_dir) as made:
        if format == "gguf":
            from llm.tools.gguf import write_gguf

            with Display("exporting", len(parameter_shapes(config.model))) as display:
                weights = _shown(read_weights(folder, config.model), display)
                write_gguf(made / "model.gguf", config.model, tokenizer, weights, precision)
        else:
            written = model_to_export(config.model, tokenizer)
            write_hf_files(made, config.model, tokenizer, DTYPES[precision], written)
            if "generation_config.json" not in tokenizer.files:
                described = json.dumps(_generation_config(tokenizer), indent=2)
                (made / "generation_config.json").write_text(described + "\n", "utf-8")
            _write_weights(made, folder, config.model, written, DTYPES[precision], max_file_bytes)
            if reason := _other_ids(written, tokenizer):
                tell(f"{out_dir}: {reason}; the model card has the line that gives ours", sys.stderr)
            _write_card(made, folder, state, config, written, tokenizer, precision)
        sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
    tell(f"{out_dir}: {', '.join(sizes)}, {sum(sizes.values()):,} bytes", sys.stderr)
    return {
        "out_dir": str(out_dir),
        "format": format,
        "precision": precision,
        "parameters": parameter_count(config.model),
        "files": list(sizes),
        "bytes": sum(sizes.values()),
    }


def _shown(weights: Iterator[tuple[str, torch.Tensor]], display: Display) -> Iterator[tuple[str, torch.Tensor]]:
    for done, weight in enumerate(weights, 1):
        yield weight
        display.update(done)
    # gguf's writer holds them all, and writes them at the end.
    display.endless("writing")


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The default sampling in other programs: the defaults of `llm generate`."""
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.eos_ids) if len(tokenizer.eos_ids) > 1 else tokenizer.eos_id,
        # transformers would choose EOS too, with a warning per call.
        "pad_token_id": 0 if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.cuttable else tokenizer.eos_id,
        "do_sample": True,
        "temperature": TEMPERATURE,
        # Off, because the default of transformers is 50.
        "top_k": 0,
        "top_p": 1.0,
    }


def _write_weights(
    made: Path, folder: Path, model: ModelConfig, written: ModelConfig, dtype: torch.dtype, max_file_bytes: int
) -> None:
    """Copies a checkpoint's weights, cast to dtype, into model.safetensors or into several files with an index.

    written: the model to write; tensors that it has and the checkpoint's model lacks are zeros.
    """
    shapes, ours = hf_shapes(written), hf_shapes(model)
    sizes = {hf_name: shape.numel() * dtype.itemsize for hf_name, shape in shapes.items()}
    # A file's name contains the number of files, so the division is made before the first tensor is read.
    files: list[list[str]] = [[]]
    held = 0
    for hf_name, size in sizes.items():
        if files[-1] and held + size > max_file_bytes:
            files.append([])
            held = 0
        files[-1].append(hf_name)
        held += size
    weight_map: dict[str, str] = {}
    sums = read_checksums(folder)
    with open_tensors(folder, "model", sums=sums) as get, Display("exporting", len(shapes)) as display:
        done = itertools.count(1)

        def checked(hf_name: str) -> torch.Tensor:
            tensor = get(hf_name) if hf_name in ours else torch.zeros(shapes[hf_name])
            if tensor.shape != shapes[hf_name]:
                raise DamagedCheckpoint(
                    f"{folder}: model is of another shape: {hf_name} is {list(tensor.shape)}, its config asks for "
                    f"{list(shapes[hf_name])}"
                )
            display.update(next(done), "exporting")
            return tensor.to(dtype)

        for part_number, names in enumerate(files):
            file = part_file("model", part_number, len(files))
            # Only the tensors of one file are in memory at a time.
            save_tensors(made / file, {name: checked(name) for name in names})
            weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        write_index(made, "model", weight_map, sum(sizes.values()))


def _other_ids(written: ModelConfig, tokenizer: Tokenizer) -> str | None:
    """Returns why AutoTokenizer of transformers 5 gives other ids than ours for the folder; None: it gives ours."""
    name, family = hf_class(written)
    if tokenizer.is_read_beside(family) or not tokenizer.for_transformers:
        return None
    shape = name.removesuffix("ForCausalLM")
    return f"transformers 5 reads text for a {shape} with another class, so AutoTokenizer gives other ids"


def _write_card(
    made: Path,
    folder: Path,
    state: TrainState,
    config: Config,
    written: ModelConfig,
    tokenizer: Tokenizer,
    precision: str,
) -> None:
    """Writes README.md for model hubs, and the loss curve if the run's metrics.jsonl is next to the checkpoint.

    written: the model whose weights the folder has.
    """
    from llm.tools.report import loss_curve

    metrics = folder.parent / "metrics.jsonl"
    # The run may have continued after this checkpoint.
    lines = [line for line in read_metrics(metrics) if line["step"] <= state.step] if metrics.is_file() else []
    measured = _last(lines, "loss") | _last(lines, "val_loss")
    if measured:
        loss_curve(metrics, made / "loss_curve.png")
    model, train = config.model, config.train
    shape = hf_class(written)[0].removesuffix("ForCausalLM")
    activation = "SwiGLU" if HIDDEN_ACT == "silu" else HIDDEN_ACT
    facts = {
        "parameters": f"{parameter_count(model):,}",
        "shape": f"{shape}: {model.n_layers} layers of {model.d_model}, {model.n_heads} heads of {model.head_size} "
        f"({model.n_kv_heads} for keys and values), {activation} of {model.d_ff}",
        "context": f"{model.max_seq_len:,} tokens",
        "vocabulary": f"{tokenizer.vocab_size:,} ids ({tokenizer.kind})",
        "weights": precision,
    }
    if written != model:
        facts["biases"] = "of queries, keys and values; those of the output projections are zeros, for Llama's form"
    # An imported model was not trained here, so there is no training to describe.
    if state.tokens:
        facts |= {
            "trained on": f"{state.tokens:,} tokens, in {state.step:,} steps of {train.global_batch_tokens:,}",
            "sequences": f"{state.data.seq_len:,} tokens",
            "data": f"`{state.data.dataset_hash}` (hash of the prepared data set)",
            "learning rate": _optimizer(config),
        }
    names = {
        "loss": "training loss (nats per token)",
        "val_loss": "validation loss (nats per token)",
        "perplexity": "validation perplexity",
        "bits_per_byte": "validation bits per byte of text",
    }
    results = {title: f"{measured[key]:.4f}" for key, title in names.items() if measured.get(key) is not None}
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        "# A language model trained from scratch",
        "This is a base model: it continues text and does not follow instructions. It has learned only from its "
        "training text, and its output is not filtered.",
        _table(facts),
        "## Measured\n\n" + (_table(results) if results else "The run's metrics were not next to the checkpoint."),
    ]
    if measured:
        parts.append("![training and validation loss over tokens](loss_curve.png)")
    other_ids = _other_ids(written, tokenizer)
    names_used = "AutoModelForCausalLM, AutoTokenizer" + (", LlamaConfig" if other_ids else "")
    parts.append(
        f"## Use\n\n```python\nfrom transformers import {names_used}\n\n"
        + (
            f"# {other_ids}.\n# The config of a Llama makes it take the folder's own tokenizer.\n"
            'tokenizer = AutoTokenizer.from_pretrained(".", config=LlamaConfig())\n'
            if other_ids
            else 'tokenizer = AutoTokenizer.from_pretrained(".")\n'
        )
        + 'model = AutoModelForCausalLM.from_pretrained(".")\n'
        + _prompt(made, tokenizer)
        + "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0], skip_special_tokens=True))\n```"
    )
    if shape != "Llama" and isinstance(tokenizer, SentencePieceTokenizer) and not tokenizer.prefix_bytes:
        parts.append(
            f"For llama.cpp, take the file of `llm export --format gguf`. llama.cpp's own converter writes for {shape} "
            "that a blank comes before every text, so other tokens than in training."
        )
    settings = config.model_dump(include={"model", "optimizer", "schedule"})  # without paths of this host
    parts.append("## Configuration\n\n```json\n" + json.dumps(settings, indent=2) + "\n```")
    (made / "README.md").write_text("\n\n".join(parts) + "\n", "utf-8")


def _prompt(made: Path, tokenizer: Tokenizer) -> str:
    """Returns the lines of Python that make a prompt as in training, where every document begins with bos_id."""
    if not tokenizer.for_transformers:
        return "# transformers cannot read tokenizer.model alone: encode the prompt with the package sentencepiece\n"
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.cuttable:
        return 'prompt = tokenizer("Once upon a time", return_tensors="pt")\n'
    begin = tokenizer.decode([tokenizer.bos_id])
    return (
        f"# Documents begin with {begin!r}: {tokenizer.begins}.\n"
        f'prompt = tokenizer({begin!r} + "Once upon a time", return_tensors="pt", add_special_tokens=False)\n'
    )


def _optimizer(config: Config) -> str:
    """Returns the peak learning rates and their optimizers."""
    blocks = peak_lr("layers.0.mlp.down_proj.weight", config.optimizer)
    names = {"the embedding": "embed", "the norms": "norm"}
    if not config.model.tie_embeddings:
        names["the LM head"] = "lm_head"
    rates = {part: peak_lr(name, config.optimizer) for part, name in names.items()}
    if config.optimizer.kind != "muon" and set(rates.values()) == {blocks}:
        return f"{blocks:g} at its peak, AdamW"
    kind = "Muon" if config.optimizer.kind == "muon" else "AdamW"
    rest = ", ".join(f"{rate:g} for {part}" for part, rate in rates.items())
    if len(set(rates.values())) == 1:
        rest = f"{rates['the norms']:g} for the rest"
    return f"{blocks:g} at its peak for the matrices inside the blocks, {kind}; {rest}, AdamW"


def _last(lines: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return next((line for line in reversed(lines) if key in line), {})


def _table(facts: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())])
