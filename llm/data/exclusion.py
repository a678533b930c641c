"""Finds documents that share a run of words with evaluation texts, for `llm prepare_data --exclude`.

Words are letters and digits in lower case; whatever else stands between them does not count. Each run of `ngram` words
in an evaluation text is one 64-bit hash, and a document that has one of these runs is left out. The hashes are a sorted
array, with a table of their first bits: at most 16 bytes for each different run, in each process. By chance a run has a
hash of another with a probability of (number of hashes) / 2^64.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from llm.data.blocks import RECORD_BYTES
from llm.data.formats import BOM, kind_of
from llm.data.json_records import Unfinished, split_records
from llm.data.text_files import HEAD_BYTES, input_paths, open_input, open_table
from llm.errors import UserError

TASK = "task:"
"""Before the name, or the .yaml file, of a task of lm-evaluation-harness."""
_PART_BYTES = 1 << 20
_BLANK = ord(" ")
# Letters and digits of ASCII in lower case, and all bytes of other characters; everything else is a blank.
_LETTERS = bytes(byte if byte > 127 or chr(byte).isalnum() else _BLANK for byte in range(256))
_OTHER_MARKS = re.compile(r"[^\x00-\x7f\w]+")


@dataclass(frozen=True)
class Edges:
    """Hashes of the first and last words of a chunk, for the runs that go from one chunk of a document to the next."""

    first: np.ndarray  # uint64, at most ngram - 1 words
    last: np.ndarray
    words: int  # of the chunk


@dataclass(frozen=True)
class Exclusion:
    """Runs of words that no document may have."""

    ngram: int
    runs: np.ndarray  # uint64, sorted, each once

    def finds(self, words: np.ndarray) -> bool:
        """Whether a text has one of the runs. words: as `hash_words` returns."""
        found = hash_runs(words, self.ngram)
        # Few runs need the search, which reads memory at a score of places.
        found = found[self._has_prefix[found >> self._shift]]
        at = np.searchsorted(self.runs, found)
        return bool((self.runs[np.minimum(at, len(self.runs) - 1)] == found).any())

    @property
    def _shift(self) -> np.uint64:
        return np.uint64(62 - len(self.runs).bit_length())

    @cached_property
    def _has_prefix(self) -> np.ndarray:
        """Whether a run's hash begins with these bits: bool, 4 to 8 entries for each run."""
        table = np.zeros(1 << int(64 - self._shift), np.bool_)
        table[self.runs >> self._shift] = True
        return table

    def edges(self, words: np.ndarray) -> Edges:
        return Edges(words[: self.ngram - 1], words[max(0, len(words) - self.ngram + 1) :], len(words))

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result, as JSON values."""
        return {"ngram": self.ngram, "sha256": hashlib.sha256(self.runs.astype("<u8").tobytes()).hexdigest()}


def join_edges(before: np.ndarray, edges: Edges, ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the words around the beginning of a chunk, and the last words of the document up to its end.

    before: the last words of the document up to the chunk.
    """
    around = np.concatenate([before, edges.first])
    last = edges.last if edges.words >= ngram - 1 else around[max(0, len(around) - ngram + 1) :]
    return around, last


def hash_words(text: bytes) -> np.ndarray:
    """Returns a hash of each word of a text, in order: uint64 [words]. Bytes that are not UTF-8 are no letters."""
    if text.isascii():
        data = text.lower().translate(_LETTERS)
    else:
        data = _OTHER_MARKS.sub(" ", text.decode(errors="replace").lower()).encode().translate(_LETTERS)
    # In parts, because the arrays take many times the size of the text.
    parts, begin = [], 0
    while begin < len(data):
        end = data.find(b" ", begin + _PART_BYTES)
        end = end if end >= 0 else len(data)
        parts.append(_hash_words(np.frombuffer(data, np.uint8, end - begin, begin)))
        begin = end
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def _hash_words(data: np.ndarray) -> np.ndarray:
    is_letter = data != _BLANK
    places = np.flatnonzero(is_letter)
    if not len(places):
        return np.zeros(0, np.uint64)
    begins = np.flatnonzero(np.diff(places, prepend=-2) > 1)  # of words, in `places`
    lengths = np.diff(begins, append=len(places))
    inside = np.arange(len(places)) - np.repeat(begins, lengths)
    letters, factors = _random()
    # Letters behind the 256th count without their order.
    products = letters[data[places]] * factors[np.minimum(inside, len(factors) - 1)]
    return _mixed(np.add.reduceat(products, begins))


def hash_runs(words: np.ndarray, ngram: int) -> np.ndarray:
    """Returns a hash of each run of `ngram` words: uint64 [max(0, words - ngram + 1)]."""
    count = len(words) - ngram + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    _, factors = _random()
    total = np.zeros(count, np.uint64)
    for i in range(ngram):
        total += words[i : i + count] * factors[i]
    return _mixed(total)


