"""What every tokenizer offers: ids of text, the bytes of ids, how documents begin and end, and the files to carry.

llm/data/sentencepiece_tokenizer.py has the tokenizers that we train and SentencePiece models of others;
llm/data/library_tokenizer.py has those that Hugging Face's library tokenizers encodes.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.errors import UserError


class Tokenizer:
    """Encodes text to token ids and decodes them. A document is stored as bos_id, its ids, eos_id."""

    path: Path
    """The file that it was loaded from, for messages and for `load_tokenizer` in other processes."""
    files: dict[str, bytes]
    """{name: content}, unchanged: the files that shards, checkpoints and exports carry."""
    hashed: dict[str, Any]
    """What the hash covers, as JSON values: the sha256 of files, and settings that decide ids."""
    vocab_size: int
    """All ids are below it."""
    kind: str
    """What it is, in words."""
    bos_id: int
    """Begins a document: the tokenizer's BOS; `begins` tells what it is where the tokenizer has none."""
    eos_id: int
    """Ends a document."""
    eos_ids: tuple[int, ...]
    """Each of them ends a generated text; eos_id is the first."""
    begins: str
    """What bos_id is, in words."""
    cuttable = False
    """Whether `blocks.cut` keeps the ids of a text. Otherwise a document must be encoded as a whole."""
    lossless = False
    """Whether decoding gives back every text, which prepare_data checks."""
    special_in_text = True
    """Whether the name of a special token in a text, such as "</s>", is encoded as that token."""
    for_transformers = True
    """Whether transformers' AutoTokenizer gives the same ids from `files`."""
    _bytes: list[bytes]

    @property
    def sha256(self) -> str:
        """Identifies the tokenizer: of the model file alone if nothing else decides ids, else of `hashed` as JSON."""
        if len(self.hashed) == 1:
            return str(next(iter(self.hashed.values())))
        return hashlib.sha256(json.dumps(self.hashed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def begin_mark(self) -> int:
        """Marks the beginning of a document until shards are written: bos_id, unless a text can have this id too."""
        return self.vocab_size if self.special_in_text else self.bos_id

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without BOS and EOS. Raises UserError if it contains half a surrogate pair."""
        try:
            raw = text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not valid Unicode: {error.reason} ({error.object[error.start]!r})") from None
        return self.encode_batch([raw])[0].tolist()

    def encode_batch(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes many texts, each in UTF-8, without BOS and EOS. As `encode`, with less overhead.

        Returns (concatenated ids, int32 [tokens]; where the ids of each text end, int64 [texts]).
        """
        raise NotImplementedError

    def is_byte(self) -> np.ndarray:
        """Returns for each id whether it is one byte of a character that the vocabulary lacks: bool [vocab_size]."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of ids, which may begin or end inside a character."""
        # Not a library's decode, which returns a str, and a str cannot hold a part of a character.
        return b"".join([self._bytes[i] for i in ids])

    def piece_bytes(self) -> list[bytes]:
        """Returns the raw bytes of each id; empty for an id that no text has."""
        return list(self._bytes)

    def token_bytes(self) -> np.ndarray:
        """Returns the number of raw bytes of each id: int32 [vocab_size]; 0 for an id that no text has."""
        return np.array([len(piece) for piece in self._bytes], np.int32)

    def text_of(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of a whole text's ids: as `decode_bytes`, without the blank that encoding put in front."""
        return self.decode_bytes(ids).removeprefix(b" " * self.prefix_bytes)

    def is_read_beside(self, model_type: str) -> bool:
        """Returns whether AutoTokenizer also gives the same ids beside a model of this type.

        For a Qwen2, transformers 5 takes Qwen2Tokenizer, whatever `files` name.
        """
        return model_type != "qwen2"

    prefix_bytes = 0
    """Blanks that encoding puts in front of a text (SentencePiece's dummy prefix); decoding removes them."""

    def describe(self) -> dict[str, Any]:
        """Returns what the manifest of shards says of the tokenizer, as JSON values."""
        return {
            "kind": self.kind,
            "files": sorted(self.files),
            "hash_covers": self.hashed,
            "bos_id": self.bos_id,
            "begins": self.begins,
            "eos_id": self.eos_id,
            "eos_ids": list(self.eos_ids),
        }

    def save(self, folder: Path) -> None:
        """Writes `files` into a folder."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_object(content: bytes | None, path: Path) -> dict[str, Any]:
    """Returns the JSON object of a file; empty if there is no such file. Raises UserError if it is something else."""
    try:
        tree = json.loads(content) if content is not None else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a JSON object")
    return tree


def content_of(token: Any) -> str | None:
    """Returns the text of a special token as tokenizer_config.json writes it: a string, or an object with "content"."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
