"""The readers of a run's folder: checkpoints, run.json, metrics.jsonl, and the config that a run begins with."""

import functools
import json
import sys
from pathlib import Path
from random import Random

import torch

from llm.config_file import load_config, parse_config
from llm.data.tokenizer import load_tokenizer, train_tokenizer
from llm.errors import UserError
from llm.metrics import MetricsLog, read_metrics
from llm.model import checkpoint, checkpoint_path, checksums
from llm.model.checkpoint import DataState, TrainState
from llm.model.hf import to_hf
from llm.model.tensor_files import open_tensors
from llm.model.transformer import parameter_shapes
from llm.tools.history import read_runs
from llm.tools.report import _page, charts
from llm.training import saving

from .harness import Target, damage_bytes, damage_json

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from running import small_config

# Half of the time would go to the tokenizer beside the damaged file, which stays the same.
checkpoint.load_tokenizer = functools.cache(load_tokenizer)

LINES = [
    {"step": 0, "tokens": 0, "val_loss": 5.5, "perplexity": 244.0, "bits_per_byte": 3.0},
    {"step": 1, "tokens": 512, "loss": 5.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1e4, "step_ms": 50.0}
    | {"data_wait_ms": 0.1, "mfu": None, "matmul_fraction": 0.5, "memory": 1 << 30, "skipped_steps": 0}
    | {"outliers": [{"step": 1, "tokens": 512, "metric": "loss", "value": 9.0, "deviations": 7.0}]},
    {"step": 2, "tokens": 1024, "loss": 4.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1e4, "step_ms": 51.0},
    {"step": 2, "tokens": 1024, "val_loss": 4.1, "perplexity": 60.0, "bits_per_byte": 2.2}
    | {"val_loss_by_source": {"a": 4.0}, "samples": [{"prompt": "a", "text": "b"}]},
]


def make_checkpoint(folder: Path) -> Path:
    """A checkpoint of a model with random weights: FOLDER/run/step-00000001."""
    (folder / "text.txt").write_text("the cat sat on the mat. " * 50)
    tokenizer = load_tokenizer(train_tokenizer([folder / "text.txt"], folder / "spm", 270)["model"])
    tree = small_config(folder / "shards", folder / "run", model__vocab_size=tokenizer.vocab_size, data__seq_len=64)
    tree["model"] |= {"n_layers": 1, "d_model": 16, "n_heads": 1, "n_kv_heads": 1, "d_ff": 32}
    config = parse_config(tree, "fuzz")
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in parameter_shapes(config.model).items():
        tensors |= {key: part.clone() for key, part in to_hf(config.model, name, torch.ones(shape)).items()}
    state = TrainState(1, 512, DataState("0" * 64, 64, 0, "1", 8), val_loss=4.0)
    path = folder / "run/step-00000001"
    saving.write_checkpoint(path, {"model": tensors}, config, state, tokenizer)
    return path


def make_run(folder: Path, *names: str) -> list[Path]:
    run = folder / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    config = parse_config(small_config(folder / "shards", run), "fuzz").model_dump()
    described = {"config": config, "versions": {"torch": "2"}, "commit": None, "started": "2026-01-01T00:00:00+00:00"}
    described |= {"rules": {"optimizer.lr": {"key": "optimizer.lr", "value": 1e-3, "rule": "a rule"}}}
    described |= {"parameters": 1000, "world_size": 1, "device": "a CPU", "precision": "fp32"}
    (run / "run.json").write_text(json.dumps(described, indent=2))
    (run / "status.json").write_text(json.dumps({"status": "complete", "result": {"step": 2}, "message": None}))
    return [run / name for name in names]


def damage_state(chance: Random, valid: bytes, other: bytes) -> bytes:
    """Mostly mends the checksum, which would otherwise refuse every change."""
    damaged = damage_json(chance, valid, other)
    if chance.random() < 0.2:
        return damaged
    try:
        return json.dumps(checksums.sealed(json.loads(damaged))).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return damaged


def read_checkpoint(path: Path) -> None:
    folder = path.parent
    checkpoint_path.newest(folder.parent)
    state, config = checkpoint.read_state(folder)
    state.is_complete(config.train)
    # `llm inspect --verify` reads all that there is, names what is damaged, and never raises.
    if problems := checkpoint.verify(folder):
        raise UserError(problems[0])


def read_weights(path: Path) -> None:
    """Without the checksums, which would find all damage before it is read."""
    with open_tensors(path.parent, "model") as get:
        get("model.norm.weight")


def make_sharded(folder: Path) -> list[Path]:
    path = make_checkpoint(folder)
    only = path / "model.safetensors"
    names = checkpoint.read_checksums(path)
    assert names is not None
    only.rename(path / "model-00001-of-00002.safetensors")
    index = path / "model.safetensors.index.json"
    weight_map = dict.fromkeys(names.tensors["model"], "model-00001-of-00002.safetensors")
    index.write_text(json.dumps({"metadata": {"total_size": 4}, "weight_map": weight_map}))
    return [index]


def read_run(path: Path) -> None:
    """As `llm report`, but for the pictures, which take a second."""
    runs = read_runs([path.parent])
    charts(runs)
    _page(runs, [])


def read_log(path: Path) -> None:
    """As `llm train` that goes on, and as `llm report`."""
    lines, before = read_metrics(path), path.read_bytes()
    MetricsLog(path, keep_through_step=1 << 100).close()
    assert read_metrics(path) == lines
    # Nothing is lost but a last line that was cut off.
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    read_run(path)


def make_config(folder: Path) -> list[Path]:
    path = folder / "config.json"
    path.write_text(json.dumps(small_config(folder / "shards", folder / "run"), indent=2))
    return [path]


def make_link(folder: Path) -> list[Path]:
    path = make_checkpoint(folder)
    (path.parent / "latest").write_text(path.name + "\n")
    return [path.parent / "latest"]


def read_link(path: Path) -> None:
    found = checkpoint_path.locate(path.parent)
    assert found.name == "step-00000001"
    named = checkpoint_path.named_by(path)
    if named is None or named.name != found.name:
        raise UserError("names no checkpoint; the newest was taken")


def damage_header(chance: Random, valid: bytes, other: bytes) -> bytes:
    """Changes the header only: the numbers after it have no form."""
    end = 8 + int.from_bytes(valid[:8], "little")
    return _header_bytes(chance, valid[:end], other[:end]) + valid[end:]


_header_bytes = damage_bytes(b'"F32"', b'"shape"', b'"data_offsets"', b"[0,0]", b"9" * 30, b"[" * 3000, b"-1", b"\xff")
_log_bytes = damage_bytes(
    b'"step"', b"null", b"[" * 3000, b"9" * 5000, b"1e999", b"NaN", b"\xff", b"\0", b"{}\n", b"\n"
)

TARGETS = [
    Target("state", lambda folder: [make_checkpoint(folder) / "state.json"], read_checkpoint, damage_state),
    Target("safetensors", lambda f: [make_checkpoint(f) / "model.safetensors"], read_weights, damage_header),
    Target("index", make_sharded, read_weights, damage_json),
    Target("latest", make_link, read_link, damage_bytes(b"..", b"/", b"\0")),
    Target("run", lambda folder: make_run(folder, "run.json", "status.json"), read_run, damage_json),
    Target("metrics", lambda folder: make_run(folder, "metrics.jsonl"), read_log, _log_bytes),
    Target("config", make_config, load_config, damage_json),
]
