"""Input files: finds them by name, folder or pattern, decides how each is read, and opens them as streams of UTF-8."""

import bz2
import codecs
import glob
import gzip
import io
import lzma
import os
import re
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from llm.data import formats
from llm.data.formats import BOM, READ, RECORDS, TABLES, kind_of, lacks_text, suffix_of
from llm.errors import UserError

MODES = ("auto", "line", "file", "paragraph")
DETECT_BYTES = 1 << 20
HEAD_BYTES = 1 << 16
# A line of white space counts as empty, up to this length, so that a reader need not look further ahead.
EMPTY_LINE_BYTES = 1024
# The white space of str.isspace() but the newline, in UTF-8.
_WHITE = (
    rb"(?:[ \t\r\f\v\x1c-\x1f]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)"
)
EMPTY_LINES = rb"(?:%s{0,%d}\n)" % (_WHITE, EMPTY_LINE_BYTES // 3)
"""Pattern of one empty line; for use at the beginning of a line."""
_EMPTY_LINE = re.compile(rb"^" + EMPTY_LINES, re.MULTILINE)
_CHUNK_BYTES = 1 << 20
_KINDS = {
    "jsonl": "one document an object",
    "json": "one document an object",
    "csv": "one document a row",
    "parquet": "one document a row",
    "arrow": "one document a row",
    "line": "one document a line",
    "paragraph": "one document a paragraph",
    "file": "one running text",
    "tar": "an archive, its files are read",
    "empty": "empty",
}


@dataclass(frozen=True)
class Source:
    """A file and how it is read.

    mode: "jsonl", "json" (an array, or objects that span lines), "csv", "parquet", "arrow", "tar", "empty"; of text
        "line", "paragraph" or "file".
    members: of a .tar: the mode of each file in it, in its order; "" for one that is left out.
    """

    path: Path
    mode: str
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sources:
    """The files of a command's inputs."""

    files: tuple[Source, ...]
    lines: tuple[str, ...]  # for people: what was chosen for each input, and why
    stats: dict[Path, tuple[int, ...]]  # of each file, for `changed`

    @property
    def bytes(self) -> int:
        """Size of all files on disk."""
        return sum(stat[0] for stat in self.stats.values())

    def changed(self) -> list[Path]:
        """Returns the files whose size, time or identity is not what it was when they were found."""
        return [path for path, stat in self.stats.items() if not path.exists() or stat_of(path) != stat]


def stat_of(path: Path) -> tuple[int, ...]:
    """Returns what tells that a file has changed."""
    found = path.stat()
    # The time of the last change of status too, because the time of modification can be set back.
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev


def find_sources(inputs: Iterable[str | os.PathLike[str]], documents: str = "auto", text_key: str = "text") -> Sources:
    """Finds the input files in the order of `inputs`, and decides how each is read.

    An input is a file, a folder (its files with a suffix of `formats.READ`, also compressed, in it and below) or a
    pattern such as `data/**/*.txt`; the files of a folder or pattern are sorted by name. A file that is reached twice
    counts once.

    documents: for text: "line", "paragraph", "file" or "auto", which is "file" if the first MiB holds an empty line (of
        a folder or pattern: of any of its files), else "line". With "file", a folder stands for all text in it, also
        sources (.md, .py). Lines end at \\n; a \\r before it is part of the text.
    text_key: where the text is in a record or table.

    Raises UserError for an input that is missing, empty, unreadable, no regular file or no text, for one without
    `text_key`, and for a folder that links to itself.
    """
    if documents not in MODES:
        raise UserError(f"--documents {documents}: is one of {', '.join(MODES)}")
    seen: dict[tuple[int, int], Path] = {}
    files: list[Source] = []
    lines: list[str] = []
    for name in inputs:
        found = _Found(os.fspath(name), documents, text_key)
        again = []
        for source in found.sources:
            stat = source.path.stat()
            if seen.setdefault((stat.st_dev, stat.st_ino), source.path) is source.path:
                files.append(source)
            else:
                again.append(f"{source.path} (as {seen[stat.st_dev, stat.st_ino]})")
        lines.append(found.describe())
        if again:
            lines.append(f"{name}: {len(again):,} read before, so not again: {', '.join(again[:3])}")
    if not files:
        raise UserError("no input: name at least one file of text")
    return Sources(tuple(files), tuple(lines), {source.path: stat_of(source.path) for source in files})


class _Found:
    """The files that one `--input` names."""

    def __init__(self, name: str, documents: str, text_key: str) -> None:
        self.name = name
        self._documents = documents
        self._text_key = text_key
        paths, self.left_out, self.is_many = _paths_of(name, documents)
        self.is_guessed = False
        self.has_empty_line = False
        sources = [source for path in paths if (source := self._source(path))]
        # One decision for all text of a folder: a running text may have a file without an empty line.
        guess = "file" if self.has_empty_line else "line"
        self.sources = [
            replace(
                source,
                mode=guess if source.mode == "auto" else source.mode,
                members=tuple(guess if mode == "auto" else mode for mode in source.members),
            )
            for source in sources
        ]
        if not any(source.mode != "empty" for source in self.sources):
            if self.sources:
                raise UserError(f"{name}: holds only empty files" if self.is_many else f"{name}: is empty")
            raise UserError(_nothing_in(Path(name), self.left_out))

    def _source(self, path: Path) -> Source | None:
        """Decides how a file is read; counts it in `left_out` and returns None if it is no text, found in a folder."""
        with open_input(path) as stream:
            if stream.is_tar or (suffix_of(path) == ".tar" and stream.peek(1)):
                members = tuple(self._mode(member, in_tar=True) for member in read_members(path, stream))
                if not any(members):
                    raise UserError(f"{path}: holds no text that can be read, of {len(members):,} files")
                return Source(path, "tar", members)
            mode = self._mode(stream)
        return Source(path, mode) if mode else None

    def _mode(self, stream: "Stream", *, in_tar: bool = False) -> str:
        """Returns the mode of a file or of a file in a .tar; "auto" leaves it to `has_empty_line`, "" leaves it out."""
        head = stream.read(HEAD_BYTES).removeprefix(BOM)
        # In a folder and a .tar some files are no text; what is named itself has to be.
        is_chosen = not in_tar and not self.is_many
        suffix = suffix_of(stream.path)
        if not head:
            return "empty" if suffix in READ or is_chosen or self._documents == "file" else ""
        if in_tar and suffix not in READ and self._documents != "file":
            return ""  # as in a folder
        is_all = len(head) < HEAD_BYTES - len(BOM)
        where = str(stream.path)
        try:
            kind = kind_of(stream.path.name, head, is_all=is_all, text_is_wanted=self._documents != "auto", where=where)
            if kind == "tar":
                raise UserError(f"{where}: is an archive in an archive; unpack it first")
        except UserError:
            if is_chosen or suffix in READ:
                raise
            self.left_out[suffix or stream.path.name] += 1
            return ""
        if missing := lacks_text(kind, head, is_all, self._text_key, suffix):
            # Tables and single objects are often about the text, such as a folder's dataset_info.json.
            if not is_chosen and suffix in (".json", *TABLES):
                self.left_out[f"{suffix} without {self._text_key!r}"] += 1
                return ""
            if kind == "csv":
                raise UserError(f"{where}: has no column {self._text_key!r}, {missing}; name one with --text_key")
            other = "" if suffix in RECORDS else "; --documents line takes the lines themselves"
            raise UserError(
                f'{where}:1: expected an object with a string under "{self._text_key}", found {missing} '
                f"(--text_key names another key{other})"
            )
        if kind != "text":
            return kind
        if self._documents != "auto":
            return self._documents
        self.is_guessed = True
        if not self.has_empty_line:
            rest = stream.read(DETECT_BYTES - len(head)) if not is_all else b""
            self.has_empty_line = bool(_EMPTY_LINE.search(head + rest))
        return "auto"

    def describe(self) -> str:
        """Returns a message: what was chosen for the files, and why."""
        if not self.is_many:
            (source,) = self.sources
            an = "an" if self.has_empty_line else "no"
            why = (
                f" (its first MiB holds {an} empty line; --documents line, paragraph or file overrides that)"
                if self.is_guessed
                else ""
            )
            of = f": {_counts(Counter(source.members))}" if source.mode == "tar" else ""
            return f"{self.name}: {_KINDS[source.mode]}{why}{of}"
        counts = _counts(Counter(source.mode for source in self.sources))
        why = " (--documents line, paragraph or file overrides that)" if self.is_guessed else ""
        other = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(self.left_out.items()))
        return f"{self.name}: {counts}{why}" + (f"; left out, as no text: {other}" if other else "")


