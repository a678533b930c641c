"""Documents from files, read as a stream in bounded memory.

`read_blocks` is the quick part that one process can do for many: it takes files apart where documents end. `parse`
finds the documents in a block. A document longer than a block comes in pieces of about PIECE_CHARS. They are cut where
the tokenizer may cut too, so a document's ids are those of its pieces, one after the other (`cut`).
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from llm.data.json_text import TooLong, read_text
from llm.data.text_files import Stream, find_files, open_input, open_parquet, resolve_documents
from llm.errors import UserError

PIECE_CHARS = 1 << 18
# Text in which nothing may be cut for this long (a file without blanks, say) is cut here all the same: BPE's time and
# memory grow faster than the text, and a running text must not have to fit in memory.
SEGMENT_CHARS = 1 << 16
BLOCK_BYTES = 1 << 20
# A parquet's value has to be in memory whole, up to four bytes a character and more than once; of a JSON object that is
# longer than a block, all but the text.
VALUE_BYTES = 1 << 26
BESIDE_CHARS = 1 << 25

_CUT = re.compile(r"(?<=[^ ]) |(?<=\n)[^\n]|(?<=[^\u2581])\u2581|(?<=\u2581)[\s\S]")
_BETWEEN_PARAGRAPHS = re.compile(rb"(?:\A|\n)(?:\r?\n)+")
_EMPTY_LINES = (b"\n", b"\r\n")


@dataclass(frozen=True)
class Document:
    """A document, or one piece of a long one: `first` and `last` tell which."""

    text: str
    bytes: int  # of the text, in UTF-8
    source: str  # the file
    position: int  # bytes of all inputs that are read once this is, for progress
    first: bool = True
    last: bool = True


@dataclass(frozen=True)
class Dropped:
    """A document that is left out."""

    reason: str  # "empty", "invalid_utf8", "too_long", "duplicate"
    where: str  # what is wrong and in which file, for people


class _Unusable(Exception):
    """Inside of a document that is read in parts."""

    def __init__(self, dropped: Dropped) -> None:
        self.dropped = dropped


@dataclass(frozen=True)
class Place:
    """Where reading can begin, so that a run can be taken up again."""

    file: int = 0
    offset: int = 0  # in the file's contents: bytes; of a parquet, rows
    line: int = 1  # of a .jsonl
    first: bool = True  # False: inside a document


BEGINNING = Place()


@dataclass(frozen=True)
class Block:
    """A part of a file that holds whole documents, or one piece of a document."""

    path: Path
    mode: str  # "line", "jsonl", "paragraph", "parquet": documents in that form; "piece": of a document
    data: bytes
    offset: int  # of the data, as in Place
    line: int
    position: int  # bytes of all inputs that are read
    next: Place | None  # where the next block begins; None: reading cannot begin there
    values: tuple[bytes | None, ...] = ()  # of a parquet, instead of data
    first: bool = True  # of a piece
    last: bool = True
    dropped: Dropped | None = None  # the document that ends here cannot be used


def cut(text: str, begin: int, size: int) -> int | None:
    """The first place at or after `begin + size` at which a text may be cut without changing its token ids.

    Such places are: before a run of blanks, after a run of newlines, before and after U+2581, and, counted from the
    place before, after every SEGMENT_CHARS characters that have none of these. `begin` is 0 or such a place.
    None: there is none before the end of `text`.
    """
    at = begin + size
    if at >= len(text):
        return None
    match = _CUT.search(text, at)
    end = match.start() if match else len(text)
    # A place nearby proves that no segment is too long; only where there is none the segment's start is looked for.
    near = _CUT.search(text, max(begin + 1, at - 1024), at)
    if end - (near.start() if near else begin) > SEGMENT_CHARS:
        segment = begin
        for place in _CUT.finditer(text, begin + 1, at):
            segment = place.start()
        forced = segment + -((segment - at) // SEGMENT_CHARS) * SEGMENT_CHARS
        if forced < end:
            return forced
    return end if match else None


def read_documents(
    inputs: Iterable[str | os.PathLike[str]], documents: str = "auto", text_key: str = "text"
) -> Iterator[Document]:
    """Streams the documents of some inputs, in order; those with nothing but white space are left out.

    Args:
        inputs: see `llm.data.text_files.find_files`.
        documents: what a document is in a text file: see `llm.data.text_files.resolve_documents`.
        text_key: where the text is in an object of a .jsonl or a row of a .parquet.

    Raises UserError: a file that is missing, unreadable or damaged, text that is not UTF-8 (with the byte), a bad
    record.
    """
    for block in read_blocks(find_files(inputs), documents, text_key):
        texts, dropped = parse(block, text_key)
        for drop in dropped:
            if drop.reason != "empty":
                way_out = "convert it first, for example with iconv -t UTF-8" if "byte" in drop.where else "take it out"
                raise UserError(f"{drop.where}; {way_out}")
        for text in texts:
            source, position = str(block.path), block.position
            if block.mode == "piece":
                yield Document(text.decode(), len(text), source, position, block.first, block.last)
            else:
                for piece, first, last in pieces_of(text.decode()):
                    yield Document(piece, len(piece.encode()), source, position, first, last)


def pieces_of(text: str) -> Iterator[tuple[str, bool, bool]]:
    """A document's pieces, each with whether it is the first and whether the last."""
    begin = 0
    while (end := cut(text, begin, PIECE_CHARS)) is not None:
        yield text[begin:end], begin == 0, False
        begin = end
    yield text[begin:], begin == 0, True


