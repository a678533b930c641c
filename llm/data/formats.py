"""What a file holds: told by its first bytes, and by its name where they leave it open. What is not text is refused."""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from llm.data.json_records import Unfinished, split_records
from llm.errors import UserError

BOM = b"\xef\xbb\xbf"
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
RECORDS = (".jsonl", ".ndjson", ".json")
TABLES = (".csv", ".tsv")
READ = (".txt", *RECORDS, *TABLES, ".parquet", ".arrow", ".tar")
"""Suffixes of the files that a folder stands for."""

_SHORT = {".tgz": ".tar", ".tbz2": ".tar", ".txz": ".tar", ".tzst": ".tar"}
_COMPRESSIONS = {
    "gz": re.compile(rb"\x1f\x8b\x08"),
    "zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or one to be skipped
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "bz2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
}
# UTF-32 first, because its mark begins with that of UTF-16.
_MARKS = {
    b"\xff\xfe\0\0": "utf-32-le",
    b"\0\0\xfe\xff": "utf-32-be",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}
_AS_TEXT = "save its texts as .jsonl, one object with a string a line"
_AS_GZ = "decompress it, or compress it with gzip, zstd, xz or bzip2"
_PDF, _RTF, _WARC, _WIKI = rb"%PDF-\d", rb"\{\\rtf\d", rb"WARC/\d\.\d\r?\n", rb"<mediawiki[ >]"
_TEXT_FORMATS = (_PDF, _RTF, _WARC, _WIKI)
_NO_TEXT = bytes({*range(32)} - {*b"\b\t\n\v\f\r\x1b"})
"""Control characters that text hardly has."""
# (the first bytes, suffixes, what it is, the way out)
_REFUSED: tuple[tuple[bytes, tuple[str, ...], str, str], ...] = (
    (rb"LLMSHARD", (), "a shard of `llm prepare_data`", "give the text that it was made from"),
    (
        rb"MMIDIDX",
        (".bin", ".idx"),
        "token ids of another program",
        "`llm prepare_data --tokens uint16 --tok TOKENIZER` takes them",
    ),
    (rb"\x93NUMPY", (".npy",), "a NumPy array", _AS_TEXT),
    (
        rb"PK\x03\x04|PK\x05\x06",
        (".zip", ".npz", ".docx", ".epub"),
        "a zip archive",
        "unzip it, or save its text as .txt",
    ),
    (rb"\x80[\0-\x05]", (".pkl", ".pickle", ".pt", ".pth"), "a pickle", f"{_AS_TEXT} (reading a pickle runs its code)"),
    (_PDF, (".pdf",), "a PDF", "take its text out first: pdftotext FILE.pdf FILE.txt"),
    (_WARC, (".warc", ".wet", ".wat"), "a web archive", "take its text out first, for example with trafilatura"),
    (_WIKI, (), "a dump of a wiki", "take its text out first: wikiextractor --json FILE"),
    (rb"(?!)", (".tfrecord", ".tfrecords", ".msgpack"), "records of another program", _AS_TEXT),
    (rb"\xd0\xcf\x11\xe0", (".doc", ".xls"), "an Office document", "save it as .txt or .csv"),
    (_RTF, (".rtf",), "rich text", "save it as .txt"),
    (rb"\x89HDF", (".h5", ".hdf5"), "an HDF5 file", _AS_TEXT),
    (rb"SQLite format 3\0", (".db", ".sqlite"), "a database", _AS_TEXT),
    (rb"ORC", (".orc",), "an ORC file", "save it as .parquet"),
    (rb"Obj\x01", (".avro",), "an Avro file", "save it as .parquet"),
    (rb"PARE", (), "an encrypted parquet file", "decrypt it first"),
    (rb"GGUF", (".gguf", ".safetensors"), "a model", "give text"),
    (rb"7z\xbc\xaf|Rar!|LZIP", (".7z", ".rar"), "an archive of another program", "unpack it first"),
    (rb"\x04\x22\x4d\x18|\x1f\x9d|\xff\x06\0\0sNaPpY|\x5d\0\0", (".lz4", ".lzma", ".z", ".br"), "compressed", _AS_GZ),
    (rb"\x7fELF|\x89PNG|\xff\xd8\xff|GIF8", (".so", ".png", ".jpg", ".gif"), "a program or a picture", "give text"),
    (rb"RIFF|OggS|ID3", (".wav", ".ogg", ".mp3", ".mp4"), "a recording", "give text"),
)
_PATTERNS = [re.compile(first) for first, *_ in _REFUSED]
# A file of Arrow's, or a stream of its messages, as datasets writes them.
_ARROW = re.compile(rb"ARROW1\0\0|\xff{4}[^\0]...")
# At the beginning of a JSON array of objects, as far as one line of text can hold it.
_ARRAY = re.compile(rb'\s*\[\s*(?:\{\s*(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"\s*:|\})|\])', re.DOTALL)
_OBJECT = re.compile(rb'\s*\{\s*"[^"\\]*+(?:\\.[^"\\]*+)*+"\s*:', re.DOTALL)
MISSING = object()
"""What `lookup` returns for a key that a record does not have; None is a value."""


