"""Makes a tokenizer.json of a list of tiktoken ranks, the vocabularies of GPT-2 to GPT-4o, Llama 3 and Qwen.

A list has a token in base64 and its rank on each line. It does not say how text is split before merging, nor which
tokens are special, so a name does (SPLITS). https://github.com/openai/tiktoken

tiktoken encodes a part of the split text as one token if it is one, and else merges the neighbours whose union has the
least rank, leftmost first. The library tokenizers applies the merge rule that comes first, leftmost first. The ids are
the same with one rule for each token, in the order of the ranks: the last merge that makes the token when tiktoken
encodes it alone, without knowing it. No other merge ever makes it: as long as no merge crosses the ends of a token's
bytes, the merges between them are those of the bytes alone, because the choice among them is the same.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm.data.byte_level import (
    GPT2_SPLIT,
    GPT4_SPLIT,
    GPT4O_SPLIT,
    QWEN_SPLIT,
    byte_characters,
    merges_by_rank,
    write_bytes,
)
from llm.data.library_tokenizer import PLAIN, LibraryTokenizer
from llm.errors import UserError

FILE = "ranks.tiktoken"


@dataclass(frozen=True)
class Split:
    """How a family of models splits text before merging, and its special tokens."""

    pattern: str
    special: Mapping[str, int]
    """{name: id, counted from the number of ranks}."""
    eos: str = "<|endoftext|>"
    bos: str | None = None
    """None: eos begins documents too."""


_FILL_IN = {"<|fim_prefix|>": 2, "<|fim_middle|>": 3, "<|fim_suffix|>": 4}
_LLAMA3 = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6, "<|end_header_id|>": 7}
SPLITS = {
    "gpt2": Split(GPT2_SPLIT, {"<|endoftext|>": 0}),
    "cl100k": Split(GPT4_SPLIT, {"<|endoftext|>": 1, **_FILL_IN, "<|endofprompt|>": 20}),
    "o200k": Split(GPT4O_SPLIT, {"<|endoftext|>": 1, "<|endofprompt|>": 20}),
    "llama3": Split(GPT4_SPLIT, {**_LLAMA3, "<|eot_id|>": 9}, eos="<|end_of_text|>", bos="<|begin_of_text|>"),
    "qwen": Split(QWEN_SPLIT, {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}),
}


def read_ranks(content: bytes) -> dict[bytes, int] | None:
    """Returns {token: rank} of a file; None if it is no list of ranks."""
    ranks: dict[bytes, int] = {}
    try:
        for line in content.splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        return None
    return ranks if len(ranks) >= 256 else None


def tokenizer_of_ranks(path: Path, content: bytes, name: str) -> LibraryTokenizer:
    """Makes the tokenizer of a list of ranks. name: a key of SPLITS. Raises UserError for a file of another kind."""
    split, ranks = SPLITS[name], read_ranks(content)
    if ranks is None or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path}: no list of tiktoken ranks with all 256 bytes")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path}: its ranks are not the numbers from 0 to {len(ranks) - 1:,}; take the original file")
    characters = byte_characters()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [{"id": len(ranks) + at, "content": text, **flags} for text, at in sorted(split.special.items())]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    isolated = {"type": "Split", "pattern": {"Regex": split.pattern}, "behavior": "Isolated", "invert": False}
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(special, key=lambda token: int(str(token["id"]))),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [isolated, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a part of the split text that is a token is that token
            # The special tokens too, because the library would give them the next free ids.
            "vocab": {write_bytes(token, characters): rank for token, rank in ranks.items()}
            | {str(token["content"]): token["id"] for token in special},
            "merges": merges_by_rank(sorted(ranks, key=ranks.__getitem__)),
        },
    }
    config = {**PLAIN, "bos_token": split.bos, "eos_token": split.eos}
    return LibraryTokenizer(
        Path(f"{path}:{name}"),
        json.dumps(tree, ensure_ascii=False).encode(),
        {"tokenizer_config.json": json.dumps(config, indent=1).encode() + b"\n", FILE: content},
    )
