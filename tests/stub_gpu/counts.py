"""What the stub GPU counted in this process: kernels, copies, waits of the host, collectives."""

import ctypes
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

LAUNCHES = ("kernel", "triton", "product")
PAGEABLE = ("pageable_to_device", "device_to_pageable")
"""Copies that hold up the host, because its memory is not pinned."""

_Report = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


def _library() -> ctypes.CDLL:
    """The stub, which LD_PRELOAD brought into this process."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "stub_gpu_counts"):
        raise RuntimeError("this process has no stub GPU: run it with `make stub-gpu`")
    library.stub_gpu_counts.restype = ctypes.c_char_p
    return library


@dataclass
class Counts:
    calls: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    """By kind (library/stub.hpp) and name: the number of calls, and their bytes."""

    where: Counter[str] = field(default_factory=Counter)
    """Waits of the host and copies of pageable memory, each with the functions of this project that led to it."""

    def number(self, *kinds: str) -> int:
        return sum(number for kind in kinds for number, _ in self.calls[kind].values())

    @property
    def launches(self) -> int:
        return self.number(*LAUNCHES)


@contextmanager
def counting() -> Iterator[Counts]:
    """Counts what is called inside. The result is filled at the end."""
    library, counts = _library(), Counts()
    report = _Report(lambda what: counts.where.update([f"{what.decode()}: {_callers()}"]))
    library.stub_gpu_reset()
    library.stub_gpu_on_wait(report)
    try:
        yield counts
    finally:
        library.stub_gpu_on_wait(_Report())
        found = json.loads(library.stub_gpu_counts())
        counts.calls = {kind: {name: tuple(pair) for name, pair in names.items()} for kind, names in found.items()}


def _callers(at_most: int = 3) -> str:
    """The innermost functions of this project that are being executed, outermost first."""
    root, callers = os.getcwd() + os.sep, list[str]()
    frame = sys._getframe(1)
    while frame is not None and len(callers) < at_most:
        file = frame.f_code.co_filename
        if file.startswith((root + "llm", root + "kernels", root + "benchmarks")):
            callers.append(f"{file.removeprefix(root)} {frame.f_code.co_qualname}")
        frame = frame.f_back  # type: ignore[assignment]
    return " > ".join(reversed(callers))
