"""A file is read as what it holds, whatever its name; what is no text is refused in a line that says what to do."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.data import blocks as limits
from llm.data import parquet_footer
from llm.data.document_reader import Drops, parse, read_blocks, read_documents
from llm.data.json_records import Unfinished, split_records
from llm.data.text_files import find_sources
from llm.errors import UserError

TEXTS = ["one", 'two, with "quotes"\nand lines\r\n', "🎉 字", " ".join(["word"] * 90)]
JSONL = "".join(json.dumps({"text": text, "n": [{"text": "no"}]}) + "\n" for text in TEXTS).encode()
BOM = b"\xef\xbb\xbf"


def read(*inputs: Path, **options: Any) -> list[str]:
    texts: list[str] = []
    for document in read_documents(inputs, **options):
        texts = [*texts, document.text] if document.first else [*texts[:-1], texts[-1] + document.text]
    return texts


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def parquet(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def tar(mode: str = "w", **files: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name.replace("__", "."))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return sink.getvalue()


def csv(delimiter: str = ",", end: str = "\n") -> str:
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    return end.join([f"id{delimiter}text", *(f"{i}{delimiter}{text}" for i, text in enumerate(quoted))]) + end


def name_of(value: object) -> str:
    """A test's name: contents hold the time of their compression, and all processes must find the same tests."""
    return value if isinstance(value, str) and len(value) < 60 else type(value).__name__


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, JSONL) for name in ("a.jsonl", "a.ndjson", "a.json", "a.txt", "a", "a.log")),
        *(("a.json.gz", gzip.compress(JSONL)), ("a.jsonl", gzip.compress(JSONL)), ("a.txt", zstd(JSONL))),
        *(("a.jsonl.xz", lzma.compress(JSONL)), ("a.gz", bz2.compress(JSONL)), ("a.jsonl.gz", JSONL)),
        ("a.json", b'{"text": "\xff"}\n' + JSONL),
        *((name, json.dumps([{"text": text} for text in TEXTS])) for name in ("a.json", "a.jsonl", "a.txt")),
        ("a.json", json.dumps([{"text": text} for text in TEXTS], indent=2)),
        ("a.json", "".join(json.dumps({"text": text}, indent=2) for text in TEXTS)),
        *(("a.csv", csv()), ("a.csv", csv(";", "\r\n")), ("a.tsv", csv("\t"))),
        ("a.csv.gz", gzip.compress(csv().encode())),
        *((name, parquet(text=TEXTS)) for name in ("a.parquet", "a", "a.txt")),
        ("a.parquet", gzip.compress(parquet(text=[text.encode() for text in TEXTS]))),
        *((name, json.dumps([{"text": text} for text in TEXTS]).encode(code)) for name, code in (("a", "utf-16"),)),
        ("a.jsonl", b"\xfe\xff" + JSONL.decode().encode("utf-16-be")),
        ("a.jsonl", b"\xff\xfe\0\0" + JSONL.decode().encode("utf-32-le")),
        ("a.tar", tar(a__jsonl=JSONL, b__jpg=b"\xff\xd8\xff", c__json=b'{"label": 1}')),
        ("a.tgz", tar("w:gz", a__parquet=parquet(text=TEXTS), b__txt__gz=gzip.compress(b"\n\n"), c__json=b'[{}]')),
    ],
    ids=name_of,
)  # fmt: skip
@pytest.mark.parametrize("mark", [b"", BOM], ids=["no mark", "mark"])
def test_each_format_is_read_under_any_name_and_without_its_mark(
    tmp_path: Path, name: str, content: bytes | str, mark: bytes
) -> None:
    content = content if isinstance(content, bytes) else content.encode()
    if mark and not content.startswith((b"{", b"[", b"id")):
        return
    path = write(tmp_path / name, mark + content)
    assert read(path) == TEXTS
    assert all(file.mode != "line" for file in find_sources([path]).files)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train.bin", np.arange(500, dtype=np.uint16).tobytes(), "token ids of another program"),
        ("data.idx", b"MMIDIDX\0\0" + bytes(40), "token ids"),
        ("a.txt", b"LLMSHARD" + bytes(40), "a shard of `llm prepare_data`"),
        ("a.npy", b"\x93NUMPY\x01\0", "a NumPy array"),
        ("a.txt", pickle.dumps([{"text": "x"}]), "a pickle"),
        ("a.pkl", b"x", "a pickle"),
        ("a.arrow", b"text", "is damaged, or no .arrow"),
        ("a.txt", b"%PDF-1.7\n", "a PDF.*pdftotext"),
        ("a.txt", b"PK\x03\x04" + bytes(22), "a zip archive"),
        ("a.jsonl", gzip.compress(gzip.compress(JSONL)), "compressed twice"),
        ("a.txt", "some text, of some length".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("a.txt", "some text, of some length".encode("utf-16-be"), "iconv -f UTF-16BE"),
        ("a.txt", bytes(range(256)) * 20, "is no text"),
        ("a", bytes(range(1, 64)), "many control characters"),
        ("a.wet", "text", "a web archive"),
        ("a.txt", "WARC/1.0\r\nWARC-Type: warcinfo\r\n", "a web archive"),
        ("a.xml", '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">\n', "wikiextractor"),
        ("a.tfrecord", "text", "records of another program"),
        ("a.parquet", b"text", "is damaged, or no .parquet"),
        ("a.tar", b"text" * 200, "is damaged or cut short"),
        ("a.tar", tar(a__txt=b"x" * 3000)[:2000], "is damaged or cut short"),
        ("a.tar", tar(a__txt=b"x", b__txt=b"y")[:1024] + b"z" * 1024, "is damaged or cut short"),
        ("a.tar", tar(a__jpg=b"x"), "holds no text"),
        ("a.json", json.dumps([{"text": "x" * 50}] * 3)[:-60], "end inside a record"),
        ("a.csv", 'text\n"never closed\nx\n', "a quote is never closed"),
        ("a.csv", "body\nx\n", "has no column 'text', only body; name one with --text_key"),
        ("a.jsonl", '{"body": "x"}\n', 'under "text", found only body'),
        ("a.json", '[{"body": "x"}]', 'under "text", found only body'),
        ("a.jsonl", '{"text": 3}\n', 'under "text", found int values'),
        ("a.txt", '{"body": "x"}\n' * 3, "--documents line takes the lines themselves"),
    ],
    ids=name_of,
)
def test_what_is_no_text_is_refused_by_name_with_the_way_out(
    tmp_path: Path, name: str, content: bytes | str, said: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=rf"{name}.*{said}") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_text_that_begins_like_json_stays_text(tmp_path: Path) -> None:
    for content in (
        '{"a": 1,\n"b"}\n',
        "[1] a list\n",
        "[\n]\n",
        "{curly}\n",
        '{"a": 1}\nand a line\n',
        "null\n",
        "BZh9 x\n",
    ):
        assert read(write(tmp_path / "a.txt", content)) == content.splitlines()
    assert read(write(tmp_path / "b.txt", JSONL), documents="file") == [JSONL.decode()]


