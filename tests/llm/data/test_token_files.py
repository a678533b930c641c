"""Token ids that other programs have made become the shards that their texts would become."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_loader import unpack_shard
from running import run_llm

from llm.data import blocks as limits
from llm.data import token_files
from llm.data.blocks import Block
from llm.data.manifest import read_manifest
from llm.data.prepare import prepare_data
from llm.data.token_files import find_token_files, read_token_blocks
from llm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from llm.errors import UserError

Write = Callable[[Path, list[list[int]], Tokenizer], list[Path]]


def sentences(seed: int, words: int) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(["the", "cat", "sat", "on", "a", "mat,", "and", "purred.\n"]) for _ in range(words))


TEXTS = [sentences(seed, seed % 50 + 1) for seed in range(1, 301)]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text(sentences(0, 5000))
    return load_tokenizer(train_tokenizer([folder / "a.txt"], folder / "spm", 300)["model"])


def run(inputs: list[Path], tok: Tokenizer, out_dir: Path, **options: Any) -> dict[str, Any]:
    return prepare_data(
        inputs, tok.path, out_dir, **{"seq_len": 16, "shard_tokens": 1000, "workers": 1, "val_fraction": 0.1, **options}
    )


def stored(out_dir: Path) -> list[tuple[str, list[int], list[int]]]:
    """The tokens and document starts of each shard."""
    found = []
    for part, shards in read_manifest(out_dir).shards.items():
        for shard in shards:
            ids, starts = unpack_shard((out_dir / shard.file).read_bytes())
            found.append((part, ids.tolist(), [int(start) for start in starts]))
    return found


def ids_of(documents: list[list[int]], tok: Tokenizer, *, first: bool = False, bos: bool = False) -> list[int]:
    begin, end = [tok.bos_id] * bos + [tok.eos_id] * first, [tok.eos_id] * (not first)
    return [token for document in documents for token in [*begin, *document, *end]]


def nanogpt(dtype: str = "uint16", **options: Any) -> Write:
    def write(folder: Path, documents: list[list[int]], tok: Tokenizer) -> list[Path]:
        np.array(ids_of(documents, tok, **options), dtype).tofile(folder / "train.bin")
        return [folder / "train.bin"]

    return write


def llm_c(magic: int, version: int, dtype: str) -> Write:
    def write(folder: Path, documents: list[list[int]], tok: Tokenizer) -> list[Path]:
        paths = []
        for i, part in enumerate((documents[:100], documents[100:])):
            ids = ids_of(part, tok, first=True)
            header = np.zeros(256, np.int32)
            header[:3] = magic, version, len(ids)
            paths.append(folder / f"train_{i:06d}.bin")
            paths[-1].write_bytes(header.tobytes() + np.array(ids, dtype).tobytes())
        return paths

    return write


def index(lengths: list[int], itemsize: int, code: int, ends: list[int]) -> bytes:
    """An .idx of Megatron-LM. ends: number of sequences before each document's end, with a 0 before."""
    begins = np.cumsum([0, *lengths[:-1]]) * itemsize
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(ends))
    return head + np.array(lengths, "<i4").tobytes() + begins.astype("<i8").tobytes() + np.array(ends, "<i8").tobytes()


def megatron(dtype: str, code: int, *, eod: bool, sentences: bool = False) -> Write:
    def write(folder: Path, documents: list[list[int]], tok: Tokenizer) -> list[Path]:
        stored = [[*document, *[tok.eos_id] * eod] for document in documents]
        parts = [part for document in stored for part in ((document[:3], document[3:]) if sentences else (document,))]
        np.array([token for part in parts for token in part], dtype).tofile(folder / "a_text_document.bin")
        ends = list(range(0, len(parts) + 1, 2 if sentences else 1))
        content = index([len(part) for part in parts], np.dtype(dtype).itemsize, code, ends)
        (folder / "a_text_document.idx").write_bytes(content)
        return [folder / "a_text_document.bin"]

    return write


