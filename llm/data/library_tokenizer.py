"""Tokenizers that Hugging Face's library `tokenizers` encodes: a tokenizer.json, alone or in a model's folder.

The ids are those of transformers' AutoTokenizer for the same files. The names of special tokens in a text become these
tokens there, so they do here. https://huggingface.co/docs/tokenizers describes the file.
"""

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.base_tokenizer import Tokenizer, content_of, read_object, sha256_of
from llm.data.byte_level import QWEN_SPLIT, RankEncoder, byte_characters, rank_encoder
from llm.data.sentencepiece_tokenizer import BLANK, COMPANIONS, eos_ids
from llm.errors import UserError

# Files of a folder that go where the tokenizer goes, besides tokenizer.json and COMPANIONS.
TEMPLATE = "chat_template.jinja"
CARRIED = (*COMPANIONS, "tokenizer.model", TEMPLATE, "ranks.tiktoken")
PLAIN: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    # transformers 4 would also make token_type_ids, which its generate refuses.
    "model_input_names": ["input_ids", "attention_mask"],
}
"""A tokenizer_config.json for a tokenizer.json that comes without one."""
# Where only a tokenizer.json is given, these names tell BOS and EOS.
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<|endoftext|>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")
DECODERS = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}
SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
PART_CHARS = 1 << 16
"""Longer texts are encoded in parts of about this size where that keeps the ids: the library's results take about a
hundred bytes per token."""
RANKS_AFTER = 2 << 20
"""Bytes of text after which another half a second, in which tiktoken gets ready, is soon won back."""
# A part begins at a blank between two letters.
_PLACE = re.compile(r"(?<=[a-z]) (?=[a-z])")


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the library, from its JSON and the files that belong to it.

    Args:
        path: where it was read, for messages and for `load_tokenizer`.
        content: the tokenizer.json.
        companions: {name: content} of CARRIED files in its folder.

    Raises UserError for a file that the library cannot read, for kinds other than BPE and Unigram, and without EOS.
    """

    def __init__(self, path: Path, content: bytes, companions: Mapping[str, bytes] | None = None) -> None:
        self.path = path
        companions = dict(companions or {})
        trees = {name: read_object(companions.get(name), path.parent / name) for name in COMPANIONS}
        tree = read_object(content, path)
        config = trees["tokenizer_config.json"]
        kind = (tree.get("model") or {}).get("type") or "of no known kind"
        if kind not in ("BPE", "Unigram"):
            raise UserError(f"{path}: a tokenizer of kind {kind}; BPE and Unigram are read")
        steps = _steps(tree.get("decoder"), "decoders")
        if strange := {step["type"] for step in steps} - DECODERS:
            raise UserError(f"{path}: a decoder of kind {', '.join(sorted(strange))}, which is not read")
        self._is_byte_level = '"ByteLevel"' in json.dumps([tree.get(key) for key in ("pre_tokenizer", "normalizer")])
        self.kind = "byte-level BPE" if self._is_byte_level else f"{kind} of the library tokenizers"
        settings = _as_transformers_builds(tree, config, self._is_byte_level)
        self._class = settings.get("class")
        self._library = _load(tree, path)
        described = _describe(tree, trees["special_tokens_map.json"], self._library.get_vocab(with_added_tokens=True))
        if "tokenizer_config.json" not in companions:
            companions["tokenizer_config.json"] = json.dumps(described, indent=1).encode() + b"\n"
            config = described
        settings["added_tokens"] = self._add_tokens(config)
        settings["split_special_tokens"] = bool(config.get("split_special_tokens"))
        self._library.encode_special_tokens = settings["split_special_tokens"]
        self.special_in_text = not settings["split_special_tokens"]
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self._bytes, self._is_byte = self._spell(tree["model"], steps, vocabulary)
        self._find_bos_and_eos(described | config, trees["generation_config.json"], vocabulary)
        self.hashed = {"tokenizer.json": sha256_of(content), "bos_id": self.bos_id, "eos_id": self.eos_id, **settings}
        self.files = {"tokenizer.json": content, **companions}
        self._seen_bytes = 0
        self.prefix_bytes = int(self.decode_bytes(self.encode("a")) == b" a")

    def _add_tokens(self, config: Mapping[str, Any]) -> list[str]:
        """Adds the tokens that tokenizer_config.json names, as transformers does; returns those that were new."""
        from tokenizers import AddedToken

        before = set(self._library.get_vocab(with_added_tokens=True))
        known = {token.content for token in self._library.get_added_tokens_decoder().values()}
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        for _, token in sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])):
            text = content_of(token)
            if text and text not in known:
                options = {flag: token[flag] for flag in flags if isinstance(token, Mapping) and flag in token}
                self._library.add_tokens([AddedToken(text, **options)])
        named = [content_of(config.get(key)) for key in SPECIAL_KEYS]
        more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        named += [content_of(token) for token in (more.values() if isinstance(more, Mapping) else more)]
        known = {token.content for token in self._library.get_added_tokens_decoder().values()}
        new = [AddedToken(text, special=True, normalized=False) for text in named if text and text not in known]
        self._library.add_special_tokens(new)
        return sorted({*known, *(token.content for token in new)} - before)

    def _spell(
        self, model: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], vocabulary: Mapping[str, int]
    ) -> tuple[list[bytes], np.ndarray]:
        """Returns the bytes of each id, and whether each is a byte of a character that the vocabulary lacks."""
        replaced = [
            (step["pattern"]["String"], step["content"])
            for step in steps
            if step["type"] == "Replace" and "String" in step["pattern"]
        ]
        replaced += [(step.get("replacement", BLANK), " ") for step in steps if step["type"] == "Metaspace"]
        spelled = [b""] * self.vocab_size
        single = np.zeros(self.vocab_size, np.bool_)
        # latin-1 encodes the characters below U+0100 as the byte of that number.
        to_latin = str.maketrans({char: chr(byte) for byte, char in enumerate(byte_characters())})
        for piece, number in vocabulary.items():
            if self._is_byte_level:
                spelled[number] = piece.translate(to_latin).encode("latin-1", errors="replace")
                single[number] = len(spelled[number]) == 1 and spelled[number] >= b"\x80"
            elif model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
                spelled[number] = bytes.fromhex(piece[3:-1])
                single[number] = True
            else:
                for old, new in replaced:
                    piece = piece.replace(old, new)
                spelled[number] = piece.encode()
        # The unknown token is for text that is lost.
        unknown = model.get("unk_id") if model["type"] == "Unigram" else model.get("unk_token")
        unknown = vocabulary.get(unknown) if isinstance(unknown, str) else unknown
        for number, token in self._library.get_added_tokens_decoder().items():
            spelled[number], single[number] = token.content.encode(), False
        if unknown is not None and not self._is_byte_level:
            spelled[unknown] = b""
        return spelled, single

    def _find_bos_and_eos(
        self, names: Mapping[str, Any], generation: Mapping[str, Any], vocabulary: Mapping[str, int]
    ) -> None:
        def named(key: str) -> int | None:
            text = content_of(names.get(key))
            if text is not None and text not in vocabulary:
                raise UserError(f"{self.path}: its {key} {text!r} is not in the vocabulary")
            return None if text is None else vocabulary[text]

        def generated(key: str) -> int | None:
            value = generation.get(key)
            value = value[0] if isinstance(value, list) and value else value
            return value if type(value) is int and 0 <= value < self.vocab_size else None

        eos = named("eos_token")
        eos = generated("eos_token_id") if eos is None else eos
        if eos is None:
            raise UserError(
                f"{self.path}: no EOS to end documents with; name one as eos_token in its tokenizer_config.json"
            )
        self.eos_id = eos
        self.eos_ids = eos_ids(eos, generation)
        bos, self.begins = named("bos_token"), "the tokenizer's BOS"
        if bos is None:
            bos, self.begins = generated("bos_token_id"), "the BOS of generation_config.json; the tokenizer has none"
        if bos is None:
            bos, self.begins = eos, "its EOS, because the tokenizer has no BOS"
        self.bos_id = bos

    def encode_batch(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        parts: list[str] = []
        ends = []
        for text in texts:
            parts += self._parts(text.decode())
            ends.append(len(parts))
        self._seen_bytes += sum(map(len, texts))
        ranks = self._ranks if self._seen_bytes >= RANKS_AFTER else None
        found = [None if ranks is None else ranks.encode(part) for part in parts]
        rest = (i for i, ids in enumerate(found) if ids is None)
        for some in _batches([part for part, ids in zip(parts, found, strict=True) if ids is None]):
            for encoded in self._library.encode_batch_fast(some, add_special_tokens=False):
                found[next(rest)] = np.array(encoded.ids, np.int32)
        arrays = [np.empty(0, np.int32), *(ids for ids in found if ids is not None)]
        # The ids before each part: where part n begins.
        before = np.cumsum([len(ids) for ids in arrays], dtype=np.int64)
        return np.concatenate(arrays), before[ends] if ends else np.empty(0, np.int64)

    @cached_property
    def _ranks(self) -> RankEncoder | None:
        return rank_encoder(self.tree())

    def is_read_beside(self, model_type: str) -> bool:
        if model_type == "mistral":
            return self._class != "LlamaTokenizer"  # for a Mistral, transformers 5 takes tokenizer.json as it is
        return model_type != "qwen2" or self._class == "Qwen2Tokenizer"

    def is_byte(self) -> np.ndarray:
        return self._is_byte

    def tree(self) -> dict[str, Any]:
        """Returns a tokenizer.json of what encodes: as transformers builds it from the files, with all added tokens."""
        tree: dict[str, Any] = json.loads(self._library.to_str())
        return tree

    def _parts(self, text: str) -> Iterator[str]:
        """Cuts a long text where that keeps its ids."""
        if len(text) <= PART_CHARS or self._skipped is None:
            yield text
            return
        begin = 0
        while place := _PLACE.search(text, begin + PART_CHARS):
            yield text[begin : place.start()]
            begin = place.start() + self._skipped
        yield text[begin:]

    @cached_property
    def _skipped(self) -> int | None:
        """How many characters a cut leaves out at _PLACE: none; or the blank, which encoding puts in front of a text.

        None: neither keeps the ids of random texts, so texts are encoded whole.
        """
        chance = random.Random(0)
        added = [token.content for token in self._library.get_added_tokens_decoder().values()][:100]
        tempting = [
            *"abcxyzABZ019 \n\r\t.,;:'\"-_<>|()[]{}/\\é字\u0301\u2581\u3000\U0001f389",
            "  ",
            "\n\n",
            "'s",
            *added,
        ]
        words = ["the", "of", "and", "not", "in", "return", "don't"]
        for skipped in (0, 1):
            for _ in range(300):
                pieces = chance.choices([*tempting, *words, " a", " b", " the", " of "], k=chance.randrange(1, 40))
                text = "".join(pieces) + "a b" + "".join(chance.choices(tempting, k=5))
                begins = [0, *(match.start() for match in _PLACE.finditer(text)), len(text)]
                parts = [text[begin + (skipped if begin else 0) : end] for begin, end in pairwise(begins)]
                cut = [i for part in parts for i in self._library.encode(part, add_special_tokens=False).ids]
                if cut != self._library.encode(text, add_special_tokens=False).ids:
                    break
            else:
                return skipped
        return None


def _load(tree: Mapping[str, Any], path: Path) -> Any:
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise UserError(f"{path}: needs the package tokenizers: pip install tokenizers") from None
    try:
        library = Library.from_str(json.dumps(tree))
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{path}: the library tokenizers cannot read it ({error})") from None
    library.no_truncation()
    library.no_padding()
    return library


def _as_transformers_builds(tree: dict[str, Any], config: Mapping[str, Any], is_byte_level: bool) -> dict[str, Any]:
    """Changes the tree as transformers 5 does: these classes take vocabulary and merges, and no more, from the file.

    Of Llama's, only the beginning of a text gets the dummy prefix, unless the tokenizer is `legacy`. Returns the
    settings that decide ids.
    """
    name, prefix = str(config.get("tokenizer_class") or "").removesuffix("Fast"), config.get("add_prefix_space")
    if tree["model"]["type"] != "BPE" or name not in ("LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"):
        return {}
    # LlamaTokenizer is also named by byte-level tokenizers, such as Llama 3's, which transformers then takes unchanged.
    if is_byte_level == (name == "LlamaTokenizer"):
        return {}
    tree["normalizer"] = None
    tree["model"] |= {"ignore_merges": False, "dropout": None}
    if name == "LlamaTokenizer":
        scheme = "never" if prefix is False else "always" if config.get("legacy") else "first"
        tree["pre_tokenizer"] = {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": scheme, "split": False}
        tree["model"] |= {"fuse_unk": True, "byte_fallback": True}
        return {"class": name, "prepend": scheme}
    split_by_gpt2 = name == "GPT2Tokenizer"
    bytes_of = {"type": "ByteLevel", "add_prefix_space": bool(prefix), "trim_offsets": True, "use_regex": split_by_gpt2}
    tree["pre_tokenizer"] = bytes_of
    if name == "Qwen2Tokenizer":
        split = {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated", "invert": False}
        tree["normalizer"] = {"type": "NFC"}
        tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_of]}
    return {"class": name, "prepend": bool(prefix)}


def _describe(tree: Mapping[str, Any], special: Mapping[str, Any], known: Mapping[str, int]) -> dict[str, Any]:
    """Returns a tokenizer_config.json for a tokenizer.json without one: BOS and EOS by their usual names.

    special: the special_tokens_map.json of earlier versions of transformers.
    """
    usual = {"bos_token": (*_put_in_front(tree), *BOS_NAMES), "eos_token": EOS_NAMES}
    return PLAIN | {
        key: content_of(special.get(key)) or next((name for name in names if name in known), None)
        for key, names in usual.items()
    }


def _steps(step: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """Returns the steps of a decoder: itself, or those in its sequence."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inside for part in step[inner] for inside in _steps(part, inner)]
    return [step]


def _put_in_front(tree: Mapping[str, Any]) -> Iterator[str]:
    """Yields the special tokens that the tokenizer itself puts before a text."""
    processor = tree.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        for part in step.get("single") or []:
            if "SpecialToken" not in part:
                break
            yield part["SpecialToken"]["id"]


def _batches(parts: list[str]) -> Iterator[list[str]]:
    """Yields the parts in lists of about PART_CHARS * 4 characters."""
    some: list[str] = []
    size = 0
    for part in parts:
        some.append(part)
        size += len(part)
        if size >= 4 * PART_CHARS:
            yield some
            some, size = [], 0
    if some:
        yield some
