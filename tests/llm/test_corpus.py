"""Documents come out of files whole, in order and in bounded memory; what is wrong with a file is said in one line."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm import corpus
from llm.corpus import Document, cut, describe_documents, read_documents, resolve_documents, write_stdlib_corpus
from llm.errors import UserError

# Text in which the places where it may be cut, and near misses, are frequent.
CUTTABLE = st.text(st.sampled_from(" \n\r\t\u2581ab字"), max_size=60)


def whole(documents: list[Document]) -> list[str]:
    """The documents' texts, pieces joined."""
    texts: list[str] = []
    for document in documents:
        if document.first:
            texts.append("")
        texts[-1] += document.text
    return texts


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
        patch.setattr(corpus, "SEGMENT_CHARS", segment)
        allowed = places(text, segment)
        begin = max((place for place in allowed if place <= begin), default=0)
        assert cut(text, begin, size) == min((place for place in allowed if place >= begin + size), default=None)


@given(st.lists(CUTTABLE, min_size=1, max_size=8), st.integers(4, 20), st.integers(2, 10))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_long_document_comes_in_pieces_cut_where_text_may_be_cut(
    tmp_path: Path, parts: list[str], piece: int, segment: int
) -> None:
    text = "x" + "".join(parts)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE_CHARS", piece)
        patch.setattr(corpus, "SEGMENT_CHARS", segment)
        documents = list(read_documents([path], "file"))
        allowed = places(text, segment)
    assert whole(documents) == [text]
    assert [document.last for document in documents] == [False] * (len(documents) - 1) + [True]
    at = 0
    for document in documents[:-1]:
        at += len(document.text)
        assert at in allowed
        assert len(document.text) < piece + segment  # memory is bounded whatever the text


@given(st.lists(st.text(max_size=30).filter(lambda text: "\n" not in text and text.strip()), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_come_back_as_they_are_also_those_longer_than_a_piece(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\n".join(lines).encode())
    for piece in (4, 1 << 18):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(corpus, "PIECE_CHARS", piece)
            assert texts_of(path, "line") == lines


def test_jsonl_documents_are_the_texts(tmp_path: Path) -> None:
    texts = ["one", "two\n\nlines\r\n", "emoji 🎉 \u2028 still the same line", "a b " * 100_000]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text, "other": 1}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    path.write_text("\ufeff" + "\n\n".join(lines), "utf-8")
    assert texts_of(path) == texts
    assert len(list(read_documents([path]))) > len(texts)  # the long one in pieces


def test_a_carriage_return_and_a_form_feed_end_no_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\x0cstill\rtwo\n")
    assert texts_of(path) == ["one\r", "two\x0cstill\rtwo"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a\nb\n", "line"),
        (b"a\n\nb", "file"),
        (b"\na", "file"),
        (b"a\r\n\r\nb", "file"),
        (b"a\n \nb", "line"),
        (b"a" * (1 << 20) + b"\n\nb", "line"),  # too late to be seen
    ],
)
def test_auto_takes_a_text_with_an_empty_line_as_one(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert resolve_documents(path) == expected
    assert resolve_documents(path, "line") == "line"
    assert resolve_documents(path, "file") == "file"
    assert ("one running text" if expected == "file" else "one document a line") in describe_documents(path)


def test_empty_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\n \t\ntwo\n")
    dropped: Counter[str] = Counter()
    assert [d.text for d in read_documents([path], "line", dropped)] == ["one", "two"]
    assert dropped == {"empty": 2}


def test_position_tells_how_much_of_all_files_is_read(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.jsonl"
    first.write_text("one\ntwo\n")
    second.write_text('{"text": "three"}\n')
    assert [document.position for document in read_documents([first, second, first])] == [4, 8, 26, 30, 34]


@pytest.mark.parametrize("mode", ["line", "file"])
@pytest.mark.parametrize("at", [0, 3, 8, 19])
def test_invalid_utf8_is_named_by_file_and_byte(tmp_path: Path, mode: str, at: int) -> None:
    path = tmp_path / "a.txt"
    content = bytearray("déjà vu, 字\nline two".encode())
    content[at:at] = b"\xff"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE_CHARS", 4)
        with pytest.raises(UserError, match=rf"a\.txt: not valid UTF-8 at byte {at} \(0xff\)"):
            list(read_documents([path], mode))


def test_a_character_that_the_file_ends_in_the_middle_of_is_invalid(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("aa\n\n字".encode()[:-1])
    with pytest.raises(UserError, match="not valid UTF-8 at byte 4"):
        list(read_documents([path]))


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
def test_a_bad_line_of_a_jsonl_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: ") as error:
        list(read_documents([path]))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_inputs_that_are_no_text_files(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for name, message in [
        ("missing.txt", "no such file"),
        ("empty.txt", "is empty"),
        (".", "is a directory"),
        ("/dev/null", "is no regular file"),
    ]:
        with pytest.raises(UserError, match=message):
            list(read_documents([tmp_path / name]))
    with pytest.raises(UserError, match="no input"):
        list(read_documents([]))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="--documents page"):
        list(read_documents([tmp_path / "a.txt"], "page"))


def test_reading_stays_within_its_memory(tmp_path: Path) -> None:
    """6 MB without a blank, a newline or an end of line: not even then is the text held whole."""
    import tracemalloc

    path = tmp_path / "a.txt"
    path.write_text("".join(random.Random(0).choices("acgt", k=1 << 20)) * 6)
    for mode in ("line", "file"):
        tracemalloc.start()
        size = sum(document.bytes for document in read_documents([path], mode))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert size == 6 << 20
        assert peak < 3 << 20


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