# Documents in a block.


def parse(block: Block, text_key: str = "text") -> tuple[list[bytes], list[Dropped]]:
    """The documents in a block, or its piece, as UTF-8; and those that are left out.

    Raises UserError: a line of a .jsonl is no object with a string under `text_key`.
    """
    dropped = [] if block.dropped is None else [block.dropped]
    if block.mode == "piece":
        if block.dropped is not None:
            return [], dropped
        if block.first and block.last and _blank(block.data):
            return [], [Dropped("empty", str(block.path))]
        return [block.data], dropped
    texts = []
    for text in _PARSERS[block.mode](block, text_key):
        if isinstance(text, Dropped):
            dropped.append(text)
        elif _blank(text):
            dropped.append(Dropped("empty", str(block.path)))
        else:
            texts.append(text)
    return texts, dropped


def _blank(text: bytes) -> bool:
    # str knows more white space than bytes does; only text that begins with a byte above 127 may hold it alone.
    start = text.lstrip()
    return not start or (start[0] > 127 and start.decode().isspace())


_Parsed = Iterator[bytes | Dropped]


def _parse_lines(block: Block, text_key: str) -> _Parsed:
    return _valid(block.data.removesuffix(b"\n").split(b"\n"), block, 1)


def _parse_paragraphs(block: Block, text_key: str) -> _Parsed:
    valid = _is_utf8(block.data)
    begin = 0
    for end, after in [*(gap.span() for gap in _BETWEEN_PARAGRAPHS.finditer(block.data)), (None, 0)]:
        if text := block.data[begin:end].removesuffix(b"\n"):
            yield text if valid else _checked(text, block.path, block.offset + begin)
        begin = after


