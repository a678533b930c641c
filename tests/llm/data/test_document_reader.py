"""Documents come out of files whole, in order and in bounded memory; what is wrong with a file is said in one line."""

import json
import random
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.data import blocks as limits
from llm.data import corpus
from llm.data.blocks import Block, Document, cut
from llm.data.corpus import write_stdlib_corpus
from llm.data.document_reader import Drops, parse, read_blocks, read_documents
from llm.data.text_files import find_sources
from llm.errors import UserError

# Text in which the places where it may be cut, and near misses, are frequent.
STRICT = Drops(strict=True)
CUTTABLE = st.text(st.sampled_from(" \n\r\t\u2581ab字"), max_size=60)


def whole(documents: list[Document]) -> list[str]:
    """The documents' texts, chunks joined."""
    texts: list[str] = []
    for document in documents:
        if document.first:
            texts.append("")
        texts[-1] += document.text
    return texts


def blocks_of(path: Path, mode: str = "auto", **options: Any) -> list[Block]:
    return list(read_blocks(find_sources([path], mode).files, **options))


def texts_of(path: Path, mode: str = "auto") -> list[str]:
    documents = list(read_documents([path], mode))
    assert all(document.bytes == len(document.text.encode()) for document in documents)
    assert sum(document.last for document in documents) == sum(document.first for document in documents)
    return whole(documents)


def places(text: str, segment: int) -> set[int]:
    """Where a text may be cut, straight from the definition."""
    found: set[int] = set()
    start = 0
    for i in range(1, len(text)):
        before, after = text[i - 1], text[i]
        safe = (after == " " != before) or (before == "\n" != after) or "\u2581" in (before, after)
        if safe or i - start == segment:
            found.add(i)
            start = i
    return found


@given(CUTTABLE, st.integers(1, 12), st.integers(0, 60), st.integers(1, 30))
@settings(max_examples=500, deadline=None)
def test_cut_is_the_first_place_that_the_definition_allows(text: str, segment: int, begin: int, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "SEGMENT_CHARS", segment)
        allowed = places(text, segment)
        begin = max((place for place in allowed if place <= begin), default=0)
        assert cut(text, begin, size) == min((place for place in allowed if place >= begin + size), default=None)


@given(st.lists(CUTTABLE, min_size=1, max_size=8), st.integers(4, 20), st.integers(2, 10))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_long_document_comes_in_chunks_cut_where_text_may_be_cut(
    tmp_path: Path, parts: list[str], chunk: int, segment: int
) -> None:
    text = "x" + "".join(parts)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "CHUNK_CHARS", chunk)
        patch.setattr(limits, "SEGMENT_CHARS", segment)
        documents = list(read_documents([path], "file"))
        allowed = places(text, segment)
    assert whole(documents) == [text]
    assert [document.last for document in documents] == [False] * (len(documents) - 1) + [True]
    at = 0
    for document in documents[:-1]:
        at += len(document.text)
        assert at in allowed
        assert len(document.text) < chunk + segment  # memory is bounded whatever the text