LAYOUTS = {
    "nanoGPT, EOS behind a document": (nanogpt(), "uint16"),
    "nanoGPT, EOS before a document": (nanogpt(first=True), "uint16"),
    "BOS and EOS": (nanogpt("uint32", bos=True), "uint32"),
    "llm.c, 16 bits": (llm_c(20240520, 1, "uint16"), "auto"),
    "llm.c, 32 bits": (llm_c(20240801, 7, "uint32"), "uint32"),
    "Megatron-LM": (megatron("uint16", 8, eod=False), "auto"),
    "Megatron-LM with EOD": (megatron("int32", 4, eod=True), "auto"),
    "Megatron-LM, sentences": (megatron("uint16", 8, eod=False, sentences=True), "uint16"),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("count", [300, 120], ids=["split by hash", "split by position"])
def test_ids_become_the_shards_of_their_texts(tok: Tokenizer, tmp_path: Path, name: str, count: int) -> None:
    write, tokens = LAYOUTS[name]
    texts = TEXTS[:count]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "ids").mkdir()
    paths = write(tmp_path / "ids", [tok.encode(text) for text in texts], tok)
    of_texts = run([tmp_path / "a.jsonl"], tok, tmp_path / "texts", dedup="exact")
    for inputs in (paths, [tmp_path / "ids"], [tmp_path / "ids" / "*"]):
        of_ids = run(inputs, tok, tmp_path / "out", tokens=tokens, dedup="exact")
        for key in of_texts.keys() - {"dataset_hash", "out_dir", "reused", "round_trip_documents"}:
            assert of_ids[key] == of_texts[key], key
        assert stored(tmp_path / "out") == stored(tmp_path / "texts")
    assert of_ids["reused"]
    assert of_ids["round_trip_documents"] == 0


