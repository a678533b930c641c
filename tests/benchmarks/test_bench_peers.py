"""benchmarks.bench_peers: scores as `llm eval` does, and gives each contestant its time or its FLOPs."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import bench_ladder
from benchmarks.bench_peers import Peer, config_of, cosine, read_stream, score, wanted
from llm.data.tokenizer import load_tokenizer
from llm.inference.evaluate import evaluate_model
from llm.model.flops import flops_per_token
from llm.model.transformer import Transformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    words = ["the", "model", "reads", "a", "text", "and", "writes", "the", "next", "word"]
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for i in range(1500):
            text = " ".join(words[(i * j * j + i) % len(words)] + str(i * j % 97) for j in range(i % 7 + 1, 200))
            file.write(json.dumps({"text": text}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_ladder, "VOCAB_SIZE", 400)
        bench_ladder.prepare([folder / "text.jsonl"], folder / "data", 10, seq_len=512)
    return folder / "data"


def test_a_text_is_scored_as_llm_eval_does(folder: Path, tmp_path: Path) -> None:
    config = config_of("rules", folder, 100_000)
    model = Transformer(config.model).eval()
    model.init_weights(0)
    tokenizer, text = load_tokenizer(folder / "tokenizer.model"), tmp_path / "held_out.jsonl"
    lines = (folder / "held_out.jsonl").read_text("utf-8").splitlines(keepends=True)
    text.write_text("".join(lines[:20]), encoding="utf-8")
    expected = evaluate_model(model, tokenizer, [text], context=512)["bits_per_byte"]
    assert score(model, tokenizer, text, 512) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["nanoGPT", "llama 0.008"])
def test_a_peer_learns(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)  # takes longer than the steps
    peer = Peer(name, config_of("rules", folder, 100_000), read_stream(folder, 512), 100_000)
    windows = peer.stream[: 2 * 513].view(2, 513).long()
    before = peer.model(windows[:, :-1], windows[:, 1:]).item()
    for _ in range(4):
        peer()
    after = peer.model(windows[:, :-1], windows[:, 1:]).item()
    assert after < before - 0.1
    assert peer.model.logits(windows[:, :-1]).shape == (2, 512, peer.model.embed.num_embeddings)


def test_a_peers_token_costs_the_flops_of_its_products(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama of our shape costs what our model does, but for the weights of the norms."""
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    config = config_of("rules", folder, 100_000)
    llama = Peer("llama 0.01", config, torch.zeros(600, dtype=torch.int32), 1)
    assert llama.flops_per_token == pytest.approx(flops_per_token(config.model, 512).usual, rel=0.005)


def test_equal_time_follows_from_the_rates_and_equal_flops_from_the_models() -> None:
    rates, flops = {"rules": 1000.0, "tiny before": 1500.0, "nanoGPT": 2000.0}, {"rules": 6.0, "nanoGPT": 12.0}
    assert wanted("rules", rates, 2, flops) == {"equal time": 120_000}
    assert wanted("tiny before", rates, 2, flops) == {"equal time": 180_000, "equal tokens": 120_000}
    assert wanted("nanoGPT", rates, 2, flops) == {"equal time": 240_000, "equal FLOPs": 60_000}


def test_a_cosine_rises_and_ends_at_its_least_value() -> None:
    rates = [cosine(step, 101, 10, 0.1) for step in range(101)]
    assert rates[:2] == pytest.approx([1 / 11, 2 / 11])
    assert max(rates) == rates[10] == 1
    assert rates[100] == pytest.approx(0.1, abs=1e-3)
    assert all(a > b for a, b in pairwise(rates[10:]))