def input_paths(name: str) -> list[Path]:
    """Returns the files that a file, folder or pattern stands for. Raises UserError if there are none."""
    return _paths_of(name, "auto")[0]


def _paths_of(name: str, documents: str) -> tuple[list[Path], Counter[str], bool]:
    """Returns the files, {suffix: number of files in a folder that are left out}, whether it names many files."""
    if not name:
        raise UserError("--input '': is empty; name a file or a folder")
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        _check_splits(path)
        every = sorted(_walk(path), key=lambda file: os.fsencode(file.relative_to(path)))
        # Of other names, only the contents tell whether they are text.
        paths = [
            file
            for file in every
            if suffix_of(file) in READ or (documents == "file" and not formats.is_refused_by_name(file))
        ]
        left_out = Counter(file.suffix or file.name for file in set(every) - set(paths))
        if not paths:
            raise UserError(_nothing_in(path, left_out))
        return paths, left_out, True
    # The name of an existing file may hold a * or [ itself.
    if not os.path.lexists(path) and glob.has_magic(name):
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)), key=os.fsencode)
        # `**` matches folders too.
        matches = [file for file in matches if not file.is_dir()]
        if not matches:
            raise UserError(f"{name}: no file matches")
        return matches, Counter(), True
    return [path], Counter(), False


