"""`llm corpus`: makes a corpus from text that every machine has, the sources of Python's standard library."""

import json
import os
import sysconfig
import tokenize
from collections import Counter
from pathlib import Path
from typing import Any

from llm.atomic import atomic_file
from llm.errors import UserError
from llm.locks import locked


def write_stdlib_corpus(output: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes the running Python's standard library as a .jsonl corpus: one document per source file, in path order.

    Folders of tests and of installed packages are left out. Sources are decoded as Python does (PEP 263). Each line is
    {"text": the source, "path": its path in the library}.

    Returns {"output", "documents", "bytes", "dropped": {reason: files}}. Raises UserError if there are no sources;
    OSError.
    """
    library = Path(sysconfig.get_path("stdlib"))
    dropped: Counter[str] = Counter()
    documents = size = 0
    try:
        with locked(output, "another corpus is writing here"), atomic_file(output) as file:
            for path in _sources(library):
                try:
                    with tokenize.open(path) as source:
                        text = source.read()
                # tokenize.open raises SyntaxError if the coding line is unknown or contradicts a byte order mark.
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
            # Raised inside the block of atomic_file, so that no empty corpus appears.
            if not documents:
                raise UserError(f"{library}: this Python comes without the sources of its standard library")
    except OSError as error:
        # The error may name the temporary file, which the user does not know.
        error.filename, error.filename2 = str(output), None
        raise
    return {"output": str(output), "documents": documents, "bytes": size, "dropped": dict(dropped)}


def _sources(library: Path) -> list[Path]:
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    found: list[Path] = []
    for folder, folders, files in os.walk(library):
        # Changed in place: os.walk descends only into the folders that remain in this list.
        folders[:] = [name for name in folders if name not in left_out]
        found.extend(Path(folder, name) for name in files if name.endswith(".py"))
    # os.walk gives the file system's order; the corpus must not depend on it.
    return sorted(found, key=lambda path: path.relative_to(library).as_posix())
