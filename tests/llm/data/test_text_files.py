"""Inputs are found by name, folder and pattern and read through compression; what is wrong with one is a line."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm.data import blocks, document_reader
from llm.data.blocks import Place
from llm.data.document_reader import read_blocks, read_documents
from llm.data.text_files import find_sources, open_input
from llm.errors import UserError

TEXTS = ["one", "two\n\nlines\r\n", "🎉 字", *(" ".join(["word"] * n) for n in range(1, 400, 7))]


def compress(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :]))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
    else:
        path.write_bytes(data)
    return path


def write(path: Path, texts: list[str], key: str = "text", **options: object) -> Path:
    """The texts as a file of the kind that its name says."""
    if ".jsonl" in path.name:
        return compress(path, "".join(json.dumps({key: text, "id": 1}) + "\n" for text in texts).encode())
    if ".parquet" in path.name:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"id": range(len(texts)), key: texts}), sink, row_group_size=20, **options)
        return compress(path, sink.getvalue().to_pybytes())
    return compress(path, "\n\n".join(texts).encode())


def paths_of(*inputs: Path | str) -> list[Path]:
    return [source.path for source in find_sources(inputs).files]


def texts_of(*inputs: Path | str, **options: str) -> list[str]:
    return [document.text for document in read_documents(inputs, **options)]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_each_kind_is_read_compressed_or_not_also_from_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, compression: str
) -> None:
    path = write(tmp_path / f"a{kind}{compression}", TEXTS)
    assert texts_of(path) == (["\n\n".join(TEXTS)] if kind == ".txt" else TEXTS)
    assert find_sources([path]).bytes == path.stat().st_size
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(blocks, "CHUNK_CHARS", 900)
    files = find_sources([path]).files
    every = list(read_blocks(files))
    assert len(every) > 5
    for i, block in enumerate(every):
        if block.can_start:
            rest = list(read_blocks(files, start=block.place))
            assert [(b.place, b.data, b.values) for b in rest] == [(b.place, b.data, b.values) for b in every[i:]]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_the_text_may_be_under_another_key(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"a{kind}", TEXTS, "content")
    assert texts_of(path, text_key="content") == TEXTS
    with pytest.raises(UserError, match="--text_key"):
        texts_of(path)
    with pytest.raises(UserError, match="--text_key"):
        texts_of(path, text_key="id")


def test_kinds_of_string_columns(tmp_path: Path) -> None:
    for name, kind in [("a", pa.large_string()), ("b", pa.dictionary(pa.int32(), pa.string())), ("c", pa.string())]:
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"text": pa.array(["one", None, "", "字"], pa.string()).cast(kind)}), path)
        assert texts_of(path) == ["one", "字"]


def test_a_long_value_and_one_that_is_not_utf8_are_told_by_their_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [b"one", b"x" * 300, b"\xff", b"two", b"y" * 5000, b"three"]
    text = pa.Array.from_buffers(pa.string(), 6, pa.array(values, pa.binary()).buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 200)
    monkeypatch.setattr(blocks, "RECORD_BYTES", 1000)
    parsed = [document_reader.parse(block) for block in read_blocks(find_sources([tmp_path / "a.parquet"]).files)]
    assert [text for texts, _ in parsed for text in texts] == [b"one", b"x" * 300, b"two", b"three"]
    dropped = [drop for _, drops in parsed for drop in drops]
    assert [drop.reason for drop in dropped] == ["invalid_utf8", "too_long"]
    assert "row 2: not valid UTF-8 at byte 0 (0xff)" in dropped[0].where
    assert "row 4: 5,000 bytes" in dropped[1].where


class TestFinding:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("b.txt", "a.jsonl.gz", "sub/c.parquet", "sub/d.TXT.zst"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            write(tmp_path / name, TEXTS[:3])
        for name in (".hidden.txt", "notes.md", "sub/.git.txt", "LICENSE"):
            (tmp_path / name).write_text("no text")
        (tmp_path / "empty.txt").touch()
        return tmp_path

    def names(self, folder: Path, *inputs: object) -> list[str]:
        return [path.relative_to(folder).as_posix() for path in paths_of(*map(str, inputs))]

    def test_a_folder_stands_for_all_text_in_it_by_name(self, folder: Path) -> None:
        assert self.names(folder, folder) == ["a.jsonl.gz", "b.txt", "empty.txt", "sub/c.parquet", "sub/d.TXT.zst"]
        (said,) = find_sources([folder]).lines
        assert "1 file: one document an object" in said
        assert "left out, as no text: 1 .md, 1 LICENSE" in said

    def test_a_pattern_stands_for_the_files_that_match(self, folder: Path) -> None:
        assert self.names(folder, folder / "*.txt") == ["b.txt", "empty.txt"]
        assert self.names(folder, folder / "**/*.zst", folder / "b.txt") == ["sub/d.TXT.zst", "b.txt"]
        (folder / "[x].txt").write_text("a name is taken as it is if there is such a file")
        assert self.names(folder, folder / "[x].txt") == ["[x].txt"]

    def test_an_empty_file_in_a_folder_is_an_empty_document(self, folder: Path) -> None:
        (folder / "a.jsonl.gz").unlink()
        every = list(read_blocks(find_sources([folder]).files))
        assert document_reader.parse(every[1])[1][0].reason == "empty_file"
        assert [block.place for block in every[:2]] == [Place(0), Place(1)]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("missing.txt", "no such file"),
            ("empty.txt", "is empty"),
            ("nothing", "holds no .txt, .jsonl, .* to read, no file at all"),
            ("blank", "holds only empty files"),
            ("*.md.gz", "no file matches"),
            ("/dev/null", "is no regular file"),
        ],
    )
    def test_what_there_is_not(self, folder: Path, name: str, message: str) -> None:
        (folder / "nothing").mkdir()
        (folder / "blank").mkdir()
        (folder / "blank" / "a.txt").touch()
        with pytest.raises(UserError, match=message):
            find_sources([folder / name])

    def test_no_input_and_no_such_mode(self, folder: Path) -> None:
        with pytest.raises(UserError, match="no input"):
            find_sources([])
        with pytest.raises(UserError, match="--documents page"):
            find_sources([folder / "b.txt"], "page")


@pytest.mark.parametrize("damage", ["cut", "changed"])
@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.zst", "a.parquet", "a.parquet.gz"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    chance = random.Random(0)
    path = write(tmp_path / name, ["".join(chance.choices("abcdefgh \n", k=100)) for _ in range(300)])
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) * 2 // 3]
    else:
        data[:4] = b"xxxx"
        data[-4:] = b"xxxx"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: is (damaged|no )") as error:
        texts_of(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a\nb\n", "line"),
        (b"a\n\nb", "file"),
        (b"\na", "file"),
        (b"a\r\n\r\nb", "file"),
        (b"a\n \nb", "file"),
        (b"a\n\t\xc2\xa0\xe3\x80\x80\r\nb", "file"),
        (b"a" * (1 << 20) + b"\n\nb", "line"),  # too late to be seen
    ],
)
def test_auto_takes_a_text_with_an_empty_line_as_one(tmp_path: Path, content: bytes, expected: str) -> None:
    for name in ("a.txt", "a.txt.gz"):
        path = compress(tmp_path / name, content)
        found = find_sources([path])
        assert found.files[0].mode == expected
        for mode in ("line", "paragraph", "file"):
            assert find_sources([path], mode).files[0].mode == mode
        (said,) = found.lines
        assert ("one running text" if expected == "file" else "one document a line") in said
        assert "--documents line, paragraph or file" in said


def test_a_stream_knows_how_far_it_is(tmp_path: Path) -> None:
    data = bytes(random.Random(0).randrange(256) for _ in range(5000))
    for name in ("a", "a.gz", "a.zst"):
        with open_input(compress(tmp_path / name, data)) as stream:
            stream.skip_to(1234)
            assert stream.read(10) == data[1234:1244]
            assert stream.offset == 1244
            assert stream.position > 0
