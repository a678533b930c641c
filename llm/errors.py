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
    except ReportedByRank0:
        return 1
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(_describe(error))
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(message: str) -> int:
    rank = os.environ.get("RANK", "0")
    prefix = "error: " if rank == "0" else f"error on rank {rank}: "
    print(prefix + " ".join(message.split()), file=sys.stderr, flush=True)
    return 1


def _describe(error: OSError) -> str:
    where = error.filename if error.filename is not None else "I/O"
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
    return f"{where}: {error.strerror or error}{ways_out.get(error.errno or 0, '')}"
