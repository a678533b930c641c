"""`llm inspect`: what it counts and shows is there, and nothing that is damaged passes --verify."""

import json
import re
import shutil
import struct

import numpy as np
import pytest
import reference_loader

from llm.data.manifest import ShardInfo, read_manifest, write_manifest
from llm.data.shards import ShardWriter, document_starts, verify_shard
from llm.data.tokenizer import load_tokenizer
from llm.tools import inspect_files
from llm.tools.inspect_files import inspect


@pytest.fixture(scope="module")
def documents(small_shards):
    """All documents of each split as lists of ids, put together by the reference loader."""
    manifest = read_manifest(small_shards)
    found = {}
    for split in ("train", "val"):
        tokens, starts = [], []
        for shard in manifest.shards[split]:
            more, begins = reference_loader.unpack_shard((small_shards / shard.file).read_bytes())
            starts += (begins + len(tokens)).tolist()
            tokens += more.tolist()
        found[split] = [tokens[a:b] for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]
    return found


def test_counts_lengths_and_samples_are_those_of_the_documents(small_shards, documents, tmp_path, llm_here):
    code, out, err = llm_here("inspect", small_shards, "--json", "--samples", 5, "--png", tmp_path / "lengths.png")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    manifest = read_manifest(small_shards)
    assert result["dataset_hash"] == manifest.dataset_hash
    for split in ("train", "val"):
        assert result[split]["documents"] == len(documents[split])
        assert result[split]["tokens"] == sum(map(len, documents[split]))
        assert result[split]["shards"] == len(manifest.shards[split])
    lengths = [len(document) for split in documents.values() for document in split]
    for low, high, count in result["lengths"]:
        assert count == sum(low <= length <= high for length in lengths)
    assert sum(count for *_, count in result["lengths"]) == len(lengths)

    tokenizer = load_tokenizer(small_shards / "tokenizer.model")
    texts = [tokenizer.decode(i for i in ids if i not in (1, 2)) for ids in documents["train"]]
    samples = [text for sample in result["samples"] for text in sample]
    assert len(result["samples"]) == 5
    assert any(len(sample) > 1 for sample in result["samples"])  # a boundary is shown
    # A sample may begin and end inside a character.
    assert all(any(part.strip("\ufffd") in text for text in texts) for part in samples)
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_a_person_sees_counts_bars_and_boundaries(small_shards, llm_here):
    _, out, _ = llm_here("inspect", small_shards, "--samples", 5)
    assert "train.documents" in out
    assert "####" in out
    assert out.count("-- sample ") == 5
    assert "\n-- next document ---" in out


def test_control_characters_of_documents_and_manifests_are_shown_as_escapes(capsys):
    report = {"packing": {"text_key": "\x1b]0;x\x07"}, "path": "a\nb", "samples": [["\x9bone\n", "two\r"]]}
    inspect_files._print_report(report)
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(out)
    assert "\\x1b]0;x\\x07" in out
    assert "a\\nb" in out
    assert "\\x9bone\n" in out


def test_a_checkpoint_is_described(write_config, small_shards, tmp_path, llm_here):
    assert llm_here("train", "--config", write_config(train__total_tokens=512))[0] == 0
    code, out, _ = llm_here("inspect", tmp_path / "run", "--json")
    result = json.loads(out)
    assert (code, result["step"], result["tokens"]) == (0, 1, 512)
    assert result["data"]["dataset_hash"] == read_manifest(small_shards).dataset_hash
    assert {"model.safetensors", "state.json"} <= set(result["files"])
    _, out, _ = llm_here("inspect", tmp_path / "run")
    long_name = "files.optimizer-exp_avg_sq.safetensors"
    assert re.search(rf"^{long_name} [\d,]+$", out, re.M)
    code, _, err = llm_here("inspect", tmp_path / "run", "--png", tmp_path / "lengths.png")
    assert code == 1
    assert "holds no manifest.json; --png is for a directory of shards" in err


