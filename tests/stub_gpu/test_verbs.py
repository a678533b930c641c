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


FRESH = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""Every tensor gets memory of zeroes. Otherwise a check of a gradient that no kernel has written may stop a run."""


def llm(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    done = run_llm(*arguments, env=environment() | variables, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def json_alone(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Returns the objects of stdout, which has one on every line and nothing else."""
    lines = done.stdout.splitlines()
    assert lines, done.stderr[-3000:]
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
    done = llm("train", "--config", path, "--json", *SETTINGS[name], **FRESH)
    assert json_alone(done)
    assert (path.parent / "run" / "latest").exists()


@pytest.fixture(scope="module")
def run(config: Callable[[str], Path]) -> Path:
    """The config of a run that has ended, in <its folder>/run."""
    path = config("config")
    llm("train", "--config", path, **FRESH)
    return path


def test_a_run_is_resumed(run: Path) -> None:
    done = llm("train", "--config", run, "--json", "train.total_tokens=6144", **FRESH)
    assert json_alone(done)
    assert "resumed" in done.stderr


def test_text_is_scored(run: Path, small_corpus: Path) -> None:
    assert json_alone(llm("eval", "--ckpt", run.parent / "run", "--input", small_corpus, "--json"))


@pytest.mark.parametrize("settings", [(), ("--temperature", 0, "--num_samples", 3), ("--top_k", 5, "--top_p", 0.9)])
def test_a_prompt_is_continued(run: Path, settings: tuple[object, ...]) -> None:
    done = llm("generate", "--ckpt", run.parent / "run", "--prompt", "a", "--max_new_tokens", 40, "--json", *settings)
    (found,) = json_alone(done)
    assert found["tokens"] > 0


def test_a_step_is_profiled(run: Path, tmp_path: Path) -> None:
    (found,) = json_alone(llm("profile", "--config", run, "--steps", 2, "--out_dir", tmp_path, "--json"))
    assert found["step_ms"] > 0


def test_a_run_is_planned(run: Path) -> None:
    assert json_alone(llm("plan", "--config", run, "--json"))


def test_the_machine_is_checked(run: Path) -> None:
    (found,) = json_alone(llm("doctor", "--config", run, "--seconds", 1, "--json"))
    assert not found["failed"]


def test_kernels_are_compared(run: Path) -> None:
    """They disagree with plain torch, because neither computes anything."""
    done = run_llm("doctor", "--kernels", "--config", run, "--json", env=environment(), check=False)
    (found,) = json_alone(done)
    assert "Traceback" not in done.stderr
    assert found["failed"]
