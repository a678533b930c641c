"""Keeps the memory of a training run on a CPU between its steps."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = -1


def keep_freed_memory() -> None:
    """Makes the allocator keep freed memory for later tensors, on Linux with glibc; elsewhere it does nothing.

    By default glibc returns the memory of a large tensor to the system, which then clears the pages of the next tensor.
    That takes a third of a step's time. With this function the resident set of the process stays at its peak.
    """
    # CDLL(None) is the process itself, which has already loaded its C library.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:  # musl does not have it
        # Blocks from mmap go back to the system when they are freed, so mmap must not be used.
        mallopt(M_MMAP_MAX, 0)
        # The memory then comes from the heap; glibc must not return the free end of the heap.
        mallopt(M_TRIM_THRESHOLD, NEVER)
