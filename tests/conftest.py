"""Fixtures that several files share. Text is made from this Python's standard library; nothing is downloaded."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import small_config

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors; threads would only wait for each other


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests for this process: those marked `interpreter` where Triton interprets, else all others;
    those marked `stub_gpu` on the stub GPU only.
    """
    import torch

    from kernels.launch import INTERPRETED

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    # Several processes share the files: the longest go first, or one would end long after the others.
    longest = ("test_learning.py", "test_interpreter.py", "test_parallel.py")
    items.sort(key=lambda item: item.path.name not in longest)
    others = [item for item in items if bool(item.get_closest_marker("interpreter")) != INTERPRETED]
    if "STUB_GPU" not in os.environ:
        others += [item for item in items if item.get_closest_marker("stub_gpu") and item not in others]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 150 kB of Python sources, one a document, as jsonl."""
    from llm.data.corpus import write_stdlib_corpus

    folder = tmp_path_factory.mktemp("corpus")
    write_stdlib_corpus(folder / "all.jsonl")
    kept: list[str] = []
    with open(folder / "all.jsonl", encoding="utf-8") as lines:
        for line in lines:
            if len(line) < 4_000:
                kept.append(line)
            if sum(map(len, kept)) > 150_000:
                break
    (folder / "small.jsonl").write_text("".join(kept), encoding="utf-8")
    return folder / "small.jsonl"


@pytest.fixture(scope="session")
def small_tokenizer(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llm.data.tokenizer import train_tokenizer

    prefix = tmp_path_factory.mktemp("tokenizer") / "spm"
    train_tokenizer([str(small_corpus)], str(prefix), 500)
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def small_shards(small_corpus: Path, small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards for sequences of 64 tokens, a twentieth held out."""
    from llm.data.prepare import prepare_data

    folder = tmp_path_factory.mktemp("data") / "shards"
    prepare_data(
        [str(small_corpus)],
        str(small_tokenizer),
        str(folder),
        seq_len=64,
        shard_tokens=20_000,
        val_fraction=0.05,
        workers=1,
    )
    return folder


@pytest.fixture(scope="session")
def random_checkpoint(small_tokenizer: Path, small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one checkpoint that no training made. Its predictions are far from uniform, and the likeliest
    token is never a single byte, so that greedy text is valid UTF-8.
    """
    import torch

    from llm.config_file import parse_config
    from llm.data.tokenizer import load_tokenizer
    from llm.model import checkpoint
    from llm.model.hf import to_hf
    from llm.model.transformer import Transformer
    from llm.training import saving

    folder = tmp_path_factory.mktemp("random") / "run"
    tokenizer = load_tokenizer(small_tokenizer)
    config = parse_config(
        small_config(small_shards, folder, model__vocab_size=tokenizer.vocab_size, data__seq_len=64), "random"
    )
    model = Transformer(config.model)
    model.init_weights(3)
    model.requires_grad_(False)
    model.lm_head.weight[: tokenizer.vocab_size][torch.from_numpy(tokenizer.is_byte())] = 0.0
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors |= to_hf(config.model, name, 3 * parameter)
    state = checkpoint.TrainState(0, 0, checkpoint.DataState("", 64, 0, "", 0))
    saving.write_checkpoint(
        folder / "step-00000000",
        {"model": {name: tensor.contiguous() for name, tensor in tensors.items()}},
        config,
        state,
        tokenizer,
    )
    return folder


@pytest.fixture
def write_config(small_shards: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a small config; returns its path. The run's folder is tmp_path/run unless changed."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(small_config(small_shards, tmp_path / "run", **changes)))
        return path

    return write


@pytest.fixture
def llm_here(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`llm ARGUMENTS` in this process, which saves the seconds a new one takes: (exit code, stdout, stderr)."""
    from llm import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call
