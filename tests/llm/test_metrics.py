import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import REPOSITORY

from llm.metrics import (
    MetricsLog,
    Score,
    read_metrics,
    score_from_sums,
    score_sums,
)


def test_training_md_explains_every_key_of_a_line(
    write_config: Callable[..., Path], llm_here: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    config = write_config(train__total_tokens=512, train__sample_prompts=["def "])
    code, _, err = llm_here("train", "--config", config)
    assert code == 0, err
    keys = {key for line in read_metrics(tmp_path / "run/metrics.jsonl") for key in line}
    assert {"loss", "val_loss", "samples"} <= keys
    explained = (REPOSITORY / "docs/training.md").read_text().split("## What is measured")[1].split("\n## ")[0]
    assert {key for key in keys if f"`{key}`" not in explained} == set()


def test_score_counts_targets_eos_and_bytes_as_defined() -> None:
    eos, token_bytes = 2, torch.tensor([0, 0, 0, 4, 1])
    labels = torch.tensor([[3, 4, 2, -100], [4, -100, 2, 3]])
    losses = torch.tensor([[1.0, 2.0, 4.0, 99.0], [8.0, 99.0, 16.0, 32.0]])
    score = score_from_sums(score_sums(losses, labels, token_bytes, eos))
    assert score == Score(nll=63.0, tokens=6, text_nll=43.0, text_bytes=10)
    assert score.nll_per_token == 63 / 6
    assert score.perplexity == pytest.approx(math.exp(63 / 6))
    assert score.bits_per_byte == pytest.approx(43 / math.log(2) / 10)


def test_scores_of_parts_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 20, (6, 8), generator=generator).where(torch.rand(6, 8, generator=generator) < 0.9, -100)
    labels[labels == -1] = -100
    losses, token_bytes = torch.rand(6, 8, generator=generator), torch.arange(20)
    whole = score_sums(losses, labels, token_bytes, 2)
    parts = [score_sums(losses[i : i + 2], labels[i : i + 2], token_bytes, 2) for i in (4, 0, 2)]
    assert score_from_sums(torch.cat(parts)) == score_from_sums(whole), "their order changes no bit"


def test_an_empty_score_is_nan_not_a_crash() -> None:
    empty = Score(0.0, 0, 0.0, 0)
    assert math.isnan(empty.nll_per_token)
    assert math.isnan(empty.bits_per_byte)
    assert Score(1e6, 10, 0.0, 0).perplexity == math.inf


def test_metrics_past_the_checkpoint_are_cut_and_half_a_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": float(step)}) for step in range(1, 6)]
    path.write_text("\n".join(lines) + '\n{"step": 6, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5]
    log = MetricsLog(path, keep_through_step=3)
    log.write({"step": 4, "loss": 44.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 44.0)]
