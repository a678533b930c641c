"""The tokenizer: SentencePiece BPE with byte fallback. Decoding gives back every text exactly.

Two rules hold, and the tests check them:
1. `decode(encode(text)) == text` for every text.
2. A text may be cut where `blocks.cut` cuts it without changing its ids. Therefore long texts can be encoded
   in chunks and in parallel, and the encoder (csrc/encoder/) can cache words. The rule holds because no piece of the
   vocabulary crosses such a place, and BPE only makes pieces of the vocabulary.

A model made by other programs may break the second rule; then SentencePiece encodes each text as a whole.

BPE: Sennrich et al. 2016. SentencePiece: Kudo & Richardson 2018.
"""

import hashlib
import io
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from llm.atomic import atomic_file, atomic_text
from llm.data import _encoder
from llm.data.blocks import SEGMENT_CHARS, Document, cut
from llm.data.document_reader import Drops, read_sources
from llm.data.manifest import Manifest
from llm.data.text_files import find_sources
from llm.display import Display
from llm.errors import UserError
from llm.locks import locked

SAMPLE_BYTES = 100_000_000
SENTENCE_CHARS = 1024  # at most 4 kB of UTF-8

_BLANK = "\u2581"  # SentencePiece replaces a blank by it, so it cannot distinguish this character from a blank
_UNKNOWN = "\u2585"  # its trainer replaces rare characters by it, and skips sentences that contain it
_WORD = re.compile(r" *[^ ]+| +")
_LINE = re.compile(r"[^\n]*\n+|[^\n]+")
# Cuts before a run of blanks, which no piece crosses; elsewhere only if there is no blank in reach.
_LONG_LINE = re.compile(rf".{{1,{SENTENCE_CHARS}}}(?<! )(?= )|.{{1,{SENTENCE_CHARS}}}", re.DOTALL)


class Tokenizer:
    """Encodes text to token ids and decodes them, with a model file made by `train_tokenizer`.

    Raises UserError for a missing file, for one that is no SentencePiece model, and for a model that loses text.
    """

    path: Path
    model: bytes  # the contents of the model file, which others may replace while the tokenizer is in use
    sha256: str  # hash of the model file
    vocab_size: int
    bos_id: int
    eos_id: int

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.model = model = self.path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{path}: no such tokenizer; `llm train_tokenizer` makes one") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = _load(model, self.path)
        self.vocab_size = self._processor.get_piece_size()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        try:
            self._bytes = _piece_bytes(self._processor)
        except UnicodeDecodeError:
            raise UserError(f"{path}: is no SentencePiece model (a piece is not UTF-8)") from None
        self._check()
        self._byte_ids = np.array([self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)], np.int32)
        self._encoder = self._native_encoder() if _cuts_keep_ids(model, self._bytes) else None

    def _check(self) -> None:
        def refuse(reason: str) -> UserError:
            return UserError(f"{self.path}: {reason}; use a model made by `llm train_tokenizer`")

        if self.bos_id < 0 or self.eos_id < 0:
            raise refuse("has no <s> and </s>")
        if sum(map(self._processor.is_byte, range(self.vocab_size))) != 256:
            raise refuse("has no byte fallback, so it would lose characters")
        # Leading blanks, a tab, both kinds of line end, and two characters that NFKC would change.
        probe = "  a\tb\r\n\n ﬁ　"
        if b"".join(self._bytes[i] for i in self._processor.encode(probe)) != probe.encode():
            raise refuse("changes the text (normalisation or white space)")

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
        if self._encoder is not None:
            return self._encoder.encode(texts, SEGMENT_CHARS)
        # np.empty(0): np.concatenate refuses an empty list.
        arrays = [np.concatenate([np.empty(0, np.int32), *self._encode_whole(text)]) for text in texts]
        ids = np.concatenate([np.empty(0, np.int32), *arrays])
        return ids, np.cumsum([len(array) for array in arrays], dtype=np.int64)

    @property
    def cuttable(self) -> bool:
        """Whether `blocks.cut` keeps the ids of a text: true for every model made by `train_tokenizer`.

        With other models SentencePiece encodes each text as a whole, which is several times slower.
        """
        return self._encoder is not None

    def is_byte(self) -> np.ndarray:
        """Returns for each id whether it is a byte-fallback token: bool [vocab_size]."""
        result = np.zeros(self.vocab_size, np.bool_)
        result[self._byte_ids] = True
        return result

    def _native_encoder(self) -> _encoder.Encoder:
        scores = [self._processor.get_score(i) for i in range(self.vocab_size)]
        # The encoder ignores empty pieces: a byte token is never the result of a merge, only a fallback.
        pieces = [b"" if self._processor.is_byte(i) else piece for i, piece in enumerate(self._bytes)]
        return _encoder.Encoder(pieces, scores, self._byte_ids.tolist())

    def _encode_whole(self, text: bytes) -> Iterator[np.ndarray]:
        # Encoded as its three bytes, because SentencePiece would encode it as a blank.
        blank = _BLANK.encode()
        for number, part in enumerate(text.split(blank)):
            if number:
                yield self._byte_ids[list(blank)]
            yield self._processor.encode(part, return_type="numpy")

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids. BOS, EOS and the unknown token have no text; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of ids, which may begin or end inside a character."""
        # Not SentencePiece's decode, which returns a str, and a str cannot hold a part of a character.
        return b"".join([self._bytes[i] for i in ids])

    def piece_bytes(self) -> list[bytes]:
        """Returns the raw bytes of each id; empty for control tokens."""
        return list(self._bytes)

    def token_bytes(self) -> np.ndarray:
        """Returns the number of raw bytes of each id: int32 [vocab_size]; 0 for control tokens."""
        return np.array([len(piece) for piece in self._bytes], np.int32)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads the tokenizer from a model file, or from a directory that contains one (shards, a checkpoint)."""
    path = Path(path)
    return Tokenizer(path / "tokenizer.model" if path.is_dir() else path)


