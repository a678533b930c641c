"""Where tiktoken encodes in place of the library tokenizers, it gives the same ids."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from foreign_tokenizers import TEXT, make, make_ranks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from llm.data import library_tokenizer
from llm.data.byte_level import RankEncoder, rank_encoder
from llm.data.library_tokenizer import LibraryTokenizer
from llm.data.tiktoken_ranks import SPLITS
from llm.data.tokenizer import load_tokenizer, train_tokenizer

FORMS = ["gpt2", "llama3", "qwen2", "bytelevel", "bytelevel 1", "bytelevel 2", *(f"ranks {name}" for name in SPLITS)]
OTHERS = ["smollm2", "llama2", "unigram", "tinyllama-spm"]
WORDS = [*" \n\t\r", "  ", "\n\n", "\r\n", "the", " fox", "123", " 20245", "'s", "DON'T", "I'LL", "'ſ", "é", "e\u0301"]
WORDS += ["ǅ", "ʰ", "🎉", "/", "...\n", "\x00", "\u2028", "\xa0", "字", "ﬁ", "Å", "<|", "<|endoftext|>", "<|im_end|>"]
WORDS += ["<|begin_of_text|>", "<tool_call>", "<|end_of_text|>", " " * 200, "a" * 200]
SOME_TEXT = st.text(max_size=40) | st.lists(st.sampled_from(WORDS), max_size=20).map("".join)


def load(form: str, folder: Path) -> LibraryTokenizer:
    kind, _, name = form.partition(" ")
    if kind == "ranks":
        tokenizer = load_tokenizer(f"{make_ranks(folder)}:{name}")
    elif kind == "bytelevel":
        (folder / "a.txt").write_text("\n".join(TEXT))
        digits = int(name) if name else None
        tokenizer = load_tokenizer(
            train_tokenizer([folder / "a.txt"], folder / "tok", 400, kind="bytelevel", digits=digits)["model"]
        )
    else:
        tokenizer = load_tokenizer(make(form, folder))
    assert isinstance(tokenizer, LibraryTokenizer)
    return tokenizer


@pytest.fixture(scope="module", params=FORMS)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LibraryTokenizer, RankEncoder]:
    tokenizer = load(request.param, tmp_path_factory.mktemp("byte_level"))
    ranks = rank_encoder(tokenizer.tree())
    assert ranks is not None
    return tokenizer, ranks


@given(SOME_TEXT)
@example("I'LL don't 1234567 of<|endoftext|>\r\n\n  x \n")
@example("".join(TEXT[:2]))
@settings(max_examples=200, deadline=None)
def test_any_text_has_the_ids_of_the_library(both: tuple[LibraryTokenizer, RankEncoder], text: str) -> None:
    tokenizer, ranks = both
    ids = ranks.encode(text)
    assert ids is None or ids.tolist() == tokenizer.encode(text)
    assert ids is None or ids.dtype == np.int32


def test_most_texts_go_this_way(both: tuple[LibraryTokenizer, RankEncoder]) -> None:
    _, ranks = both
    assert ranks.encode(TEXT[0]) is not None
    assert ranks.encode("< | é") is not None


def test_special_tokens_and_changed_text_do_not(both: tuple[LibraryTokenizer, RankEncoder]) -> None:
    tokenizer, ranks = both
    (name, *_) = (token["content"] for token in tokenizer.tree()["added_tokens"])
    assert ranks.encode(f"a{name}b") is None
    assert (ranks.encode("e\u0301") is None) == (tokenizer.tree()["normalizer"] is not None)


@pytest.mark.parametrize("blank", [" ", "\n", "\u3000", " \n"])
def test_long_runs_of_blanks_do_not_end_the_process(both: tuple[LibraryTokenizer, RankEncoder], blank: str) -> None:
    """tiktoken's regular expressions overflow their stack, and Rust's panic is no Exception of Python's."""
    tokenizer, ranks = both
    assert ranks.encode("a" + blank * 1_000_000 + "b") is None
    text = "a" + (blank * 15_000 + "b") * 2
    ids = ranks.encode(text)
    assert tokenizer.encode(text) == (ids.tolist() if ids is not None else tokenizer.encode(text))
    assert (ids is None) == (tokenizer.tree()["normalizer"] is not None and not text.isascii())


