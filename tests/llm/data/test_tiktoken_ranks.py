"""Lists of tiktoken ranks give the ids of tiktoken, for each name of a split pattern."""

import random
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from foreign_tokenizers import GPT4, QWEN, make_ranks, write_ranks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from llm.data.tiktoken_ranks import SPLITS, read_ranks
from llm.data.tokenizer import Tokenizer, load_tokenizer
from llm.errors import UserError

PUBLISHED_RANKS = {"gpt2": 50_256, "cl100k": 100_256, "o200k": 199_998, "llama3": 128_000, "qwen": 151_643}
WORDS = [*" \n\t\r", "  ", "\n\n", "\r\n", "the", " fox", "123", " 20245", "'s", "DON'T", "I'LL", "é", "e\u0301", "字"]
WORDS += ["ǅ", "ʰ", "🎉", "/", "...\n", "\x00", "\u2028", "\xa0", "<|endoftext|>", "<|begin_of_text|>", "<|im_end|>"]
PAIRED = " \n\r\t/'.abSTz19éʰ"
SOME_TEXT = st.text(max_size=40) | st.lists(st.sampled_from(WORDS), max_size=20).map("".join)


def published(name: str, ranks: dict[bytes, int]) -> dict[str, Any]:
    """The split pattern, and special tokens by their distance from the number of ranks, as they are published."""
    if name == "llama3":
        special = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6, "<|end_header_id|>": 7}
        return {"pat_str": GPT4, "special_tokens": special | {"<|eot_id|>": 9}}
    if name == "qwen":
        return {"pat_str": QWEN, "special_tokens": {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}}
    with pytest.MonkeyPatch.context() as patch:  # of the functions that download ranks
        for loads in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            patch.setattr(openai_public, loads, lambda *args, **options: ranks)
        made = getattr(openai_public, "gpt2" if name == "gpt2" else f"{name}_base")()
    special = {token: number - PUBLISHED_RANKS[name] for token, number in made["special_tokens"].items()}
    return {"pat_str": made["pat_str"], "special_tokens": special}


def encoding(name: str, path: Path) -> tiktoken.Encoding:
    ranks = read_ranks(path.read_bytes())
    assert ranks is not None
    form = published(name, ranks)
    special = {token: len(ranks) + number for token, number in form["special_tokens"].items()}
    return tiktoken.Encoding(name, pat_str=form["pat_str"], mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module", params=SPLITS)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, tiktoken.Encoding]:
    path = make_ranks(tmp_path_factory.mktemp("ranks"))
    # Any two characters are a token, so that the ids show every place where text is split.
    tokens = list(read_ranks(path.read_bytes()) or ())
    pairs = (one.encode() + two.encode() for one in PAIRED for two in PAIRED)
    write_ranks(path, list(dict.fromkeys([*tokens, *pairs])))
    return load_tokenizer(f"{path}:{request.param}"), encoding(request.param, path)


@given(SOME_TEXT)
@example("I'LL don't 1234567 of<|endoftext|>\r\n\n  x \n")
@example("ABCdef's GHI/\n//\n ʰǅa")
@settings(max_examples=100, deadline=None)
def test_the_ids_are_those_of_tiktoken(both: tuple[Tokenizer, tiktoken.Encoding], text: str) -> None:
    ours, theirs = both
    ids = ours.encode(text)
    assert ids == theirs.encode(text, allowed_special="all")
    assert ours.decode_bytes(ids) == theirs.decode_bytes(ids) == text.encode()


def test_its_special_tokens_are_the_published_ones(both: tuple[Tokenizer, tiktoken.Encoding]) -> None:
    ours, theirs = both
    assert ours.vocab_size == theirs.n_vocab
    assert all(ours.encode(token) == [theirs.encode_single_token(token)] for token in theirs.special_tokens_set)
    assert theirs.decode([ours.eos_id]) in ("<|endoftext|>", "<|end_of_text|>")


@given(st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_also_of_ranks_that_no_trainer_would_make(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Tokens join any two others, in any order, so that many cannot be reached by merges."""
    chance = random.Random(seed)
    tokens = [bytes([byte]) for byte in range(256)]
    joined = [*map(str.encode, "abcd")]
    for _ in range(60):
        joined.append(chance.choice(joined) + chance.choice(joined))
    more = [token for token in dict.fromkeys(joined) if len(token) > 1]
    chance.shuffle(more)
    path = write_ranks(tmp_path_factory.mktemp("ranks") / "some.tiktoken", tokens + more)
    ours, theirs = load_tokenizer(f"{path}:qwen"), encoding("qwen", path)
    texts = ["".join(chance.choices("abcd ", k=chance.randrange(60))) for _ in range(30)]
    for text in [*texts, *(token.decode() for token in more)]:
        assert ours.encode(text) == theirs.encode(text, allowed_special="all")


def test_refusals(tmp_path: Path) -> None:
    path = make_ranks(tmp_path)
    with pytest.raises(UserError, match=r"do not say how text is split; name it, --tok .*:NAME, as gpt2, cl100k"):
        load_tokenizer(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2] + lines[-1:]))
    with pytest.raises(UserError, match="ranks are not the numbers from 0 to"):
        load_tokenizer(f"{path}:gpt2")
    path.write_bytes(b"".join(lines[1:]))
    with pytest.raises(UserError, match="no list of tiktoken ranks with all 256 bytes"):
        load_tokenizer(f"{path}:gpt2")
