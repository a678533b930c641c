"""Shards hold every token of the text once, in order, the same on any number of processes; or there is no manifest."""

import fcntl
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_loader import unpack_shard

from llm.data import blocks as limits
from llm.data import packing, split, spool
from llm.data.blocks import Block, Place, cut
from llm.data.manifest import read_manifest
from llm.data.packing import Settings, group_blocks, held_out, pack_all
from llm.data.prepare import prepare_data
from llm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from llm.errors import UserError

SEQ_LEN = 16


def sentences(seed: int, words: int) -> str:
    chance = random.Random(seed)
    return " ".join(
        chance.choice(["the", "cat", "sat", "on", "a", "mat,", "and", "purred.\n", "\u2581"]) for _ in range(words)
    )


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text(sentences(0, 5000))
    return load_tokenizer(train_tokenizer([folder / "a.txt"], folder / "spm", 300)["model"])


def run(path: Path | list[Path], tok: Tokenizer, out_dir: Path, **options: Any) -> dict[str, Any]:
    arguments = {"seq_len": SEQ_LEN, "shard_tokens": 1000, "workers": 1} | options
    return prepare_data(path if isinstance(path, list) else [path], tok.path, out_dir, **arguments)


def stored(out_dir: Path, part: str) -> tuple[list[int], list[int], list[int]]:
    """All tokens of a part, where documents start in them, and the length of each shard."""
    tokens: list[int] = []
    starts: list[int] = []
    lengths: list[int] = []
    for shard in read_manifest(out_dir).shards[part]:
        ids, its_starts = unpack_shard((out_dir / shard.file).read_bytes())
        starts += [len(tokens) + int(start) for start in its_starts]
        tokens += ids.tolist()
        lengths.append(len(ids))
    return tokens, starts, lengths


