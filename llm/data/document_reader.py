"""Documents from files, read as a stream in bounded memory.

Reading has two steps, so that several processes can share it. `read_blocks` runs in one process and is quick: it looks
only for the places where documents end, and yields blocks of about BLOCK_BYTES. `parse` finds the documents in a block,
in any process.

A document that is longer than a block comes as several blocks, with one chunk of about CHUNK_CHARS characters in each.
Chunks end only where a cut changes no token id (`cut`), so the ids of a document are its chunks' ids, concatenated.
A whole record of a .jsonl or .parquet must be in memory before its text can be cut, so its size has a limit,
RECORD_BYTES.
"""

import codecs
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm.data.text_files import Stream, find_files, open_input, open_parquet, resolve_documents
from llm.errors import UserError

CHUNK_CHARS = 1 << 18
# Text with no other place to cut (a file without blanks, for example) is cut after this many characters, because time
# and memory of BPE grow faster than the text, and a long text need not fit in memory.
SEGMENT_CHARS = 1 << 16
BLOCK_BYTES = 1 << 20
# Limit of a line of a .jsonl or a value of a .parquet. Parsing takes several times its size in memory.
RECORD_BYTES = 256_000_000

# A match starts at the place to cut: the first blank of a run, the first character after newlines, a U+2581, or the
# character after one.
_CUT = re.compile(r"(?<=[^ ]) |(?<=\n)[^\n]|(?<=[^\u2581])\u2581|(?<=\u2581)[\s\S]")
# \A: a block may begin with empty lines. A gap includes the newline that ends the line before it.
_BETWEEN_PARAGRAPHS = re.compile(rb"(?:\A|\n)(?:\r?\n)+")
_EMPTY_LINES = (b"\n", b"\r\n")


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
    """A document that is left out."""

    reason: str  # "empty", "invalid_utf8", "too_long", "duplicate"
    where: str  # message: the file, the place in it and what is wrong


@dataclass(frozen=True)
class Place:
    """The place where a document begins."""

    file: int = 0  # index in the input files
    offset: int = 0  # position in the file's contents, in bytes; in a .parquet, in rows
    line: int = 1  # line number in a .jsonl


@dataclass(frozen=True)
class Block:
    """A part of a file that one process parses: whole documents, or one chunk of a document."""

    path: Path
    mode: str  # "line", "jsonl", "paragraph", "parquet": whole documents in that form; "chunk"
    place: Place  # where its first document begins; for a chunk, where the document of the chunk begins
    data: bytes = b""
    values: tuple[bytes | None, ...] = ()  # for a .parquet, instead of data
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


def read_documents(
    inputs: Iterable[str | os.PathLike[str]], documents: str = "auto", text_key: str = "text"
) -> Iterator[Document]:
    """Yields the documents of input files in order, without documents that hold only white space.

    Args:
        inputs: see `llm.data.text_files.find_files`.
        documents: what a document is in a text file: see `llm.data.text_files.resolve_documents`.
        text_key: the key of the text in an object of a .jsonl or a row of a .parquet.

    Raises UserError: a file that is missing, unreadable or damaged, text that is not UTF-8 (with the byte), a bad
    record.
    """
    for block in read_blocks(find_files(inputs), documents, text_key):
        texts, dropped = parse(block, text_key)
        for drop in dropped:
            if drop.reason != "empty":
                # Half a surrogate pair in a .jsonl is "invalid_utf8" too, but iconv does not help with it.
                is_bytes = "not valid UTF-8" in drop.where
                way_out = "convert it first, for example with iconv -t UTF-8" if is_bytes else "take it out"
                raise UserError(f"{drop.where}; {way_out}")
        for text in texts:
            for chunk, first, last in chunks_of(text.decode()):
                yield Document(chunk, len(chunk.encode()), block.position, first and block.first, last and block.last)


# Documents in a block.


def parse(block: Block, text_key: str = "text") -> tuple[list[bytes], list[Dropped]]:
    """Returns the documents of a block, or its chunk, as UTF-8, and the documents that are left out.

    Raises UserError: a line of a .jsonl is no object with a string under `text_key`.
    """
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
    elif block.mode == "parquet":
        # A null becomes an empty document, which `parse` counts as dropped.
        yield from _valid([value or b"" for value in block.values], block)
    elif block.mode == "paragraph":
        yield from _paragraphs(block)
    else:
        # Not splitlines(): it would cut at a lone \r too, which is part of the text.
        lines = _valid(block.data.removesuffix(b"\n").split(b"\n"), block)
        yield from lines if block.mode == "line" else _texts_of_records(lines, block, text_key)


def _paragraphs(block: Block) -> Iterator[bytes | Dropped]:
    valid = _is_utf8(block.data)
    begin = 0
    for end, after in [*(gap.span() for gap in _BETWEEN_PARAGRAPHS.finditer(block.data)), (None, 0)]:
        # Only the last text of the block can end with a newline: the other newlines belong to the gaps.
        if text := block.data[begin:end].removesuffix(b"\n"):
            yield text if valid else _checked(text, block.path, block.place.offset + begin)
        begin = after


