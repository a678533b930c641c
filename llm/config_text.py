"""How the text of a config is read: a JSON file with the usual mistakes, and values as people write them."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from llm.errors import UserError

MAX_BYTES = 1 << 20
"""A larger file is no config, and parsing it could take all memory."""
MAX_DEPTH = 32
MAX_DIGITS = 1_000
MAX_SHOWN = 80
"""Characters of a value in a message."""

PYTHON_WORDS = {"True": True, "False": False, "None": None}
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30}
QUANTITY = re.compile(
    r"(?=[+-]?\.?\d)([+-]?(?:\d{1,3}(?:,\d{3})+|\d[\d_]*)?)(\.\d*)?(e[+-]?\d+)?([kmbgt]|[kmg]i)?",
    re.IGNORECASE | re.ASCII,
)


def is_url(path: str) -> bool:
    """Whether a path is that of an object store, such as s3://bucket/shards."""
    return re.match("[a-z][a-z0-9+.:-]*://", path, re.IGNORECASE) is not None


class _Object(dict[str, Any]):
    """An object of a JSON file."""

    repeated: list[str]
    """The keys that it has more than once. The last value of each counts."""

    @classmethod
    def of(cls, pairs: list[tuple[str, Any]]) -> "_Object":
        found = cls(pairs)
        found.repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        return found


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file with one object. Raises UserError that names the place and the usual mistake there."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; name a JSON file such as {path}/125m.json") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES:,} bytes; a config is a small JSON file")
    try:
        # Editors on Windows also write UTF-16, and a byte order mark before UTF-8.
        text = content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; a config is JSON text") from None
    try:
        tree = json.loads(text, parse_float=_number, object_pairs_hook=_Object.of)
    except json.JSONDecodeError as error:
        at, what = _explain(text, error)
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        raise UserError(f"{path}:{line}:{column}: not JSON: {what}") from None
    except RecursionError:
        raise UserError(f"{path}: nested more than {MAX_DEPTH} levels deep") from None
    except ValueError:  # Python converts no integer of thousands of digits
        raise UserError(f"{path}: a number has too many digits") from None
    if not isinstance(tree, _Object):
        raise UserError(f"{path}: a config is a JSON object with sections such as model and train")
    for problem in beyond_bounds(tree):
        raise UserError(f"{path}: {problem}")
    if repeated := list(_repeated_keys(tree)):
        raise UserError(f"{path}: {', '.join(repeated)}: more than once in one object; keep one of them")
    return tree


def _explain(text: str, error: json.JSONDecodeError) -> tuple[int, str]:
    """Returns where a text stops being JSON, and the usual mistake there; else Python's own message."""
    before, rest = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    # Python 3.13 and newer point at the comma, older ones behind it.
    if before.endswith(",") and rest[:1] in ("}", "]"):
        return len(before) - 1, "a trailing comma; remove it"
    if re.match(r",\s*[}\]]", rest):
        return error.pos, "a trailing comma; remove it"
    if word := re.match(r"(True|False|None)\b", rest):
        return error.pos, f"{word[0]}; JSON writes {json.dumps(PYTHON_WORDS[word[0]])}"
    if rest.startswith(("//", "/*", "#")):
        return error.pos, "a comment; JSON has none"
    if rest.startswith("'"):
        return error.pos, "a single quote; JSON has only double quotes"
    return error.pos, error.msg if text.strip() else "the file is empty"


def _repeated_keys(tree: Any, *where: str) -> Iterator[str]:
    if isinstance(tree, _Object):
        yield from (".".join([*where, key]) for key in tree.repeated)
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield from _repeated_keys(value, *where, str(key))


def beyond_bounds(tree: Any) -> Iterator[str]:
    """Yields what no key can hold: values nested too deeply, and integers that do not fit into 64 bits."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while waiting:  # not by recursion, which deep nesting would end
        where, value = waiting.pop()
        if len(where) > MAX_DEPTH:
            yield f"{'.'.join(where[:2])}: nested more than {MAX_DEPTH} levels deep"
            return
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            yield f"{'.'.join(where)} = {shown(value)}: does not fit into 64 bits"
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        waiting.extend(((*where, str(key)), entry) for key, entry in entries)


def read_value(text: str, annotation: Any = Any) -> Any:
    """Takes the text of an override as its key's type suggests: True as true, None as null, 1M as 1000000.

    A list of names may be written a,b. Any other text is JSON, or stays a text, which validation then reports.
    """
    if text[:1] == '"' and isinstance(word := read_word(text), str):
        text = word
    kinds = get_args(annotation) if get_origin(annotation) in (UnionType, Union) else (annotation,)
    if NoneType in kinds and text.lower() in ("none", "null"):
        return None
    for kind in kinds:
        if get_origin(kind) is Literal:
            for choice in get_args(kind):
                if str(choice).lower() == text.lower():
                    return choice
        elif kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        elif kind in (int, float) and (number := _quantity(text)) is not None:
            return number
        elif kind is str:
            return text
        elif get_origin(kind) is list and text.lower() in ("none", "null"):
            return []
        elif get_origin(kind) is list and text[:1] not in ("[", "{"):
            (entry,) = get_args(kind)
            if get_origin(entry) is Literal:
                return [read_value(part.strip(), entry) for part in text.split(",") if part.strip()]
            if entry is str:  # one text, which may have commas
                return [text] if text else []
    return read_word(text)


def _quantity(text: str) -> int | float | None:
    """Parses 200_000_000, 1,000,000, 2.5e9, 1M, 4k and 4Ki; None for any other text."""
    match = QUANTITY.fullmatch(text)
    if match is None or len(text) > MAX_DIGITS:
        return None
    digits, fraction, exponent, unit = match.groups(default="")
    digits = digits.replace("_", "").replace(",", "")
    if not fraction and not exponent:
        return int(digits) * UNITS[unit.lower()]
    number = _number(digits + fraction + exponent)
    # By Decimal, because 2.3 * 1_000_000 is no integer.
    return _number(f"{Decimal(str(number)) * UNITS[unit.lower()]:e}") if unit else number


def read_word(text: str) -> Any:
    """Parses an integer, also one such as 200_000_000, or else JSON; other text stays text."""
    if text in PYTHON_WORDS:
        return PYTHON_WORDS[text]
    # Before JSON, which does not know 1_000. ValueError: also an integer of thousands of digits.
    for parse in (int, partial(json.loads, parse_float=_number)):
        with contextlib.suppress(ValueError):
            return parse(text)
    return text


def _number(text: str) -> float | int:
    """Parses a JSON float. 2.5e9 becomes an integer, so that it can be a number of tokens."""
    number = float(text)
    return int(number) if "e" in text.lower() and number.is_integer() else number


def shown(value: Any) -> str:
    """Returns a value as JSON for a message, a long one shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]}... ({len(text):,} characters)"
