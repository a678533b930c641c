"""Loads tokenizers of every kind, and trains new ones."""

import contextlib
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
from llm.data.base_tokenizer import Tokenizer, read_object
from llm.data.blocks import SEGMENT_CHARS, Document
from llm.data.byte_level import GPT4_SPLIT
from llm.data.document_reader import Drops, read_sources
from llm.data.library_tokenizer import CARRIED, TEMPLATE, LibraryTokenizer
from llm.data.manifest import Manifest
from llm.data.sentencepiece_tokenizer import BLANK, COMPANIONS, SentencePieceTokenizer, load_model, piece_bytes
from llm.data.text_files import find_sources
from llm.data.tiktoken_ranks import SPLITS, read_ranks, tokenizer_of_ranks
from llm.display import Display
from llm.errors import UserError
from llm.locks import locked

__all__ = ["TOKENIZER_FILES", "Tokenizer", "load_tokenizer", "train_tokenizer"]

SAMPLE_BYTES = 100_000_000
SENTENCE_CHARS = 1024  # at most 4 kB of UTF-8
TOKENIZER_FILES = ("tokenizer.json", *CARRIED)
"""The files that a tokenizer may have in a folder."""
MADE_FROM = "made_from"
"""Key of tokenizer_config.json: llm/model/hf_tokenizer.py made the tokenizer.json from the file of this name."""

BYTE_LEVEL_NAMES = ("<|begin_of_text|>", "<|end_of_text|>")
"""BOS and EOS of the kind bytelevel."""

_UNKNOWN = "\u2585"  # SentencePiece's trainer replaces rare characters by it, and skips sentences that contain it
_WORD = re.compile(r" *[^ ]+| +")
_LINE = re.compile(r"[^\n]*\n+|[^\n]+")
# Cuts before a run of blanks, which no piece crosses; elsewhere only if there is no blank in reach.
_LONG_LINE = re.compile(rf".{{1,{SENTENCE_CHARS}}}(?<! )(?= )|.{{1,{SENTENCE_CHARS}}}", re.DOTALL)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads a tokenizer.

    path: a SentencePiece model; a tokenizer.json of the library tokenizers (under this name its folder says more about
        it, under another it is alone); FILE:NAME, tiktoken ranks and a key of tiktoken_ranks.SPLITS; or a folder:
        shards, a checkpoint, or a model of Hugging Face's. A folder's tokenizer.json goes before its tokenizer.model,
        unless that is one of ours.

    Raises UserError if there is none, or none that can be read.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    file, _, split = str(path).rpartition(":")
    if split in SPLITS and not path.exists():
        return tokenizer_of_ranks(Path(file), _read(Path(file)), split)
    if path.suffix == ".json":
        companions = read_files(path.parent, CARRIED) if path.name == "tokenizer.json" else {}
        return LibraryTokenizer(path, _read(path), companions)
    if path.is_file() and read_ranks(_read(path)) is not None:
        raise UserError(
            f"{path}: tiktoken ranks do not say how text is split; name it, --tok {path}:NAME, as {', '.join(SPLITS)}"
        )
    return SentencePieceTokenizer(path)


def tokenizer_of(manifest: Manifest) -> Tokenizer:
    """Loads the tokenizer of a data set. Raises UserError if it is not the one that its shards were made with."""
    tokenizer = load_tokenizer(manifest.path)
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise UserError(
            f"{tokenizer.path}: not the tokenizer that the shards were made with; run `llm prepare_data` again"
        )
    return tokenizer


def _load_folder(folder: Path) -> Tokenizer:
    model, library = folder / "tokenizer.model", folder / "tokenizer.json"
    copied = MADE_FROM in read_object(*_config(folder))
    if copied and not model.is_file():
        raise UserError(
            f"{folder}: its tokenizer.json was made from a tokenizer.model, which is missing; copy it there from the "
            "exported folder"
        )
    if copied and (folder / TEMPLATE).is_file() and _has_more(library, model):
        return LibraryTokenizer(library, _read(library), read_files(folder, CARRIED))
    if not library.is_file() or copied:
        if not model.is_file() and not copied and any((folder / name).is_file() for name in COMPANIONS):
            raise UserError(f"{folder}: has no tokenizer.json and no tokenizer.model; name a tokenizer with --tok")
        ours = SentencePieceTokenizer(model)
        if not ours.cuttable:
            return SentencePieceTokenizer(model, read_files(folder, COMPANIONS))
        ours.files |= read_files(folder, (TEMPLATE,))
        return ours
    if model.is_file():
        # A tokenizer.model may also be a list of tiktoken ranks.
        with contextlib.suppress(UserError):
            ours = SentencePieceTokenizer(model)
            if ours.cuttable:
                return ours
    return LibraryTokenizer(library, _read(library), read_files(folder, CARRIED))


