"""Documents from files, read as a stream in bounded memory.

Reading has two steps, so that several processes can share it. `read_blocks` runs in one process and is quick: it looks
only for the places where documents end, and yields blocks of about BLOCK_BYTES. `parse` finds the documents in a block,
in any process.

A whole record of a .jsonl or .parquet must be in memory before its text can be cut, so its size has a limit,
RECORD_BYTES. Documents that cannot be used are left out and counted, with the same rule in every command (`Drops`).
"""

import codecs
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llm.data import blocks
from llm.data.blocks import START, Block, Document, Dropped, Place, blocks_of_text, chunks_of
from llm.data.formats import BOM
from llm.data.records import checked_utf8, read_arrow, read_csv, read_parquet, read_records, text_of, too_long
from llm.data.text_files import EMPTY_LINE_BYTES, EMPTY_LINES, Source, Stream, find_sources, open_input, read_members
from llm.errors import UserError

# \A: a block may begin with empty lines. A gap includes the newline that ends the line before it.
_BETWEEN_PARAGRAPHS = re.compile(rb"(?:\A|\n)" + EMPTY_LINES + rb"+")
_EMPTY_LINE = re.compile(EMPTY_LINES)
SHOWN_DROPS = 20


@dataclass
class Drops:
    """Counts the documents that are left out, and shows where the first ones with a fault are.

    say: shows a line to people.
    strict: raise UserError for the first fault.
    """

    say: Callable[[str], object] = lambda line: print(line, file=sys.stderr)
    strict: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)  # of the first faults

    def add(self, dropped: Dropped) -> None:
        self.counts[dropped.reason] += 1
        if not dropped.is_fault:
            return
        if self.strict:
            raise UserError(f"{dropped.where}; without --strict it is left out and counted")
        if len(self.places) < SHOWN_DROPS:
            self.places.append(dropped.where)
            self.say(f"dropped: {dropped.where}")

    def __str__(self) -> str:
        return describe_drops(self.counts, self.places)


def describe_drops(counts: dict[str, int], places: Sequence[str] = ()) -> str:
    """Returns the numbers of documents that were left out, by reason, and the first place."""
    numbers = ", ".join(f"{number:,} {reason}" for reason, number in sorted(counts.items())) or "none"
    return f"{numbers}; {places[0]}" if places else numbers


def read_documents(
    inputs: Iterable[str | os.PathLike[str]],
    documents: str = "auto",
    text_key: str = "text",
    drops: Drops | None = None,
) -> Iterator[Document]:
    """Returns the documents of input files in order, without those that hold only white space or cannot be used.

    Args:
        inputs, documents: see `llm.data.text_files.find_sources`.
        text_key: the key of the text in an object of a .jsonl or a row of a table; `a.b` for b in the object a.
        drops: counts what is left out; None: it is shown on stderr.

    Raises UserError: a file that is missing, unreadable or damaged; with `drops.strict` also for a document that cannot
    be used.
    """
    return read_sources(find_sources(inputs, documents, text_key).files, text_key, drops or Drops())


def read_sources(sources: Sequence[Source], text_key: str, drops: Drops) -> Iterator[Document]:
    """Yields the documents of files that were found before. See `read_documents`."""
    for block in read_blocks(sources, text_key):
        texts, dropped = parse(block, text_key)
        for drop in dropped:
            drops.add(drop)
        for text in texts:
            for chunk, first, last in chunks_of(text.decode()):
                yield Document(chunk, len(chunk.encode()), block.position, first and block.first, last and block.last)


# Documents in a block.


def parse(block: Block, text_key: str = "text") -> tuple[list[bytes], list[Dropped]]:
    """Returns the documents of a block, or its chunk, as UTF-8, and the documents that are left out."""
    texts, dropped = [], []
    for text in _texts_in(block, text_key):
        if isinstance(text, Dropped):
            dropped.append(text)
        # A chunk of white space is part of a document that holds other text.
        elif _is_blank(text) and not block.is_part:
            dropped.append(Dropped("empty", str(block.path)))
        else:
            texts.append(text)
    return texts, dropped