def documents_of(out_dir: Path, part: str, tok: Tokenizer) -> list[str]:
    """The texts of a part; checks on the way that each is BOS, text, EOS, and starts where the index says."""
    tokens, starts, _ = stored(out_dir, part)
    assert starts == [i for i, token in enumerate(tokens) if token == tok.bos_id]
    texts = []
    for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        assert tokens[begin] == tok.bos_id
        assert tokens[end - 1] == tok.eos_id
        text = tok.decode(tokens[begin + 1 : end - 1])
        assert tok.encode(text) == tokens[begin + 1 : end - 1]
        texts.append(text)
    return texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestSplitByHash:
    def test_each_document_is_in_one_part_whole_and_in_order(self, tok: Tokenizer, tmp_path: Path) -> None:
        texts = [sentences(seed, seed % 50 + 1) for seed in range(1, 401)]
        result = run(write_jsonl(tmp_path / "a.jsonl", texts), tok, tmp_path / "out", val_fraction=0.1)
        train, val = (documents_of(tmp_path / "out", part, tok) for part in ("train", "val"))
        assert train == [text for text in texts if not held_out(text.encode(), 0.1)]
        assert val == [text for text in texts if held_out(text.encode(), 0.1)]
        assert result["train_documents"] == len(train)
        assert result["val_documents"] == len(val)
        assert result["documents"] == 400
        assert 20 < len(val) < 60

    def test_where_a_document_goes_depends_on_it_alone(self, tok: Tokenizer, tmp_path: Path) -> None:
        texts = [sentences(seed, 30) for seed in range(1, 251)]
        more = [sentences(seed, 30) for seed in range(1000, 1100)]
        run(write_jsonl(tmp_path / "a.jsonl", texts), tok, tmp_path / "a", val_fraction=0.2)
        run(write_jsonl(tmp_path / "b.jsonl", more + texts[::-1]), tok, tmp_path / "b", val_fraction=0.2)
        assert set(documents_of(tmp_path / "a", "val", tok)) <= set(documents_of(tmp_path / "b", "val", tok))

    def test_a_long_document_stays_whole(self, tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        texts = [sentences(seed, 100) for seed in range(250)]
        path = write_jsonl(tmp_path / "a.jsonl", texts)
        monkeypatch.setattr(limits, "CHUNK_CHARS", 64)
        monkeypatch.setattr(limits, "BLOCK_BYTES", 300)
        monkeypatch.setattr(packing, "GROUP_BYTES", 1000)
        run(path, tok, tmp_path / "out", val_fraction=0.3)
        found = documents_of(tmp_path / "out", "train", tok) + documents_of(tmp_path / "out", "val", tok)
        assert sorted(found) == sorted(texts)

    def test_the_hash_is_frozen(self) -> None:
        """Another hash would move documents of data sets that exist from one part to the other."""
        assert [i for i in range(300) if held_out(b"document %d" % i, 0.02)] == [61, 210, 218, 265, 277, 292, 294]
        assert not any(held_out(b"%d" % i, 0.0) for i in range(100))

    @pytest.mark.parametrize(("fraction", "message"), [(0.001, "raise --val_fraction to 0."), (0.999, "lower --val")])
    def test_a_part_without_a_sequence_is_an_error_with_the_way_out(
        self, tok: Tokenizer, tmp_path: Path, fraction: float, message: str
    ) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", [f"{i}" for i in range(200)])
        with pytest.raises(UserError, match=message) as error:
            run(path, tok, tmp_path / "out", val_fraction=fraction, seq_len=40)
        assert "--seq_len 40" in str(error.value)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(("part", "fraction"), [("val", 0.05), ("train", 0.95)])
    def test_one_sequence_is_enough_and_a_token_less_is_not(
        self, tok: Tokenizer, tmp_path: Path, part: str, fraction: float
    ) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", [sentences(seed, 5) for seed in range(300)])
        tokens = run(path, tok, tmp_path / "out", val_fraction=fraction)[f"{part}_tokens"]
        options = {"val_fraction": fraction, "shard_tokens": 10_000}
        assert run(path, tok, tmp_path / "out", seq_len=tokens - 1, **options)["unused_tokens"][part] == 0
        with pytest.raises(UserError, match=f"{tokens} of"):
            run(path, tok, tmp_path / "out", seq_len=tokens, **options)

    def test_the_way_out_is_one(self, tok: Tokenizer, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", [sentences(seed, 20) for seed in range(300)])
        with pytest.raises(UserError, match="raise --val_fraction to") as error:
            run(path, tok, tmp_path / "out", val_fraction=1e-6)
        fraction = float(str(error.value).split("raise --val_fraction to ")[1].split()[0])
        run(path, tok, tmp_path / "out", val_fraction=fraction)


class TestSplitByPosition:
    def rejoined(self, out_dir: Path, tok: Tokenizer) -> tuple[list[str], list[str]]:
        return documents_of(out_dir, "train", tok), documents_of(out_dir, "val", tok)

    def test_a_running_text_ends_in_validation_and_nothing_is_lost(self, tok: Tokenizer, tmp_path: Path) -> None:
        text = "\n\n" + sentences(1, 5000)
        (tmp_path / "a.txt").write_text(text)
        result = run(tmp_path / "a.txt", tok, tmp_path / "out", val_fraction=0.1)
        train, val = self.rejoined(tmp_path / "out", tok)
        assert len(train) == len(val) == 1
        assert train[0] + val[0] == text
        assert cut(text, 0, len(train[0])) == len(train[0])  # cut where text may be cut
        assert result["val_tokens"] == pytest.approx(0.1 * (result["train_tokens"] + result["val_tokens"]), abs=20)
        assert result["documents"] == 1

    def test_validation_gets_a_sequence_where_the_fraction_is_less(
        self, tok: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "a.txt").write_text("\n\n" + sentences(1, 1000))
        result = run(tmp_path / "a.txt", tok, tmp_path / "out", seq_len=100)
        assert 101 <= result["val_tokens"] <= 120
        assert read_manifest(tmp_path / "out").sequences("val", 100) == 1
        assert "one sequence, --val_fraction 0.005 would be less" in capsys.readouterr().err.replace("\n", " ")

    @given(
        st.lists(st.text(st.sampled_from("ab \n\u2581"), min_size=1, max_size=60), min_size=1, max_size=12),
        st.floats(0.01, 0.9),
        st.integers(2, 12),
        st.integers(13, 40),
    )
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_of_any_documents_none_is_lost_or_doubled(
        self, tok: Tokenizer, tmp_path: Path, texts: list[str], fraction: float, seq_len: int, shard_tokens: int
    ) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", texts)
        kept = [text for text in texts if not text.isspace()]
        lengths = [len(tok.encode(text)) + 2 for text in kept]
        wanted = max(round(sum(lengths) * fraction), seq_len + 1)
        options = {"val_fraction": fraction, "seq_len": seq_len, "shard_tokens": shard_tokens}
        if not kept:
            with pytest.raises(UserError, match="no document with text"):
                run(path, tok, tmp_path / "out", **options)
            return
        if sum(lengths) - wanted < seq_len:  # even EOS after the cut leaves less than a sequence before it
            with pytest.raises(UserError, match="tokens are too few for a sequence"):
                run(path, tok, tmp_path / "out", **options)
            return
        try:
            result = run(path, tok, tmp_path / "out", **options)
        except UserError:  # no place to cut where there would be room
            assert sum(lengths) - wanted <= seq_len + max(lengths)
            return
        train, val = self.rejoined(tmp_path / "out", tok)
        assert "" not in train + val
        if len(train) + len(val) == len(kept) + 1:  # one was cut in two
            train, val = train[:-1], [train[-1] + val[0], *val[1:]]
        assert train + val == kept
        for part in ("train", "val"):
            tokens, _, shards = stored(tmp_path / "out", part)
            assert len(tokens) == result[f"{part}_tokens"] >= seq_len + 1
            assert all(length == shard_tokens for length in shards[:-1])
            assert read_manifest(tmp_path / "out").sequences(part, seq_len) >= 1
        assert result["val_tokens"] >= wanted

    def test_wherever_the_cut_falls_both_parts_have_a_sequence_or_it_is_an_error(
        self, tok: Tokenizer, tmp_path: Path
    ) -> None:
        texts = ["a b\n" * 4, " on a mat" * 4]
        path = write_jsonl(tmp_path / "a.jsonl", texts)
        made = 0
        for seq_len in range(2, 40):
            try:
                run(path, tok, tmp_path / "out", seq_len=seq_len)
            except UserError as error:
                assert "too few for a sequence" in str(error)  # noqa: PT017
                continue
            made += 1
            train, val = self.rejoined(tmp_path / "out", tok)
            assert "".join(train + val) == "".join(texts)
            assert "" not in train + val  # a cut between BOS and a blank would make an empty document
            assert all(read_manifest(tmp_path / "out").sequences(part, seq_len) for part in ("train", "val"))
        assert made > 10

    def test_the_place_to_cut_is_found_far_back(
        self, tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(split, "COPY_TOKENS", 7)
        monkeypatch.setattr(spool, "COPY_TOKENS", 7)
        head = sentences(1, 300).replace("\u2581", "")
        text = f"\n\n{head} {'x' * 500}"
        (tmp_path / "a.txt").write_text(text)
        run(tmp_path / "a.txt", tok, tmp_path / "out", val_fraction=0.1)
        train, val = self.rejoined(tmp_path / "out", tok)
        assert val == [" " + "x" * 500]
        assert train == [f"\n\n{head}"]

    def test_too_little_text_names_sizes_and_the_way_out(self, tok: Tokenizer, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text(sentences(1, 60))
        with pytest.raises(UserError, match=r"a\.txt: \d+ tokens are too few .*--seq_len 100 .*lower --seq_len"):
            run(tmp_path / "a.txt", tok, tmp_path / "out", seq_len=100)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(("documents", "split"), [(199, "position"), (200, "hash")])
    def test_two_hundred_documents_are_enough_for_the_split_by_hash(
        self, tok: Tokenizer, tmp_path: Path, documents: int, split: str
    ) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", ["", *(sentences(seed, 20) for seed in range(documents)), " "])
        result = run(path, tok, tmp_path / "out", val_fraction=0.2)
        assert read_manifest(tmp_path / "out").packing["split"] == split
        assert result["documents"] == documents
        assert result["dropped"] == {"empty": 2}


class TestShards:
    def test_the_bytes_do_not_depend_on_the_number_of_workers(
        self, tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(limits, "BLOCK_BYTES", 20_000)  # many more groups than are under way at once
        monkeypatch.setattr(packing, "GROUP_BYTES", 20_000)
        path = write_jsonl(tmp_path / "a.jsonl", [sentences(seed, 60) for seed in range(3000)])
        for workers in (1, 3):
            run(path, tok, tmp_path / str(workers), workers=workers, shard_tokens=20_000)
        assert snapshot(tmp_path / "1") == snapshot(tmp_path / "3")

    @given(st.integers(1, 300), st.integers(1, 9), st.integers(20, 2000), st.integers(20, 400))
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_where_work_is_divided_changes_no_token(
        self, tok: Tokenizer, tmp_path: Path, size: int, blocks: int, block: int, piece: int
    ) -> None:
        path = tmp_path / "a.jsonl"
        if not path.exists():
            write_jsonl(path, [sentences(seed, 4 + 80 * (seed % 7 == 0)) for seed in range(30)])
            run(path, tok, tmp_path / "whole")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "GROUP_BYTES", size)
            patch.setattr(packing, "GROUP_BLOCKS", blocks)
            patch.setattr(limits, "BLOCK_BYTES", block)
            patch.setattr(limits, "CHUNK_CHARS", piece)
            patch.setattr(spool, "COPY_TOKENS", size)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            result = run(path, tok, tmp_path / "out")
        assert result["dataset_hash"] == read_manifest(tmp_path / "whole").dataset_hash

    def test_counters_add_up(self, tok: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        texts = [sentences(seed, 40) for seed in range(250)]
        path = write_jsonl(tmp_path / "a.jsonl", [*texts, "", "\n"])
        result = run(path, tok, tmp_path / "out", val_fraction=0.1)
        text_tokens = sum(len(tok.encode(text)) for text in texts)
        assert result["documents"] == 250
        assert result["dropped"] == {"empty": 2}
        assert result["bytes"] == sum(len(text.encode()) for text in texts)
        assert result["train_tokens"] + result["val_tokens"] == text_tokens + 2 * 250
        assert result["bytes_per_token"] == pytest.approx(result["bytes"] / text_tokens)
        manifest = read_manifest(tmp_path / "out")
        assert result["dataset_hash"] == manifest.dataset_hash
        assert result["unused_tokens"]["train"] == manifest.unused_tokens("train", SEQ_LEN)
        assert json.loads(json.dumps(result)) == result
        shown = capsys.readouterr()
        assert "documents 250 (dropped: 2 empty)" in shown.err
        assert shown.out == ""

    @pytest.mark.parametrize("workers", [1, 2])
    def test_what_is_left_out_is_counted_by_reason_and_shown(
        self,
        tok: Tokenizer,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        workers: int,
    ) -> None:
        monkeypatch.setattr(limits, "BLOCK_BYTES", 4000)
        monkeypatch.setattr(limits, "RECORD_BYTES", 9000)
        texts = [sentences(seed, 40) for seed in range(260)]
        long = sentences(1000, 1200)
        lines = [json.dumps({"text": text}).encode() for text in [*texts, " ", texts[7], long, long]]
        lines.append(json.dumps({"text": long + "!", "other": "x" * 4000}).encode())
        lines[3:3] = [b'{"text": "caf\xe9"}']
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
        result = run(tmp_path / "a.jsonl", tok, tmp_path / "out", val_fraction=0.1, dedup="exact", workers=workers)
        assert result["dropped"] == {"empty": 1, "duplicate": 2, "invalid_utf8": 1, "too_long": 1}
        assert result["documents"] == 261
        assert result["bytes"] == sum(len(text.encode()) for text in [*texts, long])
        kept = documents_of(tmp_path / "out", "train", tok) + documents_of(tmp_path / "out", "val", tok)
        assert sorted(kept) == sorted([*texts, long])
        at = sum(len(line) + 1 for line in lines[:3]) + lines[3].index(b"\xe9")
        places = read_manifest(tmp_path / "out").counters["dropped_places"]
        assert places == [
            f"{tmp_path}/a.jsonl: not valid UTF-8 at byte {at} (0xe9)",
            f"{tmp_path}/a.jsonl:266: {len(lines[-1]):,} bytes, more than the 9,000 that a record may have",
        ]
        shown = capsys.readouterr().err
        assert all(f"dropped: {place}" in shown for place in places)
        assert "110 bytes of memory a document" in shown

    def test_equal_documents_are_found_long_or_short_and_only_if_asked_for(
        self, tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A long one comes in chunks from a text file, and whole from a .jsonl whose blocks are larger."""
        monkeypatch.setattr(limits, "CHUNK_CHARS", 500)
        long = sentences(1, 1000)
        (tmp_path / "a.txt").write_text(long)
        path = write_jsonl(tmp_path / "b.jsonl", [*(sentences(seed, 20) for seed in range(250)), long, long + "!"])
        inputs = [tmp_path / "a.txt", path]
        options = {"documents": "file", "val_fraction": 0.2}
        assert run(inputs, tok, tmp_path / "out", **options)["documents"] == 253
        result = run(inputs, tok, tmp_path / "out", **options, dedup="exact")
        assert (result["documents"], result["dropped"]) == (252, {"duplicate": 1})

    def test_a_text_that_a_parquet_repeats_is_encoded_once_and_counted(self, tok: Tokenizer, tmp_path: Path) -> None:
        long, longer = sentences(1, 6000), sentences(2, 400_000)
        texts = [*(sentences(seed, 20) for seed in range(250)), *[long] * 40, *[longer] * 3, *["\n" * 20_000] * 2, long]
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
        write_jsonl(tmp_path / "a.jsonl", texts)
        results = [
            run(tmp_path / f"a{kind}", tok, tmp_path / kind, dedup="exact", val_fraction=0.1, shard_tokens=10_000)
            for kind in (".parquet", ".jsonl")
        ]
        assert results[0]["dropped"] == results[1]["dropped"] == {"duplicate": 42, "empty": 2}
        assert results[0]["dataset_hash"] != results[1]["dataset_hash"]  # the settings name the kind of file
        found = [snapshot(tmp_path / kind) for kind in (".parquet", ".jsonl")]
        assert all(found[0][name] == found[1][name] for name in found[0].keys() - {"manifest.json"})

    @pytest.mark.parametrize("val_fraction", [0.1, 0.9])
    def test_a_long_document_that_is_dropped_at_its_end_leaves_nothing(
        self, tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, val_fraction: float
    ) -> None:
        monkeypatch.setattr(limits, "CHUNK_CHARS", 200)
        monkeypatch.setattr(limits, "BLOCK_BYTES", 500)
        texts = [sentences(seed, 600 if seed % 20 == 0 else 20).replace("\n", " ") for seed in range(220)]
        lines = [text.encode() for text in texts]
        lines[50:50] = [lines[40], lines[60] + b"\xff"]
        (tmp_path / "a.txt").write_bytes(b"\n".join(lines))
        options = {"documents": "line", "dedup": "exact", "val_fraction": val_fraction}
        result = run(tmp_path / "a.txt", tok, tmp_path / "out", **options)
        assert result["dropped"] == {"duplicate": 1, "invalid_utf8": 1}
        assert (result["documents"], result["bytes"]) == (220, sum(len(text.encode()) for text in texts))
        kept = documents_of(tmp_path / "out", "train", tok) + documents_of(tmp_path / "out", "val", tok)
        assert sorted(kept) == sorted(texts)

    def test_byte_fallback_and_round_trips_are_counted(self, tok: Tokenizer, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", ["the cat"] * 100 + ["字字 the"] * 99)
        result = run(path, tok, tmp_path / "out")
        tokens = 100 * len(tok.encode("the cat")) + 99 * len(tok.encode("字字 the"))
        assert result["byte_fallback_rate"] == 99 * 6 / tokens
        assert result["round_trip_documents"] == 4

    def test_a_foreign_tokenizer_encodes_each_document_whole_and_says_so(
        self, tok: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "sentences.txt").write_text(sentences(0, 3000))
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "sentences.txt"),
            model_prefix=str(tmp_path / "foreign"),
            model_type="unigram",
            vocab_size=300,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            minloglevel=4,
        )
        foreign = load_tokenizer(tmp_path / "foreign.model")
        texts = [sentences(seed, 30) for seed in range(250)]
        run(write_jsonl(tmp_path / "a.jsonl", texts), foreign, tmp_path / "out", val_fraction=0.1)
        assert "each document is read whole into memory" in capsys.readouterr().err
        kept = documents_of(tmp_path / "out", "train", foreign) + documents_of(tmp_path / "out", "val", foreign)
        assert sorted(kept) == sorted(texts)

    def test_a_text_that_does_not_come_back_fails_the_command(
        self, tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decode = Tokenizer.decode_bytes
        monkeypatch.setattr(Tokenizer, "decode_bytes", lambda self, ids: decode(self, ids).replace(b"mat", b"hat"))
        path = write_jsonl(tmp_path / "a.jsonl", ["on a mat, " * 5] * 300)
        with pytest.raises(UserError, match=r"a\.jsonl: round trip failed: .*mat.* decode to .*hat.*loses text"):
            run(path, tok, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_shards_hold_what_they_should_and_the_directory_no_more(self, tok: Tokenizer, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text(sentences(1, 4000))
        run(tmp_path / "a.txt", tok, tmp_path / "deep" / "out", documents="file")
        manifest = read_manifest(tmp_path / "deep" / "out")
        shards = [shard for part in manifest.shards.values() for shard in part]
        names = {path.name for path in (tmp_path / "deep" / "out").iterdir()}
        assert names == {"manifest.json", "tokenizer.model"} | {shard.file for shard in shards}
        assert [shard.tokens for shard in manifest.shards["train"][:-1]] == [1000] * (len(manifest.shards["train"]) - 1)
        assert sum(shard.documents for shard in manifest.shards["train"]) == 1  # it crosses all of them
        assert manifest.seq_len == SEQ_LEN
        assert manifest.packing == {
            "documents": ["file"],
            "split": "position",
            "shard_tokens": 1000,
            "val_fraction": 0.005,
        }
        assert load_tokenizer(tmp_path / "deep" / "out").sha256 == manifest.tokenizer_sha256 == tok.sha256

    def test_a_vocabulary_above_65536_is_stored_in_four_bytes(
        self, tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Tokenizer, "vocab_size", 70_000, raising=False)
        plain = Tokenizer.__init__

        def init(self: Tokenizer, path: Path) -> None:
            plain(self, path)
            self.vocab_size = 70_000

        monkeypatch.setattr(Tokenizer, "__init__", init)
        text = sentences(1, 1000)
        (tmp_path / "a.txt").write_text(text)
        run(tmp_path / "a.txt", tok, tmp_path / "out", documents="file")
        (train,), (val,) = (documents_of(tmp_path / "out", part, tok) for part in ("train", "val"))
        assert train + val == text


class TestDirectory:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        (tmp_path / "a.txt").write_text(sentences(1, 2000))
        return tmp_path / "a.txt"

    def test_the_same_again_is_left_as_it_is(self, tok: Tokenizer, tmp_path: Path, path: Path) -> None:
        first = run(path, tok, tmp_path / "out")
        stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
        again = run(path, tok, tmp_path / "out", workers=2)
        assert (first["reused"], again["reused"]) == (False, True)
        assert again | {"reused": False} == first
        assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == stamps

    @pytest.mark.parametrize("damage", ["manifest.json", "tokenizer.model", "train-00000.bin"])
    def test_what_is_missing_is_made_again(self, tok: Tokenizer, tmp_path: Path, path: Path, damage: str) -> None:
        run(path, tok, tmp_path / "out")
        before = snapshot(tmp_path / "out")
        (tmp_path / "out" / damage).unlink()
        assert not run(path, tok, tmp_path / "out")["reused"]
        assert snapshot(tmp_path / "out") == before

    @pytest.mark.parametrize(
        "change", [{"seq_len": 8}, {"shard_tokens": 500}, {"val_fraction": 0.3}, {"documents": "file"}, {"text": "x"}]
    )
    def test_other_input_or_settings_replace_it(
        self,
        tok: Tokenizer,
        tmp_path: Path,
        path: Path,
        change: dict[str, Any],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        run(path, tok, tmp_path / "out", shard_tokens=100)
        (tmp_path / "out" / "notes.txt").write_text("mine")
        options = {"shard_tokens": 100} | change
        if text := options.pop("text", None):
            path.write_text(path.read_text() + text)
        result = run(path, tok, tmp_path / "out", **options)
        assert not result["reused"]
        assert "replaces the shards" in capsys.readouterr().err
        assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
        (tmp_path / "out" / "notes.txt").unlink()
        run(path, tok, tmp_path / "fresh", **options)
        assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")  # and nothing of the old is left

    def test_an_error_leaves_the_old_shards_or_nothing(
        self, tok: Tokenizer, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(path, tok, tmp_path / "out")
        before = snapshot(tmp_path / "out")

        def full(self: object, *arguments: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(spool.ShardWriter, "append", full)
        for name in ("out", "new"):
            with pytest.raises(OSError, match="No space left") as error:
                run(path, tok, tmp_path / name, seq_len=8)
            assert error.value.filename == str(tmp_path / name)
        assert snapshot(tmp_path / "out") == before
        assert not (tmp_path / "new").exists()

    def test_bad_text_far_in_leaves_nothing(self, tok: Tokenizer, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"fine\n" * 100_000 + b"\xff")
        with pytest.raises(
            UserError, match=r"no document with .*1 invalid_utf8.*a\.txt: not valid UTF-8 at byte 500000"
        ):
            run(tmp_path / "a.txt", tok, tmp_path / "out", documents="file")
        assert not (tmp_path / "out").exists()

    def test_a_worker_that_dies_is_one_line(self, tok: Tokenizer, tmp_path: Path, path: Path) -> None:
        block = Block(path, "line", Place(), b"the cat\n" * 150_000)
        packed = pack_all(group_blocks(block for _ in range(10**9)), Settings(tok.path), 2, tok)
        next(packed)
        for child in packing.multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="a worker process died"):
            for _ in packed:
                pass

    def test_only_one_at_a_time(self, tok: Tokenizer, tmp_path: Path, path: Path) -> None:
        run(path, tok, tmp_path / "out")
        lock = os.open(tmp_path / "out", os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            with pytest.raises(UserError, match="another prepare_data"):
                run(path, tok, tmp_path / "out", seq_len=8)
        finally:
            os.close(lock)
        run(path, tok, tmp_path / "out", seq_len=8)

    def test_a_link_to_a_directory_is_followed(self, tok: Tokenizer, tmp_path: Path, path: Path) -> None:
        (tmp_path / "big_disk").mkdir()
        (tmp_path / "out").symlink_to(tmp_path / "big_disk")
        run(path, tok, tmp_path / "out")
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "big_disk" / "manifest.json").exists()


def test_a_tokenizer_is_trained_on_the_input_if_none_is_named(tok: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(sentences(0, 5000))
    arguments = {"seq_len": SEQ_LEN, "shard_tokens": 1000, "workers": 2}
    named = prepare_data([tmp_path / "a.txt"], tok.path, tmp_path / "named", **arguments)
    for reused in (False, True):
        trained = prepare_data([tmp_path / "a.txt"], None, tmp_path / "out", vocab_size=300, **arguments)
        assert trained == named | {"out_dir": str(tmp_path / "out"), "reused": reused}
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "named")
    for tokenizer, vocab_size in ((None, None), (tok.path, 300)):
        with pytest.raises(UserError, match="needs --tok, or --vocab_size to train a tokenizer on the input; not both"):
            prepare_data([tmp_path / "a.txt"], tokenizer, tmp_path / "out", vocab_size=vocab_size, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "--seq_len 1"),
        ({"shard_tokens": SEQ_LEN}, "--shard_tokens 16"),
        ({"val_fraction": 0.0}, "--val_fraction 0.0"),
        ({"val_fraction": 1.0}, "--val_fraction 1.0"),
        ({"val_fraction": float("nan")}, "--val_fraction nan"),
        ({"workers": 0}, "--workers 0"),
        ({"dedup": "fuzzy"}, "--dedup fuzzy"),
        ({"documents": "page"}, "--documents page"),
    ],
)
def test_settings_that_cannot_be(tok: Tokenizer, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "a.txt").write_text(sentences(1, 100))
    with pytest.raises(UserError, match=message):
        run(tmp_path / "a.txt", tok, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be(tok: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(sentences(1, 1000))
    (tmp_path / "blank.txt").write_text("\n \n")
    for path, out, message in [
        (tmp_path / "missing.txt", tmp_path / "out", "no such file"),
        (tmp_path / "blank.txt", tmp_path / "out", "no document with text"),
        (tmp_path / "a.txt", tmp_path / "a.txt", "is a file; --out_dir names a directory"),
    ]:
        with pytest.raises(UserError, match=message):
            run(path, tok, out)
    with pytest.raises(OSError, match="Not a directory"):
        run(tmp_path / "a.txt", tok, tmp_path / "a.txt" / "out")
    with pytest.raises(UserError, match="no such tokenizer"):
        prepare_data([tmp_path / "a.txt"], tmp_path / "m", tmp_path / "out", seq_len=8, shard_tokens=100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "blank.txt"]
