"""Every verb that uses the device, as users start it: it ends without an exception, and stdout is JSON alone."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import environment, run_llm, small_config

pytestmark = [pytest.mark.stub_gpu, pytest.mark.slow]

MODEL = {"n_layers": 2, "d_model": 128, "n_heads": 2, "n_kv_heads": 1, "d_ff": 128, "max_seq_len": 64, "qk_norm": True}
SETTINGS = {
    **{f"{precision} {stage}": (f"train.precision={precision}", f"deepspeed.zero_stage={stage}")
       for precision in ("bf16", "fp32", "fp16") for stage in range(precision == "fp16", 4)},
    **{f"offload {stage}": (f"deepspeed.zero_stage={stage}", "deepspeed.offload=cpu") for stage in (1, 2, 3)},
    **{f"checkpointing {each}": (f"train.activation_checkpointing={each}",) for each in ("selective", "full")},
    "Muon": ("optimizer.kind=muon", "deepspeed.zero_stage=0"),
    "compile": ("train.compile=true",),
    "without qk_norm": ("model.qk_norm=false",),
    "tied": ("model.tie_embeddings=true",),
    "same bits": ("train.same_bits=true", "deepspeed.zero_stage=0"),
    "automatic": ("train.precision=auto", "train.micro_batch=null"),
}  # fmt: skip


def llm(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `llm` with memory that begins as zeroes, so that no value is garbage that stops a run."""
    memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = run_llm(*arguments, env=environment() | memory | variables, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def json_alone(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Returns the objects of stdout, which has one on every line and nothing else."""
    lines = done.stdout.splitlines()
    assert lines
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def config(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes the config of a run of four steps of two micro-batches, with its name; returns its path."""

    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp("stub")
        changes = {"train__device": "cuda", "train__micro_batch": 4, "checkpoint__every_steps": 2}
        tree = small_config(small_shards, folder / "run", **changes)
        tree["model"] = MODEL
        tree["train"]["eval_every_steps"] = 2
        (folder / f"{name}.json").write_text(json.dumps(tree))
        return folder / f"{name}.json"

    return write


@pytest.mark.parametrize("name", SETTINGS)
def test_training_ends_and_prints_json_alone(config: Callable[[str], Path], name: str) -> None:
    path = config("config")
    done = llm("train", "--config", path, "--json", *SETTINGS[name])
    assert json_alone(done)
    assert (path.parent / "run" / "latest").exists()
