"""The loader on damaged, swapped, shrinking and impossible shards: one line that names the file and the reason."""

import collections
import hashlib
import os
import struct
from dataclasses import replace

import numpy as np
import pytest
import reference_loader
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.shards import Loader
from llm.errors import UserError

TOKENIZER = hashlib.sha256(b"a tokenizer").digest()


def make_dataset(directory, shards, vocab_size=1000):
    arrays = [(np.asarray(tokens), np.asarray(starts)) for tokens, starts in shards]
    return reference_loader.write_dataset(directory, arrays, vocab_size, TOKENIZER)


def random_shard(rng, tokens, density):
    return rng.integers(0, 1000, tokens), np.flatnonzero(rng.random(tokens) < density)


def read_all(manifest, **options):
    settings = {"seq_len": 100, "seed": 0, "global_batch": 8, "micro_batch": 8, "shuffle": False, **options}
    with Loader(manifest, "train", end=manifest.sequences("train", settings["seq_len"]), **settings) as loader:
        for _ in loader:
            pass


def patched_header(content, offset, data):
    """The file with other bytes in its header, whose checksum is right again."""
    content = bytearray(content)
    content[offset : offset + len(data)] = data
    struct.pack_into("<I", content, 4092, reference_loader.crc32c(bytes(content[:4092])))
    return bytes(content)


@pytest.fixture
def small(tmp_path):
    """One shard of one page of tokens, and its manifest."""
    return make_dataset(tmp_path, [random_shard(np.random.default_rng(5), 2000, 0.02)])


def check_error(manifest, message):
    with pytest.raises(UserError, match=message) as caught:
        read_all(manifest)
    assert str(caught.value).startswith(f"{manifest.path}/train-00000.bin: ")
    assert "\n" not in str(caught.value)


