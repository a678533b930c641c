"""Records: the documents of .jsonl, .json, .csv, .parquet and .arrow files."""

import csv
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from llm.data import blocks
from llm.data.blocks import Block, Dropped, Place, blocks_of_text, blocks_of_values
from llm.data.formats import BOM, MISSING, csv_header, lookup, suffix_of
from llm.data.json_records import Unfinished, split_records
from llm.data.parquet_footer import RowGroup, read_footer
from llm.data.text_files import Stream, open_table
from llm.errors import UserError

BATCH_BYTES = 1 << 27  # of a .parquet, decoded at a time
REPEATED_BYTES = 1 << 14


def text_of(record: bytes, file: str, number: int, text_key: str) -> bytes | Dropped:
    """Returns the text in a record of JSON. file: with `number`, the place of the record in messages."""
    try:
        # Decoded here, because json.loads guesses the encoding of bytes, and would accept UTF-16.
        value = _parsed(record.decode(), text_key)
    except UnicodeDecodeError as error:
        return Dropped("invalid_utf8", f"{file}{number}: not valid UTF-8 (0x{record[error.start]:02x})")
    # Brackets that are nested too deeply raise RecursionError.
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
        return Dropped("bad_record", f"{file}{number}: not JSON: {reason}")
    text = lookup(value, text_key)
    if text is None:
        return Dropped("null", f'{file}{number}: the text under "{text_key}" is null')
    if not isinstance(text, str):
        other = " (--text_key names another key)" if text is MISSING else ""
        return Dropped("bad_record", f'{file}{number}: expected an object with a string under "{text_key}"{other}')
    try:
        # JSON can escape half a surrogate pair ("\ud800"). A str holds it, UTF-8 cannot.
        return text.encode()
    except UnicodeEncodeError as error:
        half = f"half a surrogate pair (\\u{ord(text[error.start]):04x})"
        return Dropped("invalid_utf8", f"{file}{number}: the text holds {half}, which is no character")


def _parsed(record: str, text_key: str) -> Any:
    name = text_key.rpartition(".")[2]
    # json takes the last of equal keys without a word. Looked for only where the key's name occurs twice.
    hook = _object_of_one if record.count(f'"{name}"') > 1 else None
    try:
        return json.loads(record, object_pairs_hook=hook)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        if hook and str(error).startswith(_TWICE):
            raise
        # Python refuses integers of thousands of digits. No text depends on them.
        return json.loads(record, object_pairs_hook=hook, parse_int=lambda digits: 0)


_TWICE = "two values under one key"


