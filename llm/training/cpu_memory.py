"""The memory of a training run on a CPU, kept between its steps."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = -1


def keep_freed_memory() -> None:
    """Has the allocator keep what tensors free, for the next ones: on Linux with glibc, elsewhere it does nothing.

    By default glibc gives a large tensor's memory back when it is freed, and the system clears the pages of the next,
    which takes a third of a step's time. From here on the resident set of the process stays at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:  # musl has none
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, NEVER)
