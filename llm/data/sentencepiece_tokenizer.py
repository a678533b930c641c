"""Tokenizers that are SentencePiece models: ours, made by `llm train_tokenizer`, and those of others.

Of ours, two rules hold, and the tests check them:
1. `decode(encode(text)) == text` for every text.
2. A text may be cut where `blocks.cut` cuts it without changing its ids. Therefore long texts can be encoded
   in chunks and in parallel, and the encoder (csrc/encoder/) can cache words. The rule holds because no piece of the
   vocabulary crosses such a place, and BPE only makes pieces of the vocabulary.

A model of others may break both: it may put a blank in front of a text (a dummy prefix), normalise it, lack byte
fallback, or be a unigram model. Then SentencePiece encodes each document as a whole.

BPE: Sennrich et al. 2016. Unigram: Kudo 2018. SentencePiece: Kudo & Richardson 2018.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from llm.data import _encoder
from llm.data.base_tokenizer import Tokenizer, content_of, read_object, sha256_of
from llm.data.blocks import SEGMENT_CHARS, cut
from llm.errors import UserError

BLANK = "\u2581"  # SentencePiece replaces a blank by it, so it cannot distinguish this character from a blank
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
# ModelProto 3 normalizer_spec, in it 3 add_dummy_prefix. A later field replaces an earlier one.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
    """Encodes text to token ids and decodes them, with a SentencePiece model.

    Args:
        path: the model file.
        companions: {name: content} of the COMPANIONS in its folder, which say more about the tokenizer.

    Raises UserError for a missing file, for one that is no SentencePiece model, and for a model without EOS.
    """

    def __init__(self, path: str | os.PathLike[str], companions: Mapping[str, bytes] | None = None) -> None:
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{path}: no such tokenizer; `llm train_tokenizer` makes one") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        self.files = {"tokenizer.model": model}
        self.hashed = {"tokenizer.model": sha256_of(model)}
        self._processor = load_model(model, self.path)
        self.vocab_size = self._processor.get_piece_size()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        self.eos_ids = (self.eos_id,)
        try:
            self._bytes = piece_bytes(self._processor)
        except UnicodeDecodeError:
            raise UserError(f"{path}: is no SentencePiece model (a piece is not UTF-8)") from None
        # In the order of the bytes; without byte fallback each is the unknown piece.
        self._byte_ids = np.array([self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)], np.int32)
        self.lossless = self._keeps_text()
        self._encoder = None
        if self.lossless and _cuts_keep_ids(model, self._bytes):
            self._encoder = self._native_encoder()
        self.cuttable = self._encoder is not None
        self.kind = "SentencePiece BPE with byte fallback" if self.lossless else "SentencePiece model of others"
        self.special_in_text = False
        self.for_transformers = self.cuttable
        self._added: dict[str, int] = {}
        # Ours carries a copy of itself in Hugging Face's format, which must not count as companions.
        if companions and not self.cuttable:
            self._add(dict(companions), model)
        if self.eos_id < 0:
            raise UserError(f"{self.path}: has no EOS to end documents with; name a tokenizer that has one")
        self.begins = "the tokenizer's BOS"
        if self.bos_id < 0:
            self.bos_id, self.begins = self.eos_id, "its EOS, because the tokenizer has no BOS"
            self.special_in_text = True  # documents have no id of their own for their beginning
        ids = self.encode_batch([b"a"])[0].tolist()
        self.prefix_bytes = int(self.decode_bytes(ids) == b" a")

    def _keeps_text(self) -> bool:
        """Whether decoding gives back every text: there are BOS, EOS and byte fallback, and no normalisation."""
        if self.bos_id < 0 or self.eos_id < 0:
            return False
        if np.count_nonzero(self.is_byte()) != 256:
            return False
        # Leading blanks, a tab, both kinds of line end, and two characters that NFKC would change.
        probe = "  a\tb\r\n\n ﬁ　"
        return b"".join(self._bytes[i] for i in self._processor.encode(probe)) == probe.encode()

    def _add(self, companions: dict[str, bytes], model: bytes) -> None:
        """Reads what a Hugging Face folder says: added tokens, special tokens in a text, BOS and EOS."""
        trees = {name: read_object(companions.get(name), self.path.parent / name) for name in COMPANIONS}
        config = trees["tokenizer_config.json"]
        self.files |= companions
        self.for_transformers = str(config.get("tokenizer_class")).startswith("LlamaTokenizer")
        added = {text: number for text, number in trees["added_tokens.json"].items() if isinstance(number, int)}
        for number, token in (config.get("added_tokens_decoder") or {}).items():
            text = content_of(token)
            if text:
                added[text] = int(number)
        for key in ("bos_token", "eos_token", "unk_token"):
            text = content_of(config.get(key)) or content_of(trees["special_tokens_map.json"].get(key))
            if text is None:
                continue
            piece = self._processor.piece_to_id(text)
            known = added.get(text, piece if self._processor.id_to_piece(piece) == text else None)
            if known is None:
                raise UserError(f"{self.path.parent}: its {key} {text!r} has no id; add it to added_tokens.json")
            added[text] = known
            if key != "unk_token":
                setattr(self, f"{key.removesuffix('_token')}_id", known)
        for text, number in added.items():
            self._bytes += [b""] * (number + 1 - len(self._bytes))
            self._bytes[number] = text.encode()
        self.vocab_size = len(self._bytes)
        self.special_in_text = not config.get("split_special_tokens")
        # As transformers' LlamaTokenizer: the beginning of a text gets the dummy prefix if it is no blank itself; with
        # `legacy`, so does what follows an added token.
        self._legacy = bool(config.get("legacy", False))
        self.hashed |= {"added_tokens": added, "legacy": self._legacy, "split": not self.special_in_text}
        self.hashed |= {"bos_id": self.bos_id, "eos_id": self.eos_id}
        self.eos_ids = eos_ids(self.eos_id, trees["generation_config.json"])
        if self.special_in_text and added:
            self._added = added
            longest_first = sorted(added, key=len, reverse=True)
            self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
            self._unprefixed = load_model(model + _NO_DUMMY_PREFIX, self.path)
        self.path = self.path.parent

    def encode_batch(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        if self._encoder is not None:
            return self._encoder.encode(texts, SEGMENT_CHARS)
        encode = self._encode_whole if self.lossless else self._encode_theirs
        # np.empty(0): np.concatenate refuses an empty list.
        arrays = [np.concatenate([np.empty(0, np.int32), *encode(text)]) for text in texts]
        ids = np.concatenate([np.empty(0, np.int32), *arrays])
        return ids, np.cumsum([len(array) for array in arrays], dtype=np.int64)

    def is_byte(self) -> np.ndarray:
        result = np.zeros(self.vocab_size, np.bool_)
        result[[i for i in self._byte_ids if self._processor.is_byte(int(i))]] = True
        return result

    def _native_encoder(self) -> _encoder.Encoder:
        scores = [self._processor.get_score(i) for i in range(self.vocab_size)]
        # The encoder ignores empty pieces: a byte token is never the result of a merge, only a fallback.
        pieces = [b"" if is_byte else piece for is_byte, piece in zip(self.is_byte(), self._bytes, strict=True)]
        return _encoder.Encoder(pieces, scores, self._byte_ids.tolist())

    def _encode_whole(self, text: bytes) -> Iterator[np.ndarray]:
        # Encoded as its three bytes, because SentencePiece would encode it as a blank.
        blank = BLANK.encode()
        for number, part in enumerate(text.split(blank)):
            if number:
                yield self._byte_ids[list(blank)]
            yield self._processor.encode(part, return_type="numpy")

    def _encode_theirs(self, text: bytes) -> Iterator[np.ndarray]:
        if not self._added:
            yield self._processor.encode(text, return_type="numpy")
            return
        # re.split gives the added tokens at the odd places.
        for number, part in enumerate(self._split.split(text.decode())):
            if number % 2:
                yield np.array([self._added[part]], np.int32)
            elif part:
                prefixed = (self._legacy or not number) and part[0] not in (" ", BLANK)
                processor = self._processor if prefixed else self._unprefixed
                yield processor.encode(part, return_type="numpy")


def eos_ids(eos_id: int, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the tokenizer's EOS and those that generation_config.json adds, without repetition."""
    more = generation.get("eos_token_id")
    more = more if isinstance(more, list) else [more]
    return tuple(dict.fromkeys([eos_id, *(number for number in more if type(number) is int)]))


