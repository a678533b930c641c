"""Headers and manifests with anything in them: our error, one line that names the file, or the data; never a crash."""

import copy
import hashlib
import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import reference_loader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.data.manifest import read_manifest, write_manifest
from llm.data.shards import Loader, crc32c, document_starts, verify_shard
from llm.errors import UserError

TOKENIZER = hashlib.sha256(b"a tokenizer").digest()
FEW = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=50_000, database=None)

HEADER_FIELDS = {  # offset: width
    "version": (8, 4),
    "header_bytes": (12, 4),
    "token_bytes": (16, 4),
    "block_bytes": (20, 4),
    "vocab_size": (24, 8),
    "tokens": (32, 8),
    "documents": (40, 8),
    "tokens_offset": (48, 8),
    "documents_offset": (56, 8),
    "checksums_offset": (64, 8),
    "file_bytes": (72, 8),
    "tokenizer_sha256": (80, 32),
    "table_checksum": (112, 4),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two shards of a few hundred tokens and their manifest, written and read."""
    directory = tmp_path_factory.mktemp("fuzzed")
    rng = np.random.default_rng(1)
    shards = [(rng.integers(0, 1000, n), np.flatnonzero(rng.random(n) < 0.05)) for n in (300, 120)]
    made = reference_loader.write_dataset(directory, shards, 1000, TOKENIZER)
    return write_manifest(
        directory,
        vocab_size=1000,
        tokenizer_sha256=TOKENIZER.hex(),
        seq_len=16,
        packing={"documents": "line"},
        shards=made.shards,
        counters={"documents": 4},
    )


def use(manifest):
    """Everything that reads shards."""
    for shard in manifest.shards["train"]:
        verify_shard(manifest, shard, 1, 2)
        document_starts(manifest, shard)
    options = {"seq_len": 16, "seed": 0, "global_batch": 4, "micro_batch": 4, "threads": 1, "prefetch": 1}
    with Loader(manifest, "train", **options) as loader:
        next(loader)
        loader.targets(0, 30)


def check(path, action):
    """Runs it; what it raises, if anything, is our error, one line that names a file in `path`."""
    try:
        action()
        said = str(path)
    except UserError as error:
        said = str(error)
    assert said.startswith(str(path))
    assert "\n" not in said


def rewrite(path, content, size=None):
    """Replaces a file's content in place (a file that is emptied first is slow on some file systems)."""
    with open(path, "r+b") as file:
        file.write(content)
        file.truncate(len(content) if size is None else size)  # sparse where it grows


# --- Headers ---------------------------------------------------------------------------------------------------------


def interesting(width):
    """Integers near the edges that offset arithmetic has, and any others."""
    near = st.sampled_from([0, 1, 2, 300, 4096, 8192, 65536, 2**31, 2**32, 2**56, 2**62, 2**63, 2**64 - 4096, 2**64])
    return st.one_of(st.tuples(near, st.integers(-9, 9)).map(sum), st.integers(0, 2**64)).map(
        lambda value: (value % 2 ** (8 * min(width, 8))).to_bytes(width, "little")
    )


def fuzz_header(dataset, data):
    """Changes fields under a right header checksum, which the manifest confirms, with the file's size right or not."""
    info = dataset.shards["train"][0]
    path = dataset.path / info.file
    whole = path.read_bytes()
    content = bytearray(whole)
    for name in data.draw(st.lists(st.sampled_from(sorted(HEADER_FIELDS)), min_size=1, max_size=4)):
        offset, width = HEADER_FIELDS[name]
        content[offset : offset + width] = data.draw(interesting(width))
    checksum = crc32c(bytes(content[:4092]))
    struct.pack_into("<I", content, 4092, checksum)
    tokens, documents = struct.unpack_from("<2Q", content, 32)
    size = data.draw(st.sampled_from([len(content), 4096, struct.unpack_from("<Q", content, 72)[0] % 2**40]))
    listed = replace(info, tokens=tokens % 2**63, documents=documents % 2**63, bytes=size, header_crc32c=checksum)
    manifest = replace(dataset, shards={"train": (listed,), "val": ()})
    try:
        rewrite(path, content, size)
        check(dataset.path, lambda: use(manifest))
    finally:
        rewrite(path, whole)


@FEW
@given(st.data())
def test_any_header_is_read_or_refused(dataset, data):
    fuzz_header(dataset, data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@MANY
@given(st.data())
def test_fifty_thousand_headers_are_read_or_refused(dataset, data):
    fuzz_header(dataset, data)


# --- Manifests -------------------------------------------------------------------------------------------------------

numbers = st.one_of(st.sampled_from([-1, 0, 1, 2**31, 2**32, 2**56, 2**63 - 1, 2**63, 2**64, 10**30]), st.integers())
junk = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        numbers,
        st.floats(),
        st.text(st.characters(), max_size=8),
        st.sampled_from(
            ["", ".", "..", "a/b", "/etc/passwd", "a\0b", "\ud800", "train-00001.bin", "5e" * 32, "x" * 64]
        ),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)


def change_somewhere(data, tree):
    """Replaces, removes or adds one entry anywhere in a tree of dicts and lists."""
    node = tree
    while True:
        keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.integers(0, 3)) == 0:
            break
        node = node[key]
    what = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "repeat"]))
    if what == "remove":
        del node[key]
    elif what == "repeat" and isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    else:
        node[key] = data.draw(junk)


