"""Errors for users: one line with the problem, its place and what to do."""

import errno
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

MAX_LINE = 4_000
"""Characters of an error."""

# What a terminal obeys instead of showing it: control characters, and those that turn the direction of text. Lone
# surrogates are bytes of file names that are not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Returns a text with control characters as escapes such as \\x1b, for everything that is printed for people.

    Newlines and tabs stay. Documents, names and models of other people may hold sequences that a terminal obeys.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """An error that the user can correct. The message is one line: the problem, its place and what to do."""


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be used. `what`: the problem and its place, without the way out."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; use another checkpoint")
        self.what = what


class ReportedByRank0(UserError):
    """Rank 0 raises and prints the error itself; the other ranks raise this one, print nothing and exit with code 1."""


STOPPED = 75
"""The exit code of a run that was stopped before its end and can go on: EX_TEMPFAIL of sysexits.h."""


def exit_code(run: Callable[[], int | None]) -> int:
    """Runs a command; prints an error that the user can correct as one line on stderr. Returns the exit code.

    run: returns the exit code of a success; None: 0.
    """
    try:
        return run() or 0
    # Before UserError, its base class.
    except ReportedByRank0:
        return 1
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # Python flushes stdout as it exits, which would print another BrokenPipeError.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(_describe(error))
    except ModuleNotFoundError as error:
        if str(error.name).startswith(("llm", "kernels")):
            raise
        return _fail(_describe_missing(error))
    except KeyboardInterrupt:
        # 128 + 2: the exit code of shells for a process that SIGINT has ended.
        return 130


def _fail(message: str) -> int:
    rank = os.environ.get("RANK", "0")
    # The ranks of a run usually share one terminal or log.
    prefix = "error: " if rank == "0" else f"error on rank {rank}: "
    # Messages of libraries may have several lines; our errors have one.
    print(prefix + _shortened(visible(" ".join(message.split()))), file=sys.stderr, flush=True)
    return 1


def _shortened(text: str) -> str:
    """A message may quote a value of any length; its end has the way out."""
    left_out = len(text) - MAX_LINE
    return text if left_out <= 0 else f"{text[: MAX_LINE // 2]} ({left_out:,} characters) {text[-MAX_LINE // 2 :]}"


def _describe_missing(error: ModuleNotFoundError) -> str:
    root = Path(__file__).resolve().parents[1]
    activate = root / ".venv" / "bin" / "activate"
    way_out = f"source {shlex.quote(str(activate))}" if activate.exists() else f"make setup, in {root}"
    return f"{sys.executable} has no package {error.name}, so the environment is not active or not whole: {way_out}"


def _describe(error: OSError) -> str:
    where = error.filename if error.filename is not None else "I/O"
    # The os functions store the path as the caller gave it, perhaps as bytes.
    if isinstance(where, bytes):
        where = where.decode(errors="replace")
    ways_out = {
        errno.ENOSPC: "; free some space or name another folder",
        errno.EDQUOT: "; free some space or name another folder",
        errno.EACCES: "; check its permissions or name another folder",
        errno.EPERM: "; check its permissions or name another folder",
        errno.EROFS: "; name a folder that can be written",
        errno.EISDIR: "; a file is due here",
        errno.ENOTDIR: "; a folder is due here",
    }
    # An OSError that was made from a text has neither strerror nor errno.
    return f"{where}: {error.strerror or error}{ways_out.get(error.errno or 0, '')}"
