"""Detects that another process of the run has ended, whatever call this process waits in.

When a process is gone, NCCL waits for it until a timeout of many minutes, in a call that no signal interrupts; gloo
raises an error without a reason. So every rank keeps a TCP connection to rank 0 and has a thread that waits for the
connection's end. The system closes it when the process dies, TCP's keepalive within half a minute when the machine
does. A rank that fails sends the reason first.
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
"""When another rank is lost, the main thread has so long to fail by itself before its process is ended."""
ATTRIBUTION_SECONDS = 2
"""An exception waits so long for the news that the end of another rank is its cause."""
# Seconds until the first probe, seconds between probes, lost probes: 10 + 4 * 5 = 30 seconds in all.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
# A connection that ends without any byte is a process that was killed, so a good end needs one.
GOODBYE = b"\0"


class FailureDetector:
    """Watches the other processes of a run. Making one is collective.

    As a context manager it tells the others, on leaving the block, that this process ends well, or why it fails.

    Attributes:
        on_lost: called in a thread with the rank that ended and one line about it. The process is ended afterwards
            unless its main thread leaves the block by itself.
    """

    def __init__(self, world: World) -> None:
        self.on_lost: Callable[[int, str], None] | None = None
        self._rank = world.rank
        self.connections: dict[socket.socket, int] = {}  # the rank at the other end of each connection
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
            # A daemon: waiting for the others must not keep this process alive.
            threading.Thread(target=self._watch, name="failure detector", daemon=True).start()

    @contextlib.contextmanager
    def attributing(self) -> Iterator[None]:
        """Turns an exception that the end of another rank has caused into a UserError that names this rank."""
        try:
            yield
        # This one states its own reason.
        except UserError:
            raise
        except Exception as error:
            # gloo raises at once, perhaps before the thread has read the reason from the connection.
            if self.connections and self._lost.wait(ATTRIBUTION_SECONDS):
                raise UserError(self._what) from error
            raise

    def _connect(self, world: World) -> None:
        address = os.environ["MASTER_ADDR"]
        if world.rank == 0:
            # IPv4 or IPv6, as the address that the other ranks connect to.
            family = socket.getaddrinfo(address, None)[0][0]
            with socket.create_server(("", 0), family=family, backlog=world.size) as server:
                # Port 0 has let the system choose, so the others have to be told.
                world.broadcast(server.getsockname()[1])
                # accept would wait forever for a rank that has died since.
                server.settimeout(60)
                for _ in range(world.size - 1):
                    connection, _ = server.accept()
                    # TCP may deliver the four bytes in parts; MSG_WAITALL waits for all.
                    self.connections[connection] = int.from_bytes(connection.recv(4, socket.MSG_WAITALL))
        else:
            connection = socket.create_connection((address, world.broadcast(None)), timeout=60)
            connection.sendall(world.rank.to_bytes(4))
            self.connections[connection] = 0
        for connection in self.connections:
            # The limit was for connecting; from here on silence is normal.
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEPALIVE.items():
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def _watch(self) -> None:
        # A copy, because the main thread goes through all connections in `_tell`.
        waiting = dict(self.connections)
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
        # After _what, which another thread reads as soon as the event is set.
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
            # Ranks are connected to rank 0 only, so rank 0 passes the news on to the others.
            self._tell(self._what)
            os._exit(1)  # the main thread may wait in NCCL, where no exception reaches it

    def _tell(self, why: str) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):  # that rank may be gone, too
                connection.sendall(" ".join(why.split()).encode()[:1000] or GOODBYE)
                # Ends what the other side reads; this side can still receive.
                connection.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # First, so that the thread does not end the process while it leaves.
        self._leaving.set()
        if self._lost.is_set():
            self._told.wait()  # else the thread would end with the process before on_lost has returned
        name = "" if isinstance(error, UserError) or error is None else f"{type(error).__name__}: "
        self._tell("" if error is None else f"{name}{error}")


def _last_word(connection: socket.socket) -> bytes:
    """Returns all that the other rank sends until its end; empty where it ended without a word."""
    received = b""
    with contextlib.suppress(OSError):
        while chunk := connection.recv(1024):
            received += chunk
    return received