def rehash(tree):
    """Makes the dataset_hash right again, where that can be."""
    try:
        shards = {split: [[s["sha256"], s["tokens"]] for s in tree["shards"][split]] for split in ("train", "val")}
        identity = {key: tree[key] for key in ("format_version", "tokenizer_sha256", "packing")} | {"shards": shards}
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        tree["dataset_hash"] = hashlib.sha256(canonical.encode()).hexdigest()
    except (KeyError, TypeError):
        pass


def fuzz_manifest(dataset, data):
    path = dataset.path / "manifest.json"
    whole = path.read_bytes()
    tree = json.loads(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        change_somewhere(data, tree)
    if data.draw(st.booleans()):
        rehash(tree)
    text = json.dumps(tree).encode()
    if data.draw(st.integers(0, 9)) == 0:
        place = data.draw(st.integers(0, len(text)))
        text = text[:place] + data.draw(st.binary(max_size=4)) + text[place + data.draw(st.integers(0, 4)) :]
    try:
        rewrite(path, text)
        check(dataset.path, lambda: use(read_manifest(dataset.path)))
    finally:
        rewrite(path, whole)


@FEW
@given(st.data())
def test_any_manifest_is_read_or_refused(dataset, data):
    fuzz_manifest(dataset, data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@MANY
@given(st.data())
def test_fifty_thousand_manifests_are_read_or_refused(dataset, data):
    fuzz_manifest(dataset, data)


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["packing"].update(x=float("nan")),
        lambda tree: tree["packing"].update(x=float("inf")),
        lambda tree: tree["shards"]["train"][0].update(file="a\0b"),
        lambda tree: tree["shards"]["train"][0].update(file="\ud800"),
        lambda tree: tree["shards"].update(train=[{**tree["shards"]["train"][0], "tokens": 2**62}] * 5),
        lambda tree: tree.update(format_version="\n"),
    ],
    ids=["nan", "infinity", "nul", "surrogate", "sums above 64 bits", "a version of two lines"],
)
def test_what_json_allows_and_a_manifest_does_not(dataset, change):
    path = dataset.path / "manifest.json"
    whole = path.read_bytes()
    tree = json.loads(whole)
    change(tree)
    rehash(tree)
    path.write_text(json.dumps(tree))
    try:
        with pytest.raises(UserError, match=r"manifest\.json: .*; run `llm prepare_data` again$"):
            read_manifest(dataset.path)
    finally:
        rewrite(path, whole)


def test_a_manifest_nested_without_end_is_refused(dataset):
    path = dataset.path / "manifest.json"
    whole = path.read_bytes()
    path.write_text("[" * 200_000)
    try:
        with pytest.raises(UserError, match=r"manifest\.json: not JSON"):
            read_manifest(dataset.path)
    finally:
        rewrite(path, whole)