def tokenizer_of(manifest: Manifest) -> Tokenizer:
    """Loads the tokenizer of a data set. Raises UserError if it is not the one that its shards were made with."""
    tokenizer = load_tokenizer(manifest.path / "tokenizer.model")
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise UserError(
            f"{tokenizer.path}: not the tokenizer that the shards were made with; run `llm prepare_data` again"
        )
    return tokenizer


def _load(model: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    sentencepiece.SetMinLogLevel(4)  # it logs to file descriptor 2, not to sys.stderr
    if model:  # SentencePiece treats an empty model as an absent one
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError):
            pass
    raise UserError(f"{path}: is no SentencePiece model")


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor) -> list[bytes]:
    def raw(i: int) -> bytes:
        piece = processor.id_to_piece(i)
        if processor.is_byte(i):
            return bytes.fromhex(piece[3:-1])  # a piece such as <0x0A>
        if processor.is_control(i) or processor.is_unknown(i):
            return b""
        return piece.replace(_BLANK, " ").encode()

    return [raw(i) for i in range(processor.get_piece_size())]


def _cuts_keep_ids(model: bytes, pieces: Sequence[bytes]) -> bool:
    """Whether cutting a text changes no id: true for a BPE model of plain pieces that cross no place to cut.

    Every character of a piece must be a piece too, because BPE starts from characters.
    """
    bpe, normal, user_defined, unused = 2, 1, 4, 5  # numbers of sentencepiece_model.proto
    # ModelProto: 1 pieces, 2 trainer_spec. TrainerSpec: 3 model_type. SentencePiece: 3 type, absent if it is normal.
    spec = dict(_fields(dict(_fields(model))[2]))
    kinds = [dict(_fields(value)).get(3, normal) for field, value in _fields(model) if field == 1]
    # User-defined pieces are matched before BPE starts, and unused pieces are split again after it.
    if spec.get(3) != bpe or user_defined in kinds or unused in kinds:
        return False
    texts = [piece.decode() for piece, kind in zip(pieces, kinds, strict=True) if kind == normal]
    return {char for text in texts for char in text} <= set(texts) and all(cut(text, 0, 1) is None for text in texts)


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