def _parse_jsonl(block: Block, text_key: str) -> _Parsed:
    lines = block.data.removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(_valid(lines, block, 1), block.line):
        if isinstance(line, Dropped):
            yield line
        elif (record := line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip():
            yield _text_of(record, block.path, number, text_key)


def _parse_rows(block: Block, text_key: str) -> _Parsed:
    return _valid([value or b"" for value in block.values], block, 0)


_PARSERS = {
    "line": _parse_lines,
    "paragraph": _parse_paragraphs,
    "jsonl": _parse_jsonl,
    "parquet": _parse_rows,
}


def _valid(texts: list[bytes], block: Block, gap: int) -> _Parsed:
    """The texts that are UTF-8, and word of the others; `gap` bytes stand between two (0: rows are counted)."""
    if _is_utf8(b"\n".join(texts)):
        yield from texts
        return
    offset = block.offset
    for text in texts:
        yield _checked(text, block.path, offset, row=gap == 0)
        offset += len(text) + gap if gap else 1


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _checked(text: bytes, path: Path, offset: int, row: bool = False) -> bytes | Dropped:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        where = f"row {offset}, byte {error.start}" if row else f"byte {offset + error.start}"
        return Dropped("invalid_utf8", f"{path}: not valid UTF-8 at {where} (0x{text[error.start]:02x})")
    return text


def _text_of(line: bytes, path: Path, number: int, text_key: str) -> bytes | Dropped:
    """The text in a line of a .jsonl."""
    try:
        record = json.loads(line.decode())
    except (json.JSONDecodeError, RecursionError) as error:
        raise _not_json(error, path, number) from None
    text = record.get(text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(
            f'{path}:{number}: expected an object with a string under "{text_key}" (--text_key names another key)'
        )
    return _encoded(text, path, number)


def _encoded(text: str, path: Path, number: int) -> bytes | Dropped:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        half = f"half a surrogate pair (\\u{ord(text[error.start]):04x})"
        return Dropped("invalid_utf8", f"{path}:{number}: the text holds {half}, which is no character")


def _not_json(error: ValueError | RecursionError, path: Path, number: int) -> UserError:
    reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
    return UserError(f"{path}:{number}: not JSON: {reason}; a .jsonl file holds one object a line")


# Blocks of files.


def read_blocks(
    paths: Iterable[Path], documents: str = "auto", text_key: str = "text", start: Place = Place()
) -> Iterator[Block]:
    """Takes files apart, in order and as a stream, from `start` on.

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
        before += path.stat().st_size


def _read_text(path: Path, mode: str, text_key: str, place: Place) -> Iterator[Block]:
    with open_input(path) as stream:
        stream.skip_to(place.offset)
        if mode == "file" or not place.first:
            yield from _read_long(stream, mode, b"", place)
        line = place.line
        while True:
            at = stream.offset
            whole, begun = _next_block(stream, mode)
            if whole:
                here, line = line, line + (whole.count(b"\n") if mode == "jsonl" else 0)
                after = Place(place.file, at + len(whole), line)
                # What comes next is taken apart in another way if reading begins there.
                yield Block(path, mode, whole, at, here, stream.position, None if begun else after)
            if begun:  # a document that is longer than a block
                after = Place(place.file, at + len(whole), line)
                if mode == "jsonl":
                    yield from _read_long_record(begun, stream, after, text_key)
                    line += 1
                else:
                    yield from _read_long(stream, mode, begun, after)
            if not whole and not begun:
                return


def _next_block(stream: Stream, mode: str) -> tuple[bytes, bytes]:
    """Whole documents of about BLOCK_BYTES; and the beginning of one that is longer, if that comes next."""
    data = stream.read(BLOCK_BYTES)
    last = b"" if data.endswith(b"\n") else stream.readline(BLOCK_BYTES)
    data += last
    if mode == "paragraph":
        while data.endswith(b"\n") and len(data) < 2 * BLOCK_BYTES and not _ends_paragraph(data):
            last = stream.readline(BLOCK_BYTES)
            if not last:
                return data, b""
            data += last
        if (len(last) < BLOCK_BYTES and not data.endswith(b"\n")) or _ends_paragraph(data):
            return data, b""
        end = max((gap.end() for gap in _BETWEEN_PARAGRAPHS.finditer(data)), default=0)
    else:
        if len(last) < BLOCK_BYTES or data.endswith(b"\n"):
            return data, b""
        end = data.rfind(b"\n") + 1
    return data[:end], data[end:]


def _ends_paragraph(data: bytes) -> bool:
    return data.endswith((b"\n\n", b"\n\r\n")) or data in _EMPTY_LINES


def _chunks(stream: Stream, mode: str, begun: bytes = b"") -> Iterator[bytes]:
    """What is left of a document in a text file, `begun` first; reads on to where the next one begins."""
    held = b""  # an end of line belongs to the document only if the document goes on behind it
    line = begun
    while True:
        if mode == "file":
            yield line
        elif mode == "line":
            yield line.removesuffix(b"\n")
            if line.endswith(b"\n"):
                return
        else:
            if held and line in _EMPTY_LINES:
                return
            yield held + line.removesuffix(b"\n")
            held = b"\n" if line.endswith(b"\n") else b""
        line = stream.read(PIECE_CHARS) if mode == "file" else stream.readline(PIECE_CHARS)
        if not line:
            return


def _decoded(chunks: Iterable[bytes], path: Path, offset: int) -> Iterator[str]:
    """UTF-8 that is cut anywhere, from `offset` of a file on. Raises _Unusable."""
    rest = b""
    for chunk in itertools.chain(chunks, [b""]):
        data = rest + chunk
        complete = len(data) - (_unfinished(data) if chunk else 0)
        piece = _checked(data[:complete], path, offset)
        if isinstance(piece, Dropped):
            raise _Unusable(piece)
        yield piece.decode()
        offset += complete
        rest = data[complete:]


def _read_long(stream: Stream, mode: str, begun: bytes, place: Place) -> Iterator[Block]:
    """One document of a text file in pieces of about PIECE_CHARS characters; `begun` is read already."""
    text, first, offset = "", place.first, place.offset
    chunks = _chunks(stream, mode, begun)

    def block(piece: bytes, last: bool, dropped: Dropped | None = None) -> Block:
        end = Place(place.file + 1) if mode == "file" else Place(place.file, stream.offset)
        after = end if last else Place(place.file, offset + len(piece), first=False)
        return Block(
            stream.path, "piece", piece, offset, 0, stream.position, after, first=first, last=last, dropped=dropped
        )

    try:
        for part in _decoded(chunks, stream.path, offset):
            text += part
            while (end := cut(text, 0, PIECE_CHARS)) is not None:
                raw, text = text[:end].encode(), text[end:]
                yield block(raw, False)
                first, offset = False, offset + len(raw)
    except _Unusable as error:
        for _ in chunks:
            pass
        yield block(b"", True, error.dropped)
        return
    if text or not first or not offset:
        yield block(text.encode(), True)


def _read_long_record(begun: bytes, stream: Stream, place: Place, text_key: str) -> Iterator[Block]:
    """A line of a .jsonl that is longer than a block: its text in pieces, as above."""
    text, first, rest = "", True, StringIO()
    block = Block(stream.path, "piece", b"", place.offset, place.line, 0, None)
    lines = _lines(begun, stream)
    dropped = None
    try:
        for part in read_text(_decoded(lines, stream.path, place.offset), text_key, rest, BESIDE_CHARS):
            if isinstance(half := _encoded(part, stream.path, place.line), Dropped):
                raise _Unusable(half)
            text += part
            while (end := cut(text, 0, PIECE_CHARS)) is not None:
                yield replace(block, data=text[:end].encode(), position=stream.position, first=first, last=False)
                first, text = False, text[end:]
    except _Unusable as error:
        dropped = error.dropped
    except TooLong:
        limit = f"more than {BESIDE_CHARS:,} characters beside the text; take them out"
        dropped = Dropped("too_long", f"{stream.path}:{place.line}: {limit}")
    except ValueError as error:
        raise _not_json(error, stream.path, place.line) from None
    for _ in lines:
        pass
    beside = rest.getvalue().removeprefix("\ufeff" if place.line == 1 else "")
    if dropped is None:
        if not beside.strip():
            return
        _text_of(beside.encode(), stream.path, place.line, text_key)
    after = Place(place.file, stream.offset, place.line + 1)
    data = b"" if dropped else text.encode()
    yield replace(block, data=data, position=stream.position, next=after, first=first, dropped=dropped)


def _lines(begun: bytes, stream: Stream) -> Iterator[bytes]:
    """What is left of a line, `begun` first."""
    for at in range(0, len(begun), PIECE_CHARS):
        yield begun[at : at + PIECE_CHARS]
    last = begun
    while last and not last.endswith(b"\n"):
        last = stream.readline(PIECE_CHARS)
        yield last


def _long_value(text: bytes | Dropped, path: Path, place: Place, position: int, after: Place) -> Iterator[Block]:
    """The pieces of a document that is in memory whole."""
    block = Block(path, "piece", b"", place.offset, place.line, position, after)
    if isinstance(text, Dropped):
        yield replace(block, dropped=text)
        return
    for piece, first, last in pieces_of(text.decode()):
        yield replace(block, data=piece.encode(), first=first, last=last, next=after if last else None)


def _read_parquet(path: Path, text_key: str, place: Place) -> Iterator[Block]:
    import pyarrow
    from pyarrow import types

    size = path.stat().st_size
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        if text_key not in names:
            raise UserError(f"{path}: has no column {text_key!r}, only {', '.join(names)}; name one with --text_key")
        kind = file.schema_arrow.field(text_key).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
            raise UserError(f"{path}: the column {text_key!r} holds {kind}, not strings; name another with --text_key")
        begin = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if begin + rows > place.offset:
                for records in file.iter_batches(_rows_a_block(file, group, text_key), [group], [text_key]):
                    skip = max(0, place.offset - begin)
                    column = records.column(0).slice(skip)
                    begin += len(records)
                    values = column.cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist()
                    position = size * begin // file.metadata.num_rows
                    yield from _blocks_of_values(values, path, Place(place.file, begin - len(values)), position)
            else:
                begin += rows


def _rows_a_block(file: Any, group: int, text_key: str) -> int:
    metadata = file.metadata.row_group(group)
    columns = (metadata.column(i) for i in range(metadata.num_columns))
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_key)
    return int(min(max(1, BLOCK_BYTES * metadata.num_rows // max(1, size)), 1 << 14))


def _blocks_of_values(values: list[bytes | None], path: Path, place: Place, position: int) -> Iterator[Block]:
    begin = 0
    for end in [i for i, value in enumerate(values) if value and len(value) > BLOCK_BYTES] + [len(values)]:
        if begin < end:
            after = replace(place, offset=place.offset + end)
            at = place.offset + begin
            yield Block(path, "parquet", b"", at, 0, position, after, values=tuple(values[begin:end]))
        if end < len(values):
            row, value = replace(place, offset=place.offset + end), values[end] or b""
            if len(value) > VALUE_BYTES:
                limit = f"{len(value):,} bytes; a value has at most {VALUE_BYTES:,}, the text of a .jsonl any number"
                text: bytes | Dropped = Dropped("too_long", f"{path}: row {row.offset}: {limit}")
            else:
                text = _checked(value, path, row.offset, row=True)
            yield from _long_value(text, path, row, position, replace(row, offset=row.offset + 1))
        begin = end + 1


def _unfinished(data: bytes) -> int:
    """How many bytes at the end begin a UTF-8 character that needs more of them than there are."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if back < length else 0
        if byte < 0x80:
            break
    return 0