def _has_more(library: Path, model: Path) -> bool:
    """Whether somebody added tokens to the copy of a model of ours. Only transformers writes TEMPLATE beside a copy."""
    known = SentencePieceTokenizer(model).vocab_size
    added = read_object(_read(library), library).get("added_tokens") or []
    return any(token["id"] >= known for token in added)


def _config(folder: Path) -> tuple[bytes | None, Path]:
    path = folder / "tokenizer_config.json"
    return (_read(path) if path.is_file() else None), path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such tokenizer; `llm train_tokenizer` makes one") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def read_files(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Returns {name: content} of those of the named files that a folder has."""
    return {name: _read(folder / name) for name in names if (folder / name).is_file()}


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
    kind: str = "sentencepiece",
    digits: int | None = None,
) -> dict[str, Any]:
    """Trains a tokenizer: writes MODEL_PREFIX.model, and MODEL_PREFIX.vocab to read (a piece and its score per line).

    The kind bytelevel is a BPE over bytes, in text that is split with the pattern of GPT-4. Its file is
    MODEL_PREFIX.json, in the format of the library tokenizers, with <|begin_of_text|> and <|end_of_text|>.

    Of the kind sentencepiece, a vocabulary holds <unk> (never used), <s>, </s>, the 256 bytes, the characters that make
    up 99.95 % of the text, and pieces that were seen at least twice. If the text supports fewer than `vocab_size`, the
    result is the largest vocabulary that it supports, with a message. The same input gives the same bytes.

    Args:
        inputs, documents, text_key: see `document_reader.read_documents`.
        strict: raise UserError for the first document that cannot be used (`blocks.Dropped`), instead of counting it.
        strict_vocab_size: raise instead of making a smaller vocabulary.
        sample_bytes: bytes of text to train on. A larger corpus is sampled evenly, with a fixed seed. Training takes
            about 12 bytes of memory per byte.
        kind: "sentencepiece" or "bytelevel".
        digits: the most digits of a token, 1 to 3; None: any number, of the kind bytelevel 3 as GPT-4.

    Returns {"vocab_size", "model", "vocab", "bytes" (of text), "sampled_bytes" (trained on), "cut_lines",
    "dropped" {reason: documents}}.
    Raises UserError for bad input, for a vocab_size that is too small (the message has the smallest possible one) or,
    with strict_vocab_size, too large; OSError.
    """
    if kind not in ("sentencepiece", "bytelevel"):
        raise UserError(f"--kind {kind}: is sentencepiece or bytelevel")
    if digits not in (None, 1, 2, 3):
        raise UserError(f"--digits {digits}: is 1, 2 or 3; leave it out for the default of the kind")
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
        # Lines are sentences of SentencePiece's trainer alone.
        lines = (line for text in texts for line in _LINE.findall(text)) if kind == "sentencepiece" else ()
        cut_lines = sum(len(line) > SENTENCE_CHARS for line in lines)
        if cut_lines:
            display.line(f"{cut_lines:,} lines are cut for training into {SENTENCE_CHARS} characters; none is skipped")
        display.line(f"training a vocabulary of {vocab_size:,} on {sampled:,} bytes")
        display.endless("training")  # the trainers do not tell how far they are
        if kind == "bytelevel":
            vocabulary, content = train_byte_level(texts, vocab_size, digits or 3)
        else:
            content = train_supported(texts, vocab_size, digits)
            vocabulary = _readable(load_model(content, Path(prefix)))
        made = len(vocabulary)
        if made < vocab_size:
            supported = (
                f"the text supports a vocabulary of {made:,} (its characters, and pieces seen at least twice), "
                f"not {vocab_size:,}"
            )
            if strict_vocab_size:
                raise UserError(f"{supported}; lower --vocab_size or leave out --strict_vocab_size")
            display.line(f"{supported}: made the largest that it supports")
        model = prefix + (".json" if kind == "bytelevel" else ".model")
        _write(prefix, model, content, vocabulary)
    return {
        "vocab_size": made,
        "model": model,
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


def _readable(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    """Returns a line for each piece, with its score."""
    # A newline inside a piece would break the format of one piece per line.
    visible = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})
    return [
        f"{processor.id_to_piece(i).translate(visible)}\t{processor.get_score(i):g}\n"
        for i in range(processor.get_piece_size())
    ]