def train_tokenizer(
    inputs: Sequence[str | os.PathLike[str]],
    model_prefix: str | os.PathLike[str],
    vocab_size: int,
    *,
    strict_vocab_size: bool = False,
    documents: str = "auto",
    text_key: str = "text",
    sample_bytes: int = SAMPLE_BYTES,
    strict: bool = False,
) -> dict[str, Any]:
    """Trains a tokenizer: writes MODEL_PREFIX.model, and MODEL_PREFIX.vocab to read (a piece and its score per line).

    A vocabulary holds <unk> (never used), <s>, </s>, the 256 bytes, the characters that make up 99.95 % of the text,
    and pieces that were seen at least twice. If the text supports fewer than `vocab_size`, the result is the largest
    vocabulary that it supports, with a message. The same input gives the same bytes.

    Args:
        inputs, documents, text_key: see `document_reader.read_documents`.
        strict: raise UserError for the first document that cannot be used (`blocks.Dropped`), instead of counting it.
        strict_vocab_size: raise instead of making a smaller vocabulary.
        sample_bytes: bytes of text to train on. A larger corpus is sampled evenly, with a fixed seed. Training takes
            about 12 bytes of memory per byte.

    Returns {"vocab_size", "model", "vocab", "bytes" (of text), "sampled_bytes" (trained on), "cut_lines",
    "dropped" {reason: documents}}.
    Raises UserError for bad input, for a vocab_size that is too small (the message has the smallest possible one) or,
    with strict_vocab_size, too large; OSError.
    """
    prefix = _prefix(model_prefix)
    sources = find_sources(inputs, documents, text_key)
    _check_writable(prefix)
    lock = locked(f"{prefix}.model", "another train_tokenizer is writing here")
    with lock, Display("reading", total=sources.bytes) as display:
        for line in sources.lines:
            display.line(line)
        drops = Drops(display.line, strict)
        texts, total = _sample(read_sources(sources.files, text_key, drops), sample_bytes, sources.bytes, display)
        if not texts:
            where = ", ".join(map(str, inputs))
            nothing = f"no document with text in it (dropped: {drops})"
            raise UserError(f"{where}: " + ("the sample holds no text; raise sample_bytes" if total else nothing))
        if drops.counts:
            display.line(f"dropped: {drops}")
        sampled = sum(len(text.encode()) for text in texts)
        if sampled < total:
            display.line(
                f"training on {sampled:,} of {total:,} bytes ({sampled / total:.1%}), drawn evenly over all input"
            )
        cut_lines = sum(len(line) > SENTENCE_CHARS for text in texts for line in _LINE.findall(text))
        if cut_lines:
            display.line(f"{cut_lines:,} lines are cut for training into {SENTENCE_CHARS} characters; none is skipped")
        display.line(f"training a vocabulary of {vocab_size:,} on {sampled:,} bytes")
        display.endless("training")  # SentencePiece does not tell how far it is
        model = train_supported(texts, vocab_size)
        processor = _load(model, Path(prefix))
        made = processor.get_piece_size()
        if made < vocab_size:
            supported = (
                f"the text supports a vocabulary of {made:,} (its characters, and pieces seen at least twice), "
                f"not {vocab_size:,}"
            )
            if strict_vocab_size:
                raise UserError(f"{supported}; lower --vocab_size or leave out --strict_vocab_size")
            display.line(f"{supported}: made the largest that it supports")
        _write(prefix, model, processor)
    return {
        "vocab_size": made,
        "model": f"{prefix}.model",
        "vocab": f"{prefix}.vocab",
        "bytes": total,
        "sampled_bytes": sampled,
        "cut_lines": cut_lines,
        "dropped": dict(drops.counts),
    }


def _prefix(model_prefix: str | os.PathLike[str]) -> str:
    """Returns the path without `.model`; for a folder (`tok/`) the name under which a folder's tokenizer is found."""
    prefix = os.path.expanduser(os.fspath(model_prefix))
    if not prefix:
        raise UserError("--model_prefix '': is empty; name the files to write, such as artifacts/tokenizer/llm_spm")
    return os.path.join(prefix, "tokenizer") if prefix.endswith(os.sep) else prefix.removesuffix(".model")


def _check_writable(prefix: str) -> None:
    """Raises UserError before, not after, minutes of training."""
    folder = Path(f"{prefix}.model").parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: no permission to write here")


def _write(prefix: str, model: bytes, processor: sentencepiece.SentencePieceProcessor) -> None:
    # A newline inside a piece would break the format of one piece per line.
    visible = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})
    vocabulary = "".join(
        f"{processor.id_to_piece(i).translate(visible)}\t{processor.get_score(i):g}\n"
        for i in range(processor.get_piece_size())
    )
    try:
        atomic_text(f"{prefix}.vocab", vocabulary)
        # Written last: if it exists, both files are complete.
        with atomic_file(f"{prefix}.model") as file:
            file.write(model)
    except OSError as error:
        error.filename, error.filename2 = f"{prefix}.model", None  # not the temporary file
        raise


def _sample(chunks: Iterable[Document], sample_bytes: int, size: int, display: Display) -> tuple[list[str], int]:
    """Samples the documents (for long documents, the chunks) with equal probability. Returns the sample and all bytes.

    size: bytes of the files. Compressed files contain more text than that, so whenever the sample reaches twice the
        wanted size, half of it is dropped.
    """
    chance = random.Random(0)
    share = min(1.0, sample_bytes / size)
    texts: list[tuple[float, str]] = []
    total = sampled = 0
    for chunk in chunks:
        total += chunk.bytes
        drawn = chance.random()
        if drawn < share:
            # The random number is kept: halving the sample gives the sample of half the share.
            texts.append((drawn, chunk.text))
            sampled += chunk.bytes
        # The last text stays, because a sample of one long chunk is better than none.
        while sampled > 2 * sample_bytes and len(texts) > 1:
            share /= 2
            texts = [(number, text) for number, text in texts if number < share]
            sampled = sum(len(text.encode()) for _, text in texts)
        display.update(chunk.position, "reading")
    return [text for _, text in texts], total


