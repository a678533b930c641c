"""Decoding gives back any text, cutting changes no id, and a vocabulary holds what its text supports."""

import gzip
import random
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm.data import blocks, document_reader, sentencepiece_tokenizer, tokenizer
from llm.data.blocks import cut
from llm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from llm.errors import UserError

# A text that tempts: runs of blanks and newlines, text behind them that always follows, the trainer's reserved
# characters, and the letters of `<s>`, `</s>`, `<unk>` and `<0x41>` often enough to be merged as far as they go.
TEMPTING = (
    "def f(x):\n    return x\n\n\ndef g(x):\n\treturn  <0x4 1> <s> </s> <unk> <0x41> <0x4x 0x41> s> /s> <0x0A>\r\n\r\n"
    "a\u2581b\u2585c \u2581\u2581 , ,\n- a\n- b\n# 12 345\n'don't'\n'do'\n𝒳ö字字字\n   \n  \n"
)
TEXT = st.one_of(
    st.text(max_size=80),
    st.text(st.sampled_from(" \n\r\t\x00\u2581\u2585\ufeff\u0301\uffff<s>/x041unkdef():\U0001f389字"), max_size=80),
    st.lists(
        st.sampled_from(
            [
                "<s>",
                "</s>",
                "<unk>",
                "<0x41>",
                "<0x0A>",
                "1>",
                "\u2581",
                "\u2585",
                " ",
                "  ",
                "\n",
                "\n\n",
                "\r\n",
                "\t",
            ],
        )
        | st.sampled_from(
            ["\x00", "\x1f", "def", "return x", "\ufeff", "\u0301", "\ufdd0", "\U0010ffff", "👩‍👩‍👧", "字"]
        ),
        max_size=30,
    ).map("".join),
)


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    source = Path(document_reader.__file__).read_text()
    (folder / "a.txt").write_text((TEMPTING * 40 + source) * 2)
    result = train_tokenizer([folder / "a.txt"], folder / "spm", 1200)
    assert result["vocab_size"] == 1200
    return load_tokenizer(result["model"])


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = (TEMPTING * 40 + Path(document_reader.__file__).read_text()) * 2
    return train(tmp_path_factory.mktemp("byte_level"), text, 600, kind="bytelevel")


def train(folder: Path, text: str, vocab_size: int, **options: object) -> Tokenizer:
    (folder / "a.txt").write_bytes(text.encode())
    return load_tokenizer(train_tokenizer([folder / "a.txt"], folder / "m", vocab_size, **options)["model"])  # type: ignore[arg-type]


class TestLossless:
    @given(TEXT)
    @example("\u2581 \u2581\u2581x\u2581")
    @example("<s></s><unk><0x41>")
    @example("\x00\x1f\ufeff\ufffe\U0010fffe\ufffd")
    @settings(max_examples=1500, deadline=None)
    def test_decode_gives_back_any_text(self, tok: Tokenizer, text: str) -> None:
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert tok.decode_bytes(ids) == text.encode()
        assert all(0 <= i < tok.vocab_size for i in ids)
        assert not {tok.bos_id, tok.eos_id, 0} & set(ids)
        assert tok.token_bytes()[ids].sum() == len(text.encode())

    def test_every_character_there_is(self, tok: Tokenizer) -> None:
        points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
        for low in range(0, len(points), 1 << 16):
            text = "".join(map(chr, points[low : low + (1 << 16)]))
            assert tok.decode(tok.encode(text)) == text

    def test_u2581_is_its_three_bytes_and_a_blank_is_not(self, tok: Tokenizer) -> None:
        pieces = tok.piece_bytes()
        assert [pieces[i] for i in tok.encode("\u2581")] == [b"\xe2", b"\x96", b"\x81"]
        assert [pieces[i] for i in tok.encode(" ")] == [b" "]
        assert tok.encode("a\u2581 b") == tok.encode("a") + tok.encode("\u2581") + tok.encode(" b")

    def test_the_names_of_control_tokens_are_plain_text(self, tok: Tokenizer) -> None:
        for name in ("<s>", "</s>", "<unk>", "<0x41>"):
            assert len(tok.encode(name)) > 1
        assert tok.decode([tok.bos_id, *tok.encode("<s>"), tok.eos_id, 0]) == "<s>"

    def test_bytes_that_are_not_utf8_become_u_fffd(self, tok: Tokenizer) -> None:
        ids = tok.encode("\u2581")
        assert tok.decode(ids[:2]) == "\ufffd"
        assert tok.decode_bytes(ids[:2]) == b"\xe2\x96"

    def test_half_a_surrogate_pair_is_an_error(self, tok: Tokenizer) -> None:
        with pytest.raises(UserError, match="not valid Unicode"):
            tok.encode("a\ud800b")

    def test_a_corpus_without_blanks_still_tells_a_blank_from_u2581(self, tmp_path: Path) -> None:
        small = train(tmp_path, "ab\nab\n", 300)
        assert small.decode(small.encode("a b\u2581")) == "a b\u2581"