def _check_splits(path: Path) -> None:
    """Raises UserError for a folder that datasets' `save_to_disk` made of several splits: one of them may be a test."""
    if (path / "dataset_dict.json").is_file() and any(path.glob("*/state.json")):
        splits = sorted(state.parent.name for state in path.glob("*/state.json"))
        raise UserError(f"{path}: holds the splits {', '.join(splits)}; name one of its folders: {path / splits[0]}")


def _counts(modes: Counter[str]) -> str:
    return "; ".join(
        f"{count:,} {'file' if count == 1 else 'files'}: {_KINDS.get(mode, 'left out')}"
        for mode, count in modes.items()
    )


def _nothing_in(path: Path, left_out: Counter[str]) -> str:
    most = ", ".join(
        f"{count:,} {suffix}" for suffix, count in sorted(left_out.items(), key=lambda item: (-item[1], item[0]))[:8]
    )
    found = f"only {most}{', ...' if len(left_out) > 8 else ''}" if left_out else "no file at all"
    return (
        f"{path}: holds no {', '.join(READ)} (or those with {', '.join(formats.COMPRESSED)}) to read, {found}; "
        "name files, or take every text with --documents file"
    )


def _walk(top: Path) -> Iterator[Path]:
    """Yields the files in a folder and below; follows links. Raises UserError for a link to a folder that holds it."""
    # Each folder with the identities of those above it. No recursion, because Python limits its depth.
    folders: list[tuple[Path, tuple[tuple[int, int], ...]]] = [(top, ())]
    while folders:
        folder, above = folders.pop()
        try:
            found = folder.stat()
            with os.scandir(folder) as entries:
                # Hidden names belong to other programs (.git, .ipynb_checkpoints).
                paths = [folder / entry.name for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}") from None
        identity = (found.st_dev, found.st_ino)
        if identity in above:
            raise UserError(
                f"{folder}: is a link to a folder that holds it, so it would be read for ever; remove the link"
            )
        for path in paths:
            if path.is_dir():
                folders.append((path, (*above, identity)))
            else:
                yield path


# Streams.


class Stream:
    """The contents of a file, decompressed and in UTF-8, read from front to back."""

    def __init__(self, path: Path, content: Any, raw: IO[bytes]) -> None:
        self.path = path
        self.offset = 0  # bytes of the contents that have been read
        self._content = content
        self._raw = raw

    @property
    def position(self) -> int:
        """Bytes of the file on disk that have been read."""
        # On disk, because the size of compressed contents is not known before their end.
        return self._raw.tell()

    @property
    def is_tar(self) -> bool:
        return self.peek(512)[257:262] == b"ustar"

    @property
    def seekable(self) -> IO[bytes] | None:
        """The file itself if its contents can be sought: they are not compressed, and not in a .tar."""
        return self._raw if self._content is self._raw else None

    def peek(self, size: int) -> bytes:
        """Returns the next bytes, at least `size` unless the contents end, and does not go past them."""
        with _with_path(self.path):
            data: bytes = self._content.peek(size)
        return data

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
        if self.seekable:
            self._raw.seek(offset)
            self.offset = offset
        # Compressed contents cannot be sought: they are decompressed and thrown away.
        while self.offset < offset and self.read(min(offset - self.offset, _CHUNK_BYTES)):
            pass


