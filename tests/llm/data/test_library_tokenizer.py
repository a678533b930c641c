"""Tokenizers of others give the ids of transformers' AutoTokenizer for the same files, special tokens included."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import transformers
from foreign_tokenizers import STYLES, TEXT, make
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference_loader import unpack_shard

from llm.data import library_tokenizer
from llm.data.library_tokenizer import LibraryTokenizer
from llm.data.manifest import read_manifest
from llm.data.prepare import prepare_data
from llm.data.shards import Loader, verify_shard
from llm.data.tokenizer import Tokenizer, load_tokenizer
from llm.errors import UserError

NAMES = ["<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "<0x41>"]
WORDS = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "the", " fox", "123", " 2024", "'s", "DON'T", "é", "e\u0301", "字", "ﬁ"]
SOME_TEXT = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from([*NAMES, *WORDS, "<|begin_of_text|>", "<|eot_id|>", "\u2581", "🎉", "\x00"]), max_size=20
    ).map("".join),
)


@pytest.fixture(scope="module", params=STYLES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = make(request.param, tmp_path_factory.mktemp(request.param) / "model")
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


class TestIds:
    @given(SOME_TEXT)
    @example("a</s>b <s> c")
    @example(" <s> the\u2581\n\n123")
    @example("")
    @settings(max_examples=60, deadline=None)
    def test_they_are_those_of_auto_tokenizer(self, both: tuple[Tokenizer, Any], text: str) -> None:
        ours, theirs = both
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert all(0 <= i < ours.vocab_size for i in ids)
        # NFC changes the text of Qwen's.
        if ours.kind == "byte-level BPE" and ours.encode("e\u0301") != ours.encode("é"):
            assert ours.decode_bytes(ids) == text.encode()
            assert ours.token_bytes()[ids].sum() == len(text.encode())

    def test_a_long_text_cut_into_parts_has_the_same_ids(
        self, both: tuple[Tokenizer, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ours, _ = both
        chance = random.Random(0)
        text = " ".join(chance.choices([*NAMES, *WORDS, "quick brown", "the lazy dogs", *TEXT[:2]], k=400))
        whole = ours.encode(text)
        monkeypatch.setattr(library_tokenizer, "PART_CHARS", 50)
        assert ours.encode(text) == whole
        if isinstance(ours, LibraryTokenizer):
            assert len(list(ours._parts(text))) > 10

    def test_a_tokenizer_that_no_cut_suits_is_not_cut(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from tokenizers import AddedToken

        folder = make("gpt2", tmp_path / "model")
        ours = load_tokenizer(folder)
        assert isinstance(ours, LibraryTokenizer)
        ours._library.add_tokens([AddedToken("a b", normalized=False)])  # a token across every place to cut
        monkeypatch.setattr(library_tokenizer, "PART_CHARS", 5)
        assert list(ours._parts("a b a b a b a b")) == ["a b a b a b a b"]

    def test_tokens_that_the_config_alone_names(self, tmp_path: Path) -> None:
        folder = make("llama3", tmp_path / "model")
        config = json.loads((folder / "tokenizer_config.json").read_text())
        added = {"700": {"content": "<think>", "special": False, "lstrip": True, "normalized": False}}
        names = {"pad_token": "[PAD]", "additional_special_tokens": ["<tool>"], "added_tokens_decoder": added}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | names))
        ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        text = "the fox <think>a<tool>b[PAD]"
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
        assert ours.vocab_size == load_tokenizer(make("llama3", tmp_path / "bare")).vocab_size + 3

    def test_alone_a_tokenizer_json_has_its_usual_bos_and_eos(self, tmp_path: Path) -> None:
        folder = make("llama3", tmp_path / "model")
        (folder / "tokenizer.json").rename(tmp_path / "mine.json")
        alone = load_tokenizer(tmp_path / "mine.json")
        assert (alone.bos_id, alone.eos_ids) == (0, (1,))
        alone.save(tmp_path)
        again = load_tokenizer(tmp_path)
        assert again.sha256 == alone.sha256
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)


class TestFraming:
    def test_bos_and_eos_are_the_models(self, both: tuple[Tokenizer, Any]) -> None:
        ours, theirs = both
        assert ours.eos_id == theirs.eos_token_id
        if theirs.bos_token_id is None:
            assert ours.bos_id == ours.eos_id
            assert ours.begins == "its EOS, because the tokenizer has no BOS"
        else:
            assert (ours.bos_id, ours.begins) == (theirs.bos_token_id, "the tokenizer's BOS")

    def test_a_list_of_eos_ids(self, tmp_path: Path) -> None:
        assert load_tokenizer(make("qwen2", tmp_path / "qwen2")).eos_ids == (0, 2)
        assert load_tokenizer(make("llama3", tmp_path / "llama3")).eos_ids == (1, 2)

    def test_the_hash_covers_what_decides_ids(self, tmp_path: Path) -> None:
        folder = make("llama3", tmp_path / "model")
        before = load_tokenizer(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        for changes, same in (
            ({"chat_template": "x"}, True),
            ({"eos_token": "<|eot_id|>"}, False),
            ({"split_special_tokens": True}, False),
            ({"pad_token": "<pad>"}, False),
        ):
            (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
            assert (load_tokenizer(folder).sha256 == before.sha256) == same, changes


class TestShards:
    def test_documents_with_special_tokens_come_back_whole(self, both: tuple[Tokenizer, Any], tmp_path: Path) -> None:
        ours, theirs = both
        chance = random.Random(1)
        texts = ["".join(chance.choices([*NAMES, *WORDS, *TEXT[:2]], k=20)) + f" {i}" for i in range(220)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        result = prepare_data(
            [tmp_path / "a.jsonl"], ours.path, tmp_path / "out", seq_len=64, shard_tokens=5_000, val_fraction=0.1
        )
        manifest = read_manifest(tmp_path / "out")
        assert {name: (tmp_path / "out" / name).read_bytes() for name in ours.files} == ours.files
        assert manifest.tokenizer == ours.describe()
        assert load_tokenizer(tmp_path / "out").sha256 == ours.sha256 == manifest.tokenizer_sha256
        expected = sorted(
            [ours.bos_id, *theirs(text, add_special_tokens=False).input_ids, ours.eos_id] for text in texts
        )
        assert sorted(stored(tmp_path / "out")) == expected
        for part in manifest.shards.values():
            for shard in part:
                assert verify_shard(manifest, shard, ours.bos_id, ours.eos_id, in_text=True) == []
        # Bytes of tokens, which are those of the text unless the tokenizer changes it.
        assert manifest.counters["piece_bytes"] == sum(len(ours.decode_bytes(ours.encode(text))) for text in texts)
        changed = any(ours.text_of(ours.encode(text)) != text.encode() for text in texts)
        assert (manifest.counters["piece_bytes"] - ours.prefix_bytes * len(texts) == result["bytes"]) != changed

    @pytest.mark.parametrize("vocab_size", [65_536, 65_537])
    def test_large_vocabularies(self, tmp_path: Path, vocab_size: int) -> None:
        folder = make("smollm2", tmp_path / "model")  # BOS is EOS
        tree = json.loads((folder / "tokenizer.json").read_text())
        known = len(tree["model"]["vocab"])
        tree["model"]["vocab"] |= {f"unused{i}": i for i in range(known, vocab_size - 1)} | {"dogs": vocab_size - 1}
        tree["added_tokens"].append(tree["added_tokens"][0] | {"id": vocab_size - 1, "content": "dogs"})
        (folder / "tokenizer.json").write_text(json.dumps(tree))
        ours = load_tokenizer(folder)
        assert ours.vocab_size == vocab_size
        (tmp_path / "a.txt").write_text("the dogs <|endoftext|> the fox\n" * 40)
        prepare_data([tmp_path / "a.txt"], folder, tmp_path / "out", seq_len=16, shard_tokens=500, documents="line")
        manifest, ids = read_manifest(tmp_path / "out"), ours.encode("the dogs <|endoftext|> the fox")
        documents = stored(tmp_path / "out")
        assert [ours.bos_id, *ids, ours.eos_id] in documents
        assert vocab_size - 1 in ids
        assert sum(shard.documents for part in manifest.shards.values() for shard in part) in (40, 41)
        with Loader(manifest, "train", seq_len=16, seed=0, global_batch=4, micro_batch=4, shuffle=False) as loader:
            assert next(loader).input_ids.flatten()[: len(ids) + 2].tolist() == [ours.bos_id, *ids, ours.eos_id]


def stored(folder: Path) -> list[list[int]]:
    """The documents of a data set as the index of its shards divides them. The first may continue in the next shard."""
    manifest = read_manifest(folder)
    documents: list[list[int]] = []
    for part in manifest.shards.values():
        for shard in part:
            tokens, starts = unpack_shard((folder / shard.file).read_bytes())
            ends = [*map(int, starts), len(tokens)]
            if documents and ends[0] > 0:
                documents[-1] += tokens[: ends[0]].tolist()
            documents += [tokens[begin:end].tolist() for begin, end in pairwise(ends)]
    return documents


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda tree: tree["model"].update(type="WordPiece"), "a tokenizer of kind WordPiece"),
            (lambda tree: tree.update(decoder={"type": "CTC"}), "a decoder of kind CTC"),
            (lambda tree: tree["model"].update(vocab=5), "the library tokenizers cannot read it"),
            (lambda tree: tree.pop("model"), "of no known kind"),
        ],
    )
    def test_what_cannot_be_read_is_named(self, tmp_path: Path, change: Any, message: str) -> None:
        folder = make("llama3", tmp_path / "model")
        tree = json.loads((folder / "tokenizer.json").read_text())
        change(tree)
        (folder / "tokenizer.json").write_text(json.dumps(tree))
        with pytest.raises(UserError, match=rf"tokenizer\.json: .*{message}"):
            load_tokenizer(folder)

    def test_no_eos(self, tmp_path: Path) -> None:
        folder = make("llama3", tmp_path / "model")
        (folder / "tokenizer_config.json").write_text('{"eos_token": null}')
        (folder / "generation_config.json").unlink()
        with pytest.raises(UserError, match="no EOS to end documents with"):
            load_tokenizer(folder)

    def test_a_file_of_another_kind(self, tmp_path: Path) -> None:
        folder = make("llama3", tmp_path / "model")
        (folder / "tokenizer.json").write_text("[]")
        with pytest.raises(UserError, match=r"tokenizer\.json: not a JSON object"):
            load_tokenizer(folder)