class TestCutting:
    @given(TEXT, st.integers(1, 30), st.integers(1, 90))
    @settings(max_examples=1000, deadline=None)
    def test_a_text_cut_where_it_may_be_has_the_same_ids(
        self, tok: Tokenizer, text: str, size: int, segment: int
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "SEGMENT_CHARS", segment)
            patch.setattr(sentencepiece_tokenizer, "SEGMENT_CHARS", segment)
            expected = tok.encode(text)
            ids, begin = [], 0
            while (end := cut(text, begin, size)) is not None:
                ids += tok.encode(text[begin:end])
                begin = end
            assert ids + tok.encode(text[begin:]) == expected

    @given(TEXT)
    @settings(max_examples=300, deadline=None)
    def test_what_sentencepiece_itself_says_of_the_uncut_text(self, tok: Tokenizer, text: str) -> None:
        text = text.replace("\u2581", "")
        processor = sentencepiece.SentencePieceProcessor(model_file=str(tok.path))
        assert tok.encode(text) == processor.encode(text)

    def test_what_sentencepiece_says_of_more_words_than_are_remembered(self, tok: Tokenizer) -> None:
        chance = random.Random(0)
        letters = [chr(i) for i in range(0x20, 0x7F)] + list("\n\r\t  éö字𝒳\x00\u2585\ufeff")
        words = ["".join(chance.choices(letters, k=chance.randrange(1, 12))) for _ in range(120_000)]
        text = " ".join(words + words[:2000] + ["x" * 200, "def" * 60, " " * 300])
        processor = sentencepiece.SentencePieceProcessor(model_file=str(tok.path))
        assert tok.encode(text) == processor.encode(text)

    def test_no_piece_of_the_vocabulary_crosses_a_place_to_cut(self, tok: Tokenizer) -> None:
        learned = [piece.decode(errors="replace") for piece in tok.piece_bytes()]
        assert [piece for piece in learned if cut(piece, 0, 1) is not None] == []
        # ... though newlines, runs of them and of blanks were learned, and what follows a newline followed it always.
        assert {"\n\n", "    ", "\r\n", ":\n"} <= set(learned)

    def test_a_piece_without_a_kind_is_told_without_parsing_it(self, tok: Tokenizer) -> None:
        fields = sentencepiece_tokenizer._fields(tok.files["tokenizer.model"])
        pieces = [piece for field, piece in fields if field == 1]
        told = [sentencepiece_tokenizer._has_no_kind(piece) for piece in pieces]
        assert told == [3 not in dict(sentencepiece_tokenizer._fields(piece)) for piece in pieces]
        assert told.count(False) == 3 + 256  # <unk>, BOS, EOS, the bytes
        long = b"\n\x80\x01" + b"x" * 128 + b"\x15abcd"
        assert not sentencepiece_tokenizer._has_no_kind(long)

    def test_documents_are_encoded_each_for_itself(self, tok: Tokenizer) -> None:
        texts = ["", "a", "", "a b\n\nc" * 1000, "\u2581", ""]
        ids, ends = tok.encode_batch([text.encode() for text in texts])
        assert (ids.dtype, ends.dtype) == (np.int32, np.int64)
        assert [part.tolist() for part in np.split(ids, ends[:-1])] == [tok.encode(text) for text in texts]
        assert [len(part) for part in tok.encode_batch([])] == [0, 0]

    def test_a_long_text_without_a_place_to_cut(self, tok: Tokenizer) -> None:
        text = "".join(random.Random(0).choices("def", k=300_000))
        assert tok.decode(tok.encode(text)) == text