def test_both_ways_mix_in_the_order_of_the_texts(
    both: tuple[LibraryTokenizer, RankEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, _ = both
    chance = random.Random(0)
    texts = ["".join(chance.choices(WORDS, k=chance.randrange(20))).encode() for _ in range(200)]
    texts.append(" a b the of".join(chance.choices(WORDS, k=20_000)).encode())  # in several parts
    monkeypatch.setattr(library_tokenizer, "RANKS_AFTER", 1 << 60)
    ids, ends = tokenizer.encode_batch(texts)
    monkeypatch.setattr(library_tokenizer, "RANKS_AFTER", 0)
    used: list[bool] = []
    encode = RankEncoder.encode
    with monkeypatch.context() as patch:
        patch.setattr(RankEncoder, "encode", lambda self, text: note(used, encode(self, text)))
        found, found_ends = tokenizer.encode_batch(texts)
    assert set(used) == {True, False}
    assert found.tolist() == ids.tolist()
    assert found_ends.tolist() == ends.tolist()
    assert (found.dtype, found_ends.dtype) == (ids.dtype, ends.dtype)


def note(used: list[bool], ids: np.ndarray | None) -> np.ndarray | None:
    used.append(ids is not None)
    return ids


def test_it_gets_ready_once_there_is_much_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(library_tokenizer, "rank_encoder", lambda tree: made.append(1) or rank_encoder(tree))
    tokenizer = load("gpt2", tmp_path)
    text = TEXT[0].encode() * 1000
    tokenizer.encode_batch([text])
    assert not made
    for _ in range(40):
        tokenizer.encode_batch([text])
    assert made == [1]


@pytest.mark.parametrize("form", OTHERS)
def test_other_kinds_stay_with_the_library(tmp_path: Path, form: str) -> None:
    try:
        tree = load(form, tmp_path).tree()
    except AssertionError:  # it is SentencePiece's
        return
    # transformers 5 drops SmolLM2's split of digits, which leaves a GPT-2.
    assert (rank_encoder(tree) is None) == (form != "smollm2")


def swap(tree: dict[str, Any]) -> None:
    merges = tree["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def other_rule(tree: dict[str, Any]) -> None:
    """A token of three characters is made from its other two parts."""
    merges = tree["model"]["merges"]
    at = next(n for n, (first, second) in enumerate(merges) if len(first + second) == 3)
    text = "".join(merges[at])
    merges[at] = [text[:1], text[1:]] if len(merges[at][0]) == 2 else [text[:2], text[2:]]


@pytest.mark.parametrize(
    "change",
    [
        swap,
        other_rule,
        lambda tree: tree["model"]["vocab"].pop("!"),
        lambda tree: tree["model"].update(dropout=0.1),
        lambda tree: tree["model"].update(end_of_word_suffix="</w>"),
        lambda tree: tree.update(normalizer={"type": "NFKC"}),
        lambda tree: tree.update(pre_tokenizer=None),
        lambda tree: tree.update(pre_tokenizer={"type": "Sequence", "pretokenizers": []}),
        lambda tree: tree["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True}),
        lambda tree: tree["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\p{L}+"}),
        lambda tree: tree["pre_tokenizer"]["pretokenizers"][0].update(pattern={"String": " "}),
        lambda tree: tree["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        lambda tree: tree["pre_tokenizer"]["pretokenizers"][0].update(invert=True),
        lambda tree: tree["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda tree: tree["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
        lambda tree: tree["added_tokens"].append({"content": "e\u0301"}),
    ],
)
def test_what_it_cannot_tell_to_be_the_same_stays_with_the_library(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    tree = load("bytelevel", tmp_path).tree()
    assert rank_encoder(json.loads(json.dumps(tree))) is not None
    change(tree)
    assert rank_encoder(tree) is None


def test_a_token_without_a_merge_counts_only_where_whole_words_do(tmp_path: Path) -> None:
    tree = load("bytelevel", tmp_path).tree()
    tree["model"]["vocab"]["qzx"] = max(tree["model"]["vocab"].values()) + 1
    expected = {False: 3, True: 1}
    for whole, count in expected.items():
        tree["model"]["ignore_merges"] = whole
        ranks = rank_encoder(tree)
        assert ranks is not None
        ids = ranks.encode("qzx")
        assert ids is not None
        assert len(ids) == count
        path = tmp_path / f"{whole}.json"
        path.write_text(json.dumps(tree))
        assert load_tokenizer(path).encode("qzx") == ids.tolist()


@pytest.mark.parametrize(
    "pattern",
    [
        *(rf"\p{{{name}}}" for name in ("L", "N", "M", "Lu", "Ll", "Lt", "Lm", "Lo")),
        *(r"\s", r"[^\s\p{L}\p{N}]", r"[^\r\n\p{L}\p{N}]", "(?i:[sdtm])", "(?i:[revl])"),
    ],
)
def test_both_libraries_take_every_character_for_the_same(pattern: str) -> None:
    """Each has tables of Unicode of its own. The planes 4 to 13 have no characters, 15 and 16 are for private use."""
    codes = (*range(0xD800), *range(0xE000, 0x40001), *range(0xDFFFF, 0xF0001), 0x10FFFF)
    every = "".join(map(chr, codes))
    single = {bytes([byte]): byte for byte in range(256)}
    theirs = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=single, special_tokens={})
    rest = pre_tokenizers.Split(Regex(pattern), "removed").pre_tokenize_str(every)
    left = {char for part, _ in rest for char in part}
    assert set(bytes(theirs.encode_ordinary(every)).decode()) == set(every) - left