def test_one_bad_unit_of_utf16_costs_one_document(tmp_path: Path) -> None:
    content = b"\xff\xfe" + "one\ntwo\n".encode("utf-16-le") + b"\x00\xd8" + "\nthree\n".encode("utf-16-le")
    drops = Drops(say=lambda line: None)
    assert read(write(tmp_path / "a.txt", content + b"x"), drops=drops) == ["one", "two", "three"]
    assert drops.counts == {"invalid_utf8": 2}


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for mode, texts in {"line": ["a", "b"], "file": ["a\n\nb"], "paragraph": ["a", "b"]}.items():
        assert read(write(tmp_path / "a.txt", BOM + b"a\n\nb"), documents=mode) == texts
    assert read(write(tmp_path / "a.txt", BOM + b"a\n" + BOM + b"b"), documents="line") == ["a", "b"]
    assert read(write(tmp_path / "a.jsonl", (BOM + JSONL) * 3)) == TEXTS * 3
    assert read(write(tmp_path / "b.csv", BOM + b"text\nx\n")) == ["x"]


BAD = {
    '{"text": null}': "null",
    "{": "bad_record",
    "[" * 100_000: "bad_record",
    '"text"': "bad_record",
    '{"body": "x"}': "bad_record",
    '{"text": "a", "text": "b"}': "bad_record",
    r'{"text": "\ud800"}': "invalid_utf8",
}


