"""Hugging Face's tokenizers read our files, and give our ids and our text."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm.data.tokenizer import Tokenizer, load_tokenizer
from llm.model.hf_tokenizer import write_files

transformers = pytest.importorskip("transformers")

HARD = ["<s>", "</s>", "<unk>", "<0x41>", "\u2581", "\x00", "\r\n", "  ", "\t", "aaaaaaa", "é", "🙂", "the ", "self."]
TEXTS = st.lists(st.sampled_from(HARD) | st.text(max_size=8), max_size=12).map("".join)


@pytest.fixture(scope="module")
def both(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = tmp_path_factory.mktemp("tokenizer")
    ours = load_tokenizer(small_tokenizer)
    write_files(ours, folder, 64)
    (folder / "config.json").write_text('{"model_type": "llama"}')  # what a model folder has
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=300)
@example("<s>a</s><unk><0x41>")
@example("  \u2581 \u2581\x00\r\n\r\n")
@example("a aa aaa aaaa aaaaa" * 3)
@given(text=TEXTS)
def test_any_text_has_the_same_ids_and_comes_back(both: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = both
    ids = ours.encode(text)
    assert theirs(text).input_ids == [ours.bos_id, *ids]
    assert theirs(text, add_special_tokens=False).input_ids == ids
    assert theirs.decode(ids) == text
    assert theirs.decode([ours.bos_id, *ids, ours.eos_id], skip_special_tokens=True) == text


def test_a_whole_corpus_has_the_same_ids(both: tuple[Tokenizer, Any], small_corpus: Path) -> None:
    ours, theirs = both
    text = small_corpus.read_text("utf-8")
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)


def test_the_special_tokens_are_named(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    assert (theirs.bos_token, theirs.bos_token_id) == ("<s>", ours.bos_id)
    assert (theirs.eos_token, theirs.eos_token_id) == ("</s>", ours.eos_id)
    assert len(theirs) == theirs.vocab_size == ours.vocab_size
    assert theirs.model_max_length == 64