def test_a_text_is_shown_piece_by_piece(small_tokenizer, llm_here):
    text = "def f(x):\n\treturn 'Grüße €'"
    _, out, _ = llm_here("inspect", "--tok", small_tokenizer, "--text", text, "--json")
    result = json.loads(out)
    size = len(text.encode())
    assert (result["bytes"], result["bytes_per_token"]) == (size, size / result["tokens"])
    assert [i for i, _ in result["pieces"]] == load_tokenizer(small_tokenizer).encode(text)
    code, out, _ = llm_here("inspect", "--tok", small_tokenizer, "--text", text)
    assert (code, len(out.splitlines())) == (0, result["tokens"] + 3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "llm inspect needs PATH or --text"),
        (["--tok", "a"], "llm inspect needs PATH or --text"),
        (["--text", "a"], "--text needs --tok"),
        (["somewhere", "--tok", "a"], "--tok goes with --text; add --text, or leave --tok out"),
        (["somewhere", "--text", "a"], "llm inspect takes PATH or --text, not both"),
        (["--tok", "a", "--text", "a", "--verify"], "--verify goes with PATH; add PATH, or leave --verify out"),
    ],
)
def test_a_path_or_a_text_is_wanted(arguments, expected, llm_here):
    code, out, err = llm_here("inspect", *arguments)
    assert (code, out) == (1, "")
    assert expected in err


def test_nothing_to_inspect_is_an_error_that_names_the_path(tmp_path, llm_here):
    for path, message in ((tmp_path / "none", "no such directory"), (tmp_path, "not a checkpoint")):
        code, _, err = llm_here("inspect", path)
        assert code == 1
        assert f"error: {path}: {message}" in err


# --- --verify --------------------------------------------------------------------------------------------------------


def test_whole_shards_pass_and_every_bad_block_is_named(small_shards, tmp_path, llm_here):
    code, _, err = llm_here("inspect", small_shards, "--verify")
    assert code == 0
    assert "every checksum, id and document boundary is right" in err
    copy = shutil.copytree(small_shards, tmp_path / "copy")
    for name, place in (("train-00000.bin", 5000), ("val-00000.bin", 50)):
        content = bytearray((copy / name).read_bytes())
        content[place] ^= 1
        (copy / name).write_bytes(content)
    code, out, err = llm_here("inspect", copy, "--verify", "--json")
    assert code == 1
    assert json.loads(out)["failed"] == ["train-00000.bin", "val-00000.bin"]
    assert f"{copy}/train-00000.bin: checksum of block 0 (bytes 4096 to " in err
    assert f"{copy}/val-00000.bin: checksum of the header does not match" in err


BOS, EOS = 1, 2


@pytest.fixture
def make_shard(tmp_path):
    """Writes one shard; returns its manifest, and what verify_shard says about it after a change to its bytes."""

    def make(tokens, starts, vocab_size=1000):
        with ShardWriter(tmp_path / "train-00000.bin", vocab_size=vocab_size, tokenizer_sha256="5e" * 32) as writer:
            writer.append(np.asarray(tokens, np.int32), np.asarray(starts, np.uint64))
            info = writer.finish()
        settings = {"vocab_size": vocab_size, "tokenizer_sha256": "5e" * 32, "seq_len": 16, "packing": {}}
        manifest = write_manifest(tmp_path, shards={"train": [info], "val": []}, counters={}, **settings)
        return manifest, info

    return make


def document_stream(rng, documents, vocab_size=1000):
    """Tokens and starts of documents, each BOS, up to 300 ids, EOS."""
    lengths = rng.integers(0, 300, documents)
    parts = [np.concatenate([[BOS], rng.integers(3, vocab_size, n), [EOS]]) for n in lengths]
    return np.concatenate(parts), np.cumsum([0, *lengths[:-1] + 2])