def test_one_rule_for_what_cannot_be_used(tmp_path: Path) -> None:
    lines = ['{"text": "fine"}', *BAD, f'{{"n": {"9" * 5000}, "text": "long"}}']
    path = write(tmp_path / "a.jsonl", b"\n".join([*(line.encode() for line in lines), b'{"text": "\xff"}']))
    said: list[str] = []
    drops = Drops(said.append)
    assert read(path, drops=drops) == ["fine", "long"]
    assert drops.counts == Counter(BAD.values()) + Counter(invalid_utf8=1)
    assert all(f"a.jsonl:{number}: " in line for number, line in enumerate(said[:-1], 2))
    with pytest.raises(UserError, match=r"a\.jsonl:2: the text under .* is null; without --strict"):
        read(path, drops=Drops(strict=True))
    # The same records as an array; one with an open bracket would take the others with it.
    records = [line for line in lines if "[[" not in line and line != "{"]
    drops = Drops(say=lambda line: None)
    assert read(write(tmp_path / "b.json", "[" + ",\n".join(records) + "]"), drops=drops) == ["fine", "long"]
    assert drops.counts == Counter(bad_record=3, null=1, invalid_utf8=1)


def test_rows_of_a_table_that_cannot_be_used(tmp_path: Path) -> None:
    content = b'id,text\n1,fine\n\n2\n3,"a" b\n4,caf\xe9\n5,unquoted, comma\n6, \n7,last'
    drops = Drops(say=lambda line: None)
    assert read(write(tmp_path / "a.csv", content), drops=drops) == ["fine", "last"]
    assert drops.counts == {"bad_record": 3, "invalid_utf8": 1, "empty": 1}
    assert f"{tmp_path}/a.csv:4: 1 fields, the header has 2" in drops.places


def test_nested_keys(tmp_path: Path) -> None:
    record = {"meta": {"text": "deep", "a": {"b.c": "dots"}}, "x.y": "dotted"}
    write(tmp_path / "a.jsonl", json.dumps(record) + '\n{"meta": 1}\n')
    write(tmp_path / "a.json", json.dumps([record, {"meta": None}]))
    write(tmp_path / "a.parquet", parquet(meta=[record["meta"], None], **{"x.y": ["dotted", None]}))
    for name in ("a.jsonl", "a.json", "a.parquet"):
        assert read(tmp_path / name, text_key="meta.text", drops=Drops(say=lambda line: None)) == ["deep"]
        assert read(tmp_path / name, text_key="x.y", drops=Drops(say=lambda line: None)) == ["dotted"]
    assert read(tmp_path / "a.jsonl", text_key="meta.a.b.c", drops=Drops(say=lambda line: None)) == ["dots"]


def test_columns_of_parquet(tmp_path: Path) -> None:
    twice = pa.table([pa.array(TEXTS), pa.array(TEXTS)], names=["text", "text"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has 2 columns 'text'"):
        read(tmp_path / "a.parquet")
    # A dictionary, and what is kept of it: each row is a reference, or only some rows are decoded at a time.
    long = "word " * 8_000
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array([long]))
    for column in (repeated, pa.array([long] * 300)):
        pq.write_table(pa.table({"text": column}), tmp_path / "b.parquet")
        found = list(read_blocks(find_sources([tmp_path / "b.parquet"]).files))
        assert sum(len(block.values) for block in found) == 300
        assert max(sum(map(len, block.values)) for block in found) <= limits.BLOCK_BYTES


def test_a_footer_that_ends_pyarrow_is_a_damaged_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", parquet(text=TEXTS))
    command = [sys.executable, "-c", "import os; input(); os.abort()"]
    ended = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    parquet_footer._helpers[os.getpid()] = ended
    with pytest.raises(UserError, match=r"a\.parquet: is damaged \(its footer cannot be read\)"):
        read(path)
    assert ended.poll() is not None
    assert read(path) == TEXTS


class TestFolder:
    def test_a_folder_decides_once_for_all_its_text(self, tmp_path: Path) -> None:
        write(tmp_path / "a.txt", "one\ntwo\n")
        write(tmp_path / "b.txt", "three\n \nfour\n")
        assert read(tmp_path) == ["one\ntwo\n", "three\n \nfour\n"]
        assert read(tmp_path / "a.txt", tmp_path / "b.txt") == ["one", "two", "three\n \nfour\n"]

    def test_sources_count_as_text_where_each_file_is_a_document(self, tmp_path: Path) -> None:
        for name in ("a.py", "b.md", "LICENSE", "c.txt"):
            write(tmp_path / name, f"{name}\n")
        for name, content in (("d.png", b"\x89PNG"), ("e", bytes(99)), ("package.json", b'{"name": "x"}')):
            write(tmp_path / name, content)
        assert read(tmp_path) == ["c.txt"]
        found = find_sources([tmp_path], "file")
        assert [file.path.name for file in found.files] == ["LICENSE", "a.py", "b.md", "c.txt"]
        assert "1 .json without 'text', 1 .png, 1 e" in found.lines[0]

    def test_a_folder_without_text_lists_what_it_has_once(self, tmp_path: Path) -> None:
        for i in range(9):
            write(tmp_path / f"{i}.bin", b"\0")
            write(tmp_path / f"{i}.npy", b"\0")
        with pytest.raises(UserError, match=r"only 9 \.bin, 9 \.npy; name files"):
            find_sources([tmp_path])

    def test_a_file_counts_once_and_a_loop_is_an_error(self, tmp_path: Path) -> None:
        write(tmp_path / "in" / "a.txt", "one")
        os.link(tmp_path / "in" / "a.txt", tmp_path / "in" / "b.txt")
        (tmp_path / "in" / "c.txt").symlink_to("a.txt")
        (tmp_path / "other").symlink_to("in")
        found = find_sources([tmp_path / "in", tmp_path / "other", tmp_path / "in" / "a.txt"])
        assert [file.path for file in found.files] == [tmp_path / "in" / "a.txt"]
        assert "2 read before, so not again" in found.lines[1]
        (tmp_path / "in" / "sub").mkdir()
        for name in ("up", "up2"):
            (tmp_path / "in" / "sub" / name).symlink_to("..")
        with pytest.raises(UserError, match=r"sub/up2?: is a link to a folder that holds it"):
            find_sources([tmp_path / "in"])

    def test_paths_as_people_have_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UserError, match="--input '': is empty"):
            find_sources([""])
        monkeypatch.setenv("HOME", str(tmp_path))
        write(tmp_path / "in" / os.fsdecode(b"donn\xe9es.txt"), "one")
        assert read(Path("~/in")) == read(Path("~/in/*.txt")) == ["one"]
        (tmp_path / "in" / "gone.txt").symlink_to("nothing")
        with pytest.raises(UserError, match=r"gone\.txt: no such file \(a link to nothing\)"):
            find_sources([tmp_path / "in"])


