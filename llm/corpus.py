"""Documents from files: .txt and .jsonl, read as a stream in bounded memory; and a corpus that every machine has.

A document longer than PIECE_CHARS is passed on in pieces. They are cut where the tokenizer may cut too, so a document's
ids are those of its pieces, one after the other (`cut`).
"""

import json
import os
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llm.atomic import atomic_file
from llm.errors import UserError

PIECE_CHARS = 1 << 18
# Text in which nothing may be cut for this long (a file without blanks, say) is cut here all the same: BPE's time and
# memory grow faster than the text, and a running text must not have to fit in memory.
SEGMENT_CHARS = 1 << 16
DETECT_BYTES = 1 << 20

_CUT = re.compile(r"(?<=[^ ]) |(?<=\n)[^\n]|(?<=[^\u2581])\u2581|(?<=\u2581)[\s\S]")
_EMPTY_LINE = re.compile(rb"^\r?\n", re.MULTILINE)


@dataclass(frozen=True)
class Document:
    """A document, or one piece of a long one: `first` and `last` tell which."""

    text: str
    bytes: int  # of the text, in UTF-8
    source: str  # the file
    position: int  # bytes of all inputs that are read once this is, for progress
    first: bool = True
    last: bool = True


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
    paths: Iterable[str | os.PathLike[str]], documents: str = "auto", dropped: Counter[str] | None = None
) -> Iterator[Document]:
    """Streams the documents of some files, in order.

    Args:
        paths: .jsonl files, one object with the text under "text" a line; everything else is read as UTF-8 text.
        documents: what a document is in a text file: see `resolve_documents`.
        dropped: counts the documents that are left out, by reason. "empty": nothing but white space.

    Raises UserError: a file that is missing, empty, unreadable or not UTF-8 (with the byte), a bad line of a .jsonl.
    """
    files = [Path(path) for path in paths]
    check_inputs(files)
    position = 0
    for path in files:
        mode = resolve_documents(path, documents)
        with _open(path) as file:
            for text, size, end, first, last in _READERS[mode](file, path):
                if first and last and (not text or text.isspace()):
                    if dropped is not None:
                        dropped["empty"] += 1
                else:
                    yield Document(text, size, str(path), position + end, first, last)
            position += file.tell()


def resolve_documents(path: str | os.PathLike[str], documents: str = "auto") -> str:
    """What a document is in this file: "jsonl" (an object a line), "line" (a line), "file" (all of it, a running text).

    `documents` is "line" or "file", or "auto": "file" where the first MiB holds an empty line, else "line".
    Lines end at \\n; a \\r before it stays part of the text (and does not make an empty line less empty).
    """
    if documents not in ("auto", "line", "file"):
        raise UserError(f"--documents {documents}: is one of auto, line, file")
    path = Path(path)
    if path.suffix.lower() == ".jsonl":
        return "jsonl"
    if documents != "auto":
        return documents
    with _open(path) as file:
        return "file" if _EMPTY_LINE.search(file.read(DETECT_BYTES)) else "line"


def describe_documents(path: str | os.PathLike[str], documents: str = "auto") -> str:
    """What `resolve_documents` chose for a file and why, for people."""
    mode = resolve_documents(path, documents)
    if mode == "jsonl":
        return f"{path}: one document an object"
    text = "one running text" if mode == "file" else "one document a line"
    if documents != "auto":
        return f"{path}: {text}"
    an = "an" if mode == "file" else "no"
    return f"{path}: {text} (its first MiB holds {an} empty line; --documents line or file overrides that)"


def check_inputs(paths: Iterable[str | os.PathLike[str]]) -> int:
    """The size of all files together, in bytes. Raises UserError: one is missing, no file, empty or unreadable."""
    total = 0
    for path in map(Path, paths):
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
        if not size:
            raise UserError(f"{path}: is empty")
        total += size
    if not total:
        raise UserError("no input: name at least one .txt or .jsonl file")
    return total


def _open(path: Path) -> BinaryIO:
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a directory; name the files in it")
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no regular file; inputs are read more than once")
        return open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


# A reader yields (text, its bytes, offset in the file after it, first piece, last piece).
_Read = Iterator[tuple[str, int, int, bool, bool]]


def _read_file(file: BinaryIO, path: Path) -> _Read:
    yield from _read_long(iter(lambda: file.read(PIECE_CHARS), b""), file, path, 0)


