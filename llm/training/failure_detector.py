"""Detects that another process of the run has ended, even while this process waits in some call.

If a process is gone, NCCL waits for it until a timeout of many minutes, in a call that no signal interrupts; gloo
raises an error without a reason. So every rank has a TCP connection to rank 0, and a thread that waits for the end of
the connection. The system closes it when the process dies; if the machine dies, TCP's keepalive does so within half a
minute. A rank that fails first sends the reason.
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
"""Seconds that the main thread has to fail by itself after another rank is lost, before its process is ended."""
ATTRIBUTION_SECONDS = 2
"""Seconds that an exception waits for the message that the end of another rank is its cause."""
# Seconds until the first probe, seconds between probes, lost probes: 10 + 4 * 5 = 30 seconds in all.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
# A connection that ends without any byte means a killed process, so a good end sends one byte.
GOODBYE = b"\0"


class FailureDetector:
    """Watches the other processes of a run. Making one is collective.

    At the end of the block, it tells the others that this process ends well, or why it fails.

    Attributes:
        on_lost: called in a thread with the rank that ended and a line about it. After that the process is ended,
            unless its main thread leaves the block by itself.
    """

    def __init__(self, world: World) -> None:
        self.on_lost: Callable[[int, str], None] | None = None
        self._rank = world.rank
        self.connections: dict[socket.socket, int] = {}  # {connection: rank at its other end}
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
            # A daemon, because waiting for the others must not keep this process alive.
            threading.Thread(target=self._watch, name="failure detector", daemon=True).start()

    @contextlib.contextmanager
    def attributing(self) -> Iterator[None]:
        """Turns an exception that was caused by the end of another rank into a UserError that names this rank."""
        try:
            yield
        # This exception has its own reason.
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
            # IPv4 or IPv6, as in the address that the other ranks connect to.
            family = socket.getaddrinfo(address, None)[0][0]
            with socket.create_server(("", 0), family=family, backlog=world.size) as server:
                # With port 0 the system has chosen, so the other ranks must be told.
                world.broadcast(server.getsockname()[1])
                # accept would wait for ever for a rank that has died in the meantime.
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
            # The limit was for connecting; from now on silence is normal.
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
            # The other ranks are connected only to rank 0, so rank 0 forwards the message.
            self._tell(self._what)
            os._exit(1)  # the main thread may wait in NCCL, where no exception reaches it

    def _tell(self, why: str) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):  # that rank may be gone too
                connection.sendall(" ".join(why.split()).encode()[:1000] or GOODBYE)
                # Ends the stream to the other side; this side can still receive.
                connection.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Set first, so that the thread does not end the process while it leaves the block.
        self._leaving.set()
        if self._lost.is_set():
            self._told.wait()  # otherwise the thread could end with the process before on_lost has returned
        name = "" if isinstance(error, UserError) or error is None else f"{type(error).__name__}: "
        self._tell("" if error is None else f"{name}{error}")


def _last_word(connection: socket.socket) -> bytes:
    """Returns all that the other rank sends until its end; empty if it ended without a message."""
    received = b""
    with contextlib.suppress(OSError):
        while chunk := connection.recv(1024):
            received += chunk
    return received
