"""Connects every rank of a run with rank 0, and nobody else.

The ranks know each other by a secret that they share: each side proves to the other that it has it, by an HMAC of what
the other has made up. So a connection of anything else, such as a port scan, takes no rank's place and ends no run.
"""

import contextlib
import hmac
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

CONNECT_SECONDS = 60
ANSWER_SECONDS = 10
"""Seconds that a new connection has to prove that it is a rank's."""
MAX_STRANGERS = 64
"""Unproven connections at a time, besides one for each rank. One more closes the oldest; a rank connects again."""
RANK_BYTES, CHALLENGE_BYTES, PROOF_BYTES = 4, 32, 32
# A rank's number, its challenge for rank 0, and its proof.
ANSWER_BYTES = RANK_BYTES + CHALLENGE_BYTES + PROOF_BYTES


def connect(rank: int, size: int, address: str, broadcast: Callable[[Any], Any]) -> dict[socket.socket, int]:
    """Returns {connection: the rank at its other end}: rank 0 has one with every rank, the others with rank 0.

    address: rank 0's host. broadcast: World.broadcast.

    Raises OSError if a rank does not come within CONNECT_SECONDS.
    """
    if rank > 0:
        port, secret = broadcast(None)
        return {_introduce((address, port), secret, rank): 0}
    # IPv4 or IPv6, as in the address that the other ranks connect to.
    family = socket.getaddrinfo(address, None)[0][0]
    with socket.create_server(("", 0), family=family, backlog=MAX_STRANGERS + size) as server:
        secret = secrets.token_bytes(32)
        # With port 0 the system has chosen, so the other ranks must be told.
        broadcast((server.getsockname()[1], secret))
        return {connection: other for other, connection in _admit(server, secret, size).items()}


def _admit(server: socket.socket, secret: bytes, size: int) -> dict[int, socket.socket]:
    """Returns {rank: its connection} for all ranks but 0."""
    admitted: dict[int, socket.socket] = {}
    # {connection: its challenge, the time until which it may answer, what it has answered}; the oldest first
    unproven: dict[socket.socket, tuple[bytes, float, bytes]] = {}
    end = time.monotonic() + CONNECT_SECONDS
    server.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)

        def close(connection: socket.socket) -> None:
            selector.unregister(connection)
            del unproven[connection]
            connection.close()

        while len(admitted) < size - 1:
            for key, _ in selector.select(1):
                if key.fileobj is server:
                    with contextlib.suppress(OSError):  # it may be gone already
                        connection, _ = server.accept()
                        connection.settimeout(ANSWER_SECONDS)
                        challenge = secrets.token_bytes(CHALLENGE_BYTES)
                        connection.sendall(challenge)  # waits for nobody: the buffer is empty
                        unproven[connection] = challenge, time.monotonic() + ANSWER_SECONDS, b""
                        selector.register(connection, selectors.EVENT_READ, connection)
                    continue
                connection = key.data
                challenge, latest, before = unproven[connection]
                data = receive(connection)
                answer = before + data
                unproven[connection] = challenge, latest, answer
                if not data or len(answer) > ANSWER_BYTES:
                    close(connection)
                elif len(answer) == ANSWER_BYTES:
                    said, proof = answer[:-PROOF_BYTES], answer[-PROOF_BYTES:]
                    if not hmac.compare_digest(proof, _prove(secret, b"rank", challenge, said)):
                        close(connection)
                        continue
                    selector.unregister(connection)
                    del unproven[connection]
                    with contextlib.suppress(OSError):
                        connection.sendall(_prove(secret, b"rank 0", said[RANK_BYTES:]))
                    rank = int.from_bytes(said[:RANK_BYTES])
                    if rank in admitted:  # the proof did not reach it, and it came again
                        admitted[rank].close()
                    admitted[rank] = connection
            now = time.monotonic()
            for connection, (_, latest, _) in list(unproven.items()):
                if now > latest or len(unproven) > MAX_STRANGERS + size:
                    close(connection)
            if now > end:
                missing = ", ".join(str(rank) for rank in range(1, size) if rank not in admitted)
                raise TimeoutError(f"of the ranks, {missing} did not come within {CONNECT_SECONDS} s")
        for connection in list(unproven):
            close(connection)
    return admitted


def _introduce(address: tuple[str, int], secret: bytes, rank: int) -> socket.socket:
    """Returns a connection to rank 0."""
    end = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            connection = socket.create_connection(address, timeout=ANSWER_SECONDS)
            challenge = _receive_all(connection, CHALLENGE_BYTES)
            said = rank.to_bytes(RANK_BYTES) + secrets.token_bytes(CHALLENGE_BYTES)
            connection.sendall(said + _prove(secret, b"rank", challenge, said))
            proof = _receive_all(connection, PROOF_BYTES)
            if hmac.compare_digest(proof, _prove(secret, b"rank 0", said[RANK_BYTES:])):
                return connection
            raise ConnectionError("what answers there is not rank 0")
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def _prove(secret: bytes, *said: bytes) -> bytes:
    return hmac.digest(secret, b"".join(said), "sha256")


def _receive_all(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        data = connection.recv(size - len(received))
        if not data:
            raise ConnectionError("rank 0 has closed the connection")
        received += data
    return received


def receive(connection: socket.socket) -> bytes:
    """Returns what has come; empty at the end of the connection."""
    try:
        return connection.recv(1 << 16)
    except OSError:
        return b""
