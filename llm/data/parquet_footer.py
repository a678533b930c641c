"""Reads the footer of a .parquet in a process of its own.

pyarrow ends the process (std::terminate) for some damaged footers when the description of a column is asked for. So a
helper process asks, and a file that ends it is damaged. Run as a program, this file is that process.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import IO, Any


@dataclass(frozen=True)
class RowGroup:
    """What a footer tells of one column in a row group."""

    rows: int
    bytes: int  # of the column, encoded but not compressed
    dictionary_offset: int | None  # position in the file of the page with the dictionary


_helpers: dict[int, subprocess.Popen[str]] = {}
"""{process that started it: helper}; a forked process must not share its parent's."""


def read_footer(file: IO[bytes], column: str) -> list[RowGroup] | None:
    """Returns the row groups of a .parquet; None if it is damaged. column: a path such as `text` or `meta.text`."""
    helper = _helpers.get(os.getpid())
    if helper is None or helper.poll() is not None:
        # -P: the modules in this file's folder are not to be found by their bare names.
        helper = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        _helpers[os.getpid()] = helper
    assert helper.stdin is not None
    assert helper.stdout is not None
    try:
        # By its descriptor, because an unpacked file has no name.
        helper.stdin.write(json.dumps([f"/proc/{os.getpid()}/fd/{file.fileno()}", column]) + "\n")
        helper.stdin.flush()
        answer = helper.stdout.readline()
    except OSError:
        answer = ""
    if not answer:
        helper.kill()
        helper.wait()
    groups: list[list[Any]] | None = json.loads(answer or "null")
    return None if groups is None else [RowGroup(*group) for group in groups]


def _serve() -> None:
    for line in sys.stdin:
        try:
            groups = _row_groups(*json.loads(line))
        # Whatever is wrong: the process that asks opens the file itself, and says what.
        except Exception:
            groups = None
        print(json.dumps(groups), flush=True)


def _row_groups(path: str, column: str) -> list[list[Any]]:
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(path)
    groups: list[list[Any]] = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(i) for i in range(group.num_columns)]
        chunks = [chunk for chunk in chunks if chunk.path_in_schema == column]
        offsets = [chunk.dictionary_page_offset for chunk in chunks if chunk.has_dictionary_page]
        size = sum(chunk.total_uncompressed_size for chunk in chunks)
        groups.append([group.num_rows, size, offsets[0] if offsets else None])
    return groups


if __name__ == "__main__":
    _serve()