@cache
def _random() -> tuple[np.ndarray, np.ndarray]:
    """Returns a random number for each byte and an odd one for each place; the same in every process."""
    numbers = np.frombuffer(hashlib.shake_128(b"llm exclusion").digest(4096), "<u8").astype(np.uint64)
    return numbers[:256], numbers[256:] | np.uint64(1)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): each bit of the result depends on all bits."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))


# The evaluation texts.


def read_exclusion(inputs: Sequence[str | os.PathLike[str]], ngram: int) -> tuple[Exclusion, list[str]]:
    """Reads evaluation texts. Returns their runs of words, and lines for people.

    inputs: files, folders and patterns as for `--input`, or task:NAME and task:FILE.yaml for a task of
        lm-evaluation-harness. Of JSON, .parquet, .arrow and tasks every string of a record is a text, whatever its key;
        all else is one text.

    Raises UserError for what cannot be read, and if no text has `ngram` words.
    """
    if not 1 <= ngram <= 200:
        raise UserError(f"--ngram {ngram}: is 1 to 200")
    runs: list[np.ndarray] = []
    lines = []
    for name in (os.fspath(each) for each in inputs):
        texts = short = 0
        found: list[np.ndarray] = []
        for text in _texts(name):
            words = hash_words(text)
            texts += len(words) > 0
            short += 0 < len(words) < ngram
            found.append(hash_runs(words, ngram))
        runs.append(np.unique(np.concatenate(found))) if found else None
        lines.append(
            f"{name}: {texts:,} evaluation texts, {sum(map(len, found)):,} runs of {ngram} words"
            + (f"; shorter than a run, so that they exclude nothing: {short:,}" if short else "")
        )
    exclusion = Exclusion(ngram, np.unique(np.concatenate(runs or [np.zeros(0, np.uint64)])))
    if not len(exclusion.runs):
        raise UserError(f"--exclude {' '.join(map(str, inputs))}: no text has {ngram} words; lower --ngram")
    size = exclusion.runs.nbytes + exclusion._has_prefix.nbytes
    lines.append(f"--exclude: {len(exclusion.runs):,} different runs, {size:,} bytes in each process")
    return exclusion, lines


def _texts(name: str) -> Iterator[bytes]:
    if name.startswith(TASK):
        yield from _texts_of_task(name)
        return
    for path in input_paths(name):
        yield from _texts_of_file(path)


def _texts_of_file(path: Path) -> Iterator[bytes]:
    with open_input(path) as stream:
        head = stream.peek(HEAD_BYTES).removeprefix(BOM)
        if not head:
            raise UserError(f"{path}: is empty; leave it out of --exclude")
        is_all = len(head) < HEAD_BYTES - len(BOM)
        kind = kind_of(path.name, head, is_all=is_all, text_is_wanted=False, where=str(path))
        if kind in ("json", "jsonl"):
            try:
                for _, _, record in split_records(stream.read, RECORD_BYTES):
                    yield from _strings(_parsed(record, path))
            except Unfinished as error:
                raise UserError(f"{path}: {error}; fetch or make it again") from None
        elif kind in ("parquet", "arrow"):
            with open_table(stream) as source:
                yield from _strings(_rows(source, kind))
        elif kind == "tar":
            raise UserError(f"{path}: --exclude takes no archive; unpack it first")
        else:
            # Runs from one row or document to the next are runs that no other text has.
            yield b"".join(iter(lambda: stream.read(1 << 20), b""))


def _parsed(record: bytes, path: Path) -> Any:
    try:
        return json.loads(record.removeprefix(BOM))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); correct it, evaluation texts are not left out") from None


def _rows(source: IO[bytes], kind: str) -> Iterable[Any]:
    import pyarrow.ipc
    import pyarrow.parquet

    if kind == "parquet":
        return pyarrow.parquet.read_table(source).to_pylist()
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
    return reader.read_all().to_pylist()


def _texts_of_task(name: str) -> Iterator[bytes]:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--exclude {name} needs lm-evaluation-harness ({error}): pip install 'lm-eval>=0.4.13'"
        ) from None
    task = name.removeprefix(TASK)
    try:
        # Indexing the thousands of tasks takes many seconds, which a file does not need.
        loaded = TaskManager(include_defaults=not task.endswith((".yaml", ".yml"))).load(task)["tasks"]
        for each in loaded.values():
            yield from _strings(list(each.eval_docs))
    except KeyError as error:
        raise UserError(f"--exclude {name}: no such task ({error}); `lm_eval ls tasks` lists them") from None
    except Exception as error:  # of any kind, because tasks download data and contain code of their own
        raise UserError(f"--exclude {name}: {type(error).__name__}: {error}") from None


def _strings(value: Any) -> Iterator[bytes]:
    """Yields all strings in a value, however deep."""
    if isinstance(value, str):
        yield value.encode(errors="replace")
    elif isinstance(value, bytes):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)
