"""Errors for users: one line that tells what was found, where, and the way out."""

import errno
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right. The message is one line: what was found, where, and the way out."""


class ReportedByRank0(UserError):
    """Rank 0 has raised the error and prints it; the other ranks end with exit code 1 and print nothing."""


def exit_code(run: Callable[[], None]) -> int:
    """Runs a command; turns an error that a user can put right into one line on stderr. Returns the exit code."""
    try:
        run()
    # Before UserError, of which it is a subclass.
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
    except KeyboardInterrupt:
        # The shells' code for a process that SIGINT has ended: 128 + 2.
        return 130
    return 0


def _fail(message: str) -> int:
    rank = os.environ.get("RANK", "0")
    # The ranks of a run mostly share one terminal or log.
    prefix = "error: " if rank == "0" else f"error on rank {rank}: "
    # Messages of libraries may have several lines; an error of ours is one.
    print(prefix + " ".join(message.split()), file=sys.stderr, flush=True)
    return 1


def _describe(error: OSError) -> str:
    where = error.filename if error.filename is not None else "I/O"
    # The os functions put the path there as the caller gave it.
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
    # An OSError made from text alone has neither strerror nor errno.
    return f"{where}: {error.strerror or error}{ways_out.get(error.errno or 0, '')}"
