"""The text of the learning ladder: `python -m benchmarks.ladder_text FOLDER ... --output FILE.jsonl`.

Collects what every machine can get: documentation that the system's package manager brings and the Python sources of
installed packages. Reads .rst, .txt, .md, .html (as text without tags) and .py, each also as .gz; a file is a document.
Files of the same content are kept once. Documents are written in the order of their SHA-256, which shuffles them the
same way on every machine, until --megabytes are full.
"""

import argparse
import gzip
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

from llm.atomic import atomic_file
from llm.errors import UserError, exit_code

SUFFIXES = (".rst", ".txt", ".md", ".html", ".py")
SHORTEST, LONGEST = 500, 500_000
"""Bytes of a document. Longer files are mostly generated tables, shorter ones mostly lists of names."""


class _Text(HTMLParser):
    """Collects the text of a page, without scripts, style sheets and navigation."""

    SKIPPED = ("script", "style", "head", "nav", "header", "footer")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipping += tag in self.SKIPPED

    def handle_endtag(self, tag: str) -> None:
        # A page may close what it has not opened.
        self._skipping = max(0, self._skipping - (tag in self.SKIPPED))

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(data)


def text_of_html(page: str) -> str:
    """Returns the text of an HTML page; runs of empty lines become one."""
    parser = _Text()
    parser.feed(page)
    lines = [line.rstrip() for line in "".join(parser.parts).splitlines()]
    return "\n".join(line for line, before in zip(lines, ["", *lines], strict=False) if line or before)


def documents(folders: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yields (SHA-256, text) of each different document, in the order of the hashes.

    Raises UserError where a folder does not exist. Files that are not UTF-8, too short or too long are left out.
    """
    found: dict[str, Path] = {}
    left_out: Counter[str] = Counter()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        for path in sorted(folder.rglob("*")):
            if not path.name.removesuffix(".gz").endswith(SUFFIXES) or not path.is_file():
                continue
            text = _read(path)
            if text is None or not SHORTEST <= len(text.encode()) <= LONGEST:
                left_out["not UTF-8" if text is None else "too short or too long"] += 1
            # setdefault: equal documents count once.
            elif found.setdefault(hashlib.sha256(text.encode()).hexdigest(), path) != path:
                left_out["already there"] += 1
    print(f"{len(found):,} documents; left out: {dict(left_out)}", file=sys.stderr)
    for digest, path in sorted(found.items()):
        text = _read(path)
        assert text is not None  # it was read before
        yield digest, text


def _read(path: Path) -> str | None:
    """The text of a file; None where it is not UTF-8."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8")
    except (UnicodeDecodeError, OSError, EOFError):
        return None
    return text_of_html(text) if path.name.removesuffix(".gz").endswith(".html") else text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ladder_text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--megabytes", type=float, default=60, help="to write at most (default %(default)g)")
    options = parser.parse_args(arguments)

    def run() -> None:
        size = count = 0
        with atomic_file(os.fspath(options.output)) as file:
            for digest, text in documents(options.folders):
                size += len(text.encode())
                if size > options.megabytes * 1e6:
                    break
                file.write(json.dumps({"text": text, "sha256": digest}, ensure_ascii=False).encode() + b"\n")
                count += 1
        print(f"{options.output}: {count:,} documents")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
