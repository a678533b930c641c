"""Data sets as they are downloaded: the names and columns of well-known ones, and of datasets' save_to_disk."""

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm.data import blocks as limits
from llm.data.document_reader import Drops, parse, read_blocks, read_documents
from llm.data.text_files import find_sources
from llm.errors import UserError

TEXTS = [f"Text {i}: \n\n\u5b57 " + "word " * (i % 7) for i in range(50)]


def read(path: Path, **options: Any) -> list[str]:
    return [document.text for document in read_documents([path], **options)]


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def fineweb(folder: Path) -> None:
    """parquet with row groups, the text as large_string beside other columns; a file for each part of a crawl."""
    for number, texts in enumerate((TEXTS[:30], TEXTS[30:])):
        table = pa.table(
            {
                "text": pa.array(texts, pa.large_string()),
                "id": [f"<urn:uuid:{i}>" for i in range(len(texts))],
                "dump": pa.array(["CC-MAIN-2024-10"] * len(texts)).dictionary_encode(),
                "url": ["https://example.org"] * len(texts),
                "language_score": [0.97] * len(texts),
                "token_count": pa.array(range(len(texts)), pa.int64()),
            }
        )
        (folder / "sample/10BT").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / f"sample/10BT/{number:03}_00000.parquet", row_group_size=7, compression="zstd")


def c4(folder: Path) -> None:
    """json.gz, whose name says .json and whose content is JSON lines."""
    records = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"} for text in TEXTS]
    for number in range(2):
        part = lines(records[25 * number : 25 * number + 25])
        write(folder / f"en/c4-train.{number:05}-of-01024.json.gz", gzip.compress(part))


def pile(folder: Path) -> None:
    """jsonl.zst of several frames, with an object `meta`."""
    records = [{"text": text, "meta": {"pile_set_name": "Pile-CC", "text": "no"}} for text in TEXTS]
    write(folder / "train/00.jsonl.zst", zstd(lines(records[:20])) + zstd(lines(records[20:40])))
    write(folder / "train/01.jsonl.zst", zstd(lines(records[40:])))


def redpajama(folder: Path) -> None:
    """The first version: jsonl with `meta`, which of some sources is text that holds JSON."""
    records = [
        {"text": text, "meta": json.dumps({"url": "x", "text": "no"}), "red_pajama_subset": "c4"} for text in TEXTS
    ]
    write(folder / "arxiv_0.jsonl", lines(records[:10]))
    write(folder / "common_crawl/2023-06/en_head_0000.json.gz.dedup.classifier.jsonl.zst", zstd(lines(records[10:])))


def dolma(folder: Path) -> None:
    """json.gz of several members, with nested metadata and attributes."""
    records = [
        {
            "id": str(i),
            "text": text,
            "added": "2024-04-11T09:55:57.000Z",
            "source": "c4",
            "metadata": {"subreddit": None, "provenance": "c4_en.jsonl.gz:1"},
            "attributes": {"paloma": [[0, 7, 0.0]]},
        }
        for i, text in enumerate(TEXTS)
    ]
    content = gzip.compress(lines(records[:25])) + gzip.compress(lines(records[25:]))
    write(folder / "c4-filtered/0000.json.gz", content)


@pytest.mark.parametrize("layout", [fineweb, c4, pile, redpajama, dolma])
def test_it_is_read_as_it_was_downloaded(tmp_path: Path, layout: Any) -> None:
    layout(tmp_path)
    write(tmp_path / "README.md", "# A data set")
    write(tmp_path / ".download.json", '{"text": "no"}')
    drops = Drops()
    assert read(tmp_path, drops=drops) == TEXTS
    assert not drops.counts


def arrow(batch: int = 7, *, stream: bool = True, kind: Any = None, **columns: Any) -> bytes:
    table = pa.table(columns or {"id": list(range(len(TEXTS))), "text": pa.array(TEXTS, kind or pa.string())})
    sink = io.BytesIO()
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(sink, table.schema) as writer:
        writer.write_table(table, batch)
    return sink.getvalue()


