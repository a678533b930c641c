"""Hugging Face's tokenizers read our files, and give our ids and our text."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm.data.tokenizer import Tokenizer, load_tokenizer
from llm.errors import UserError
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
    """If names of special tokens are to be text, which is no default of transformers."""
    ours, theirs = both
    ids = ours.encode(text)
    assert theirs(text, split_special_tokens=True).input_ids == [ours.bos_id, *ids]
    assert theirs(text, split_special_tokens=True, add_special_tokens=False).input_ids == ids
    assert theirs.decode(ids) == text
    assert theirs.decode([ours.bos_id, *ids, ours.eos_id], skip_special_tokens=True) == text


def test_a_whole_corpus_has_the_same_ids(both: tuple[Tokenizer, Any], small_corpus: Path) -> None:
    ours, theirs = both
    text = small_corpus.read_text("utf-8")
    assert theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids == ours.encode(text)


def test_the_special_tokens_are_named(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    assert (theirs.bos_token, theirs.bos_token_id) == ("<s>", ours.bos_id)
    assert (theirs.eos_token, theirs.eos_token_id) == ("</s>", ours.eos_id)
    assert len(theirs) == theirs.vocab_size == ours.vocab_size
    assert theirs.model_max_length == 64
    assert (theirs.pad_token, theirs.pad_token_id, theirs.padding_side) == ("<unk>", 0, "left")
    assert theirs("a</s>b", add_special_tokens=False).input_ids == [*ours.encode("a"), ours.eos_id, *ours.encode("b")]


def test_tokens_that_are_added_stay_whole(both: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    ours, theirs = both
    theirs.save_pretrained(tmp_path)
    more = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert more.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]}) == 1
    assert more("a<|im_start|>b", add_special_tokens=False).input_ids[1] == ours.vocab_size


def test_a_batch_is_padded_and_has_what_a_model_takes(both: tuple[Tokenizer, Any]) -> None:
    batch = both[1](["a text", "one that is longer"], padding=True)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert [row[0] for row in batch["attention_mask"]] == [0, 1]
    assert [row[-1] for row in batch["attention_mask"]] == [1, 1]


def test_a_chat_with_a_base_model_is_a_text_that_it_continues(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    message = {"role": "user", "content": "Once upon"}
    assert theirs.apply_chat_template([message], tokenize=False) == "<s>Once upon"
    ids = theirs.apply_chat_template([message], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == [ours.bos_id, *ours.encode("Once upon")]
    with pytest.raises(Exception, match="This is a base model"):
        theirs.apply_chat_template([message, {"role": "assistant", "content": "a time"}], tokenize=False)


def test_what_transformers_saved_again_is_still_ours(both: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    """With its chat template, if the model file is beside it, and unless somebody added tokens."""
    ours, theirs = both
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"made from a tokenizer\.model, which is missing; copy it there"):
        load_tokenizer(tmp_path)
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.sha256 == ours.sha256
    assert again.files.keys() == {"tokenizer.model", "chat_template.jinja"}
    more = transformers.AutoTokenizer.from_pretrained(tmp_path)
    more.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    more.save_pretrained(tmp_path)
    grown = load_tokenizer(tmp_path)
    assert grown.vocab_size == ours.vocab_size + 1
    assert grown.encode("a<|im_start|>b") == more("a<|im_start|>b", add_special_tokens=False).input_ids