class TestTraining:
    def test_the_same_text_gives_the_same_bytes_in_another_process(self, tok: Tokenizer, tmp_path: Path) -> None:
        program = "import sys, llm.data.tokenizer as t; t.train_tokenizer([sys.argv[1]], sys.argv[2], 1200)"
        source = tok.path.parent / "a.txt"
        run = subprocess.run(
            [sys.executable, "-c", program, source, tmp_path / "again"],
            capture_output=True,
            text=True,
            cwd=Path(document_reader.__file__).parents[2],
        )
        assert run.returncode == 0, run.stderr
        assert (tmp_path / "again.model").read_bytes() == tok.path.read_bytes()
        assert "trainer_interface" not in run.stderr  # SentencePiece's own log
        assert "LOG" not in run.stderr
        assert run.stdout == ""

    def test_too_small_a_text_gives_the_largest_vocabulary_it_supports(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        text = "the cat sat on the mat; the hat sat on the cat\n" + "".join(map(chr, range(0x61, 0x7B)))
        made = train(tmp_path, text, 32_000)
        assert 259 < made.vocab_size < 32_000
        assert f"the text supports a vocabulary of {made.vocab_size}" in capfd.readouterr().err.replace("\n", " ")
        # Exactly: its last merge, which no later one takes up, was seen twice, and one merge more was not.
        lines = text.split("\n")  # the documents

        def merges_and_uses_of_the_last(model: Tokenizer) -> tuple[list[str], int]:
            merges = [i for i, piece in enumerate(model.piece_bytes()) if len(piece) > 1]
            uses = sum(model.encode(line).count(merges[-1]) for line in lines)
            return [model.decode([i]) for i in merges], uses

        merges, uses = merges_and_uses_of_the_last(made)
        assert uses >= 2
        more_merges, uses = merges_and_uses_of_the_last(load_tokenizer(_trained(tmp_path, lines, made.vocab_size + 1)))
        assert more_merges[:-1] == merges
        assert uses < 2
        # The very size that was found is one that can be asked for.
        assert train(tmp_path, text, made.vocab_size, strict_vocab_size=True).sha256 == made.sha256

    def test_strict_makes_that_an_error_and_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"supports a vocabulary of \d+ .*--strict_vocab_size"):
            train(tmp_path, "the cat sat on the mat\n", 32_000, strict_vocab_size=True)
        assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]

    @pytest.mark.parametrize("text", ["a", "\n\na\n", "\u2585\u2581\u2585x", "ab", "\x00y"])
    def test_a_text_of_a_few_bytes(self, tmp_path: Path, text: str) -> None:
        made = train(tmp_path, text, 32_000)
        assert 260 <= made.vocab_size < 270
        assert made.decode(made.encode(text * 3 + " z")) == text * 3 + " z"

    @pytest.mark.parametrize("vocab_size", [-1, 0, 5, 259, 270])
    def test_too_small_a_vocabulary_names_the_least_that_will_do(self, tmp_path: Path, vocab_size: int) -> None:
        text = "".join(map(chr, range(0x4E00, 0x4E40))) * 3
        with pytest.raises(UserError, match=r"--vocab_size -?\d+: this text needs at least 324 ") as error:
            train(tmp_path, text, vocab_size)
        assert "\n" not in str(error.value)
        assert train(tmp_path, text, 324).vocab_size == 324

    def test_long_lines_are_cut_and_none_is_skipped(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        lines = ["alpha beta " * 3000, "gamma" * 3000, "字\u2585" * 5000, "語" * 5000, "delta"]
        result = {}
        for text in ("\n".join(lines), "\n".join(lines) + "\n"):
            (tmp_path / "a.txt").write_text(text)
            result = train_tokenizer([tmp_path / "a.txt"], tmp_path / "m", 300, documents="file")
        assert result["cut_lines"] == 4
        assert "4 lines are cut for training" in capfd.readouterr().err
        pieces = b"|".join(load_tokenizer(tmp_path / "m.model").piece_bytes())
        assert all(word.encode() in pieces for word in (" alpha", "gamma", "字", "語", "|d|"))
        sentences = list(tokenizer.training_sentences(["\n".join(lines)]))
        assert max(len(sentence.encode()) for sentence in sentences) <= 4 * tokenizer.SENTENCE_CHARS
        assert "".join(sentences).replace("\n ", "\n") == "\n".join(lines).replace("\u2585", "")

    @given(
        st.lists(st.sampled_from(["ab", " ", "  ", "\n", "\n\n", "\r", "\u2581", "\u2585", "x" * 1500]), max_size=20)
    )
    @settings(max_examples=300, deadline=None)
    def test_the_trainer_sees_all_text_and_no_newline_but_at_an_end(self, parts: list[str]) -> None:
        text = "".join(parts)
        seen = []
        for sentence in tokenizer.training_sentences([text]):
            assert len(sentence) <= tokenizer.SENTENCE_CHARS + 1
            assert not sentence.endswith(("\n", "\r"))  # the trainer would take them off
            assert "\n" not in sentence.removesuffix(" ").rstrip("\n")
            seen.append(sentence)
        blank = str.maketrans("", "", " \u2581\u2585")  # a guard cannot be told from a blank of the text
        assert "".join(seen).translate(blank) == text.translate(blank)

    def test_of_a_large_corpus_a_sample_is_used_and_stated(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        lines = [f"line {i} of the corpus" for i in range(2000)]
        (tmp_path / "a.txt").write_text("\n".join(lines))
        size = (tmp_path / "a.txt").stat().st_size
        results = [
            train_tokenizer([tmp_path / "a.txt"], tmp_path / "m", 300, sample_bytes=size // 10) for _ in range(2)
        ]
        assert results[0] == results[1]
        assert 0.07 * size < results[0]["sampled_bytes"] < 0.13 * size
        assert results[0]["bytes"] == sum(map(len, lines))
        assert f"training on {results[0]['sampled_bytes']:,} of {results[0]['bytes']:,} bytes" in capfd.readouterr().err

    def test_of_compressed_text_the_sample_is_no_larger(self, tmp_path: Path) -> None:
        text = "\n".join(f"line {i % 100} of the corpus" for i in range(20_000)).encode()
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text))
        size = (tmp_path / "a.txt.gz").stat().st_size
        assert len(text) > 20 * size
        result = train_tokenizer([tmp_path / "a.txt.gz"], tmp_path / "m", 300, sample_bytes=size)
        assert 0.8 * size < result["sampled_bytes"] <= 2 * size

    def test_the_text_may_be_under_another_key(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"content": "the cat"}\n' * 9)
        assert train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "m", 300, text_key="content")["bytes"] == 63

    @pytest.mark.parametrize("letters", ["a", "acgt", "ab "])
    def test_words_without_end_are_searched_for_merges_like_short_ones(self, tmp_path: Path, letters: str) -> None:
        text = "".join(random.Random(0).choices(letters, k=60_000))
        (tmp_path / "a.txt").write_text(text)
        made = train_tokenizer([tmp_path / "a.txt"], tmp_path / "m", 5000)["vocab_size"]
        # The last merge of the largest supported vocabulary is made twice in the text, or twice in what was cut.
        model = load_tokenizer(tmp_path / "m.model")
        last = model.piece_bytes().index(max(model.piece_bytes(), key=len))
        ids, _ = model.encode_batch([sentence.encode() for sentence in tokenizer.training_sentences([text])])
        assert made < 5000
        assert np.count_nonzero(ids == last) > 1

    def test_the_vocabulary_file_has_a_line_for_each_piece(self, tok: Tokenizer) -> None:
        lines = tok.path.with_suffix(".vocab").read_text("utf-8").split("\n")[:-1]
        assert len(lines) == tok.vocab_size
        assert lines[1] == "<s>\t0"
        assert any(line.startswith("\\n\\n\t") for line in lines)
        scores = [float(line.split("\t")[1]) for line in lines[259:]]
        assert all(before > after for before, after in pairwise(scores))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "no such file"),
            (b"", "is empty"),
            (b"\n\n \n", "no document with text in it"),
            (b"fine\n\nnot \xff fine", "not valid UTF-8 at byte 10"),
        ],
    )
    def test_bad_input_is_one_line_and_leaves_nothing(
        self, tmp_path: Path, content: bytes | None, message: str
    ) -> None:
        path = tmp_path / "a.txt"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            train_tokenizer([path], tmp_path / "out" / "m", 300)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        assert not list(tmp_path.rglob("m.*"))

    def test_a_full_disk_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(fd: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("llm.atomic.os.fsync", full)
        with pytest.raises(OSError, match="No space left") as error:
            train(tmp_path, "the cat sat on the mat\n", 300)
        assert error.value.filename == str(tmp_path / "m.model")
        assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]

    def test_a_folder_that_cannot_be_written_is_found_out_before_the_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a.txt").write_text("text")
        monkeypatch.setattr(tokenizer.os, "access", lambda path, mode: False)
        monkeypatch.setattr(tokenizer, "train_supported", None)
        with pytest.raises(UserError, match="no permission to write"):
            train_tokenizer([tmp_path / "a.txt"], tmp_path / "m", 300)
        monkeypatch.undo()
        with pytest.raises(UserError, match=r"a\.txt: "):
            train_tokenizer([tmp_path / "a.txt"], tmp_path / "a.txt" / "m", 300)


