"""Answers signals at once, from a thread.

Python runs its handlers in the main thread, and not before that leaves a call into C++, such as a long step or the
training of a tokenizer. The line for the user, and the end of a process that is stuck, must not wait for it.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llm import launchers

GRACE_SECONDS = 3.0
"""Seconds after Ctrl-C in which the main thread can end by itself. After that the process is ended: whatever was being
written has a temporary name, as after a kill."""
INTERRUPTED = 128 + signal.SIGINT
"""The exit code of shells for a process that SIGINT has ended."""


@contextmanager
def answering(answer: Callable[[int], None]) -> Iterator[None]:
    """Inside the block, calls answer(signal's number) in a thread for each signal that has a Python handler."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may do this, and handle signals
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def wait() -> None:
        with reader:
            while number := reader.recv(1):
                answer(number[0])

    thread = threading.Thread(target=wait, name="answering signals", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()  # ends the thread
        # The main thread may be here before the thread has answered, and end the process.
        thread.join(GRACE_SECONDS)


@contextmanager
def ended_by_ctrl_c(what_next: str) -> Iterator[threading.Event]:
    """Answers Ctrl-C inside the block with a line, and ends the process GRACE_SECONDS later if the block goes on.

    what_next: how the user can go on. Yields an event that Ctrl-C sets.
    """
    interrupted, left = threading.Event(), threading.Event()

    def answer(number: int) -> None:
        # A launcher repeats what its process group was sent.
        if number != signal.SIGINT or interrupted.is_set():
            return
        interrupted.set()
        if launchers.rank() == 0:
            print(f"interrupted: {what_next}", file=sys.stderr, flush=True)
        end_unless(left)

    with answering(answer):
        try:
            yield interrupted
        finally:
            left.set()


@contextmanager
def deferred() -> Iterator[None]:
    """Raises KeyboardInterrupt only after the block. In an import of C++, such as torch, it may abort the process."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    pending: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pending:
        raise KeyboardInterrupt


def end_unless(left: threading.Event, last: Callable[[], None] = lambda: None) -> None:
    """Ends the process if the main thread has not left its block after GRACE_SECONDS; before that calls last()."""
    if not left.wait(GRACE_SECONDS):
        last()
        os._exit(INTERRUPTED)
