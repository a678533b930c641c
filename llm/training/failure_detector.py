"""Noticing that another process of the run has ended, whatever this one waits in.

NCCL waits for a peer that is gone until a timeout of many minutes, in a call that no signal reaches; gloo raises and
knows no reason. So every rank holds a TCP connection to rank 0, and a thread that waits for its end: the system
closes it when the process dies, and TCP's keepalive within half a minute when the machine does. A rank that fails
says why first.
"""

import contextlib
import os
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from llm.errors import UserError
from llm.world import World

GRACE_SECONDS = 5
"""How long the main thread has, once a peer is lost, to fail by itself before the process is ended for it."""
ATTRIBUTION_SECONDS = 2
"""How long an exception waits for the news that a peer's end is its cause."""
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
GOODBYE = b"\0"


class Peers:
    """The other processes of a run. Making one is collective; leaving it says goodbye, or why this process fails.

    Attributes:
        on_lost: called in a thread with the rank that ended and one line about it; the process is ended after it
            unless its main thread leaves by itself.
    """

    def __init__(self, world: World) -> None:
        self.on_lost: Callable[[int, str], None] | None = None
        self._rank = world.rank
        self._ranks: dict[socket.socket, int] = {}  # at the other ends
        self._lost, self._told, self._leaving = threading.Event(), threading.Event(), threading.Event()
        self._what = ""
        if world.size > 1:
            try:
                self._connect(world)
            except OSError as error:
                raise UserError(
                    f"rank {world.rank} and rank 0 at {os.environ['MASTER_ADDR']} cannot connect ({error}); open all "
                    "ports between the nodes, as NCCL and gloo need them, too"
                ) from None
            threading.Thread(target=self._watch, name="peers", daemon=True).start()

    @contextlib.contextmanager
    def attributing(self) -> Iterator[None]:
        """Turns the exception that a peer's end causes into a UserError that names it."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if self._ranks and self._lost.wait(ATTRIBUTION_SECONDS):
                raise UserError(self._what) from error
            raise

    def _connect(self, world: World) -> None:
        address = os.environ["MASTER_ADDR"]
        if world.rank == 0:
            family = socket.getaddrinfo(address, None)[0][0]
            with socket.create_server(("", 0), family=family, backlog=world.size) as server:
                world.broadcast(server.getsockname()[1])
                server.settimeout(60)
                for _ in range(world.size - 1):
                    connection, _ = server.accept()
                    self._ranks[connection] = int.from_bytes(connection.recv(4, socket.MSG_WAITALL))
        else:
            connection = socket.create_connection((address, world.broadcast(None)), timeout=60)
            connection.sendall(world.rank.to_bytes(4))
            self._ranks[connection] = 0
        for connection in self._ranks:
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEPALIVE.items():
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def _watch(self) -> None:
        waiting = dict(self._ranks)
        with selectors.DefaultSelector() as selector:
            for connection in waiting:
                selector.register(connection, selectors.EVENT_READ, connection)
            while waiting:
                for key, _ in selector.select():
                    rank, word = waiting.pop(key.data), _last_word(key.data)
                    if word != GOODBYE:
                        self._lose(rank, word.decode(errors="replace"))
                        return
                    selector.unregister(key.data)

    def _lose(self, rank: int, why: str) -> None:
        about = f"failed: {why}" if why else "ended without a word: it was killed, or crashed"
        self._what = f"rank {rank} {about}; start again to go on from the last checkpoint"
        self._lost.set()
        try:
            if self.on_lost is not None:
                self.on_lost(rank, self._what)
        except OSError as error:
            print(f"{self._what}, but that could not be noted: {error}", file=sys.stderr, flush=True)
        finally:
            self._told.set()
        if not self._leaving.wait(GRACE_SECONDS):
            print(f"error on rank {self._rank}: {self._what}", file=sys.stderr, flush=True)
            self._say(self._what)
            os._exit(1)  # the main thread may wait for a GPU that never answers

    def _say(self, why: str) -> None:
        for connection in self._ranks:
            with contextlib.suppress(OSError):  # that peer is gone itself
                connection.sendall(" ".join(why.split()).encode()[:1000] or GOODBYE)
                connection.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        if self._lost.is_set():
            self._told.wait()  # the thread would end with the process
        name = "" if isinstance(error, UserError) or error is None else f"{type(error).__name__}: "
        self._say("" if error is None else f"{name}{error}" or "rank 0 says why")


def _last_word(connection: socket.socket) -> bytes:
    """All that a peer says until its end; empty where it just ended."""
    said = b""
    with contextlib.suppress(OSError):
        while part := connection.recv(1024):
            said += part
    return said
