"""Shard files and the manifest: their bytes, who may read them, and that they are whole or not there."""

import errno
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference_loader
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.manifest import FORMAT_VERSION, ShardInfo, dataset_hash, read_manifest, write_manifest
from llm.data.shards import CRC32C_IMPLEMENTATION, ShardWriter, crc32c, token_bytes
from llm.errors import UserError

TOKENIZER = "5e" * 32


def write_shard(path, tokens, starts=(), vocab_size=1000):
    with ShardWriter(path, vocab_size=vocab_size, tokenizer_sha256=TOKENIZER) as writer:
        writer.append(np.asarray(tokens, np.int32), np.asarray(starts, np.uint64))
        return writer.finish()


# --- CRC-32C ---------------------------------------------------------------------------------------------------------

# RFC 3720, appendix B.4, and the check value of the CRC catalogue.
CRC_VECTORS = {
    b"": 0x00000000,
    b"123456789": 0xE3069283,
    bytes(32): 0x8A9136AA,
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(reversed(range(32))): 0x113FDB5C,
}


@pytest.mark.parametrize("data", CRC_VECTORS)
def test_crc32c_known_vectors(data):
    assert crc32c(data) == CRC_VECTORS[data]
    assert crc32c(data, portable=True) == CRC_VECTORS[data]
    assert reference_loader.crc32c(data) == CRC_VECTORS[data]


@given(st.binary(max_size=300), st.integers(0, 300))
def test_crc32c_hardware_equals_table_equals_reference(data, cut):
    expected = reference_loader.crc32c(data)
    for portable in (False, True):
        assert crc32c(data, portable=portable) == expected
        head = crc32c(data[:cut], portable=portable)
        assert crc32c(data[cut:], head, portable) == expected


def test_crc32c_uses_the_instruction_where_there_is_one():
    flags = Path("/proc/cpuinfo").read_text().split()
    expected = {"x86_64": ("sse4_2", "sse4.2"), "aarch64": ("crc32", "armv8-crc")}.get(platform.machine())
    wanted = expected[1] if expected and expected[0] in flags else "table"
    assert wanted == CRC32C_IMPLEMENTATION


# --- The file --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data())
def test_file_equals_the_reference_however_it_is_appended(tmp_path_factory, data):
    vocab_size = data.draw(st.sampled_from([1, 300, 65536, 65537, 2**31]))
    kinds = [np.int32, np.uint32] + ([np.uint16] if vocab_size <= 65536 else [])
    path = tmp_path_factory.mktemp("shard") / "a.bin"
    all_tokens, all_starts = [], []
    with ShardWriter(path, vocab_size=vocab_size, tokenizer_sha256=TOKENIZER) as writer:
        for _ in range(data.draw(st.integers(0, 4))):
            rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
            tokens = rng.integers(0, vocab_size, data.draw(st.sampled_from([0, 1, 5, 2046, 2048, 33000])))
            starts = np.flatnonzero(rng.random(len(tokens)) < data.draw(st.sampled_from([0, 0.01, 1])))
            writer.append(tokens.astype(data.draw(st.sampled_from(kinds))), starts.astype(np.uint64))
            all_starts += [start + sum(map(len, all_tokens)) for start in starts]
            all_tokens.append(tokens)
        tokens, starts = np.concatenate([np.empty(0, np.int64), *all_tokens]), np.array(all_starts, np.int64)
        assert (writer.tokens, writer.documents) == (len(tokens), len(starts))
        info = writer.finish()
    content = path.read_bytes()
    assert content == reference_loader.pack_shard(tokens, starts, vocab_size, bytes.fromhex(TOKENIZER))
    assert info == ShardInfo(
        "a.bin",
        len(tokens),
        len(starts),
        len(content),
        hashlib.sha256(content).hexdigest(),
        int.from_bytes(content[4092:4096], "little"),
    )
    read_tokens, read_starts = reference_loader.unpack_shard(content)
    assert np.array_equal(read_tokens, tokens)
    assert np.array_equal(read_starts, starts)


def test_tokens_are_two_bytes_wide_iff_the_vocabulary_allows():
    assert [token_bytes(v) for v in (1, 65535, 65536, 65537, 2**31)] == [2, 2, 2, 4, 4]


def test_arrays_with_gaps_are_written_as_they_read(tmp_path):
    tokens = np.arange(100, dtype=np.int32)[::3]
    with ShardWriter(tmp_path / "a.bin", vocab_size=100, tokenizer_sha256=TOKENIZER) as writer:
        writer.append(tokens, np.arange(9, dtype=np.uint64)[::4])
        writer.finish()
    written, starts = reference_loader.unpack_shard((tmp_path / "a.bin").read_bytes())
    assert written.tolist() == tokens.tolist()
    assert starts.tolist() == [0, 4, 8]