class TestArrow:
    def test_what_datasets_saves_is_read(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        saved = datasets.Dataset.from_dict({"text": TEXTS, "label": [0] * len(TEXTS)})
        saved.save_to_disk(tmp_path / "one", num_shards=3)
        assert read(tmp_path / "one") == TEXTS
        assert "3 files: one document a row" in find_sources([tmp_path / "one"]).lines[0]
        # Rows that were chosen and put into another order.
        saved.select([4, 2, 9]).save_to_disk(tmp_path / "chosen")
        assert read(tmp_path / "chosen") == [TEXTS[4], TEXTS[2], TEXTS[9]]
        datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "splits")
        with pytest.raises(UserError, match=r"holds the splits test, train; name one of its folders: .*/test"):
            read(tmp_path / "splits")
        assert read(tmp_path / "splits" / "train") == TEXTS

    @pytest.mark.parametrize("stream", [True, False], ids=["stream", "file"])
    @pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary()], ids=str)
    @pytest.mark.parametrize("name", ["a.arrow", "a.txt", "a.arrow.gz"])
    def test_each_form_is_read_under_any_name(self, tmp_path: Path, stream: bool, kind: Any, name: str) -> None:
        values = [text.encode() for text in TEXTS] if kind == pa.binary() else TEXTS
        content = arrow(stream=stream, text=pa.array(values, kind))
        write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
        assert read(tmp_path / name) == TEXTS

    def test_dictionaries_structs_and_nulls(self, tmp_path: Path) -> None:
        write(tmp_path / "a.arrow", arrow(text=pa.array(["one", None, "two", "one"]).dictionary_encode()))
        drops = Drops(say=lambda line: None)
        assert read(tmp_path / "a.arrow", drops=drops) == ["one", "two", "one"]
        assert drops.counts == {"null": 1}
        write(tmp_path / "b.arrow", arrow(meta=[{"text": "deep"}, {"text": "er"}]))
        assert read(tmp_path / "b.arrow", text_key="meta.text") == ["deep", "er"]
        with pytest.raises(UserError, match="has no column 'text', only meta; name one with --text_key"):
            read(tmp_path / "b.arrow")
        write(tmp_path / "c.arrow", arrow(text=[1, 2]))
        with pytest.raises(UserError, match="the column 'text' holds int64, not strings"):
            read(tmp_path / "c.arrow")

    def test_a_value_that_is_not_utf8_is_dropped_alone(self, tmp_path: Path) -> None:
        values = [b"one", b"\xff", b"two"]
        text = pa.Array.from_buffers(pa.string(), 3, pa.array(values, pa.binary()).buffers())
        write(tmp_path / "a.arrow", arrow(text=text))
        drops = Drops(say=lambda line: None)
        assert read(tmp_path / "a.arrow", drops=drops) == ["one", "two"]
        assert "row 1: not valid UTF-8" in drops.places[0]

    @pytest.mark.parametrize("stream", [True, False], ids=["stream", "file"])
    def test_reading_goes_on_from_any_block(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
    ) -> None:
        monkeypatch.setattr(limits, "BLOCK_BYTES", 60)
        monkeypatch.setattr(limits, "CHUNK_CHARS", 40)
        files = find_sources([write(tmp_path / "a.arrow", arrow(stream=stream))]).files
        found = list(read_blocks(files))
        assert b"".join(text for block in found for text in parse(block)[0]).decode() == "".join(TEXTS)
        for i, block in enumerate(found):
            if block.can_start:
                again = list(read_blocks(files, start=block.place))
                assert [each.values or each.data for each in again] == [each.values or each.data for each in found[i:]]

    @pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), "dictionary"], ids=str)
    @pytest.mark.parametrize("stream", [True, False], ids=["stream", "file"])
    def test_a_damaged_one_is_one_line_or_other_text_and_never_the_end_of_the_process(
        self, tmp_path: Path, stream: bool, kind: Any
    ) -> None:
        text = pa.array(TEXTS)
        content = arrow(stream=stream, text=text.dictionary_encode() if kind == "dictionary" else text.cast(kind))
        chance = random.Random(0)
        said: list[str] = []
        for i in range(60):
            damaged = bytearray(content)
            if i % 3:
                for _ in range(chance.randrange(1, 4)):
                    damaged[chance.randrange(8, len(content))] = chance.choice([0, 1, 255, chance.randrange(256)])
            else:
                del damaged[chance.randrange(8, len(content)) :]
            path = write(tmp_path / "a.arrow", bytes(damaged))
            try:
                read(path, drops=Drops(say=lambda line: None))
            except UserError as error:
                said.append(str(error))
        assert said
        assert all("a.arrow" in line and "\n" not in line for line in said)
