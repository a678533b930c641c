"""Cuts JSON that is no JSON lines into its records: the elements of an array, or objects that span lines.

Only strings and brackets are looked at; each record is parsed later, as a line of a .jsonl is. So one bad record is
dropped alone. An incremental parser such as ijson ends there, and replaces half a surrogate pair by "?".
"""

import re
from collections.abc import Callable, Iterator

_WHITE = b" \t\r\n"
# Possessive (*+), because a group that may be taken back would store a state for each escape of a long string.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]', re.DOTALL)


class Unfinished(ValueError):
    """The contents end inside a record, or a record is longer than the limit; the message says which."""


def split_records(
    read: Callable[[int], bytes], limit: int, *, offset: int = 0, in_array: bool = False, size: int = 1 << 20
) -> Iterator[tuple[int, bool, bytes]]:
    """Yields (offset of a record in the contents, whether it is an element of an array, the record).

    Args:
        read: returns up to so many of the next bytes; b"" at the end.
        limit: bytes of a record; also bounds the memory.
        offset, in_array: of an earlier record, to begin there.
        size: bytes to read at a time.

    Raises Unfinished.
    """
    data = read(size)
    at = 0  # in `data`: the beginning of the record
    scanned = 0  # up to where `data` was looked at
    depth = 1 if in_array else 0  # open brackets
    while True:
        while token := _TOKEN.search(data, scanned):
            # A string's end may be in the next part: what looks like a token behind its first quote is none.
            quote = data.find(b'"', scanned, token.start())
            if quote >= 0:
                scanned = quote
                break
            scanned = token.end()
            kind = data[token.start()]
            if kind == ord("[") and depth == 0 and not data[at : token.start()].strip(_WHITE + b","):
                in_array, depth, at = True, 1, scanned
            elif kind in b"[{":
                depth += 1
            elif kind in b"]}":
                depth -= 1
                if depth <= 0:
                    depth = 0
                    end = token.start() if in_array else scanned
                    if data[at:end].strip(_WHITE):
                        yield offset + at, in_array, data[at:end].strip(_WHITE + b"," * (not in_array))
                    in_array, at = False, scanned
            elif kind == ord(",") and depth == 1 and in_array:
                yield offset + at, in_array, data[at : token.start()].strip(_WHITE)
                at = scanned
        else:
            # Without a token, a quote begins a string that is not whole yet; nothing before it matters.
            quote = data.find(b'"', scanned)
            scanned = quote if quote >= 0 else len(data)
        if len(data) - at > limit:
            raise Unfinished(f"a record has more than {limit:,} bytes")
        # As much again as is held, so that a long string is looked at a few times, not once a part.
        more = read(max(size, len(data) - scanned))
        if not more:
            break
        data, offset, scanned, at = data[at:] + more, offset + at, scanned - at, 0
    if in_array or data[at:].strip(_WHITE + b","):
        raise Unfinished("the contents end inside a record")