def _is_blank(text: bytes) -> bool:
    # str.isspace knows more white space than bytes.isspace; such characters begin with a byte above 127.
    start = text.lstrip()
    return not start or (start[0] > 127 and start.decode().isspace())


def _texts_in(block: Block, text_key: str) -> Iterator[bytes | Dropped]:
    if block.mode == "chunk":
        yield block.dropped or block.data
    elif block.mode == "rows":
        yield from _rows(block)
    elif block.mode == "records":
        file = f"{block.path}: record "
        for number, record in enumerate(block.values, block.place.line):
            assert isinstance(record, bytes)
            yield text_of(record, file, number, text_key)
    elif block.mode == "paragraph":
        yield from _paragraphs(block)
    else:
        # Not splitlines(): it would cut at a lone \r too, which is part of the text.
        lines = _valid(block.data.removesuffix(b"\n").split(b"\n"), block)
        yield from lines if block.mode == "line" else _texts_of_records(lines, block, text_key)


def _rows(block: Block) -> Iterator[bytes | Dropped]:
    valid = _is_utf8(b"\n".join([value for value in block.values if isinstance(value, bytes)]))
    for row, value in enumerate(block.values, block.place.offset):
        if value is None:
            yield Dropped("null", f"{block.path}: row {row}: the text is null")
        else:
            yield value if valid or isinstance(value, Dropped) else checked_utf8(value, f"{block.path}: row {row}")


def _paragraphs(block: Block) -> Iterator[bytes | Dropped]:
    valid = _is_utf8(block.data)
    begin = 0
    for end, after in [*(gap.span() for gap in _BETWEEN_PARAGRAPHS.finditer(block.data)), (None, 0)]:
        # Only the last text of the block can end with a newline: the other newlines belong to the gaps.
        if text := block.data[begin:end].removesuffix(b"\n"):
            yield text.removeprefix(BOM) if valid else _checked(text, block.path, block.place.offset + begin)
        begin = after


def _texts_of_records(lines: Iterable[bytes | Dropped], block: Block, text_key: str) -> Iterator[bytes | Dropped]:
    file = f"{block.path}:"
    for number, line in enumerate(lines, block.place.line):
        if isinstance(line, Dropped):
            yield line
        elif line.strip():
            yield text_of(line, file, number, text_key)


def _valid(lines: list[bytes], block: Block) -> Iterator[bytes | Dropped]:
    """Yields the lines that are UTF-8, without byte order marks, and a Dropped for each other one."""
    # Files that begin with a mark may have been joined, so any line can begin with one.
    # A newline cannot complete a character, so the whole data is valid exactly if all lines are.
    if _is_utf8(block.data):  # faster than one by one
        yield from lines if BOM not in block.data else (line.removeprefix(BOM) for line in lines)
        return
    offset = block.place.offset
    for line in lines:
        yield _checked(line, block.path, offset)
        offset += len(line) + 1  # 1 for the newline


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _checked(text: bytes, path: Path, offset: int) -> bytes | Dropped:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return _invalid(path, offset + error.start, text[error.start])
    return text.removeprefix(BOM)


def _invalid(path: Path, offset: int, byte: int) -> Dropped:
    return Dropped("invalid_utf8", f"{path}: not valid UTF-8 at byte {offset} (0x{byte:02x})")


# Blocks of files.


def read_blocks(
    sources: Iterable[Source], text_key: str = "text", start: Place = START, *, skip_repeats: bool = False
) -> Iterator[Block]:
    """Splits files into blocks, in order and as a stream.

    start: the place of an earlier block that `can_start`; yields that block and all later ones.
    skip_repeats: drop a long value of a .parquet that equals the one before it. A dictionary stores such values once,
        so a small file may repeat a text for gigabytes.

    Raises UserError: a file is missing, unreadable or damaged; a table has no column `text_key` of text.
    """
    before = 0
    for index, source in enumerate(sources):
        size = source.path.stat().st_size
        if index >= start.file:
            place = start if index == start.file else Place(index)
            for block in _read_file(source, text_key, place, size, skip_repeats):
                yield replace(block, position=before + block.position)
        # Files before `start` count too: a position refers to the whole input.
        before += size