def _trained(folder: Path, texts: list[str], vocab_size: int) -> Path:
    """A model of just this size, seen twice or not."""
    path = folder / "more.model"
    path.write_bytes(tokenizer.train_model(texts, vocab_size))
    return path


class TestKinds:
    """--kind and --digits."""

    @pytest.mark.parametrize("kind", ["sentencepiece", "bytelevel"])
    @pytest.mark.parametrize("digits", [None, 1, 2, 3])
    def test_no_token_has_more_digits(self, tmp_path: Path, kind: str, digits: int | None) -> None:
        text = "\n".join(f"in 1945 and 2024: {n % 7}12345678 sheep" for n in range(60))
        made = train(tmp_path, text, 380 if kind == "sentencepiece" else 350, kind=kind, digits=digits)
        counts = [sum(char.isdigit() for char in piece.decode(errors="replace")) for piece in made.piece_bytes()]
        assert max(counts) == (digits or (3 if kind == "bytelevel" else 9))
        assert made.decode(made.encode(text)) == text

    @given(TEXT)
    @settings(max_examples=60, deadline=None)
    def test_bytelevel_gives_back_any_text(self, byte_level: Tokenizer, text: str) -> None:
        assert byte_level.decode_bytes(byte_level.encode(text)) == text.encode()

    def test_bytelevel_splits_as_gpt4_and_starts_with_its_own_bos(self, byte_level: Tokenizer, tmp_path: Path) -> None:
        assert byte_level.kind == "byte-level BPE"
        assert byte_level.decode([byte_level.bos_id, byte_level.eos_id]) == "<|begin_of_text|><|end_of_text|>"
        pieces = {piece.decode(errors="replace") for piece in byte_level.piece_bytes()}
        assert {" return", "def", "'t"} <= pieces
        # No piece joins letters and what follows them, or two words.
        assert not [piece for piece in pieces if re.search(r"[a-z][^a-z|]", piece) and not piece.startswith("<|")]
        transformers = pytest.importorskip("transformers")
        byte_level.save(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        text = TEMPTING + "<|end_of_text|>"
        assert theirs(text).input_ids == [byte_level.bos_id, *byte_level.encode(text)]
        assert theirs.eos_token_id == byte_level.eos_id

    def test_bytelevel_has_a_line_for_each_token_and_the_same_bytes_again(
        self, byte_level: Tokenizer, tmp_path: Path
    ) -> None:
        text = (byte_level.path.parent / "a.txt").read_bytes().decode()
        again = train(tmp_path, text, 600, kind="bytelevel")
        assert again.sha256 == byte_level.sha256
        assert again.path == tmp_path / "m.json"
        assert len((tmp_path / "m.vocab").read_text().splitlines()) == byte_level.vocab_size == 600

    def test_bytelevel_of_a_small_text_is_smaller(self, tmp_path: Path) -> None:
        made = train(tmp_path, "the cat sat on the mat xylophone", 32_000, kind="bytelevel")
        assert 258 < made.vocab_size < 300
        assert not any(b"xy" in piece for piece in made.piece_bytes())  # seen once
        with pytest.raises(UserError, match=r"supports a vocabulary of .*--strict_vocab_size"):
            train(tmp_path, "the cat sat on the mat", 32_000, kind="bytelevel", strict_vocab_size=True)
        with pytest.raises(UserError, match=r"--vocab_size 257: at least 258 \(256 bytes, <\|begin"):
            train(tmp_path, "the cat", 257, kind="bytelevel")

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"kind": "bpe"}, "--kind bpe: is sentencepiece or"), ({"digits": 4}, "--digits 4: is 1")],
    )
    def test_what_there_is_not(self, tmp_path: Path, options: dict[str, object], message: str) -> None:
        with pytest.raises(UserError, match=message):
            train(tmp_path, "the cat", 300, **options)