def training_sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yields the sentences for the trainer. Each ends with a run of newlines, so that no piece can cross its end.

    The trainer strips newlines from the end of a sentence, but not if a blank follows them. The blank starts a new
    word, so it changes no piece before it.
    """
    for text in texts:
        for part in re.split(f"[{_BLANK}{_UNKNOWN}]", text):
            for line in _LINE.findall(part):
                for sentence in _LONG_LINE.findall(line) if len(line) > SENTENCE_CHARS else (line,):
                    yield sentence + " " if sentence[-1] in "\r\n" else sentence


def train_supported(texts: Sequence[str], vocab_size: int) -> bytes:
    """Trains the vocabulary of the wanted size, or the largest one in which every merge was seen at least twice.

    BPE learns merges in order of falling frequency, so a smaller vocabulary has the first merges of a larger one. It is
    enough to find the first merge that was seen only once, and to train again up to it.
    """
    model = train_model(texts, vocab_size)
    pieces = [piece.decode(errors="replace") for piece in _piece_bytes(_load(model, Path()))]
    # A byte decodes to one character or one U+FFFD, a control token to none, so only merges are longer.
    merges = [piece for piece in pieces if len(piece) > 1]
    words = (word for sentence in training_sentences(texts) for word in _WORD.findall(sentence))
    if not merges or _seen_twice(merges, ((word, 1) for word in words)):
        return model
    # Counted only now, because the check above usually finds its second hit early in the text.
    words = (word for sentence in training_sentences(texts) for word in _WORD.findall(sentence))
    counts = Counter(words).items()
    few, many = 0, len(merges)  # the first `few` are supported, the first `many` are not
    while many - few > 1:
        middle = (few + many) // 2
        if _seen_twice(merges[:middle], counts):
            few = middle
        else:
            many = middle
    return train_model(texts, len(pieces) - len(merges) + few)


def _seen_twice(merges: Sequence[str], words: Iterable[tuple[str, int]]) -> bool:
    """Whether the last merge was made at least twice. No later merge absorbs it, so the merged words show it."""
    last = merges[-1]
    characters = sorted({char for merge in merges for char in merge})
    pieces = [piece.encode() for piece in (*merges, *characters)]
    # The encoder makes the merge with the highest score first; other characters become bytes, whose ids come last.
    scores = [-float(rank) for rank in range(len(pieces))]
    byte_ids = range(len(pieces), len(pieces) + 256)
    encoder = _encoder.Encoder(pieces + [b""] * 256, scores + [0.0] * 256, list(byte_ids))
    candidates = ((word.encode(), count) for word, count in words if last in word)
    seen = 0
    while batch := list(islice(candidates, 64)):  # few, because the first ones usually decide
        ids, ends = encoder.encode([word for word, _ in batch], SEGMENT_CHARS)
        made = np.diff(np.cumsum(ids == len(merges) - 1)[ends - 1], prepend=0)
        seen += int(made @ np.array([count for _, count in batch]))
        if seen > 1:
            return True
    return False


def train_model(texts: Sequence[str], vocab_size: int) -> bytes:
    sentencepiece.SetMinLogLevel(4)
    least = 3 + 256 + 1
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=max(vocab_size, least),
            # Otherwise a text that supports fewer pieces is an error; `train_supported` handles it.
            hard_vocab_limit=False,
            character_coverage=0.9995,
            required_chars=_BLANK,  # if it were not in the vocabulary, a blank would be encoded as the bytes of U+2581
            byte_fallback=True,
            # These three keep the text unchanged; the defaults change characters, join blanks and insert one in front.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            # For runs of blanks, such as the indentation of source code.
            allow_whitespace_only_pieces=True,
            # The trainer skips longer sentences; `training_sentences` makes none.
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=4,
        )
    except RuntimeError as error:
        found = re.search(r"smaller than required_chars\D*\d+ vs (\d+)", str(error))
        if not found:
            raise
        least = int(found[1])
    if vocab_size < least:
        raise UserError(
            f"--vocab_size {vocab_size}: this text needs at least {least:,} (256 bytes, <unk>, <s>, </s>, and its "
            f"{least - 259:,} characters)"
        )
    return model.getvalue()