def _object_of_one(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{_TWICE}, {next(key for key in keys if keys.count(key) > 1)!r}")
    return record


def read_records(stream: Stream, text_key: str, place: Place) -> Iterator[Block]:
    """Yields blocks of the records of a .json that is no JSON lines. Raises UserError if it ends inside a record."""
    start = stream.peek(16)
    mark = len(BOM) if start.startswith(BOM) else 0
    # A file begins with an array or an object; a record that is an element begins behind the bracket.
    in_array = place.offset > 0 and start[mark:].lstrip()[:1] == b"["
    stream.skip_to(place.offset or mark)
    begun = stream.offset
    number = place.line

    def numbered() -> Iterator[tuple[Place, bytes]]:
        nonlocal number
        found = split_records(
            stream.read, blocks.RECORD_BYTES, offset=begun, in_array=in_array, size=blocks.BLOCK_BYTES
        )
        try:
            for offset, _, record in found:
                yield replace(place, offset=offset, line=number), record
                number += 1
        except Unfinished as error:
            raise UserError(f"{stream.path}: {error} (record {number:,}); fetch or make it again") from None

    yield from _blocks_of_records(numbered(), stream, text_key)


def _blocks_of_records(records: Iterator[tuple[Place, bytes]], stream: Stream, text_key: str) -> Iterator[Block]:
    """Yields small records in blocks, which other processes parse; parses long ones here, and yields their chunks."""
    groups = itertools.groupby(records, lambda record: len(record[1]) > blocks.BLOCK_BYTES)
    for is_long, group in groups:
        if not is_long:
            for block in blocks_of_values(group, Block(stream.path, "records", Place())):
                yield replace(block, position=stream.position)
            continue
        for place, record in group:
            text = text_of(record, f"{stream.path}: record ", place.line, text_key)
            yield from blocks_of_text(text, Block(stream.path, "chunk", place, position=stream.position))


def read_csv(stream: Stream, text_key: str, place: Place) -> Iterator[Block]:
    """Yields blocks of the rows of a .csv or .tsv. Raises UserError if a quote is never closed."""
    limit = csv.field_size_limit(blocks.RECORD_BYTES)
    try:
        header = stream.readline(blocks.RECORD_BYTES)
        columns, delimiter = csv_header(header, text_key, suffix_of(stream.path))
        if columns.count(text_key) != 1:
            found = "twice" if text_key in columns else f"only {', '.join(columns)}"
            raise UserError(f"{stream.path}: has the column {text_key!r} {found}; name one with --text_key")
        first = place if place.offset else replace(place, offset=stream.offset, line=2)
        stream.skip_to(first.offset)
        rows = _rows(stream, delimiter, columns, columns.index(text_key), first)
        for is_long, group in itertools.groupby(rows, lambda row: _size(row[1]) > blocks.BLOCK_BYTES):
            if is_long:
                for at, value in group:
                    yield from blocks_of_text(value, Block(stream.path, "chunk", at, position=stream.position))
            else:
                for block in blocks_of_values(group, Block(stream.path, "rows", Place())):
                    yield replace(block, position=stream.position)
    finally:
        csv.field_size_limit(limit)


def _size(value: bytes | Dropped | None) -> int:
    return len(value) if isinstance(value, bytes) else 0


def _rows(
    stream: Stream, delimiter: str, columns: list[str], column: int, place: Place
) -> Iterator[tuple[Place, bytes | Dropped]]:
    # What is not UTF-8 passes as surrogates, and is dropped with its row.
    lines = (
        line.decode("utf-8", "surrogateescape") for line in iter(lambda: stream.readline(blocks.RECORD_BYTES), b"")
    )
    # strict: what follows a closing quote is an error, not text.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    line = place.line
    while True:
        at = replace(place, offset=stream.offset, line=line + reader.line_num)
        where = f"{stream.path}:{at.line}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            if "unexpected end of data" in str(error) or "field limit" in str(error):
                raise UserError(
                    f"{where}: a quote is never closed, or a field has more than {blocks.RECORD_BYTES:,} bytes; "
                    "correct it, or save the table as .jsonl or .parquet"
                ) from None
            yield at, Dropped("bad_record", f"{where}: {error}")
            continue
        if row is None:
            return
        if not row:  # an empty line
            continue
        if len(row) != len(columns):
            yield at, Dropped("bad_record", f"{where}: {len(row)} fields, the header has {len(columns)}")
            continue
        text = row[column].encode("utf-8", "surrogateescape")
        yield at, checked_utf8(text, where)


def checked_utf8(text: bytes, where: str) -> bytes | Dropped:
    """Returns the text, or what is wrong with it. where: the file and place of the text."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return Dropped("invalid_utf8", f"{where}: not valid UTF-8 at byte {error.start} (0x{text[error.start]:02x})")
    return text


def read_parquet(stream: Stream, text_key: str, place: Place, size: int, skip_repeats: bool = False) -> Iterator[Block]:
    """Yields blocks of the rows of a .parquet. size: bytes of the file, for the progress display."""
    # Imported here, because every worker imports this module, and workers do not need pyarrow.
    import pyarrow.parquet

    with open_table(stream) as source:
        groups = read_footer(source, text_key)
        # Small buffers, because a row group may be larger than memory.
        file = pyarrow.parquet.ParquetFile(source, buffer_size=blocks.BLOCK_BYTES, pre_buffer=False)
        column = _column_of(file.schema_arrow, stream.path, text_key)
        if groups is None or len(groups) != file.num_row_groups:
            raise UserError(f"{stream.path}: is damaged (its footer cannot be read); fetch or make it again")
        begin = 0
        for number, group in enumerate(groups):
            # Whole row groups before the place are not read at all.
            if begin + group.rows <= place.offset:
                begin += group.rows
                continue
            for records in file.iter_batches(_rows_a_batch(group, source), [number], [text_key]):
                values = _field_of(records.column(0), column, text_key)
                skipped = max(0, place.offset - begin)
                texts: Iterable[bytes | Dropped | None] = _values(values.slice(skipped))
                if skip_repeats:
                    texts = _without_repeats(texts, stream.path)
                first = begin + skipped
                begin += len(records)
                # Counted in rows, because the file position shows no progress: a .parquet is not read in order.
                position = size * begin // max(1, file.metadata.num_rows)
                yield from _blocks_of_column(
                    ((replace(place, offset=first + i), text) for i, text in enumerate(texts)),
                    Block(stream.path, "rows", place, position=position),
                )


def read_arrow(stream: Stream, text_key: str, place: Place, size: int) -> Iterator[Block]:
    """Yields blocks of the rows of a file or stream of Arrow's. A record batch of it is read whole, and checked."""

    with open_table(stream) as source:
        batches = _batches(source)
        column = _column_of(next(batches), stream.path, text_key)
        begin = 0
        for batch in batches:
            rows, begin = batch.num_rows, begin + batch.num_rows
            if begin <= place.offset:
                continue
            values = _validated(_field_of(batch.column(column), column, text_key))
            # Few rows at a time become objects of Python.
            step = max(1, min(blocks.BLOCK_ROWS, blocks.BLOCK_BYTES * rows // max(1, values.nbytes)))
            position = min(size, source.tell())
            texts = (
                (replace(place, offset=begin - rows + at + i), text)
                for at in range(max(0, place.offset - begin + rows), rows, step)
                for i, text in enumerate(_values(values.slice(at, step)))
            )
            yield from _blocks_of_column(texts, Block(stream.path, "rows", place, position=position))


def _validated(values: Any) -> Any:
    """Returns a column as bytes. Raises ValueError if offsets lead out of it, which would end the process later."""
    import pyarrow

    kinds = {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.binary_view(),
    }
    # As bytes, because whether they are UTF-8 is a matter of each row. A view, because a cast would read them.
    values = values.view(kinds[values.type]) if values.type in kinds else values
    values.validate(full=True)
    return values


def _batches(source: IO[bytes]) -> Iterator[Any]:
    """Yields the schema, then the record batches."""
    import pyarrow.ipc

    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
    yield reader.schema
    yield from (map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader)


def _field_of(values: Any, column: str, text_key: str) -> Any:
    """Returns the texts in a column, or in the struct that it is."""
    import pyarrow.compute

    for name in text_key.removeprefix(column).split(".")[1:]:
        values = pyarrow.compute.struct_field(values, name)
    return values


def _column_of(schema: Any, path: Path, text_key: str) -> str:
    """Returns the column to read: `text_key`, or the struct that holds it. Raises UserError if it is not of text."""
    from pyarrow import types

    parts = text_key.split(".")
    column = text_key if text_key in schema.names else parts[0]
    count = schema.names.count(column)
    if not count:
        raise UserError(f"{path}: has no column {text_key!r}, only {', '.join(schema.names)}; name one with --text_key")
    if count > 1:
        raise UserError(f"{path}: has {count} columns {column!r}; rename all but one")
    kind = schema.field(column).type
    for name in parts[1:] if column != text_key else []:
        if not types.is_struct(kind) or kind.get_field_index(name) < 0:
            raise UserError(
                f"{path}: the column {column!r} holds {kind}, no {text_key!r}; name another with --text_key"
            )
        kind = kind.field(kind.get_field_index(name)).type
    # A column of categories is stored as a dictionary and reads as the values.
    kind = kind.value_type if types.is_dictionary(kind) else kind
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    # Spark and Impala write text without the mark that says so.
    if not is_text and not (types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)):
        raise UserError(f"{path}: the column {text_key!r} holds {kind}, not strings; name another with --text_key")
    return column


def _rows_a_batch(group: RowGroup, source: IO[bytes]) -> int:
    rows = min(max(1, blocks.BLOCK_BYTES * group.rows // max(1, group.bytes)), blocks.BLOCK_ROWS)
    # A value of a dictionary is stored once, but decoded in each of its rows: a small file may stand for gigabytes. A
    # value is no longer than the page with the dictionary.
    return min(rows, max(1, BATCH_BYTES // max(1, _dictionary_bytes(group, source))))


def _dictionary_bytes(group: RowGroup, source: IO[bytes]) -> int:
    """Returns the size of a column's dictionary in a row group, 0 if it has none."""
    if group.dictionary_offset is None:
        return 0
    at = source.tell()
    source.seek(max(0, group.dictionary_offset))
    header = source.read(16)
    source.seek(at)
    # A PageHeader in Thrift's compact protocol: the field type (i32, 2 for a dictionary), then uncompressed_page_size.
    if not header.startswith(b"\x15\x04\x15"):
        return group.bytes
    size = shift = 0
    for byte in header[3:8]:
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return size >> 1  # zigzag; a size is not negative


def _values(column: Any) -> list[bytes | None]:
    """Returns a column's texts. Those that the file stores once, as a dictionary, are one object."""
    import pyarrow

    if isinstance(column, pyarrow.DictionaryArray):
        # Only the values of these rows: the dictionary has those of many other rows too.
        used = column.indices.drop_null().unique()
        values = dict(zip(used.to_pylist(), _values(column.dictionary.take(used)), strict=True))
        return [values.get(i) for i in column.indices.to_pylist()]
    # As bytes, because to_pylist() raises for a string that is not UTF-8; large_, because offsets of the other types
    # have 32 bits.
    if not pyarrow.types.is_large_binary(column.type):
        is_binary = pyarrow.types.is_binary(column.type) or pyarrow.types.is_binary_view(column.type)
        column = column if is_binary else column.cast(pyarrow.large_string())
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()


def _without_repeats(texts: Iterable[bytes | Dropped | None], path: Path) -> Iterator[bytes | Dropped | None]:
    last: bytes | None = None
    for text in texts:
        # Short ones are encoded faster than looked at here.
        if not isinstance(text, bytes) or not REPEATED_BYTES < len(text) <= blocks.RECORD_BYTES:
            yield text
        elif text == last:
            yield Dropped("duplicate", str(path))
        else:
            yield text
            # Equals of what is dropped for another reason count with that reason.
            last = text if text.strip() and isinstance(checked_utf8(text, ""), bytes) else None


def _blocks_of_column(rows: Iterator[tuple[Place, bytes | Dropped | None]], block: Block) -> Iterator[Block]:
    for is_long, group in itertools.groupby(rows, lambda row: _size(row[1]) > blocks.BLOCK_BYTES):
        if not is_long:
            yield from blocks_of_values(group, block)
            continue
        for place, value in group:
            assert isinstance(value, bytes)
            where = f"{block.path}: row {place.offset}"
            is_long = len(value) > blocks.RECORD_BYTES
            text = too_long(where, len(value)) if is_long else checked_utf8(value, where)
            yield from blocks_of_text(text, replace(block, place=place))


def too_long(where: str, size: int) -> Dropped:
    limit = f"more than the {blocks.RECORD_BYTES:,} that a record may have"
    return Dropped("too_long", f"{where}: {size:,} bytes, {limit}")