class TestLoading:
    def test_a_directory_carries_its_own(self, tok: Tokenizer, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.model").write_bytes(tok.path.read_bytes())
        loaded = load_tokenizer(tmp_path)
        assert loaded.path == tmp_path / "tokenizer.model"
        assert loaded.sha256 == tok.sha256

    @pytest.mark.parametrize("content", [b"", b"no model", b"\x0a\x05" + b"x" * 40])
    def test_a_file_that_is_no_model(self, tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "a.model").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.model: is no SentencePiece model"):
            load_tokenizer(tmp_path / "a.model")
        assert capfd.readouterr().err == ""

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"a\.model: no such tokenizer"):
            load_tokenizer(tmp_path / "a.model")

    @pytest.mark.parametrize(
        "options",
        [
            {"byte_fallback": False},
            {"add_dummy_prefix": True},
            {"remove_extra_whitespaces": True},
            {"normalization_rule_name": "nmt_nfkc"},
            {"bos_id": -1},
            {"model_type": "unigram", "add_dummy_prefix": True, "normalization_rule_name": "nmt_nfkc"},
        ],
    )
    def test_a_model_that_changes_text_gives_the_ids_of_sentencepiece(
        self, tmp_path: Path, options: dict[str, object]
    ) -> None:
        path = self.foreign(tmp_path, options)
        theirs, processor = load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
        assert not theirs.lossless
        assert not theirs.cuttable
        for text in ("one two  three", " a\n\tb ", "ﬁ é \u2581 <s> 字", ""):
            assert theirs.encode(text) == processor.encode(text)
        assert theirs.prefix_bytes == bool(options.get("add_dummy_prefix"))
        assert theirs.text_of(theirs.encode("one two")) == b"one two"
        has_bos = "bos_id" not in options
        assert theirs.bos_id == (processor.bos_id() if has_bos else processor.eos_id())
        assert theirs.begins.startswith("its EOS") != has_bos

    def test_a_model_without_eos_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="has no EOS to end documents with"):
            load_tokenizer(self.foreign(tmp_path, {"eos_id": -1}))

    @pytest.mark.parametrize(
        "options",
        [
            {"split_by_whitespace": False},
            {"user_defined_symbols": ["one t"]},
            {"user_defined_symbols": ["tw"]},
            {"model_type": "unigram"},
            {},
        ],
    )
    def test_a_foreign_model_has_the_ids_of_sentencepiece_cut_or_whole(
        self, tmp_path: Path, options: dict[str, object]
    ) -> None:
        path = self.foreign(tmp_path, options)
        model = load_tokenizer(path)
        assert model.cuttable == (not options)
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        texts = ["one two three four", " one  two\n\nthree", "", "\ttwo one two\r\n x字"]
        assert [model.encode(text) for text in texts] == processor.encode(texts)
        assert model.decode(model.encode("one\u2581two \u2581")) == "one\u2581two \u2581"

    def foreign(self, folder: Path, options: dict[str, object]) -> Path:
        lossless = {
            "byte_fallback": True,
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "normalization_rule_name": "identity",
            "model_type": "bpe",
        }
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["one two three four", "one two three", "one two"] * 5),
            model_prefix=str(folder / "foreign"),
            vocab_size=310,
            hard_vocab_limit=False,
            allow_whitespace_only_pieces=True,
            minloglevel=4,
            **(lossless | options),
        )
        return folder / "foreign.model"
