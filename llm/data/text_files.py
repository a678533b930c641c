"""Input files: finds them by name, folder or pattern, opens them as streams (also compressed ones), detects formats."""

import glob
import gzip
import io
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llm.errors import UserError

MODES = ("auto", "line", "file", "paragraph")
DETECT_BYTES = 1 << 20
_FORMATS = (".txt", ".jsonl", ".parquet")
_COMPRESSED = (".gz", ".zst")
_EMPTY_LINE = re.compile(rb"^\r?\n", re.MULTILINE)
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Found:
    """The files that one `--input` names."""

    paths: tuple[Path, ...]
    left_out: Counter[str]  # {suffix: number of files in a folder that are not text}


def find_files(inputs: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Lists the input files in the order of `inputs`; the files of a folder or pattern are sorted by name.

    An input is a file, a folder (every .txt, .jsonl and .parquet in it and below, each also with .gz or .zst) or a
    pattern such as `data/**/*.txt`. Raises UserError for one that is missing, empty, unreadable or no regular file.
    """
    paths = [path for name in inputs for path in _find(name).paths]
    if not paths:
        raise UserError("no input: name at least one .txt, .jsonl or .parquet file")
    return paths


def check_inputs(inputs: Iterable[str | os.PathLike[str]]) -> int:
    """Returns the size of all files on disk, in bytes. Raises UserError as `find_files` does."""
    return sum(path.stat().st_size for path in find_files(inputs))


def _find(name: str | os.PathLike[str]) -> Found:
    path = Path(name)
    if path.is_dir():
        files = sorted(_walk(path), key=lambda file: file.relative_to(path).as_posix())
        text = [file for file in files if _format(file) in _FORMATS]
        if not text:
            raise UserError(f"{path}: holds no {', '.join(_FORMATS)} (or those with .gz, .zst); name the files")
        left_out = Counter(file.suffix or file.name for file in files if _format(file) not in _FORMATS)
    # The name of an existing file may hold a * or [ itself.
    elif not path.exists() and glob.has_magic(os.fspath(name)):
        text = sorted(map(Path, glob.glob(os.fspath(name), recursive=True)), key=Path.as_posix)
        # `**` matches folders too.
        text = [file for file in text if not file.is_dir()]
        if not text:
            raise UserError(f"{path}: no file matches")
        left_out = Counter()
    else:
        with _opened(path) as file:
            if not os.fstat(file.fileno()).st_size:
                raise UserError(f"{path}: is empty")
        return Found((path,), Counter())
    # All files are opened now: one that cannot be read should stop a run at its start, not after hours.
    for file_path in text:
        with _opened(file_path):
            pass
    if not any(file.stat().st_size for file in text):
        raise UserError(f"{path}: holds only empty files")
    return Found(tuple(text), left_out)


def _walk(folder: Path) -> Iterator[Path]:
    # os.walk leaves out linked folders unless told otherwise.
    for parent, folders, files in os.walk(folder, followlinks=True):
        # Hidden names belong to other programs (.git, .ipynb_checkpoints).
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def resolve_documents(path: str | os.PathLike[str], documents: str = "auto") -> str:
    """Returns what one document is in this file: "jsonl" (the text of a line's object), "parquet" (a row), "line",
    "paragraph" (the lines between empty lines) or "file" (the whole file).

    documents: for text files: "line", "paragraph", "file" or "auto", which is "file" if the first MiB holds an empty
        line, else "line". Lines end at \\n; a \\r before it is part of the text, but an empty line may end in \\r\\n.
    """
    if documents not in MODES:
        raise UserError(f"--documents {documents}: is one of {', '.join(MODES)}")
    path = Path(path)
    if _format(path) in (".jsonl", ".parquet"):
        return _format(path)[1:]
    if documents != "auto":
        return documents
    with open_input(path) as stream:
        return "file" if _EMPTY_LINE.search(stream.read(DETECT_BYTES)) else "line"


def describe_documents(name: str | os.PathLike[str], documents: str = "auto") -> str:
    """Returns a message: what `resolve_documents` chose for the files of an input, and why."""
    found = _find(name)
    kinds = {
        "jsonl": "one document an object",
        "parquet": "one document a row",
        "line": "one document a line",
        "paragraph": "one document a paragraph",
        "file": "one running text",
    }
    modes = Counter(resolve_documents(path, documents) for path in found.paths)
    guessed = documents == "auto" and modes.keys() & {"line", "file"}
    if found.paths == (Path(name),):
        (mode,) = modes
        an = "an" if mode == "file" else "no"
        why = (
            f" (its first MiB holds {an} empty line; --documents line, paragraph or file overrides that)"
            if guessed
            else ""
        )
        return f"{name}: {kinds[mode]}{why}"
    counts = "; ".join(f"{count:,} {'file' if count == 1 else 'files'}: {kinds[mode]}" for mode, count in modes.items())
    why = " (--documents line, paragraph or file overrides that)" if guessed else ""
    other = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(found.left_out.items()))
    return f"{name}: {counts}{why}" + (f"; left out, as no text: {other}" if other else "")


class Stream:
    """The contents of a file, decompressed, read from front to back."""

    def __init__(self, path: Path, content: Any, raw: IO[bytes]) -> None:
        self.path = path
        self.offset = 0  # bytes of the decompressed contents that have been read
        self._content = content
        self._raw = raw

    @property
    def position(self) -> int:
        """Bytes of the file on disk that have been read."""
        # On disk, because the size of compressed contents is not known before their end.
        return self._raw.tell()

    def read(self, size: int) -> bytes:
        with _with_path(self.path):
            data: bytes = self._content.read(size)
        self.offset += len(data)
        return data

    def readline(self, limit: int) -> bytes:
        with _with_path(self.path):
            data: bytes = self._content.readline(limit)
        self.offset += len(data)
        return data

    def skip_to(self, offset: int) -> None:
        if self._content is self._raw:
            self._raw.seek(offset)
            self.offset = offset
        # Compressed contents cannot be sought: they are decompressed and thrown away.
        while self.offset < offset and self.read(min(offset - self.offset, _CHUNK_BYTES)):
            pass


@contextmanager
def open_input(path: Path) -> Iterator[Stream]:
    """Opens a file, decompresses .gz and .zst. Raises UserError, also while reading, if it is missing or damaged."""
    with _opened(path) as raw:
        suffix = path.suffix.lower()
        if suffix == ".gz":
            yield Stream(path, gzip.GzipFile(fileobj=raw), raw)
        elif suffix == ".zst":
            import pyarrow

            # pyarrow's stream has no readline; BufferedReader adds it.
            yield Stream(path, io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd")), raw)
        else:
            yield Stream(path, raw, raw)


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Opens a .parquet as a `pyarrow.parquet.ParquetFile`; decompresses a .gz or .zst to a temporary file first."""
    import pyarrow.parquet

    # Unpacked, because a .parquet is read from its end first, and a compressed stream cannot be sought.
    with tempfile.TemporaryFile() as unpacked, _opened(path) as raw:
        source = raw
        if path.suffix.lower() in _COMPRESSED:
            with open_input(path) as stream:
                while data := stream.read(_CHUNK_BYTES):
                    unpacked.write(data)
            unpacked.seek(0)
            source = unpacked
        with _with_path(path):
            # Reads in small buffers, because a row group may be larger than memory.
            yield pyarrow.parquet.ParquetFile(source, buffer_size=_CHUNK_BYTES, pre_buffer=False)


@contextmanager
def _with_path(path: Path) -> Iterator[None]:
    """Adds the file's name to errors of decompressing and decoding."""
    try:
        yield
    # gzip raises EOFError for a truncated file. This clause precedes OSError, because BadGzipFile is a subclass.
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: is damaged or cut short ({error}); fetch or make it again") from None
    except OSError as error:
        if error.errno is None:  # raised by pyarrow for damaged contents
            raise UserError(f"{path}: is damaged or cut short ({_one_line(error)}); fetch or make it again") from None
        error.filename = str(path)
        raise
    except ValueError as error:
        # ArrowInvalid is a ValueError. It is recognised by its module, because pyarrow may not be imported.
        if type(error).__module__.startswith("pyarrow"):
            raise UserError(
                f"{path}: is damaged or no parquet file ({_one_line(error)}); fetch or make it again"
            ) from None
        raise


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _opened(path: Path) -> IO[bytes]:
    try:
        # Checked before open(), which would block on a named pipe until another program writes to it.
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no regular file; inputs are read more than once")
        return open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