def _read_file(source: Source, text_key: str, place: Place, size: int, skip_repeats: bool) -> Iterator[Block]:
    with open_input(source.path) as stream:
        if source.mode != "tar":
            yield from _read_stream(stream, source.mode, text_key, place, size, skip_repeats)
            return
        # strict: find_sources has read all of it, and it has not changed.
        for number, (member, mode) in enumerate(zip(read_members(source.path, stream), source.members, strict=True)):
            if mode and number >= place.member:
                begin = place if number == place.member else Place(place.file, member=number)
                yield from _read_stream(member, mode, text_key, begin, 0, skip_repeats)


def _read_stream(
    stream: Stream, mode: str, text_key: str, place: Place, size: int, skip_repeats: bool
) -> Iterator[Block]:
    """size: bytes of the file on disk, for the progress display; 0 for one in a .tar."""
    if mode == "parquet":
        yield from read_parquet(stream, text_key, place, size, skip_repeats)
    elif mode == "arrow":
        yield from read_arrow(stream, text_key, place, size)
    elif mode == "csv":
        yield from read_csv(stream, text_key, place)
    elif mode == "json":
        yield from read_records(stream, text_key, place)
    elif mode == "empty":
        yield Block(stream.path, "chunk", place, dropped=Dropped("empty_file", f"{stream.path}: is empty"))
    else:
        yield from _read_text(stream, mode, text_key, place)


def _read_text(stream: Stream, mode: str, text_key: str, place: Place) -> Iterator[Block]:
    path = stream.path
    stream.skip_to(place.offset)
    if mode == "file":
        yield from _read_long(stream, mode, b"", Block(path, "chunk", place))
        return
    while True:
        whole, begun = _next_block(stream, mode)
        if not whole and not begun:
            return
        if whole:
            yield Block(path, mode, place, whole, position=stream.position)
            lines = whole.count(b"\n") if mode == "jsonl" else 0
            place = replace(place, offset=place.offset + len(whole), line=place.line + lines)
        if begun:  # a document that is longer than a block
            # Reading that starts here could find that this document ends within the next blocks.BLOCK_BYTES, and so is
            # not long.
            long = Block(path, "chunk", place, can_start=not whole)
            if mode == "jsonl":
                yield from _read_long_record(stream, begun, long, text_key)
            else:
                yield from _read_long(stream, mode, begun, long)
            place = replace(place, offset=stream.offset, line=place.line + 1)


def _next_block(stream: Stream, mode: str) -> tuple[bytes, bytes]:
    """Returns whole documents of about BLOCK_BYTES, and the beginning of the next one if it is longer than that."""
    # A line has a limit, because a file may be a single line that does not fit in memory.
    limit = max(blocks.BLOCK_BYTES, EMPTY_LINE_BYTES) if mode == "paragraph" else blocks.BLOCK_BYTES
    data = stream.read(blocks.BLOCK_BYTES)
    last = b"" if data.endswith(b"\n") else stream.readline(limit)
    data += last
    if mode == "paragraph":
        # Reads to the end of the paragraph, but at most another BLOCK_BYTES: a longer paragraph comes in chunks.
        while data.endswith(b"\n") and len(data) < 2 * blocks.BLOCK_BYTES and not _ends_paragraph(data):
            last = stream.readline(limit)
            if not last:
                return data, b""
            data += last
        # A line that is shorter than the limit and has no newline is the last of the file.
        if (len(last) < limit and not data.endswith(b"\n")) or _ends_paragraph(data):
            return data, b""
        end = max((gap.end() for gap in _BETWEEN_PARAGRAPHS.finditer(data)), default=0)
    else:
        # readline did not reach its limit, so the last line is whole.
        if len(last) < limit or data.endswith(b"\n"):
            return data, b""
        end = data.rfind(b"\n") + 1
    return data[:end], data[end:]