def _read_lines(file: BinaryIO, path: Path) -> _Read:
    end = 0
    while line := file.readline(PIECE_CHARS):
        if line.endswith(b"\n") or len(line) < PIECE_CHARS:
            text = _decode(line, path, end).removesuffix("\n")
            size = len(line) - line.endswith(b"\n")
            end += len(line)
            yield text, size, end, True, True
        else:
            yield from _read_long(_rest_of_line(line, file), file, path, end)
            end = file.tell()


def _rest_of_line(line: bytes, file: BinaryIO) -> Iterator[bytes]:
    while line:
        yield line.removesuffix(b"\n")
        line = b"" if line.endswith(b"\n") else file.readline(PIECE_CHARS)


def _read_long(chunks: Iterator[bytes], file: BinaryIO, path: Path, offset: int) -> _Read:
    """One document from chunks of its bytes, in pieces of about PIECE_CHARS characters."""
    text, rest, first = "", b"", True
    for chunk in chunks:
        data = rest + chunk
        complete = len(data) - _unfinished(data)
        text += _decode(data[:complete], path, offset)
        offset += complete
        rest = data[complete:]
        while (end := cut(text, 0, PIECE_CHARS)) is not None:
            piece, text = text[:end], text[end:]
            yield piece, len(piece.encode()), file.tell(), first, False
            first = False
    text += _decode(rest, path, offset)
    yield text, len(text.encode()), file.tell(), first, True


def _read_jsonl(file: BinaryIO, path: Path) -> _Read:
    end = 0
    for number, line in enumerate(file, 1):
        decoded = _decode(line, path, end)
        end += len(line)
        if number == 1:
            decoded = decoded.removeprefix("\ufeff")
        if not decoded.strip():
            continue
        try:
            record = json.loads(decoded)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise UserError(f"{path}:{number}: not JSON: {reason}; a .jsonl file holds one object a line") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f'{path}:{number}: expected an object with a string under "text"')
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise UserError(
                f"{path}:{number}: the text holds half a surrogate pair (\\u{ord(text[error.start]):04x}), "
                "which is no character"
            ) from None
        yield from _pieces_of(text, size, end)


def _pieces_of(text: str, size: int, end: int) -> _Read:
    begin = 0
    while (stop := cut(text, begin, PIECE_CHARS)) is not None:
        piece = text[begin:stop]
        size -= len(piece.encode())
        yield piece, len(piece.encode()), end, begin == 0, False
        begin = stop
    yield text[begin:], size, end, begin == 0, True


_READERS: dict[str, Callable[[BinaryIO, Path], _Read]] = {
    "file": _read_file,
    "line": _read_lines,
    "jsonl": _read_jsonl,
}


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not valid UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}); "
            "convert it first, for example with iconv -t UTF-8"
        ) from None


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


def write_stdlib_corpus(output: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes the running Python's standard library as a .jsonl corpus: one source file a document, in path order.

    Folders of tests and of installed packages are left out. Sources are decoded as Python does (PEP 263). Each line is
    {"text": the source, "path": its path in the library}.

    Returns {"output", "documents", "bytes", "dropped": {reason: files}}. Raises UserError where there are no sources;
    OSError.
    """
    library = Path(sysconfig.get_path("stdlib"))
    dropped: Counter[str] = Counter()
    documents = size = 0
    try:
        with atomic_file(output) as file:
            for path in _sources(library):
                try:
                    with tokenize.open(path) as source:
                        text = source.read()
                except (SyntaxError, UnicodeDecodeError):
                    dropped["undecodable"] += 1
                    continue
                except OSError:
                    dropped["unreadable"] += 1
                    continue
                if not text or text.isspace():
                    dropped["empty"] += 1
                    continue
                record = {"text": text, "path": path.relative_to(library).as_posix()}
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                documents += 1
                size += len(text.encode())
            if not documents:
                raise UserError(f"{library}: this Python comes without the sources of its standard library")
    except OSError as error:
        error.filename, error.filename2 = str(output), None
        raise
    return {"output": str(output), "documents": documents, "bytes": size, "dropped": dict(dropped)}


def _sources(library: Path) -> list[Path]:
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    found: list[Path] = []
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in left_out]
        found.extend(Path(folder, name) for name in files if name.endswith(".py"))
    return sorted(found, key=lambda path: path.relative_to(library).as_posix())