def _write(prefix: str, path: str, content: bytes, vocabulary: Sequence[str]) -> None:
    try:
        atomic_text(f"{prefix}.vocab", "".join(vocabulary))
        # Written last: if it exists, both files are complete.
        with atomic_file(path) as file:
            file.write(content)
    except OSError as error:
        error.filename, error.filename2 = path, None  # not the temporary file
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


def training_sentences(texts: Iterable[str], digits: int | None = None) -> Iterator[str]:
    """Yields the sentences for the trainer. Each ends with a run of newlines, so that no piece can cross its end.

    The trainer strips newlines from the end of a sentence, but not if a blank follows them. The blank starts a new
    word, so it changes no piece before it.

    digits: sentences also end inside numbers, after this many digits and every as many, so that no piece has more.
    """
    long_number = re.compile(rf"\d{{{digits}}}(?=\d)") if digits else None
    for text in texts:
        for part in re.split(f"[{BLANK}{_UNKNOWN}]", text):
            for line in _LINE.findall(part):
                for sentence in _LONG_LINE.findall(line) if len(line) > SENTENCE_CHARS else (line,):
                    begin = 0
                    for number in long_number.finditer(sentence) if long_number else ():
                        yield sentence[begin : number.end()]
                        begin = number.end()
                    rest = sentence[begin:]
                    yield rest + " " if rest[-1] in "\r\n" else rest


def train_supported(texts: Sequence[str], vocab_size: int, digits: int | None = None) -> bytes:
    """Trains the vocabulary of the wanted size, or the largest one in which every merge was seen at least twice.

    BPE learns merges in order of falling frequency, so a smaller vocabulary has the first merges of a larger one. It is
    enough to find the first merge that was seen only once, and to train again up to it.
    """
    model = train_model(texts, vocab_size, digits)
    pieces = [piece.decode(errors="replace") for piece in piece_bytes(load_model(model, Path()))]
    # A byte decodes to one character or one U+FFFD, a control token to none, so only merges are longer.
    merges = [piece for piece in pieces if len(piece) > 1]
    words = (word for sentence in training_sentences(texts, digits) for word in _WORD.findall(sentence))
    if not merges or _seen_twice(merges, ((word, 1) for word in words)):
        return model
    # Counted only now, because the check above usually finds its second hit early in the text.
    words = (word for sentence in training_sentences(texts, digits) for word in _WORD.findall(sentence))
    counts = Counter(words).items()
    few, many = 0, len(merges)  # the first `few` are supported, the first `many` are not
    while many - few > 1:
        middle = (few + many) // 2
        if _seen_twice(merges[:middle], counts):
            few = middle
        else:
            many = middle
    return train_model(texts, len(pieces) - len(merges) + few, digits)


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


def train_model(texts: Sequence[str], vocab_size: int, digits: int | None = None) -> bytes:
    sentencepiece.SetMinLogLevel(4)
    least = 3 + 256 + 1
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_sentences(texts, digits),
            model_writer=model,
            model_type="bpe",
            vocab_size=max(vocab_size, least),
            # Otherwise a text that supports fewer pieces is an error; `train_supported` handles it.
            hard_vocab_limit=False,
            character_coverage=0.9995,
            required_chars=BLANK,  # if it were not in the vocabulary, a blank would be encoded as the bytes of U+2581
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


def train_byte_level(texts: Sequence[str], vocab_size: int, digits: int) -> tuple[list[str], bytes]:
    """Trains a byte-level BPE with the library's trainer. Returns a line for each token, and the tokenizer.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    least = 256 + len(BYTE_LEVEL_NAMES)
    if vocab_size < least:
        raise UserError(f"--vocab_size {vocab_size}: at least {least} (256 bytes, {' and '.join(BYTE_LEVEL_NAMES)})")
    # The library counts in threads, which the order of the merges does not depend on.
    library = Tokenizer(models.BPE())
    # For one digit the pattern of Qwen's, as other programs know it.
    pattern = Regex(GPT4_SPLIT.replace("{1,3}", "" if digits == 1 else f"{{1,{digits}}}"))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(BYTE_LEVEL_NAMES),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    bos = BYTE_LEVEL_NAMES[0]
    library.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, library.token_to_id(bos))]
    )
    ids = library.get_vocab()
    return [f"{token}\n" for token in sorted(ids, key=ids.__getitem__)], (library.to_str(pretty=False) + "\n").encode()