def _ends_paragraph(data: bytes) -> bool:
    return data.endswith(b"\n") and _is_empty_line(data[data.rfind(b"\n", 0, -1) + 1 :])


def _is_empty_line(line: bytes) -> bool:
    return _EMPTY_LINE.fullmatch(line) is not None


def _rest_of_document(stream: Stream, mode: str, begun: bytes) -> Iterator[bytes]:
    """Yields the document that starts with `begun`, in parts; leaves the stream where the next document begins."""
    held = b""  # an end of line belongs to the document only if another line of it follows
    line = begun
    while True:
        if mode == "file":
            yield line
        elif mode == "line":
            yield line.removesuffix(b"\n")
            if line.endswith(b"\n"):
                return
        else:
            # Without `held`, this is the rest of a line that readline's limit cut just before the newline.
            if held and _is_empty_line(line):
                return
            yield held + line.removesuffix(b"\n")
            held = b"\n" if line.endswith(b"\n") else b""
        if mode == "file":
            line = stream.read(blocks.CHUNK_CHARS)
        else:
            # Where a line begins, at least as much as an empty line may hold.
            line = stream.readline(max(blocks.CHUNK_CHARS, EMPTY_LINE_BYTES if held else 0))
        if not line:
            return


def _read_long(stream: Stream, mode: str, begun: bytes, block: Block) -> Iterator[Block]:
    """Yields blocks with the chunks of one document of a text file. block: what these blocks have in common."""
    parts = _rest_of_document(stream, mode, begun)
    decoder = codecs.getincrementaldecoder("utf-8")()  # a part may end inside a character
    text, offset, is_start = "", block.place.offset, True
    # The empty part at the end makes the decoder report a character that the file cuts short.
    for part in itertools.chain(parts, [b""]):
        offset += len(part)
        try:
            decoded = decoder.decode(part, final=not part)
        except UnicodeDecodeError as error:
            for _ in parts:  # reading goes on after the document
                pass
            # error.object is this part, preceded by the bytes that the decoder had kept from the last part.
            at = offset - len(error.object) + error.start
            dropped = _invalid(block.path, at, error.object[error.start])
            yield replace(block, dropped=dropped, position=stream.position)
            return
        if is_start and decoded:
            decoded, is_start = decoded.removeprefix("\ufeff"), False
        # The last chunk is kept, because the next part may make it longer.
        *chunks, (text, _, _) = chunks_of(text + decoded)
        for chunk, _, _ in chunks:
            yield replace(block, data=chunk.encode(), position=stream.position, last=False)
            block = replace(block, first=False, can_start=False)
    if text or not block.first or mode == "file":  # an empty file is an empty document
        yield replace(block, data=text.encode(), position=stream.position)


def _read_long_record(stream: Stream, begun: bytes, block: Block, text_key: str) -> Iterator[Block]:
    """Yields blocks with the chunks of the text in a line of a .jsonl that is longer than a block."""
    parts, size = [begun], len(begun)
    while not parts[-1].endswith(b"\n") and (part := stream.readline(blocks.BLOCK_BYTES)):
        size += len(part)
        if size > blocks.RECORD_BYTES:
            parts.clear()  # the rest of the line is read but not kept, so that memory stays bounded
        parts.append(part)
    block = replace(block, position=stream.position)
    if size > blocks.RECORD_BYTES:
        yield replace(block, dropped=too_long(f"{block.path}:{block.place.line}", size))
        return
    line = b"".join(parts)
    del parts  # parsing needs the memory
    # Parsed as a block of one line, so that it passes the same checks as short lines.
    for text in _texts_in(replace(block, mode="jsonl", data=line), text_key):
        yield from blocks_of_text(text, block)
