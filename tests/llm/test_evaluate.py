"""`llm eval`: equal to the definition, computed another way; the same for every batch size; isolated documents."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import SMALL_MODEL

from llm.config import ModelConfig
from llm.evaluate import evaluate_model
from llm.model import Transformer
from llm.tokenizer import Tokenizer, load_tokenizer

Scorer = Callable[..., dict[str, float]]

# A text longer than the context of 64 tokens, short ones, and characters that are several tokens.
TEXTS = ["def f(x):\n    return x\n", "naïve ▁ 🙂\r\n", "import os\n" * 60, "x"]


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(small_tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    model = Transformer(ModelConfig(**SMALL_MODEL, vocab_size=tokenizer.vocab_size))
    model.init_weights(3)
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that mistakes show
            parameter.mul_(4.0)
    return model.eval()


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def by_definition(model: Transformer, tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    """One document and one window at a time, the softmax written out."""
    length = model.config.max_seq_len
    nll, targets, text_nll = 0.0, 0, 0.0
    for text in texts:
        tokens = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        for begin in range(0, len(tokens) - 1, length):
            window = tokens[begin : begin + length + 1]
            with torch.no_grad():
                logits = model(torch.tensor([window[:-1]]))[0].double()
            for row, target in zip(logits, window[1:], strict=True):
                loss = -math.log(float(row.exp()[target] / row.exp().sum()))
                nll, targets = nll + loss, targets + 1
                text_nll += loss if target != tokenizer.eos_id else 0.0
    raw_bytes = sum(len(text.encode()) for text in texts)
    return {
        "nll_per_token": nll / targets,
        "perplexity": math.exp(nll / targets),
        "bits_per_byte": text_nll / math.log(2) / raw_bytes,
        "tokens": targets,
        "bytes": raw_bytes,
        "documents": len(texts),
    }


def test_equals_the_definition(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = evaluate_model(model, tokenizer, context=64, inputs=[write(tmp_path / "t.jsonl", TEXTS)])
    assert found == pytest.approx(by_definition(model, tokenizer, TEXTS), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_batch_size_changes_nothing(model: Transformer, tokenizer: Tokenizer, tmp_path: Path, batch_size: int) -> None:
    path = write(tmp_path / "t.jsonl", TEXTS * 3)
    expected = evaluate_model(model, tokenizer, context=64, inputs=[path], batch_size=8)
    assert evaluate_model(model, tokenizer, context=64, inputs=[path], batch_size=batch_size) == pytest.approx(
        expected, rel=1e-6
    )


def test_documents_do_not_see_each_other(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    together = evaluate_model(model, tokenizer, context=64, inputs=[write(tmp_path / "t.jsonl", TEXTS)])
    alone = [
        evaluate_model(model, tokenizer, context=64, inputs=[write(tmp_path / "a.jsonl", [text])]) for text in TEXTS
    ]
    assert sum(one["nll_per_token"] * one["tokens"] for one in alone) == pytest.approx(
        together["nll_per_token"] * together["tokens"], rel=1e-6
    )


def test_several_files_are_scored_as_one(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", TEXTS[:2]), write(tmp_path / "b.jsonl", TEXTS[2:])]
    whole = evaluate_model(model, tokenizer, context=64, inputs=[write(tmp_path / "t.jsonl", TEXTS)])
    assert evaluate_model(model, tokenizer, context=64, inputs=files) == pytest.approx(whole, rel=1e-6)


def test_a_running_text_longer_than_a_piece_is_one_document(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"line {i} of the text\n\n" for i in range(40))
    (tmp_path / "t.txt").write_text(text)
    whole = evaluate_model(model, tokenizer, context=64, inputs=[str(tmp_path / "t.txt")])
    monkeypatch.setattr("llm.corpus.PIECE_CHARS", 100)
    pieces = evaluate_model(model, tokenizer, context=64, inputs=[str(tmp_path / "t.txt")])
    assert pieces == whole
    assert whole["documents"] == 1
    assert whole["bytes"] == len(text)
