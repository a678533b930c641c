"""What tests run the program with: small configs, `llm` and `deepspeed` as processes, and their results."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil
    import torch
    from torch import Tensor

REPOSITORY = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (REPOSITORY / "configs").glob("*.json") if path.name != "schema.json")

SMALL_MODEL = {"n_layers": 2, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64, "max_seq_len": 64}


def small_config(shards: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A config tree of a model that trains in milliseconds; changes are written section__key=value.

    It states what rules would fill in, so that a test does not depend on them.
    """
    tree: dict[str, Any] = {
        "model": {**SMALL_MODEL, "qk_norm": False},
        "data": {"path": str(shards)},
        "optimizer": {"kind": "adamw", "lr": 3e-3, "beta2": 0.95, "weight_decay": 0.1},
        "schedule": {"kind": "cosine", "warmup_tokens": 2_048, "min_lr_ratio": 0.1},
        "train": {
            "total_tokens": 8 * 512,
            "global_batch_tokens": 512,
            "device": "cpu",
            "log_every_steps": 1,
            "eval_every_steps": 1_000,
            "eval_tokens": 1_024,
            "precision": "fp32",
            "force": True,  # many epochs over little text
        },
        "checkpoint": {"dir": str(run_dir), "every_steps": 1_000},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    optimizer = tree["optimizer"]
    for name in ("embed_lr", "head_lr", "norm_lr", *(["muon_lr"] if optimizer["kind"] == "muon" else [])):
        optimizer.setdefault(name, optimizer["lr"])
    return tree


def environment() -> dict[str, str]:
    """Ours without what a run in this process has told torch.distributed."""
    joined = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {key: value for key, value in os.environ.items() if key not in joined}


def run_llm(*arguments: object, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """`llm ARGUMENTS` in a process of its own."""
    command = [sys.executable, "-m", "llm", *map(str, arguments)]
    options = {"env": environment(), **options}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert not check or done.returncode == 0, done.stderr
    return done


def deepspeed(processes: int, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`deepspeed --num_gpus N ARGUMENTS`: on a machine without a GPU, N CPU processes."""
    launcher = Path(sys.executable).parent / "deepspeed"
    port = 20_000 + os.getpid() % 20_000
    command = [launcher, "--num_gpus", str(processes), "--master_port", str(port), *map(str, arguments)]
    options = {"env": environment() | {"DS_ACCELERATOR": "cpu"}, **options}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-4_000:]
    return done


def torchrun(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc_per_node N -m ARGUMENTS`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    done = subprocess.run([*launcher, *map(str, arguments)], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return done


def deepspeed_module(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return deepspeed(processes, "--module", *arguments)


def start_two(command: Sequence[str], **options: Any) -> list["psutil.Popen"]:
    """Starts a command as rank 0 and rank 1 of two, under no launcher."""
    import psutil

    joined = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 20_000)}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    return [psutil.Popen(command, env=environment() | joined | rank, **options) for rank in ranks]


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON object that a verb's --json printed."""
    last = [line for line in done.stdout.splitlines() if line.startswith("{")][-1]
    parsed: dict[str, Any] = json.loads(last)
    return parsed


def without_checksums(ckpt: Path) -> Path:
    """Makes a checkpoint one of an earlier release, so that a test can change its tensors; returns it."""
    tree = json.loads((ckpt / "state.json").read_text())
    for key in ("files", "tensors", "checksum"):
        del tree[key]
    (ckpt / "state.json").write_text(json.dumps(tree | {"format_version": 1}))
    return ckpt


def read_losses(run_dir: Path) -> list[float]:
    from llm.metrics import read_metrics

    return [line["loss"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]


def numbers_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times and memory."""
    from llm.metrics import MEASURED, read_metrics

    return [
        {name: value for name, value in line.items() if name not in MEASURED}
        for line in read_metrics(run_dir / "metrics.jsonl")
    ]


def newton_schulz(matrix: "Tensor", dtype: "torch.dtype | None" = None) -> "Tensor":
    """Muon's direction as it is written in the paper, in fp64 or another dtype."""
    x = matrix.double() / matrix.double().norm()
    x = x.to(dtype or x.dtype)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x