def _texts_of_records(lines: Iterable[bytes | Dropped], block: Block, text_key: str) -> Iterator[bytes | Dropped]:
    for number, line in enumerate(lines, block.place.line):
        if isinstance(line, Dropped):
            yield line
        # json refuses a byte order mark. Only the first line of a file can begin with one.
        elif (record := line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip():
            yield _text_of(record, block.path, number, text_key)


def _valid(texts: list[bytes], block: Block) -> Iterator[bytes | Dropped]:
    """Yields the lines or rows that are UTF-8, and a Dropped for each other one."""
    # A newline cannot complete a character, so the joined text is valid exactly if all texts are.
    if _is_utf8(b"\n".join(texts)):  # faster than one by one
        yield from texts
        return
    is_row = block.mode == "parquet"
    offset = block.place.offset
    for text in texts:
        yield _checked(text, block.path, offset, is_row)
        offset += 1 if is_row else len(text) + 1  # 1 for the newline


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _checked(text: bytes, path: Path, offset: int, is_row: bool = False) -> bytes | Dropped:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        where = f"row {offset}, byte {error.start}" if is_row else f"byte {offset + error.start}"
        return _invalid(path, where, text[error.start])
    return text


def _invalid(path: Path, where: str, byte: int) -> Dropped:
    return Dropped("invalid_utf8", f"{path}: not valid UTF-8 at {where} (0x{byte:02x})")


def _too_long(where: str, size: int) -> Dropped:
    return Dropped("too_long", f"{where}: {size:,} bytes, more than the {RECORD_BYTES:,} that a record may have")


def _text_of(line: bytes, path: Path, number: int, text_key: str) -> bytes | Dropped:
    """Returns the text in a line of a .jsonl."""
    try:
        # Decoded here, because json.loads guesses the encoding of bytes, and would accept UTF-16.
        record = json.loads(line.decode())
    # Brackets that are nested too deeply raise RecursionError.
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise UserError(f"{path}:{number}: not JSON: {reason}; a .jsonl file holds one object a line") from None
    text = record.get(text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(
            f'{path}:{number}: expected an object with a string under "{text_key}" (--text_key names another key)'
        )
    try:
        # JSON can escape half a surrogate pair ("\ud800"). A str holds it, UTF-8 cannot.
        return text.encode()
    except UnicodeEncodeError as error:
        half = f"half a surrogate pair (\\u{ord(text[error.start]):04x})"
        return Dropped("invalid_utf8", f"{path}:{number}: the text holds {half}, which is no character")


# Blocks of files.


def read_blocks(
    paths: Iterable[Path], documents: str = "auto", text_key: str = "text", start: Place = Place()
) -> Iterator[Block]:
    """Splits files into blocks, in order and as a stream.

    start: the place of an earlier block that `can_start`; yields that block and all later ones.

    Raises UserError: a file is missing, unreadable or damaged; a .parquet has no column `text_key` of strings.
    """
    before = 0
    for index, path in enumerate(paths):
        if index >= start.file:
            place = start if index == start.file else Place(index)
            mode = resolve_documents(path, documents)
            if mode == "parquet":
                blocks = _read_parquet(path, text_key, place)
            else:
                blocks = _read_text(path, mode, text_key, place)
            for block in blocks:
                yield replace(block, position=before + block.position)
        # Files before `start` count too: a position refers to the whole input.
        before += path.stat().st_size


def _read_text(path: Path, mode: str, text_key: str, place: Place) -> Iterator[Block]:
    with open_input(path) as stream:
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
                # Reading that starts here could find that this document ends within the next BLOCK_BYTES, and so is
                # not long.
                long = Block(path, "chunk", place, can_start=not whole)
                if mode == "jsonl":
                    yield from _read_long_record(stream, begun, long, text_key)
                else:
                    yield from _read_long(stream, mode, begun, long)
                place = replace(place, offset=stream.offset, line=place.line + 1)


def _next_block(stream: Stream, mode: str) -> tuple[bytes, bytes]:
    """Returns whole documents of about BLOCK_BYTES, and the beginning of the next one if it is longer than that."""
    data = stream.read(BLOCK_BYTES)
    # readline has a limit, because a file may be a single line that does not fit in memory.
    last = b"" if data.endswith(b"\n") else stream.readline(BLOCK_BYTES)
    data += last
    if mode == "paragraph":
        # Reads to the end of the paragraph, but at most another BLOCK_BYTES: a longer paragraph comes in chunks.
        while data.endswith(b"\n") and len(data) < 2 * BLOCK_BYTES and not _ends_paragraph(data):
            last = stream.readline(BLOCK_BYTES)
            if not last:
                return data, b""
            data += last
        # A line that is shorter than the limit and has no newline is the last of the file.
        if (len(last) < BLOCK_BYTES and not data.endswith(b"\n")) or _ends_paragraph(data):
            return data, b""
        end = max((gap.end() for gap in _BETWEEN_PARAGRAPHS.finditer(data)), default=0)
    else:
        # readline did not reach its limit, so the last line is whole.
        if len(last) < BLOCK_BYTES or data.endswith(b"\n"):
            return data, b""
        end = data.rfind(b"\n") + 1
    return data[:end], data[end:]


def _ends_paragraph(data: bytes) -> bool:
    return data.endswith((b"\n\n", b"\n\r\n")) or data in _EMPTY_LINES


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
            if held and line in _EMPTY_LINES:
                return
            yield held + line.removesuffix(b"\n")
            held = b"\n" if line.endswith(b"\n") else b""
        line = stream.read(CHUNK_CHARS) if mode == "file" else stream.readline(CHUNK_CHARS)
        if not line:
            return


def _read_long(stream: Stream, mode: str, begun: bytes, block: Block) -> Iterator[Block]:
    """Yields blocks with the chunks of one document of a text file. block: what these blocks have in common."""
    parts = _rest_of_document(stream, mode, begun)
    decoder = codecs.getincrementaldecoder("utf-8")()  # a part may end inside a character
    text, offset = "", block.place.offset
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
            dropped = _invalid(block.path, f"byte {at}", error.object[error.start])
            yield replace(block, dropped=dropped, position=stream.position)
            return
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
    while not parts[-1].endswith(b"\n") and (part := stream.readline(BLOCK_BYTES)):
        size += len(part)
        if size > RECORD_BYTES:
            parts.clear()  # the rest of the line is read but not kept, so that memory stays bounded
        parts.append(part)
    block = replace(block, position=stream.position)
    if size > RECORD_BYTES:
        yield replace(block, dropped=_too_long(f"{block.path}:{block.place.line}", size))
        return
    line = b"".join(parts)
    del parts  # parsing needs the memory
    # Parsed as a block of one line, so that it passes the same checks as short lines.
    for text in _texts_in(replace(block, mode="jsonl", data=line), text_key):
        yield from _blocks_of_text(text, block)


def _blocks_of_text(text: bytes | Dropped, block: Block) -> Iterator[Block]:
    """Yields blocks with the chunks of a document in memory. block: what these blocks have in common."""
    if isinstance(text, Dropped):
        yield replace(block, dropped=text)
        return
    for chunk, first, last in chunks_of(text.decode()):
        can_start = block.can_start and first
        yield replace(block, data=chunk.encode(), first=first, last=last, can_start=can_start)


def _read_parquet(path: Path, text_key: str, place: Place) -> Iterator[Block]:
    # Imported here, because every worker imports this module, and workers do not need pyarrow.
    import pyarrow
    from pyarrow import types

    size = path.stat().st_size
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        if text_key not in names:
            raise UserError(f"{path}: has no column {text_key!r}, only {', '.join(names)}; name one with --text_key")
        kind = file.schema_arrow.field(text_key).type
        # A column of categories is stored as a dictionary and reads as the values.
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
            raise UserError(f"{path}: the column {text_key!r} holds {kind}, not strings; name another with --text_key")
        begin = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            # Whole row groups before the place are not read at all.
            if begin + rows <= place.offset:
                begin += rows
                continue
            for records in file.iter_batches(_rows_a_block(file, group, text_key), [group], [text_key]):
                column = records.column(0).slice(max(0, place.offset - begin))
                begin += len(records)
                # Cast to bytes, because to_pylist() raises for a string that is not UTF-8; large_, because offsets of
                # the other types have 32 bits.
                values = column.cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist()
                first_row = replace(place, offset=begin - len(values))
                # Counted in rows, because the file position shows no progress: a .parquet is not read in order.
                position = size * begin // file.metadata.num_rows
                yield from _blocks_of_rows(values, Block(path, "parquet", first_row, position=position))


def _rows_a_block(file: Any, group: int, text_key: str) -> int:
    metadata = file.metadata.row_group(group)
    columns = (metadata.column(i) for i in range(metadata.num_columns))
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_key)
    return int(min(max(1, BLOCK_BYTES * metadata.num_rows // max(1, size)), 1 << 14))


def _blocks_of_rows(values: list[bytes | None], block: Block) -> Iterator[Block]:
    """Yields the values of rows from `block.place` on: longer ones than a block in chunks, the others in groups."""
    rows = enumerate(values, block.place.offset)
    for long, group in itertools.groupby(rows, lambda row: len(row[1] or b"") > BLOCK_BYTES):
        part = list(group)
        if not long:
            place = replace(block.place, offset=part[0][0])
            yield replace(block, place=place, values=tuple(value for _, value in part))
            continue
        for row, value in part:
            assert value is not None
            if len(value) > RECORD_BYTES:
                text: bytes | Dropped = _too_long(f"{block.path}: row {row}", len(value))
            else:
                text = _checked(value, block.path, row, is_row=True)
            yield from _blocks_of_text(text, replace(block, mode="chunk", place=replace(block.place, offset=row)))
