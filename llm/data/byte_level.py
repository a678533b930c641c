"""Byte-level BPE: how its families split text, how they write bytes, and their encoding by tiktoken.

The library tokenizers splits about 1.5 MB of text in a second, tiktoken ten times as much. Both give the same ids where
`rank_encoder` returns an encoder: the reasons are in tiktoken_ranks.py, and the tests compare the two.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_SHORT}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {QWEN_SPLIT, GPT2_SPLIT, GPT4_SPLIT, GPT4O_SPLIT}
# tiktoken's regular expressions overflow their stack in a run of a million. Only its first blank begins a search,
# because one from each of them would take the square of its length.
_LONG_BLANK = re.compile(r"(?<!\s)\s{32768}")
# Below it, every text is in NFC.
_MAY_CHANGE = re.compile("[\u0300-\U0010ffff]")


class RankEncoder:
    """Encodes text by tiktoken. Make it by `rank_encoder`.

    Args:
        ids: {token: id}; of two tokens, the one with the lower id is merged first.
        split: the regular expression whose matches are merged.
        added: texts that the tokenizer takes out before it splits.
        is_nfc: whether it brings text to NFC first.
    """

    def __init__(self, ids: dict[bytes, int], split: str, added: Sequence[str], is_nfc: bool) -> None:
        from tiktoken import Encoding

        self._encoding = Encoding("ranks", pat_str=split, mergeable_ranks=ids, special_tokens={})
        self._added, self._is_nfc = added, is_nfc
        # Few, so that most texts need no search for each of the added.
        self._beginnings = sorted({text[:2] for text in added})

    def encode(self, text: str) -> np.ndarray | None:
        """Returns the ids, int32; None: tiktoken might give others than the tokenizer, or fail."""
        if self._is_nfc and _MAY_CHANGE.search(text):
            return None
        if any(begin in text for begin in self._beginnings) and any(added in text for added in self._added):
            return None
        if len(text) >= 32768 and _LONG_BLANK.search(text):
            return None
        # Not encode_to_numpy, which searches for special tokens: half as fast.
        return np.array(self._encoding.encode_ordinary(text), np.int32)


def rank_encoder(tree: Mapping[str, Any]) -> RankEncoder | None:
    """Returns an encoder with the ids of a tokenizer.json, as the library writes it; None if they may differ.

    They are the same if text is split by one of the expressions above, and the merges are those that the order of the
    tokens' ids gives (`last_merge`). Takes half a second for 32,000 tokens.
    """
    model = tree["model"]
    split = _split_of(tree.get("pre_tokenizer"))
    normalizer = tree.get("normalizer")
    if split is None or model["type"] != "BPE" or normalizer not in (None, {"type": "NFC"}):
        return None
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return None
    added = [token["content"] for token in tree["added_tokens"]]
    if not all(text and unicodedata.is_normalized("NFC", text) for text in added):
        return None
    byte_of = {char: bytes([byte]) for byte, char in enumerate(byte_characters())}
    merges = [(first, second) for first, second in model["merges"]]
    made = {first + second for first, second in merges}
    known = model["vocab"]
    # A token that no merge makes is only taken for a whole part of the split text, and only with ignore_merges.
    alone = set() if not model.get("ignore_merges") else known.keys() - {*added}
    written = [piece for piece in known if piece in byte_of or piece in made or piece in alone]
    if not byte_of.keys() <= known.keys() or any(char not in byte_of for piece in written for char in piece):
        return None
    written.sort(key=known.__getitem__)
    tokens = [b"".join([byte_of[char] for char in piece]) for piece in written]
    if merges != merges_by_rank(tokens):
        return None
    ids = {token: known[piece] for token, piece in zip(tokens, written, strict=True)}
    return RankEncoder(ids, split, added, is_nfc=normalizer is not None)


def _split_of(step: Mapping[str, Any] | None) -> str | None:
    """Returns the regular expression that splits text; None: it is split otherwise, or by an unknown one.

    An expression that leaves some text unmatched would lose it in tiktoken.
    """
    if step is None:
        return None
    steps: Sequence[Mapping[str, Any]] = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    last = steps[-1] if steps else {"type": None}
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return GPT2_SPLIT if last["use_regex"] else None
    if len(steps) != 2 or last["use_regex"] or steps[0]["type"] != "Split":
        return None
    pattern: str = steps[0]["pattern"].get("Regex", "")
    # Any limit of digits is as good as 3.
    is_known = re.sub(r"\\p\{N\}\{1,[1-9]\}", r"\\p{N}{1,3}", pattern) in _SPLITS
    return pattern if is_known and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"] else None


def merges_by_rank(tokens: Sequence[bytes]) -> list[tuple[str, str]]:
    """Returns the merge rules, as a tokenizer.json writes them, of tokens in the order of their ranks."""
    characters = byte_characters()
    ranks = {token: rank for rank, token in enumerate(tokens)}
    rules = (last_merge(token, ranks) for token in tokens)
    return [(write_bytes(rule[0], characters), write_bytes(rule[1], characters)) for rule in rules if rule is not None]


def write_bytes(token: bytes, characters: Sequence[str]) -> str:
    return "".join([characters[byte] for byte in token])


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> Sequence[bytes] | None:
    """Returns the two parts that merging by rank leaves of a token; None for a byte, and where it leaves more."""
    parts = [token[i : i + 1] for i in range(len(token))]
    none = len(ranks)
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], none) for i in range(len(parts) - 1)]
        least = min(pairs)
        if least == none:
            return None
        at = pairs.index(least)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts if len(parts) == 2 else None


def byte_characters() -> list[str]:
    """Returns the character that a byte-level vocabulary writes for each byte (GPT-2's bytes_to_unicode).

    Printable bytes of Latin-1 are the character itself, the others U+0100 and above.
    """
    hidden = iter(range(0x100, 0x200))
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return [chr(byte if byte in printable else next(hidden)) for byte in range(256)]