# Offsets in the small shard: 4096 tokens, 8192 document starts, then the one checksum.
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: b"", "not a shard: it has 0 bytes"),
        (lambda c: c[:7], "not a shard: it has 7 bytes"),
        (lambda c: c[:4095], "truncated: it has 4095 bytes, its header alone has 4096"),
        (lambda c: c[:4096], r"truncated: it has 4096 bytes, but its header says \d+"),
        (lambda c: c[:-1], r"truncated: it has \d+ bytes, but its header says \d+"),
        (lambda c: c + b"\0", r"too long: it has \d+ bytes"),
        (lambda c: b"X" + c[1:], "not a shard: it does not begin with LLMSHARD"),
        (lambda c: bytes(len(c)), "not a shard: it does not begin with LLMSHARD"),
        (lambda c: patched_header(c, 8, struct.pack("<I", 2)), "format version 2, but this program reads version 1"),
        (lambda c: c[:100] + bytes([c[100] ^ 1]) + c[101:], "checksum of the header does not match"),
        (lambda c: c[:4093] + bytes([c[4093] ^ 1]) + c[4094:], "checksum of the header does not match"),
        (lambda c: c[:4100] + bytes([c[4100] ^ 1]) + c[4101:], r"checksum of block 0 \(bytes 4096 to \d+\)"),
        (lambda c: c[:8100] + bytes([c[8100] ^ 1]) + c[8101:], "checksum of block 0"),  # padding
        (lambda c: c[:8192] + bytes([c[8192] ^ 1]) + c[8193:], "checksum of block 0"),
        (lambda c: c[:-1] + bytes([c[-1] ^ 1]), "checksum of the checksum table does not match"),
        (lambda c: patched_header(c, 80, b"\0" * 32), "made with another tokenizer"),
        (lambda c: patched_header(c, 24, struct.pack("<Q", 999)), "made for a vocabulary of 999, the manifest says 1"),
        (
            lambda c: patched_header(c, 16, struct.pack("<I", 4)),
            "tokens of 4 bytes do not go with a vocabulary of 1000",
        ),
        (lambda c: patched_header(c, 24, struct.pack("<Q", 70000)), "tokens of 2 bytes do not go with .* of 70000"),
        (lambda c: patched_header(c, 32, struct.pack("<Q", 2**60)), "impossible counts"),
        (lambda c: patched_header(c, 40, struct.pack("<Q", 2001)), "impossible counts: 2000 tokens, 2001 documents"),
        (lambda c: patched_header(c, 32, struct.pack("<Q", 9999)), "section offsets do not go with its counts"),
        (lambda c: patched_header(c, 56, struct.pack("<Q", 4096)), "section offsets do not go with its counts"),
        (lambda c: patched_header(c, 200, b"x"), r"not the shard that the manifest lists.*\(their checksums differ\)"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_file_and_reason(small, damage, message):
    path = small.path / "train-00000.bin"
    path.write_bytes(damage(path.read_bytes()))
    check_error(small, message)


@settings(deadline=None)
@given(st.data())
def test_every_flipped_bit_is_found(tmp_path_factory, data):
    manifest = make_dataset(
        tmp_path_factory.mktemp("shards"), [random_shard(np.random.default_rng(5), 60_000, data.draw(st.floats(0, 1)))]
    )
    read_all(manifest)
    path = manifest.path / "train-00000.bin"
    content = bytearray(path.read_bytes())
    # Any byte; the header's and the last ones are few, and drawn more often.
    byte = data.draw(
        st.one_of(
            st.integers(0, len(content) - 1),
            st.integers(0, 120),
            st.integers(4080, 4100),
            st.integers(len(content) - 20, len(content) - 1),
        )
    )
    content[byte] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000\.bin: (checksum of|not a shard|shard format version)"):
        read_all(manifest)


def test_shards_that_changed_places_are_found(tmp_path):
    rng = np.random.default_rng(6)
    manifest = make_dataset(tmp_path, [(rng.integers(0, 1000, 500), [0]) for _ in range(2)])
    read_all(manifest)
    first, second = (tmp_path / f"train-0000{i}.bin" for i in range(2))
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    check_error(manifest, r"not the shard that the manifest lists: .* \(their checksums differ\)")


def test_a_shard_of_other_counts_than_the_manifests_is_refused(small):
    infos = (replace(small.shards["train"][0], tokens=1999),)
    check_error(
        replace(small, shards={"train": infos, "val": ()}),
        "not the shard that the manifest lists: it holds 2000 tokens .*, the manifest says 1999 and",
    )


@pytest.mark.parametrize(
    ("tokens", "starts", "message"),
    [
        ([5] * 499 + [1000], [0], "holds the token id 1000, but its vocabulary has 1000"),
        ([5] * 500, [3, 3], "document 1 begins at token 3: out of order or out of range"),
        ([5] * 500, [7, 3], "document 1 begins at token 3"),
        ([5] * 500, [500], "document 0 begins at token 500"),
        ([5] * 500, [2**63 - 1], "document 0 begins at token 9223372036854775807"),
    ],
)
def test_wrong_contents_under_right_checksums_are_refused(tmp_path, tokens, starts, message):
    check_error(make_dataset(tmp_path, [(tokens, starts)]), message)


def test_something_else_in_a_shards_place_is_refused(small):
    path = small.path / "train-00000.bin"
    path.unlink()
    check_error(small, "the manifest lists it, but it is not there")
    path.mkdir()
    check_error(small, "not a regular file")
    path.rmdir()
    os.mkfifo(path)
    check_error(small, "not a regular file")
    path.unlink()
    path.symlink_to(path.name)
    check_error(small, "cannot be opened: Too many levels of symbolic links")


def test_targets_also_meets_the_damage(small):
    with Loader(small, "train", seq_len=100, seed=0, global_batch=1, micro_batch=1) as loader:
        next(loader)  # open
    (small.path / "train-00000.bin").unlink()
    loader = Loader(small, "train", seq_len=100, seed=0, global_batch=1, micro_batch=1)
    with pytest.raises(UserError, match=r"train-00000\.bin: the manifest lists it"):
        loader.targets(0, 1)


def test_an_error_waits_for_its_batch_and_stays(tmp_path):
    manifest = make_dataset(tmp_path, [random_shard(np.random.default_rng(5), 500_000, 0.001)])
    path = tmp_path / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[4096 + 4 * 65536 + 10] ^= 4  # tokens 131072 and on lie in block 4: sequence 1 alone is damaged
    path.write_bytes(content)
    order = {"seq_len": 100_000, "seed": 0, "global_batch": 1, "micro_batch": 1, "shuffle": False}
    for threads in (1, 4):
        with Loader(manifest, "train", threads=threads, **order) as loader:
            next(loader)
            for _ in range(3):
                with pytest.raises(UserError, match=r"checksum of block 4 \(bytes 266240 to 331776\)"):
                    next(loader)


@pytest.mark.parametrize("verified", [False, True])
def test_a_file_that_shrinks_while_open_is_an_error(tmp_path, verified):
    manifest = make_dataset(tmp_path, [random_shard(np.random.default_rng(5), 1_000_000, 0.001)])
    order = {"seq_len": 1000, "seed": 0, "global_batch": 1, "micro_batch": 1, "shuffle": False}
    with Loader(manifest, "train", **order) as loader:
        for _ in range(manifest.sequences("train", 1000) if verified else 1):
            next(loader)
        os.truncate(tmp_path / "train-00000.bin", 500_000)
        with pytest.raises(UserError, match=r"train-00000\.bin: truncated while in use: it has 500000 bytes, not 2"):
            collections.deque(loader, maxlen=0)


def overwrite_tokens(path, other):
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(bytes(1000))


def overwrite_all(path, other):
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (overwrite_tokens, "checksum of block 0"),
        (overwrite_all, r"was replaced or changed while in use; start again|it has \d+ bytes, but its header says"),
        (lambda path, other: os.replace(other, path), "was replaced or changed while in use; start again"),
        (lambda path, other: path.touch(), None),
        (lambda path, other: path.chmod(0o600), None),
        (lambda path, other: os.link(path, path.with_name("another name")), None),
        (lambda path, other: path.unlink(), None),
        (lambda path, other: path.parent.rename(path.parent.with_name("moved")), None),
    ],
)
def test_a_shard_that_changes_after_it_was_read_is_an_error_and_one_that_is_deleted_serves(tmp_path, change, message):
    rng = np.random.default_rng(5)
    for name in ("used", "other"):
        (tmp_path / name).mkdir()
    manifest, other = (make_dataset(tmp_path / name, [random_shard(rng, 2000, 0.02)]) for name in ("used", "other"))
    with Loader(manifest, "train", seq_len=100, seed=0, global_batch=1, micro_batch=1, threads=1, prefetch=1) as loader:
        before = [next(loader).input_ids.clone() for _ in range(2 * 19)]  # every block was read and verified
        change(manifest.path / "train-00000.bin", other.path / "train-00000.bin")
        if message is None:
            after = [next(loader).input_ids.clone() for _ in range(2 * 19)]
            assert sorted(row.tolist() for row in before) == sorted(row.tolist() for row in after)
        else:
            with pytest.raises(UserError, match=message):
                collections.deque(loader, maxlen=0)


def test_a_sequence_longer_than_the_data_names_both_numbers(small):
    with pytest.raises(UserError, match=r"seq_len 2000 is longer than the data: .* the longest train shard has 2000"):
        Loader(small, "train", seq_len=2000, seed=0, global_batch=1, micro_batch=1)
    Loader(small, "train", seq_len=1999, seed=0, global_batch=1, micro_batch=1).close()
    with pytest.raises(UserError, match=r"longest val shard has 0"):
        Loader(small, "val", seq_len=16, seed=0, global_batch=1, micro_batch=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"seq_len": 0},
        {"seq_len": 2**31},
        {"seed": -1},
        {"seed": 2**64},
        {"global_batch": 0},
        {"micro_batch": 0},
        {"rank": 2, "world_size": 2},
        {"rank": -1},
        {"world_size": 0},
        {"position": -1},
        {"position": 2**62},
        {"end": -1},
        {"threads": 0},
        {"prefetch": 0},
    ],
)
def test_impossible_arguments_are_refused(small, wrong):
    with pytest.raises(ValueError, match=" not in "):
        Loader(small, "train", **{"seq_len": 16, "seed": 0, "global_batch": 1, "micro_batch": 1, **wrong})
