"""A model in memory: what `llm.load` gives, against `llm eval` and `llm generate`."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import llm
from llm.inference.evaluate import evaluate
from llm.inference.generate import generate

TEXTS = ["def f(x):\n    return x\n", "naïve ▁ 🙂 ", "import os\n" * 60, "x", ""]
"""The third is longer than the model's sequences of 64 tokens."""


@pytest.fixture(scope="module")
def model(random_checkpoint: Path) -> llm.LanguageModel:
    return llm.load(random_checkpoint)


def test_it_says_what_was_loaded(model: llm.LanguageModel, random_checkpoint: Path) -> None:
    assert model.path == random_checkpoint / "step-00000000"
    assert (model.step, model.tokens, model.position) == (0, 0, 0)
    assert model.config.model.n_layers == 2
    assert llm.load(model.path).path == model.path
    ids = torch.tensor([[model.tokenizer.bos_id, *model.tokenizer.encode("x = 1")]])
    assert model.tokenizer.decode(ids[0, 1:].tolist()) == "x = 1"
    assert model.module(ids).shape == (*ids.shape, model.tokenizer.vocab_size)


@pytest.mark.parametrize(("stride", "batch_size"), [(None, 8), (20, 3), (64, 1)])
def test_each_text_is_scored_as_llm_eval_scores_it(
    model: llm.LanguageModel, random_checkpoint: Path, tmp_path: Path, stride: int | None, batch_size: int
) -> None:
    scores = model.score(TEXTS, stride=stride, batch_size=batch_size)
    assert len(scores) == len(TEXTS)
    for number, (text, score) in enumerate(zip(TEXTS[:-1], scores, strict=False)):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps({"text": text}) + "\n")
        told = evaluate(random_checkpoint, [file], stride=stride)
        assert score.bits_per_byte == pytest.approx(told["bits_per_byte"], rel=1e-6)
        assert score.nll_per_token == pytest.approx(told["nll_per_token"], rel=1e-6)
        assert (score.tokens, score.text_bytes) == (told["tokens"], told["bytes"])
        assert score.log_likelihood == -score.text_nll
    # Of an empty text the end alone is predicted.
    assert (scores[-1].tokens, scores[-1].text_nll, scores[-1].text_bytes) == (1, 0.0, 0)
    assert math.isnan(scores[-1].bits_per_byte)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 7}, {"top_k": 5, "stop": ["e"]}])
def test_the_pieces_are_the_text_of_llm_generate(
    model: llm.LanguageModel, random_checkpoint: Path, options: dict[str, object]
) -> None:
    pieces = list(model.generate("def f", max_new_tokens=20, **options))  # type: ignore[arg-type]
    told = generate(random_checkpoint, prompt="def f", max_new_tokens=20, **options)  # type: ignore[arg-type]
    assert "".join(pieces) == told["text"]
    assert all(pieces)


def test_a_piece_is_computed_when_it_is_asked_for(model: llm.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(model.generate("x", max_new_tokens=12, temperature=0))
    begun = model.generate("x", max_new_tokens=12, temperature=0)
    first = [next(begun), next(begun)]
    # Something else in between changes nothing.
    list(model.generate("y", max_new_tokens=3))
    model.score(["y"])
    assert first + list(begun) == whole
    assert len(whole) > 2


Ask = Callable[[llm.LanguageModel], object]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda model: model.generate("x", temperature=-1), "--temperature -1: must be 0"),
        (lambda model: model.generate("x", max_new_tokens=0), "--max_new_tokens 0: must be at least 1"),
        (lambda model: model.generate("x" * 500), "the prompt is .* tokens long and the model holds 64"),
        (lambda model: model.generate("\ud800"), "the prompt is not valid UTF-8"),
        (lambda model: model.generate("x", stop="e"), "stop takes a list"),
        (lambda model: model.score("x"), "score takes a list"),
        (lambda model: model.score(["x", "\ud800"]), "text 2 is not valid UTF-8"),
        (lambda model: model.score(["x"], stride=65), "--stride 65: must be at least 1 and at most"),
        (lambda model: model.score(["x"], batch_size=0), "--batch_size 0: must be at least 1"),
        (lambda model: llm.load(model.path, device="gpu"), "device 'gpu': is none of auto, cpu, cuda"),
        (lambda model: llm.load(model.path, precision="fp8"), "precision 'fp8': is none of fp32, bf16"),
        (lambda model: llm.load(model.path / "nowhere"), "no such checkpoint"),
        (lambda model: llm.load_tokenizer(model.path / "nowhere"), "no such tokenizer"),
        (lambda model: llm.read_metrics(model.path), "metrics.jsonl: no such file"),
    ],
)
def test_what_cannot_be_is_a_user_error_of_one_line(model: llm.LanguageModel, ask: Ask, message: str) -> None:
    with pytest.raises(llm.UserError, match=message) as raised:
        ask(model)
    assert "\n" not in str(raised.value)