@given(st.lists(st.text(max_size=30).filter(lambda text: "\n" not in text and text.strip()), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_come_back_as_they_are_also_those_longer_than_a_chunk(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\n".join(lines).encode())
    for chunk in (4, 1 << 18):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(limits, "CHUNK_CHARS", chunk)
            assert texts_of(path, "line") == lines


def test_jsonl_documents_are_the_texts(tmp_path: Path) -> None:
    texts = ["one", "two\n\nlines\r\n", "emoji 🎉 \u2028 still the same line", "a b " * 100_000]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text, "other": 1}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    path.write_text("\ufeff" + "\n\n".join(lines), "utf-8")
    assert texts_of(path) == texts
    assert len(list(read_documents([path]))) > len(texts)  # the long one in chunks


LONG_TEXTS = ["x" * 50, 'a\n\nb \\\\ "c" 🎉 字\u2028 ' * 4, "", " ", "def " * 12]


@given(
    st.lists(st.sampled_from(LONG_TEXTS), min_size=1, max_size=4), st.integers(3, 40), st.integers(4, 20), st.booleans()
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_long_line_of_a_jsonl_is_read_as_a_short_one(
    tmp_path: Path, texts: list[str], block: int, chunk: int, ascii_only: bool
) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"n": [i, {"text": "no"}], "text": text, "other": "x" * i} for i, text in enumerate(texts)]
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
    path.write_text("\ufeff" + f"\n{' ' * 50}\n".join(lines), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "BLOCK_BYTES", block)
        patch.setattr(limits, "CHUNK_CHARS", chunk)
        assert texts_of(path) == [text for text in texts if text.strip()]


def test_a_carriage_return_and_a_form_feed_end_no_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\x0cstill\rtwo\n")
    assert texts_of(path) == ["one\r", "two\x0cstill\rtwo"]


PARAGRAPHS = "\n\nfirst\nof two lines\n\n\r\nsecond \n \nstill\n\n\n\nthird\r\n"


def test_a_paragraph_ends_at_an_empty_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(PARAGRAPHS.encode())
    assert texts_of(path, "paragraph") == ["first\nof two lines", "second ", "still", "third\r"]


LONG = ["x" * 30, "def " * 12, "字" * 9, "a\u2581b" * 8]


@given(
    st.lists(st.sampled_from(["one", " two\r", *LONG, "x" * 1100, "\r", "", "", " ", "\u3000\t"]), max_size=14),
    st.integers(3, 40),
    st.integers(4, 20),
    st.integers(2, 12),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_documents_and_places_do_not_depend_on_where_a_file_is_taken_apart(
    tmp_path: Path, lines: list[str], block: int, chunk: int, segment: int
) -> None:
    """And reading that starts at a block's place yields the same blocks as reading from the beginning."""
    text = "\n".join(lines) or "x"
    gap = re.compile(r"(?:\A|\n)(?:[^\S\n]*\n)+")
    expected = {
        "line": text.removesuffix("\n").split("\n"),
        "paragraph": [part.removesuffix("\n") for part in gap.split(text)],
        "file": [text],
        "jsonl": [line for line in lines if line],
    }
    for mode, documents in expected.items():
        path = tmp_path / ("a.jsonl" if mode == "jsonl" else "a.txt")
        content = "\n".join(json.dumps({"text": line}) if line else "" for line in lines) if mode == "jsonl" else text
        path.write_bytes((content or "\n").encode())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(limits, "BLOCK_BYTES", block)
            patch.setattr(limits, "CHUNK_CHARS", chunk)
            patch.setattr(limits, "SEGMENT_CHARS", segment)
            option = "auto" if mode == "jsonl" else mode
            blocks = [replace(block, position=0) for block in blocks_of(path, option)]
            texts = [(text, block.first) for block in blocks for text in parse(block)[0]]
            whole: list[bytes] = []
            for raw, first in texts:
                whole = [*whole, raw] if first else [*whole[:-1], whole[-1] + raw]
            assert [raw.decode() for raw in whole if raw.decode().strip()] == [
                text for text in documents if text.strip()
            ]
            for i, start in enumerate(blocks):
                if start.can_start:
                    rest = blocks_of(path, option, start=start.place)
                    assert [replace(block, position=0) for block in rest] == blocks[i:]


def test_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\n \t\ntwo\n\u3000\n\u3000x\n")
    (block,) = blocks_of(path, "line")
    texts, dropped = parse(block)
    assert texts == [b"one", b"two", "\u3000x".encode()]
    assert Counter(drop.reason for drop in dropped) == {"empty": 3}
    assert texts_of(path, "line") == ["one", "two", "\u3000x"]


def test_position_tells_how_much_of_all_files_is_read(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.jsonl"
    first.write_text("one\ntwo\n")
    second.write_text('{"text": "three"}\n')
    assert [document.position for document in read_documents([first, second])] == [8, 8, 26]


@pytest.mark.parametrize("mode", ["line", "paragraph", "file"])
@pytest.mark.parametrize("at", [0, 3, 8, 19])
def test_invalid_utf8_is_named_by_file_and_byte(tmp_path: Path, mode: str, at: int) -> None:
    path = tmp_path / "a.txt"
    content = bytearray("déjà vu, 字\nline two".encode())
    content[at:at] = b"\xff"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "CHUNK_CHARS", 4)
        patch.setattr(limits, "BLOCK_BYTES", 4)
        with pytest.raises(UserError, match=rf"a\.txt: not valid UTF-8 at byte {at} \(0xff\)"):
            list(read_documents([path], mode, drops=STRICT))


def test_a_character_that_the_file_ends_in_the_middle_of_is_invalid(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("aa\n\n字".encode()[:-1])
    with pytest.raises(UserError, match="not valid UTF-8 at byte 4"):
        list(read_documents([path], drops=STRICT))


@pytest.mark.parametrize("block", [8, 1 << 20])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["text"]', 'expected an object with a string under "text"'),
        ('{"content": "x"}', 'expected an object with a string under "text"'),
        ('{"text": 3}', 'expected an object with a string under "text"'),
        (r'{"text": "\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_bad_line_of_a_jsonl_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str, block: int
) -> None:
    monkeypatch.setattr(limits, "BLOCK_BYTES", block)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: ") as error:
        list(read_documents([path], drops=STRICT))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    drops = Drops()
    assert [document.text for document in read_documents([path], drops=drops)] == ["fine"]
    assert drops.counts.total() == 1
    assert message in drops.places[0]


@pytest.mark.parametrize("block", [12, 1 << 20])
def test_what_cannot_be_used_is_left_out_alone_with_file_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\nbad \xff line\nanother fine line, of some length")
    (tmp_path / "b.txt").write_bytes(b"first\n\nsecond \xe2\x28\xa1 with more\n\nthird, it is")
    lines = [
        b'{"text": "one"}',
        b'{"text": "\xff"}',
        rb'{"text": "\ud800"}',
        b'{"text": "y", "other": "' + b"x" * 60 + b'"}',
        b'{"text": "z"}',
    ]
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines))
    monkeypatch.setattr(limits, "BLOCK_BYTES", block)
    monkeypatch.setattr(limits, "CHUNK_CHARS", 8)
    monkeypatch.setattr(limits, "RECORD_BYTES", 50)

    def read(name: str, mode: str) -> tuple[str, list[tuple[str, str]]]:
        parsed = [parse(block) for block in blocks_of(tmp_path / name, mode)]
        texts = b"|".join(text for texts, _ in parsed for text in texts).decode()
        return texts, [(drop.reason, drop.where.split(": ", 1)[-1]) for _, dropped in parsed for drop in dropped]

    texts, dropped = read("a.txt", "line")
    assert texts.replace("|", "") == "fineanother fine line, of some length"
    assert dropped == [("invalid_utf8", "not valid UTF-8 at byte 9 (0xff)")]
    texts, dropped = read("b.txt", "paragraph")
    assert texts.startswith("first|")
    assert texts.replace("|", "").endswith("third, it is")
    assert dropped == [("invalid_utf8", "not valid UTF-8 at byte 14 (0xe2)")]
    texts, dropped = read("c.jsonl", "auto")
    assert texts.split("|")[0] == "one"
    assert texts.split("|")[-1] == "z"
    assert [reason for reason, _ in dropped] == ["invalid_utf8", "invalid_utf8", *["too_long"] * (block == 12)]
    assert "half a surrogate pair" in dropped[1][1]


def peak_memory_of(function: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_reading_stays_within_its_memory(tmp_path: Path) -> None:
    """16 MB without a blank, a newline or an end of line: not even then is the text held whole."""
    text = "".join(random.Random(0).choices("acgt", k=1 << 20)) * 16
    path = tmp_path / "a.txt"
    path.write_text(text)
    for mode in ("line", "file"):
        sizes: list[int] = []
        peak = peak_memory_of(
            lambda mode=mode, sizes=sizes: sizes.append(
                sum(document.bytes for document in read_documents([path], mode))
            )
        )
        assert sizes == [16 << 20]
        assert peak < 9 << 20


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_of_a_jsonl_above_the_limit_is_dropped_and_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bytes
) -> None:
    limit, block = 1 << 20, 1 << 14
    monkeypatch.setattr(limits, "RECORD_BYTES", limit)
    monkeypatch.setattr(limits, "BLOCK_BYTES", block)

    def line(size: int) -> bytes:
        return b'{"text": "%s"}\n' % (b"ab " * size)[: size - len(b'{"text": ""}\n')]

    path = tmp_path / "a.jsonl"
    lines = [line(100), line(limit), line(limit + 1), line(100), line(16 * limit), line(100), line(2 * limit)]
    path.write_bytes(b"".join(lines).removesuffix(b"\n") + end)
    texts, dropped = 0, []
    for block_read in blocks_of(path):
        its_texts, its_dropped = parse(block_read)
        texts += sum(map(len, its_texts))
        dropped += [(drop.reason, drop.where) for drop in its_dropped]
    assert texts == sum(len(json.loads(line)["text"]) for line in lines if len(line) <= limit)
    sizes = {3: limit + 1, 5: 16 * limit, 7: 2 * limit - 1 + len(end)}
    said = "bytes, more than the 1,048,576 that a record may have"
    assert dropped == [("too_long", f"{path}:{number}: {size:,} {said}") for number, size in sizes.items()]
    with pytest.raises(UserError, match=r"a\.jsonl:3: .*; without --strict"):
        list(read_documents([path], drops=STRICT))
    path.write_bytes(line(16 * limit))
    assert peak_memory_of(lambda: blocks_of(path)) < 1.5 * limit


class TestStdlib:
    def test_it_is_made_of_the_sources_without_tests_and_packages(self, tmp_path: Path) -> None:
        output = tmp_path / "raw" / "corpus.jsonl"
        result = write_stdlib_corpus(output)
        records = [json.loads(line) for line in output.read_text("utf-8").splitlines() if line]
        paths = [record["path"] for record in records]
        assert result["documents"] == len(records) > 300
        assert result["bytes"] == sum(len(record["text"].encode()) for record in records)
        assert {"json/decoder.py", "os.py", "asyncio/events.py"} <= set(paths)
        assert paths == sorted(paths)
        folders = {part for path in paths for part in path.split("/")[:-1]}
        assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        assert len(list(read_documents([output]))) >= len(records)
        assert write_stdlib_corpus(tmp_path / "again.jsonl")["bytes"] == result["bytes"]
        assert (tmp_path / "again.jsonl").read_bytes() == output.read_bytes()

    def test_sources_are_decoded_by_their_declaration_and_what_is_left_out_is_counted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        library = tmp_path / "lib"
        (library / "tests").mkdir(parents=True)
        (library / "tests" / "a.py").write_text("left out")
        (library / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
        (library / "broken.py").write_bytes(b"x = '\xe9'\n")
        (library / "empty.py").touch()
        monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(library))
        result = write_stdlib_corpus(tmp_path / "out.jsonl")
        assert result["documents"] == 1
        assert result["dropped"] == {"undecodable": 1, "empty": 1}
        assert "é" in (tmp_path / "out.jsonl").read_text("utf-8")

    def test_a_python_without_sources_is_an_error_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
        with pytest.raises(UserError, match="without the sources"):
            write_stdlib_corpus(tmp_path / "out.jsonl")
        assert list(tmp_path.iterdir()) == []