class _Utf8(io.RawIOBase):
    """Text of another encoding as UTF-8. What cannot be decoded becomes bytes that are not UTF-8."""

    def __init__(self, content: Any, encoding: str) -> None:
        self._content = content
        # Half a surrogate pair passes, as three bytes that are not UTF-8: then only its document is dropped.
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            data = self._content.read(HEAD_BYTES)
            try:
                text = self._decoder.decode(data, final=not data)
            except UnicodeDecodeError:  # the end is missing, or (of UTF-32) a number is no character
                self._decoder.reset()
                self._rest = b"\xff"
                continue
            self._rest = text.encode("utf-8", "surrogatepass")
            if not data:
                break
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


@contextmanager
def open_input(path: Path) -> Iterator[Stream]:
    """Opens a file, decompresses and decodes it. Raises UserError, also while reading, if it is missing or damaged."""
    with _opened(path) as raw:
        yield _stream(path, raw, raw)


def _stream(path: Path, content: Any, raw: IO[bytes]) -> Stream:
    """content: the bytes, with `peek`; raw: the file on disk that they come from."""
    with _with_path(path):
        compression = formats.compression_of(content.peek(16))
        if compression == "gz":
            content = gzip.open(content)  # noqa: SIM115
        elif compression == "xz":
            content = lzma.open(content)  # noqa: SIM115
        elif compression == "bz2":
            content = bz2.open(content)  # noqa: SIM115
        elif compression == "zst":
            import pyarrow

            content = pyarrow.CompressedInputStream(content, "zstd")
        if compression:
            # pyarrow's stream has no readline and no peek; the others are faster with a larger buffer.
            content = io.BufferedReader(content, HEAD_BYTES)
        if encoding := formats.encoding_of(content.peek(4)):
            content.read(4 if "32" in encoding else 2)
            content = io.BufferedReader(_Utf8(content, encoding), HEAD_BYTES)
    return Stream(path, content, raw)


class _Member(tarfile.TarInfo):
    """A file in a .tar. tarfile takes a damaged header for the end of the archive; here it is an error."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def read_members(path: Path, stream: Stream) -> Iterator[Stream]:
    """Yields the files of a .tar in order; each is to be read before the next. Hidden files are passed over."""
    with _with_path(path), tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as archive:  # type: ignore[call-overload]
        for member in archive:
            if member.isfile() and not any(part.startswith(".") for part in Path(member.name).parts if part != "."):
                content = archive.extractfile(member)
                yield _stream(path / member.name.lstrip("/"), content, stream._raw)


@contextmanager
def open_table(stream: Stream) -> Iterator[IO[bytes]]:
    """Yields the contents as a file that can be sought, and names it in the errors of pyarrow in the block.

    Compressed contents, and those in a .tar, are unpacked to a temporary file, because a .parquet is read from its end.
    """
    with tempfile.TemporaryFile() as unpacked, _pyarrow_errors(stream.path):
        if stream.seekable:
            yield stream.seekable
            return
        while data := stream.read(_CHUNK_BYTES):
            unpacked.write(data)
        unpacked.seek(0)
        yield unpacked


@contextmanager
def _with_path(path: Path) -> Iterator[None]:
    """Adds the file's name to errors of decompressing and decoding."""
    damaged = f"{path}: is damaged or cut short (%s); fetch or make it again"
    try:
        yield
    # gzip raises EOFError for a truncated file. This clause precedes OSError, because BadGzipFile is a subclass.
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, tarfile.TarError) as error:
        raise UserError(damaged % _one_line(error)) from None
    except OSError as error:
        if "requires too much memory" in str(error):
            raise UserError(
                f"{path}: was compressed with a long window, which takes gigabytes of memory to read; "
                f"decompress it first: zstd -d --long=31 {path}"
            ) from None
        if error.errno is None:  # raised by pyarrow and bz2 for damaged contents
            raise UserError(damaged % _one_line(error)) from None
        error.filename = str(path)
        raise


@contextmanager
def _pyarrow_errors(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises for a damaged table into a UserError: its errors, and those of decoding names."""
    try:
        with _with_path(path):
            yield
    except (ValueError, LookupError, TypeError, NotImplementedError, ArithmeticError, MemoryError) as error:
        raise UserError(
            f"{path}: is damaged, or a kind of table that is not read ({_one_line(error)}); fetch or make it again"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _opened(path: Path) -> IO[bytes]:
    try:
        # Checked before open(), which would block on a named pipe until another program writes to it.
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no regular file; inputs are read more than once")
        return open(path, "rb", buffering=HEAD_BYTES)
    except FileNotFoundError:
        to = " (a link to nothing)" if path.is_symlink() else ""
        raise UserError(f"{path}: no such file{to}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