def suffix_of(name: str | PurePath) -> str:
    """Returns the last suffix of a name in lower case, without that of a compression: ".jsonl" of "a.JSONL.gz"."""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    return _SHORT.get(suffix, suffix)


def is_refused_by_name(name: str | PurePath) -> bool:
    """Whether a suffix alone says that a file is no text."""
    return any(suffix_of(name) in suffixes for _, suffixes, _, _ in _REFUSED)


def compression_of(head: bytes) -> str:
    """Returns "gz", "zst", "xz", "bz2" or "", from the first bytes of a file."""
    return next((name for name, magic in _COMPRESSIONS.items() if magic.match(head)), "")


def encoding_of(head: bytes) -> str:
    """Returns the encoding that a byte order mark tells ("utf-16-le", ...), or "" (UTF-8, with or without a mark)."""
    return next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), "")


def kind_of(name: str, head: bytes, *, is_all: bool, text_is_wanted: bool, where: str) -> str:
    """Returns what a file holds: "text", "jsonl", "json", "csv", "parquet", "arrow" or "tar".

    Args:
        name: decides where the contents do not: a .csv looks like any text.
        head: the beginning of the contents, decompressed and in UTF-8, without a byte order mark.
        is_all: whether `head` is the whole contents.
        text_is_wanted: whether text that looks like JSON counts as text, unless its name says JSON.
        where: the file in messages.

    Raises UserError for what is none of these; the message says what to do.
    """
    start = head[:65536]
    is_text = b"\0" not in start and _is_utf8(start)
    if head.startswith(b"PAR1") and not is_text:
        return "parquet"
    if _ARROW.match(head) and not is_text:
        return "arrow"
    if head[257:262] == b"ustar":
        return "tar"
    suffix = suffix_of(name)
    for pattern, (_, suffixes, what, way_out) in zip(_PATTERNS, _REFUSED, strict=True):
        # Text may begin with ORC or ID3; of these formats, only two are text in themselves.
        if suffix in suffixes or (pattern.match(head) and (not is_text or pattern.pattern in _TEXT_FORMATS)):
            raise UserError(f"{where}: is {what}, which is not read; {way_out}")
    if compression_of(head):
        raise UserError(f"{where}: is compressed twice; decompress it once")
    if suffix in (".parquet", ".arrow", ".feather", ".tar"):
        raise UserError(f"{where}: is damaged, or no {suffix} file; fetch or make it again")
    # A zero byte is a character of UTF-8 too, though a rare one.
    if b"\0" in start and ((start.count(b"\0") > len(start) // 10 and len(start) >= 16) or not _is_utf8(start)):
        # The upper byte of most characters is zero.
        order = "BE" if start[::2].count(0) > start[1::2].count(0) else "LE"
        raise UserError(
            f"{where}: is no text, or UTF-16 without a byte order mark (it holds zero bytes); "
            f"convert it, for example with iconv -f UTF-16{order} -t UTF-8"
        )
    if len(start) >= 16 and len(start) - len(start.translate(None, _NO_TEXT)) > len(start) // 4:
        raise UserError(f"{where}: is no text (it holds many control characters); {_AS_TEXT}")
    if suffix in TABLES:
        return "csv"
    if suffix in RECORDS or not text_is_wanted:
        return _json_kind(head, is_all, suffix) or "text"
    return "text"


def _json_kind(head: bytes, is_all: bool, suffix: str) -> str:
    """Returns "jsonl", "json" (an array, or objects that span lines) or "" (no JSON)."""
    start = head.lstrip()[:1]
    if suffix in RECORDS:
        if start == b"[" and not any(isinstance(value, dict) for value in first_lines(head, is_all)):
            return "json"
        if start == b"{" and suffix == ".json":
            return "jsonl" if any(isinstance(value, dict) for value in first_lines(head, is_all)) else "json"
        return "jsonl"
    if start == b"[" and _ARRAY.match(head):
        # `[]` alone, or a line of a list in some text, is no data.
        return "json" if _OBJECT.match(head.lstrip()[1:]) else ""
    if start == b"{" and _OBJECT.match(head):
        values = list(first_lines(head, is_all))
        # A line longer than the head cannot be judged, but it began as an object does.
        if (values and all(isinstance(value, dict) for value in values)) or (not values and b"\n" not in head):
            return "jsonl"
    return ""


def first_lines(head: bytes, is_all: bool) -> Iterator[Any]:
    """Yields the values of the first whole lines of JSON; None for a line that is no JSON. Skips blank ones."""
    lines = head.split(b"\n")
    for line in (lines if is_all else lines[:-1])[:100]:
        line = line.removeprefix(BOM)
        if line.strip():
            yield _value(line)


def _first_records(head: bytes) -> Iterator[Any]:
    try:
        for _, _, record in split_records(io.BytesIO(head).read, len(head)):
            yield _value(record)
    except Unfinished:  # its end is not in the head
        pass


def _value(record: bytes) -> Any:
    try:
        return json.loads(record.decode())
    except (ValueError, RecursionError):
        return None


def lacks_text(kind: str, head: bytes, is_all: bool, text_key: str, suffix: str = ".csv") -> str:
    """Returns what a file has in place of `text_key` if its first records show that it has no text, else "".

    That is found at the start, so that a wrong --text_key costs no pass over all of the input.
    """
    if kind == "csv":
        columns, _ = csv_header(head.split(b"\n", 1)[0], text_key, suffix)
        return "" if text_key in columns else f"only {', '.join(columns)}"
    if kind in ("jsonl", "json"):
        values = list(first_lines(head, is_all) if kind == "jsonl" else _first_records(head))
        # A record longer than the head may have its key anywhere.
        if not values and not is_all and f'"{text_key.rpartition(".")[2]}"'.encode() not in head:
            return "none in its beginning"
        found = [lookup(value, text_key) for value in values]
        # Text that is null may be followed by text that is not.
        if values and not any(isinstance(text, str) or text is None for text in found):
            if other := next((text for text in found if text is not MISSING), None):
                return f"{type(other).__name__} values"
            keys = next((list(value) for value in values if isinstance(value, dict)), None)
            return "no objects" if keys is None else f"only {', '.join(keys) or 'empty objects'}"
    return ""


def csv_header(line: bytes, text_key: str, suffix: str) -> tuple[list[str], str]:
    """Returns the columns and the delimiter of a .csv or .tsv, from its first line."""
    text = line.removeprefix(BOM).decode(errors="surrogateescape").rstrip("\r\n")
    usual = "\t" if suffix == ".tsv" else ","
    # Programs of some countries write semicolons; the delimiter is the one that gives the column of the text.
    for delimiter in (usual, *(other for other in ",;\t|" if other != usual)):
        columns = _cells(text, delimiter)
        if text_key in columns:
            return columns, delimiter
    return _cells(text, usual), usual


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []


def lookup(record: Any, key: str) -> Any:
    """Returns the value under a key of an object; `a.b` also names the key b of the object under a. MISSING: none."""
    if not isinstance(record, dict):
        return MISSING
    if key in record:
        return record[key]
    # A key may hold dots itself, so each dot may be the one that divides.
    for dot in re.finditer(r"\.", key):
        found = lookup(record.get(key[: dot.start()]), key[dot.end() :])
        if found is not MISSING:
            return found
    return MISSING


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # which accepts that the last character is cut
    except UnicodeDecodeError:
        return False
    return True