def load_model(model: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    sentencepiece.SetMinLogLevel(4)  # it logs to file descriptor 2, not to sys.stderr
    if model:  # SentencePiece treats an empty model as an absent one
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError):
            pass
    raise UserError(f"{path}: is no SentencePiece model")


def piece_bytes(processor: sentencepiece.SentencePieceProcessor) -> list[bytes]:
    def raw(i: int) -> bytes:
        piece = processor.id_to_piece(i)
        if piece.startswith("<0x") and processor.is_byte(i):
            return bytes.fromhex(piece[3:-1])  # a piece such as <0x0A>
        if processor.is_control(i) or processor.is_unknown(i):
            return b""
        return piece.replace(BLANK, " ").encode()

    return [raw(i) for i in range(processor.get_piece_size())]


def _cuts_keep_ids(model: bytes, pieces: Sequence[bytes]) -> bool:
    """Whether cutting a text changes no id: true for a BPE model of plain pieces that cross no place to cut.

    Every character of a piece must be a piece too, because BPE starts from characters.
    """
    bpe, normal, user_defined, unused = 2, 1, 4, 5  # numbers of sentencepiece_model.proto
    # ModelProto: 1 pieces, 2 trainer_spec. TrainerSpec: 3 model_type. SentencePiece: 3 type, absent if it is normal.
    fields = list(_fields(model))
    spec = dict(_fields(dict(fields)[2]))
    kinds = [
        normal if _has_no_kind(value) else dict(_fields(value)).get(3, normal) for field, value in fields if field == 1
    ]
    # User-defined pieces are matched before BPE starts, and unused pieces are split again after it.
    if spec.get(3) != bpe or user_defined in kinds or unused in kinds:
        return False
    texts = [piece.decode() for piece, kind in zip(pieces, kinds, strict=True) if kind == normal]
    return {char for text in texts for char in text} <= set(texts) and all(cut(text, 0, 1) is None for text in texts)


def _has_no_kind(piece: bytes) -> bool:
    """Whether a SentencePiece has nothing but a text below 128 bytes and its score, which parsing would find slowly."""
    return piece[:1] == b"\n" and piece[1] + 7 == len(piece) and piece[1] < 128 and piece[-5] == 0x15


# Parsed here, because sentencepiece's own message classes need the package protobuf.
def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields the fields of a message in protobuf's wire format as (number, int or bytes)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        # Wire types: 0 varint, 1 eight bytes, 2 a length and that many bytes, 5 four bytes.
        field, wire = divmod(varint(), 8)
        if wire == 0:
            yield field, varint()
        else:
            size = varint() if wire == 2 else 8 if wire == 1 else 4
            yield field, message[at : at + size]
            at += size