def test_a_document_of_any_length_is_one_also_on_two_processes(
    tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [*TEXTS[:230], sentences(7, 3000), sentences(7, 3000), *TEXTS[230:]]
    nanogpt()(tmp_path, [tok.encode(text) for text in texts], tok)
    expected = run([tmp_path / "train.bin"], tok, tmp_path / "whole", tokens="uint16", dedup="exact")
    monkeypatch.setattr(limits, "BLOCK_BYTES", 4 * 500)
    monkeypatch.setattr(token_files, "READ_IDS", 333)
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        # The processes of the second run have the usual limits.
        found = run([tmp_path / "train.bin"], tok, out, tokens="uint16", dedup="exact", workers=workers)
        assert found["dropped"] == {"duplicate": 2}  # one is short
        assert found == expected | {"out_dir": str(out)}
        assert stored(out) == stored(tmp_path / "whole")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(3, 99), max_size=30), min_size=1, max_size=20),
    block=st.integers(2, 12),
    read=st.integers(1, 40),
    ends=st.booleans(),
)
def test_documents_do_not_depend_on_how_they_are_read_and_reading_goes_on_from_any_block(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], block: int, read: int, ends: bool
) -> None:
    folder = tmp_path_factory.mktemp("ids")
    path = folder / "a.bin"
    if ends:
        np.array([token for document in documents for token in document], "uint16").tofile(path)
        lengths = list(map(len, documents))
        (folder / "a.idx").write_bytes(index(lengths, 2, 8, list(range(len(documents) + 1))))
    else:
        np.array([token for document in documents for token in [1, *document, 2]], "uint16").tofile(path)
    if not path.stat().st_size:
        return

    def blocks(**options: Any) -> list[Block]:
        sources = find_token_files([path], "uint16").files
        return list(read_token_blocks(sources, "uint16", (1, 2), **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "BLOCK_BYTES", 4 * block)
        patch.setattr(token_files, "READ_IDS", read)
        found = blocks()
        texts: list[list[int]] = []
        for each in found:
            if each.is_part:
                ids = np.frombuffer(each.data, np.uint32).tolist()
                assert len(ids) <= block
                texts = [*texts, ids] if each.first else [*texts[:-1], texts[-1] + ids]
            else:
                texts += [np.frombuffer(value, np.uint32).tolist() for value in each.values]  # type: ignore[arg-type]
        assert texts == [document for document in documents if document]
        for i, each in enumerate(found):
            if each.can_start:
                assert blocks(start=each.place) == found[i:]


@pytest.mark.parametrize(
    ("files", "tokens", "said"),
    [
        (
            {"a.bin": b"\1\0" * 50},
            "auto",
            "has no header that tells the type of its ids; name it, such as",
        ),
        ({"a.bin": b"\1\0" * 50 + b"\0"}, "uint16", "its 101 bytes are no whole number of ids of uint16"),
        ({"a.bin": b""}, "uint16", "is empty"),
        ({"a.bin": b"\1\0" * 50 + b"\xff\xff"}, "uint16", r"has the id 65,535, but .* has \d+ tokens; --tok"),
        (
            {"a.bin": struct.pack("<256i", 20240520, 1, 9, *[0] * 253) + bytes(16)},
            "auto",
            "has 8 ids, its header says",
        ),
        (
            {"a.bin": struct.pack("<256i", 20240520, 1, 8, *[0] * 253) + bytes(16)},
            "uint32",
            "has ids of uint16, by llm",
        ),
        ({"a.bin": b"\1\0", "a.idx": b""}, "auto", "is no index of Megatron-LM; move it away if"),
        (
            {"a.bin": b"\1\0", "a.idx": index([1], 2, 7, [0, 1])},
            "auto",
            "has version 1 and type 7 of ids, which",
        ),
        ({"a.bin": b"\1\0", "a.idx": index([2], 2, 8, [0, 1])}, "auto", "is damaged, or not the index of"),
        ({"a.bin": b"\1\0", "a.idx": index([1], 2, 8, [0, 9])}, "auto", "is damaged, or not the index of"),
        ({"a.bin": b"\1\0", "a.idx": index([1], 2, 8, [0, 1])[:-8]}, "auto", "is damaged, or not the index of"),
        ({"a.bin": b"\xff" * 4, "a.idx": index([1], 4, 4, [0, 1])}, "auto", "-1 at 0 is no token id"),
        ({}, "uint16", "no such file"),
    ],
)
def test_files_that_cannot_be_are_one_line(
    tok: Tokenizer, tmp_path: Path, files: dict[str, bytes], tokens: str, said: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        run([tmp_path / "a.bin"], tok, tmp_path / "out", tokens=tokens)
    assert not (tmp_path / "out").exists()


def test_flags_that_do_not_go_together_are_one_line(tok: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\1\0" * 50)
    for options in ({"documents": "line"}, {"text_key": "content"}):
        with pytest.raises(UserError, match="--tokens needs --tok, and goes without --documents and --text_key"):
            run([tmp_path / "a.bin"], tok, tmp_path / "out", tokens="uint16", **options)
    with pytest.raises(UserError, match="--tokens uint8: is one of auto, uint16, uint32"):
        run([tmp_path / "a.bin"], tok, tmp_path / "out", tokens="uint8")
    # Without the flag, the line names it.
    with pytest.raises(UserError, match="is token ids of another program, which is not read; `llm prepare_data"):
        run([tmp_path / "a.bin"], tok, tmp_path / "out")


def test_the_program_takes_ids(tok: Tokenizer, tmp_path: Path) -> None:
    nanogpt()(tmp_path, [tok.encode(text) for text in TEXTS], tok)
    arguments = ("--tokens", "uint16", "--tok", tok.path, "--seq_len", "16", "--val_fraction", "0.1")
    done = run_llm("prepare_data", "--input", tmp_path / "train.bin", *arguments, "--out_dir", tmp_path / "out")
    assert "token ids, uint16, no header" in done.stderr
