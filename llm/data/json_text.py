"""The string under one key of a JSON object, read as a stream: it is never held whole."""

import json
import re
from collections.abc import Iterator
from io import StringIO

_MARK = re.compile(r'["{}\[\],:]')
# The inside of a string, but for an escape at its end that is not all there: a surrogate's other half may be to come.
_INSIDE = re.compile(
    r'(?:[^"\\]++|\\u[dD][89abAB]..(?=[^\\]|\\[^u]|\\u.{4})|\\u(?![dD][89abAB]).{4}|\\[^u])*+', re.DOTALL
)


class TooLong(Exception):
    """What stands beside the string is more than the limit."""


class TwoTexts(ValueError):
    """The key comes twice with a string."""


def read_text(chunks: Iterator[str], key: str, rest: StringIO, limit: int) -> Iterator[str]:
    """Yields the string under `key` of an object, in parts; all else goes to `rest`, with "" in the string's place.

    Whether that is JSON is left to the caller: nothing but its strings and brackets has been looked at. Where the key
    holds no string, nothing is yielded.

    Args:
        chunks: the object, cut anywhere.
        limit: characters that `rest` may hold.

    Raises TooLong; ValueError: a bad escape or a control character in the string; TwoTexts.
    """
    depth, before, name = 0, "", ""  # the last mark and key of the object itself, not of what it holds
    inside = wanted = found = False  # a string; the one that is asked for
    buffer = raw = ""  # what is not understood yet; a string that is not asked for
    for chunk in chunks:
        buffer, at = buffer + chunk, 0
        while at < len(buffer):
            if inside:
                ended = _INSIDE.match(buffer, at)
                assert ended is not None
                part, at = buffer[at : ended.end()], ended.end()
                if wanted:
                    yield json.loads(f'"{part}"')
                else:
                    rest.write(part)
                    raw += part
                if not buffer.startswith('"', at):
                    break
                if depth == 1 and before != ":":
                    name = json.loads(f'"{raw}"')
                inside = False
                at += 1
                rest.write('"')
            else:
                mark = _MARK.search(buffer, at)
                end = mark.end() if mark else len(buffer)
                rest.write(buffer[at:end])
                at = end
                if mark and mark[0] == '"':
                    inside, raw = True, ""
                    wanted = depth == 1 and before == ":" and name == key
                    if wanted and found:
                        raise TwoTexts(f'two strings under "{key}"')
                    found |= wanted
                elif mark:
                    depth += (mark[0] in "{[") - (mark[0] in "}]")
                    before = mark[0] if depth == 1 else before
            if rest.tell() > limit:
                raise TooLong
        buffer = buffer[at:]
