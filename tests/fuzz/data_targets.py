"""The readers of `llm.data`: text files of each kind, tokenizers, shards and manifests."""

import gzip
import hashlib
import io
import json
import struct
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch  # noqa: F401  imported before the workers are forked; the loader would import it in each of them

from llm.data.document_reader import Drops, read_documents
from llm.data.manifest import Manifest, read_manifest, write_manifest
from llm.data.shards import Loader, crc32c, document_starts, verify_shard
from llm.data.tokenizer import load_tokenizer, train_tokenizer

from .harness import JSON_WORDS, Target, damage_bytes, damage_json

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reference_loader

TEXTS = ["one word", "two\n\nlines\r\n", "🎉 字 \u2581", "a longer text, of several words. " * 20, " ", "x" * 300]
RECORDS = [{"text": text, "id": i, "meta": {"text": text, "n": [i, None]}} for i, text in enumerate(TEXTS)]
LINES = (b'"text":', b"\r\n", b"\xff\xfe")
"""What a reader of texts in JSON may stumble over besides."""
CSV = 'meta.text,text\n1,plain\n2,"quoted, with ""quotes""\nand lines"\n3,字\n'


def files(*contents: tuple[str, bytes]) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        for name, content in contents:
            (folder / name).write_bytes(content)
        return [folder / name for name, _ in contents]

    return make


def read(path: Path) -> None:
    drops = Drops(say=lambda line: None)
    for key in ("text", "meta.text"):
        for _ in read_documents([path], "auto", key, drops):
            pass


def read_text(path: Path) -> None:
    for mode in ("auto", "line", "paragraph"):
        for _ in read_documents([path], mode, drops=Drops(say=lambda line: None)):
            pass


def parquet(**options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(RECORDS * 20), sink, **options)
    return sink.getvalue()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def tar(**contents: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return sink.getvalue()


JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS, indent=1).encode()


# Tokenizers.


def make_tokenizer(folder: Path) -> list[Path]:
    (folder / "text.txt").write_text("the cat sat on the mat. " * 50)
    return [Path(train_tokenizer([folder / "text.txt"], folder / "a", 270)["model"])]


def read_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    text = "  the cat\r\n\n sat 字 \u2581 <s>"
    decoded = tokenizer.decode(tokenizer.encode(text))
    # A damaged model may be one as others make them, which need not keep every text.
    assert decoded == text or not tokenizer.lossless


# Shards.

SHA256 = hashlib.sha256(b"a tokenizer").digest()


def make_dataset(folder: Path) -> Manifest:
    rng = np.random.default_rng(1)
    shards = [(rng.integers(0, 1000, n), np.flatnonzero(rng.random(n) < 0.05)) for n in (300, 120)]
    made = reference_loader.write_dataset(folder, shards, 1000, SHA256)
    return write_manifest(
        folder,
        vocab_size=1000,
        tokenizer_sha256=SHA256.hex(),
        seq_len=16,
        packing={"documents": ["line"]},
        shards=made.shards,
        counters={"documents": 4},
    )


def use(manifest: Manifest) -> None:
    """Everything that reads shards."""
    for shard in manifest.shards["train"]:
        verify_shard(manifest, shard, 1, 2)
        document_starts(manifest, shard)
    options = {"seq_len": 16, "seed": 0, "global_batch": 4, "micro_batch": 4, "threads": 1, "prefetch": 1}
    with Loader(manifest, "train", **options) as loader:
        next(loader)
        loader.targets(0, 30)


def make_shard(folder: Path) -> list[Path]:
    return [folder / make_dataset(folder).shards["train"][0].file]


_shard_bytes = damage_bytes()


def damage_shard(chance: Random, valid: bytes, other: bytes) -> bytes:
    """Mostly changes the header and mends its checksum, which would otherwise refuse every change."""
    if chance.random() < 0.2:
        return _shard_bytes(chance, valid, other)
    header = bytearray(_shard_bytes(chance, valid[:116], other[:116])[:116].ljust(4096, b"\0"))
    struct.pack_into("<I", header, 4092, crc32c(bytes(header[:4092])))
    body = _shard_bytes(chance, valid[4096:], other[4096:]) if chance.random() < 0.3 else valid[4096:]
    return bytes(header) + body


def read_shard(path: Path) -> None:
    """Reads a shard that the manifest describes as its own header does, so that the header alone decides."""
    manifest = read_manifest(path.parent)
    data = path.read_bytes()
    header = data[:4096].ljust(4096, b"\0")
    tokens, documents = struct.unpack_from("<2Q", header, 32)
    info = replace(
        manifest.shards["train"][0],
        tokens=tokens % 2**63,
        documents=documents % 2**63,
        bytes=len(data),
        header_crc32c=struct.unpack_from("<I", header, 4092)[0],
    )
    use(replace(manifest, shards={"train": (info,), "val": ()}))


def make_manifest(folder: Path) -> list[Path]:
    make_dataset(folder)
    return [folder / "manifest.json"]


OTHERS = 10_000  # inputs for formats that a library reads

TARGETS = [
    Target("jsonl", files(("a.jsonl", JSONL)), read, damage_bytes(*JSON_WORDS, *LINES)),
    Target("json", files(("a.json", ARRAY), ("b.json", JSONL)), read, damage_bytes(*JSON_WORDS, *LINES), OTHERS),
    Target(
        "csv",
        files(("a.csv", CSV.encode()), ("b.tsv", CSV.replace(",", "\t").encode())),
        read,
        damage_bytes(b'"', b",", b"\t", b"\n", b"\r", b"\0", b"text", b"\xff", b"\xef\xbb\xbf"),
        OTHERS,
    ),
    Target(
        "parquet",
        files(
            ("a.parquet", parquet()),
            ("b.parquet", parquet(compression="zstd", row_group_size=50, data_page_version="2.0")),
            ("c.parquet", parquet(compression="none", use_dictionary=False)),
        ),
        read,
        damage_bytes(),
        OTHERS,
    ),
    Target(
        "text",
        files(("a.txt", "\n\n".join(TEXTS).encode()), ("b.txt", "\n".join(TEXTS).encode("utf-16"))),
        read_text,
        damage_bytes(b"\n", b"\r\n", b" \n", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\x00\xd8", b"\x1f\x8b\x08", b"{"),
    ),
    Target("tar", files(("a.tar", tar(a_jsonl=JSONL, b_txt=b"\n\ntext", c_json=ARRAY))), read, damage_bytes(), OTHERS),
    Target("gz", files(("a.jsonl.gz", gzip.compress(JSONL, mtime=0))), read, damage_bytes(), OTHERS),
    Target("zst", files(("a.jsonl.zst", zstd(JSONL))), read, damage_bytes(), OTHERS),
    Target("tokenizer", make_tokenizer, read_tokenizer, damage_bytes(), OTHERS),
    Target("shard", make_shard, read_shard, damage_shard),
    Target("manifest", make_manifest, lambda path: use(read_manifest(path.parent)), damage_json),
]