@pytest.mark.parametrize(
    ("tokens", "starts", "message"),
    [
        (np.array([1, 10], np.int32), [], "id 10, but the vocabulary has 10"),
        (np.array([-1], np.int32), [], "id -1, but"),
        (np.array([2**32 - 1], np.uint32), [], "id 4294967295, but"),
        (np.array([9, 65535], np.uint16), [], "token 1 has the id 65535"),
        (np.array([1, 2], np.int32), [2], "document start 0 is 2"),
        (np.array([1, 2], np.int32), [2**64 - 1], "document start 0 is 18446744073709551615"),
        (np.array([1, 2], np.int32), [1, 1], "document start 1 is 1"),
        (np.array([1, 2], np.int32), [1, 0], "document start 1 is 0"),
    ],
)
def test_wrong_ids_and_starts_are_refused_and_change_nothing(tmp_path, tokens, starts, message):
    with ShardWriter(tmp_path / "a.bin", vocab_size=10, tokenizer_sha256=TOKENIZER) as writer:
        writer.append(np.array([3, 4], np.int32), np.array([1], np.uint64))
        with pytest.raises(ValueError, match=message):
            writer.append(tokens, np.array(starts, np.uint64))
        writer.append(np.array([5], np.int32), np.array([0], np.uint64))
        writer.finish()
    written, written_starts = reference_loader.unpack_shard((tmp_path / "a.bin").read_bytes())
    assert written.tolist() == [3, 4, 5]
    assert written_starts.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [
        (np.zeros(3, np.int64), np.zeros(1, np.uint64)),
        (np.zeros(3, np.float32), np.zeros(1, np.uint64)),
        (np.zeros(3, ">i4"), np.zeros(1, np.uint64)),
        (np.zeros((3, 1), np.int32), np.zeros(1, np.uint64)),
        (np.zeros(3, np.int32), np.zeros(1, np.int64)),
    ],
)
def test_other_arrays_are_refused(tmp_path, tokens, starts):
    writer = ShardWriter(tmp_path / "a.bin", vocab_size=10, tokenizer_sha256=TOKENIZER)
    with pytest.raises(TypeError, match="one-dimensional"):
        writer.append(tokens, starts)


@pytest.mark.parametrize(
    ("vocab_size", "tokenizer"), [(0, TOKENIZER), (2**31 + 1, TOKENIZER), (10, "5e" * 31), (10, "no hex")]
)
def test_impossible_writers_are_refused_and_leave_nothing(tmp_path, vocab_size, tokenizer):
    with pytest.raises(ValueError, match=r"vocab_size|sha256|hex"):
        ShardWriter(tmp_path / "a.bin", vocab_size=vocab_size, tokenizer_sha256=tokenizer)
    assert os.listdir(tmp_path) == []


# --- Whole or not there ----------------------------------------------------------------------------------------------


def test_the_file_appears_on_finish_and_only_then(tmp_path):
    path = tmp_path / "a.bin"
    path.write_text("what was there before")
    (tmp_path / ".a.bin.tmp").write_bytes(b"left by a killed run" * 10000)
    writer = ShardWriter(path, vocab_size=10, tokenizer_sha256=TOKENIZER)
    writer.append(np.zeros(200_000, np.int32), np.zeros(1, np.uint64))
    assert path.read_text() == "what was there before"
    assert (tmp_path / ".a.bin.tmp").read_bytes()[:8] == bytes(8)  # not a shard yet
    writer.finish()
    assert os.listdir(tmp_path) == ["a.bin"]
    assert len(reference_loader.unpack_shard(path.read_bytes())[0]) == 200_000
    writer.abort()
    assert path.exists()
    with pytest.raises(ValueError, match="closed"):
        writer.append(np.zeros(1, np.int32), np.zeros(0, np.uint64))
    with pytest.raises(ValueError, match="closed"):
        writer.finish()
    assert path.exists()


@pytest.mark.parametrize("how", ["left", "raised", "dropped", "aborted"])
def test_an_unfinished_file_is_removed(tmp_path, how):
    writer = ShardWriter(tmp_path / "a.bin", vocab_size=10, tokenizer_sha256=TOKENIZER)
    writer.append(np.zeros(200_000, np.int32), np.zeros(1, np.uint64))
    assert os.listdir(tmp_path) == [".a.bin.tmp"]
    if how == "left":
        with writer:
            pass
    elif how == "raised":
        with pytest.raises(KeyError), writer:
            raise KeyError
    elif how == "dropped":
        del writer
    else:
        writer.abort()
    assert os.listdir(tmp_path) == []