RECORDS = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(st.sampled_from('a"\\{}[],:\n字'), max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["a", '"', "{"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(st.sampled_from(["a", "]"]), RECORDS, max_size=3), max_size=5), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_json_is_cut_into_its_records_wherever_it_is_read_in_parts(records: list[Any], size: int) -> None:
    array = json.dumps(records, indent=size % 3 or None)
    for text in (array, array + "\n" + array, "\n".join(json.dumps(record, indent=1) for record in records)):
        data = text.encode()
        found = list(split_records(io.BytesIO(data).read, 1 << 20, size=size))
        assert [json.loads(record) for _, _, record in found] == records * (2 if text.count(array) == 2 else 1)
        for i, (offset, in_array, _) in enumerate(found):
            rest = split_records(io.BytesIO(data[offset:]).read, 1 << 20, offset=offset, in_array=in_array, size=size)
            assert list(rest) == found[i:]
    if records:
        with pytest.raises(Unfinished):
            list(split_records(io.BytesIO(array.encode()[:-1]).read, 1 << 20, size=size))


@given(
    st.lists(st.sampled_from(TEXTS), min_size=1, max_size=8),
    st.integers(3, 400),
    st.sampled_from(["json", "csv", "tar"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reading_goes_on_from_any_block(tmp_path: Path, texts: list[str], block: int, kind: str) -> None:
    records = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    rows = ["id,text", *(f'{record["id"]},"{record["text"].replace(chr(34), chr(34) * 2)}"' for record in records)]
    content = {
        "json": json.dumps(records, indent=1).encode(),
        "csv": "\n".join(rows).encode(),
        "tar": tar(a__csv="\n".join(rows).encode(), b__json=json.dumps(records).encode(), c__txt=b"\n\nx"),
    }
    path = write(tmp_path / f"a.{kind}", content[kind])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "BLOCK_BYTES", block)
        patch.setattr(limits, "CHUNK_CHARS", block)
        files = find_sources([path]).files
        found = list(read_blocks(files))
        whole = [text.decode() for each in found for text in parse(each)[0]]
        assert "".join(whole) == ("".join(texts * 2) + "\n\nx" if kind == "tar" else "".join(texts))
        for i, each in enumerate(found):
            if each.can_start:
                rest = list(read_blocks(files, start=each.place))
                assert [(b.place, b.data, b.values) for b in rest] == [(b.place, b.data, b.values) for b in found[i:]]
