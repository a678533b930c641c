"""Keeps the memory of a training run on a CPU between its steps."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = -1


def keep_freed_memory() -> None:
    """Makes the allocator keep freed memory for later tensors, on Linux with glibc; elsewhere it does nothing.

    By default glibc returns a large tensor's memory to the system, which then has to clear the pages of the next one:
    that takes a third of a step's time. With this the resident set of the process stays at its peak.
    """
    # CDLL(None) is the process itself, which has its C library loaded already.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:  # musl does not have it
        # Blocks from mmap go back to the system as soon as they are freed, so none may come from there.
        mallopt(M_MMAP_MAX, 0)
        # The same memory then comes from the heap, whose free end glibc would give back.
        mallopt(M_TRIM_THRESHOLD, NEVER)
