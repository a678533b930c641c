"""Reads the prompts of `llm generate`."""

import codecs
import json
import sys
from pathlib import Path

from llm.errors import UserError


def read_prompts(prompt: str | None, file: str | None) -> list[str]:
    """Returns the prompts: one text, or the lines of a file; "-" is stdin for either.

    A line of a .jsonl holds {"prompt": ...}. A byte order mark, and the newline (or CR and newline) that ends a line or
    stdin, are not part of a prompt. Raises UserError if there is no prompt.
    """
    if file is None:
        return [_stdin().removesuffix("\n").removesuffix("\r") if prompt == "-" else prompt or ""]
    try:
        text = _stdin() if file == "-" else _decoded(Path(file).read_bytes(), file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; --prompts names a text file with one prompt a line") from None
    # Not splitlines: it also splits at U+2028 and form feeds, which a prompt may contain.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if not text.strip():
        raise UserError(f"{file}: empty; --prompts wants one prompt a line")
    if not file.endswith(".jsonl"):
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(json.loads(line)["prompt"])
            assert isinstance(prompts[-1], str)
        except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
            raise UserError(f'{file}:{number}: not an object {{"prompt": "..."}}') from None
    return prompts


def _stdin() -> str:
    # sys.stdin itself decodes by the locale, which need not be UTF-8.
    return _decoded(sys.stdin.buffer.read(), "stdin")


def _decoded(content: bytes, name: str) -> str:
    """Returns the text without its byte order mark. UTF-16 needs one."""
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        return content.decode("utf-16" if content.startswith(marks) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not valid UTF-8 at byte {error.start}") from None


def check_text(text: str, name: str) -> None:
    try:
        # Python turns invalid UTF-8 in an argument into lone surrogates, which cannot be encoded.
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not valid UTF-8 (character {error.start})") from None