@pytest.mark.parametrize("vocab_size", [1000, 70_000])
def test_each_of_several_bad_blocks_is_named_once(make_shard, vocab_size, tmp_path):
    tokens, starts = document_stream(np.random.default_rng(1), 3000, vocab_size)
    manifest, info = make_shard(tokens, starts, vocab_size)
    assert verify_shard(manifest, info, BOS, EOS) == []
    assert np.array_equal(document_starts(manifest, info), starts)
    path = tmp_path / info.file
    content = bytearray(path.read_bytes())
    blocks = -(-(len(content) - 4096) // 65536)
    damaged = sorted({0, 3, blocks - 2, blocks - 1})  # the last ones hold the document index
    for block in damaged:
        content[4096 + block * 65536 + 11] ^= 128
    path.write_bytes(content)
    problems = verify_shard(manifest, info, BOS, EOS)
    assert sorted(problems) == sorted(
        f"{path}: checksum of block {block} (bytes {4096 + block * 65536} to "
        f"{min(4096 + (block + 1) * 65536, len(content) - 4 * blocks)}) does not match: the file is damaged"
        for block in damaged
    )


@pytest.mark.parametrize(
    ("tokens", "starts", "message"),
    [
        ([BOS, 5, EOS, BOS, 5], [0, 4], "block 0 does not hold BOS where a document begins"),
        ([BOS, 5, EOS, BOS, 5], [0], "block 0 does not hold BOS where a document begins"),
        ([BOS, 5, 5, BOS, 5], [0, 3], "block 0 does not hold BOS where a document begins, after an EOS"),
        ([5] * 32_767 + [5, BOS, 5], [32_768], "block 1 does not hold BOS where a document begins, after an EOS"),
        ([5] * 32_767 + [EOS, BOS, 5], [32_768], None),
        ([5, 5, EOS], [], None),
        ([], [], None),
    ],
)
def test_boundaries_are_held_against_the_tokens(make_shard, tokens, starts, message):
    manifest, info = make_shard(tokens, starts)
    problems = verify_shard(manifest, info, BOS, EOS)
    assert len(problems) == (message is not None)
    assert all(message in problem for problem in problems)


def test_wrong_contents_under_right_checksums_are_found(tmp_path):
    sha = bytes(32)
    made = reference_loader.write_dataset(tmp_path, [(np.array([BOS, 999, 1000, EOS]), np.array([0]))], 1000, sha)
    (problem,) = verify_shard(made, made.shards["train"][0], BOS, EOS)
    assert problem.endswith("train-00000.bin: block 0 holds the token id 1000, but the vocabulary has 1000")
    made = reference_loader.write_dataset(tmp_path, [(np.array([BOS, 5, EOS]), np.array([0, 7]))], 1000, sha)
    (problem,) = verify_shard(made, made.shards["train"][0], BOS, EOS)
    assert problem.endswith("train-00000.bin: document 1 begins at token 7: out of order or out of range")


def test_every_flipped_bit_fails(make_shard, tmp_path):
    tokens, starts = document_stream(np.random.default_rng(2), 20)
    manifest, info = make_shard(tokens, starts)
    content = (tmp_path / info.file).read_bytes()
    rng = np.random.default_rng(3)
    for place in [*rng.integers(0, len(content), 200), *range(128), *range(4092, 4100), len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        (tmp_path / info.file).write_bytes(damaged)
        assert verify_shard(manifest, info, BOS, EOS), place


def test_a_shard_that_is_gone_or_another_is_named(make_shard, tmp_path):
    manifest, info = make_shard(*document_stream(np.random.default_rng(4), 5))
    other = ShardInfo(**{**vars(info), "documents": 4})
    (problem,) = verify_shard(manifest, other, BOS, EOS)
    assert "not the shard that the manifest lists" in problem
    (tmp_path / info.file).unlink()
    (problem,) = verify_shard(manifest, info, BOS, EOS)
    assert "the manifest lists it, but it is not there" in problem


def test_the_tokenizer_beside_the_shards_must_be_theirs(small_shards, tmp_path):
    from llm.errors import UserError

    copy = shutil.copytree(small_shards, tmp_path / "copy")
    content = (copy / "tokenizer.model").read_bytes()
    (copy / "tokenizer.model").write_bytes(content.replace(struct.pack("<f", -5.0), struct.pack("<f", -5.5)))
    with pytest.raises(UserError, match=r"tokenizer\.model: not the tokenizer that the shards were made with"):
        inspect(copy)
