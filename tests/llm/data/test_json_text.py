"""The string under a key comes out of a JSON object as json.loads gives it, however the object is cut."""

import json
from contextlib import nullcontext, suppress
from io import StringIO
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm.data.json_text import TooLong, TwoTexts, read_text

STRINGS = st.text(st.sampled_from('a"\\/\n\t\x00{}[],: \u2028é字🎉\ud83d\ude00u0d8'), max_size=12)
VALUES = st.recursive(
    st.one_of(STRINGS, st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["text", "text ", 'te"xt', "t"]), inner)
    ),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.sampled_from(["text", "t\\ext", "other", ""]), VALUES, max_size=4)


def read(line: str, cuts: list[int], limit: int = 10**6) -> str | None:
    """The text as the parts give it; None: there is none. ValueError: no JSON."""
    places = sorted({0, len(line), *(cut % (len(line) + 1) for cut in cuts)})
    rest = StringIO()
    parts = list(read_text((line[a:b] for a, b in pairwise(places)), "text", rest, limit))
    record = json.loads(rest.getvalue())
    there = isinstance(record, dict) and isinstance(record.get("text"), str)
    assert there or not parts or record.get("text") is not None
    return "".join(parts) if there else None


CUTS = st.lists(st.integers(0, 300), max_size=12)


@given(OBJECTS, CUTS, st.booleans(), st.sampled_from([None, 1]))
@example({"text": "\ud83d\ude00\ud83d"}, list(range(40)), True, None)
@settings(max_examples=300, deadline=None)
def test_the_text_is_that_of_json_loads(record: dict, cuts: list[int], ascii_only: bool, indent: int | None) -> None:
    line = json.dumps(record, ensure_ascii=ascii_only, indent=indent)
    text = json.loads(line).get("text")
    assert read(line, cuts) == (text if isinstance(text, str) else None)


@given(OBJECTS, CUTS, st.integers(0, 300), st.sampled_from(["", *'"\\{}[],:ux0', "\n", "\\u12", '"text":"x",']))
@example({"text": "x"}, [], 1, '"text":"x",')
@settings(max_examples=300, deadline=None)
def test_what_is_no_json_is_refused(record: dict, cuts: list[int], at: int, inserted: str) -> None:
    """Or says that the text comes twice, where json.loads takes the last."""
    line = json.dumps(record)
    at %= len(line)
    line = line[:at] + inserted + line[at + (not inserted) :]
    try:
        text = json.loads(line).get("text")
    except ValueError:
        with pytest.raises(ValueError, match=r".+"):
            read(line, cuts)
    else:
        with suppress(TwoTexts) if line.count('"text"') > 1 else nullcontext():
            assert read(line, cuts) == (text if isinstance(text, str) else None)


def test_what_stands_beside_the_text_has_a_limit_and_the_text_has_none() -> None:
    text, other = "x" * 10_000, "y" * 100
    assert read(json.dumps({"text": text}), [5000], limit=99) == text
    for line in (json.dumps({"text": text, "other": other}), json.dumps({"other": list(range(99)), "text": text})):
        with pytest.raises(TooLong):
            read(line, [], limit=99)