def test_a_forked_child_leaves_the_file_to_its_parent(tmp_path):
    writer = ShardWriter(tmp_path / "a.bin", vocab_size=10, tokenizer_sha256=TOKENIZER)
    writer.append(np.zeros(200_000, np.int32), np.zeros(1, np.uint64))
    child = os.fork()
    if child == 0:
        writer.abort()
        del writer
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    writer.finish()
    assert os.listdir(tmp_path) == ["a.bin"]


@contextmanager
def file_size_limit(size):
    """Files of this process cannot grow beyond `size` bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def check_write_error(caught, number, path):
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    assert os.listdir(path.parent) == []


def test_a_full_disk_is_an_oserror_that_names_the_file(tmp_path):
    path = tmp_path / "a.bin"
    (tmp_path / ".a.bin.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/a.bin'") as caught:
        ShardWriter(path, vocab_size=10, tokenizer_sha256=TOKENIZER)
    check_write_error(caught, errno.ENOSPC, path)


@pytest.mark.parametrize("step", ["append", "finish"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, step):
    path = tmp_path / "a.bin"
    writer = ShardWriter(path, vocab_size=10, tokenizer_sha256=TOKENIZER)
    if step == "append":
        with file_size_limit(200_000), pytest.raises(OSError, match="File too large") as caught:
            writer.append(np.zeros(1_000_000, np.int32), np.zeros(1, np.uint64))
    else:
        writer.append(np.zeros(10_000, np.int32), np.zeros(1, np.uint64))
        with file_size_limit(8192), pytest.raises(OSError, match="File too large") as caught:
            writer.finish()
    check_write_error(caught, errno.EFBIG, path)


def test_a_missing_directory_is_an_oserror_that_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        ShardWriter(tmp_path / "no" / "a.bin", vocab_size=10, tokenizer_sha256=TOKENIZER)
    assert caught.value.filename == str(tmp_path / "no" / "a.bin")


def test_a_directory_in_the_files_place_is_an_oserror(tmp_path):
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_shard(tmp_path / "a.bin", [1])
    assert caught.value.filename == str(tmp_path / "a.bin")
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_is_an_oserror_that_names_the_file(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError) as caught:
        ShardWriter(tmp_path / "a.bin", vocab_size=10, tokenizer_sha256=TOKENIZER)
    assert caught.value.filename == str(tmp_path / "a.bin")


# --- The manifest ----------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    directory = tmp_path / "shards"
    directory.mkdir()
    shards = {
        "train": [write_shard(directory / f"train-{i:05}.bin", [i + 1] * n, [0]) for i, n in enumerate((100, 31, 7))],
        "val": [write_shard(directory / "val-00000.bin", [9] * 33, [0])],
    }
    return write_manifest(
        directory,
        vocab_size=1000,
        tokenizer_sha256=TOKENIZER,
        seq_len=16,
        packing={"documents": "line", "val_fraction": 0.005},
        shards=shards,
        counters={"documents": 4},
    )


def edit(manifest, change):
    path = manifest.path / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_manifest_reads_back_as_written(dataset):
    assert read_manifest(dataset.path) == dataset
    assert read_manifest(str(dataset.path)) == dataset
    assert dataset.format_version == FORMAT_VERSION
    assert dataset.packing == {"documents": "line", "val_fraction": 0.005}
    assert dataset.counters == {"documents": 4}
    assert [info.file for info in dataset.shards["train"]] == ["train-00000.bin", "train-00001.bin", "train-00002.bin"]


def test_sequences_share_one_token_and_the_rest_is_counted(dataset):
    # 100 tokens give (100 - 1) // 10 sequences, the last of which ends with token 90.
    assert dataset.sequences("train", 10) == 9 + 3 + 0
    assert dataset.unused_tokens("train", 10) == 9 + 0 + 7
    assert dataset.sequences("val", 32) == 1
    assert dataset.unused_tokens("val", 32) == 0
    assert dataset.sequences("val", 33) == 0
    assert dataset.unused_tokens("val", 33) == 33


def test_dataset_hash_is_the_contents_and_nothing_else(dataset):
    def hash_of(**changes):
        parts = {"tokenizer_sha256": TOKENIZER, "packing": dataset.packing, "shards": dataset.shards, **changes}
        return dataset_hash(**parts)

    first, second, third = dataset.shards["train"]
    assert hash_of() == dataset.dataset_hash
    # Neither the order in which settings were written nor a shard's name is content.
    assert hash_of(packing=dict(reversed(dataset.packing.items()))) == dataset.dataset_hash
    assert hash_of(shards={**dataset.shards, "train": (replace(first, file="x"), second, third)}) == hash_of()
    others = [
        hash_of(tokenizer_sha256="00" * 32),
        hash_of(packing={**dataset.packing, "val_fraction": 0.01}),
        hash_of(shards={**dataset.shards, "train": (second, first, third)}),
        hash_of(shards={**dataset.shards, "train": (first, second)}),
        hash_of(shards={"train": dataset.shards["val"], "val": dataset.shards["train"]}),
        hash_of(shards={**dataset.shards, "train": (replace(first, sha256="00" * 32), second, third)}),
    ]
    assert len({hash_of(), *others}) == 7


def test_dataset_hash_is_frozen():
    """Checkpoints hold it: a resumed run must find the hash that it knew."""
    shard = ShardInfo("a.bin", 5, 1, 9000, "ab" * 32, 7)
    found = dataset_hash(tokenizer_sha256="cd" * 32, packing={"x": 1}, shards={"train": [shard], "val": []})
    shards = '{"train":[["' + "ab" * 32 + '",5]],"val":[]}'
    canonical = '{"format_version":1,"packing":{"x":1},"shards":' + shards + ',"tokenizer_sha256":"' + "cd" * 32 + '"}'
    assert found == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=FORMAT_VERSION + 1), "version 2, but this program reads version 1"),
        (lambda c: c.pop("format_version"), "not the manifest of a data set"),
        (lambda c: c.pop("vocab_size"), "the key 'vocab_size' is missing"),
        (lambda c: c.pop("counters"), "the key 'counters' is missing"),
        (lambda c: c["shards"].pop("val"), "the key 'val' is missing"),
        (lambda c: c["shards"]["train"][0].pop("sha256"), "the key 'sha256' is missing"),
        (lambda c: c["packing"].update(val_fraction=0.01), "dataset_hash does not match"),
        (lambda c: c["shards"]["train"].pop(), "dataset_hash does not match"),
        (lambda c: c["shards"]["train"][0].update(tokens=99), "dataset_hash does not match"),
        (lambda c: c.update(tokenizer_sha256="00" * 32), "dataset_hash does not match"),
        (lambda c: c.update(tokenizer_sha256="xy" * 32), "non-hexadecimal"),
        (lambda c: c.update(dataset_hash="12"), "'12' where a sha256 is due"),
        (lambda c: c.update(vocab_size="1000"), "'1000' where a count is due"),
        (lambda c: c["shards"]["train"][0].update(tokens=-1), "-1 where a count is due"),
        (lambda c: c["shards"]["train"][0].update(bytes=True), "True where a count is due"),
        (lambda c: c["shards"]["train"][0].update(header_crc32c=2**32), "4294967296 where a crc32c is due"),
        (lambda c: c["shards"]["train"][0].update(file="../train-00000.bin"), "not the name of a file"),
        (lambda c: c["shards"]["train"][0].update(file=3), "3 is not the name of a file"),
        (lambda c: c.update(shards=[]), "list indices must be integers"),
        (lambda c: c.update(packing=3), "object is not iterable"),
    ],
)
def test_a_wrong_manifest_is_one_line_that_names_the_file(dataset, change, message):
    edit(dataset, change)
    with pytest.raises(UserError, match=message) as caught:
        read_manifest(dataset.path)
    assert str(caught.value).startswith(f"{dataset.path}/manifest.json: ")
    assert "\n" not in str(caught.value)
    assert "llm prepare_data" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b'"format_version"', b"null"])
def test_a_manifest_that_is_none_is_an_error(dataset, content):
    (dataset.path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json: not "):
        read_manifest(dataset.path)


def test_missing_directories_and_manifests_are_told_apart(tmp_path, dataset):
    with pytest.raises(UserError, match="nowhere: no such directory"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"val-00000\.bin: not a directory"):
        read_manifest(dataset.path / "val-00000.bin")
    (dataset.path / "manifest.json").unlink()
    with pytest.raises(UserError, match="`llm prepare_data` was interrupted or never ran"):
        read_manifest(dataset.path)
    (dataset.path / "manifest.json").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        read_manifest(dataset.path)


def test_writing_shards_needs_no_torch():
    """Many processes prepare data; each would pay for it."""
    check = "import sys, llm.data.shards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
