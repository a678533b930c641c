"""Blocks: the parts of files that travel from the reader to the processes that parse and encode them.

A document that is longer than a block comes as several blocks, with one chunk of about CHUNK_CHARS characters in each.
Chunks end only where a cut changes no token id (`cut`), so the ids of a document are its chunks' ids, concatenated.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

CHUNK_CHARS = 1 << 18
# Text with no other place to cut (a file without blanks, for example) is cut after this many characters, because time
# and memory of BPE grow faster than the text, and a long text need not fit in memory.
SEGMENT_CHARS = 1 << 16
BLOCK_BYTES = 1 << 20
BLOCK_ROWS = 1 << 14
# Limit of a line of a .jsonl, a record of a .json, a field of a .csv and a value of a .parquet. Parsing takes several
# times its size in memory.
RECORD_BYTES = 256_000_000

# A match starts at the place to cut: the first blank of a run, the first character after newlines, a U+2581, or the
# character after one.
_CUT = re.compile(r"(?<=[^ ]) |(?<=\n)[^\n]|(?<=[^\u2581])\u2581|(?<=\u2581)[\s\S]")


@dataclass(frozen=True)
class Document:
    """A document, or one chunk of a long document; `first` and `last` tell which chunk."""

    text: str
    bytes: int  # size of the text in UTF-8
    position: int  # bytes of all input files that have been read, for the progress display
    first: bool = True
    last: bool = True


@dataclass(frozen=True)
class Dropped:
    """A document that is left out.

    reason: "empty" (only white space), "duplicate" and "excluded" are no faults. The others are faults of the input:
        "invalid_utf8", "too_long", "null" (the text of a record is null), "bad_record" (no JSON, or no text in it),
        "empty_file". Their places are shown, and `--strict` makes them errors.
    """

    reason: str
    where: str  # message: the file, the place in it and what is wrong

    @property
    def is_fault(self) -> bool:
        return self.reason not in ("empty", "duplicate", "excluded")


@dataclass(frozen=True)
class Place:
    """The place where a document begins."""

    file: int = 0  # index in the input files
    offset: int = 0  # position in the file's contents, in bytes; in a .parquet, in rows
    line: int = 1  # number of the line, row or record
    member: int = 0  # number of the file in a .tar; `offset` and `line` are in that file


START = Place()


@dataclass(frozen=True)
class Block:
    """A part of a file that one process parses: whole documents, or one chunk of a document."""

    path: Path
    # "line", "paragraph", "jsonl": `data` is whole documents in that form. "rows": `values` are texts, "records": JSON.
    # "chunk": `data` is a chunk of a document.
    # "ids": `values` are the uint32 ids of documents, or `data` those of a part of one.
    mode: str
    place: Place  # where its first document begins; for a chunk, where the document of the chunk begins
    data: bytes = b""
    values: tuple[bytes | Dropped | None, ...] = ()
    position: int = 0  # bytes of all input files that have been read
    first: bool = True  # of a chunk
    last: bool = True
    dropped: Dropped | None = None  # set instead of the last chunk if the document cannot be used
    # Whether `read_blocks`, started at `place`, yields this block and then the same blocks as it did before.
    can_start: bool = True

    @property
    def is_part(self) -> bool:
        """Whether this is one of several chunks of a document."""
        return not (self.first and self.last)


# Cutting long texts.


def cut(text: str, begin: int, size: int) -> int | None:
    """Returns the first place at or after `begin + size` where a text may be cut without changing its token ids.

    Such places are: before a run of blanks, after a run of newlines, before and after U+2581. Where SEGMENT_CHARS
    characters contain no such place, the text may also be cut after them. `begin` is 0 or such a place.
    Returns None if there is no such place before the end of `text`.
    """
    at = begin + size
    if at >= len(text):
        return None
    # search gets a start position, not a slice, because the lookbehinds need the characters before `at`.
    match = _CUT.search(text, at)
    end = match.start() if match else len(text)
    # A place shortly before `at` proves that this segment is not too long. Without one, the start of the segment has to
    # be found, which takes longer.
    near = _CUT.search(text, max(begin + 1, at - 1024), at)
    if end - (near.start() if near else begin) > SEGMENT_CHARS:
        segment = begin
        for place in _CUT.finditer(text, begin + 1, at):
            segment = place.start()
        # Rounded up to a multiple from the segment's start, so that the places depend neither on `begin` nor on `size`.
        forced = segment + -((segment - at) // SEGMENT_CHARS) * SEGMENT_CHARS
        if forced < end:
            return forced
    return end if match else None


def chunks_of(text: str) -> Iterator[tuple[str, bool, bool]]:
    """Yields the chunks of a document as (text, is first, is last). A chunk yields itself as its only chunk."""
    begin = 0
    while (end := cut(text, begin, CHUNK_CHARS)) is not None:
        yield text[begin:end], begin == 0, False
        begin = end
    yield text[begin:], begin == 0, True


# Making blocks.


def blocks_of_text(text: bytes | Dropped | None, block: Block) -> Iterator[Block]:
    """Yields blocks with the chunks of a document in memory. block: what these blocks have in common."""
    if not isinstance(text, bytes):
        yield replace(block, mode="chunk", dropped=text or Dropped("null", f"{block.path}: its text is null"))
        return
    for chunk, first, last in chunks_of(text.decode()):
        can_start = block.can_start and first
        yield replace(block, mode="chunk", data=chunk.encode(), first=first, last=last, can_start=can_start)


def blocks_of_values(values: Iterable[tuple[Place, bytes | Dropped | None]], block: Block) -> Iterator[Block]:
    """Groups values to blocks of about BLOCK_BYTES; one that is longer than that has a block for itself.

    Equal values of a column are one object, so their sizes are counted as if each were held: they are not shared any
    more once a block has gone to another process.
    """
    group: list[bytes | Dropped | None] = []
    place, size = block.place, 0
    for at, value in values:
        length = len(value) if isinstance(value, bytes) else 0
        if group and (size + length > BLOCK_BYTES or len(group) == BLOCK_ROWS):
            yield replace(block, place=place, values=tuple(group))
            group, size = [], 0
        if not group:
            place = at
        group.append(value)
        size += length
    if group:
        yield replace(block, place=place, values=tuple(group))
