"""Detects that another process of the run has ended or hangs, even while this process waits in some call.

If a process is gone, NCCL waits for it until a timeout of many minutes, in a call that no signal interrupts; gloo
raises an error without a reason. So every rank has a TCP connection to rank 0, and a thread that reads from it. The
system closes the connection when the process dies; if the machine dies, TCP's keepalive does so within half a minute.
A rank that fails first sends the reason.

A process that hangs keeps its connection. So each thread also sends heartbeats, with the step and the phase of its main
thread. A long step is no hang, because the heartbeats go on. A rank hangs if none comes for train.hang_minutes (it is
stopped, or its machine is), or if they say that it has waited for its disk for so long.
"""

import contextlib
import faulthandler
import json
import os
import selectors
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llm.errors import UserError, visible
from llm.training import peers
from llm.world import World

GRACE_SECONDS = 5
"""Seconds that the main thread has to fail by itself after another rank is lost, before its process is ended."""
ATTRIBUTION_SECONDS = 2
"""Seconds that an exception waits for the message that the end of another rank is its cause."""
NOTING_SECONDS = 30
"""Seconds that `on_lost` has. On a disk that does not answer it may never return."""
BEAT_SECONDS = 1.0
"""Seconds between two heartbeats at most."""
PATIENCE_SECONDS = 30
"""Seconds without a heartbeat after which a line says so."""
SEND_SECONDS = 10
WAITS_FOR_DISK = ("data", "save")
"""Phases in which a rank that reads and writes nothing hangs. In others it computes, however long that takes."""
STACKS_FILE = "hang.txt"
# Seconds until the first probe, seconds between probes, lost probes: 10 + 4 * 5 = 30 seconds in all.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
GO_ON = "start again to go on from the last checkpoint"


class FailureDetector:
    """Watches the other processes of a run. Making one is collective.

    At the end of the block, it tells the others that this process ends well, or why it fails.

    Args:
        hang_minutes: how long a rank may give no sign of life.
        run_dir: where the stacks of a run that hangs are written.
        end_process: ends this process with an exit code, from the thread.

    Attributes:
        where: returns the step and the phase of the main thread, for the heartbeats.
        on_lost: called in a thread with the rank that ended and a line about it. After that the process is ended,
            unless its main thread leaves the block by itself.
        hangs: whether that rank hangs, and has not ended.
    """

    newest: "FailureDetector | None" = None

    def __init__(
        self, world: World, hang_minutes: float, run_dir: Path, end_process: Callable[[int], object] = os._exit
    ) -> None:
        self.on_lost: Callable[[int, str], None] | None = None
        self.where: Callable[[], tuple[int, str]] = lambda: (0, "set-up")
        self._rank, self._minutes, self._run_dir, self._end_process = world.rank, hang_minutes, run_dir, end_process
        self.connections: dict[socket.socket, int] = {}  # {connection: rank at its other end}
        self._beats: dict[int, tuple[int, str, float]] = {}  # {rank: step, phase, seconds that it waits for its disk}
        self._leaving_ranks: set[int] = set()
        self._lost, self._told, self._leaving = threading.Event(), threading.Event(), threading.Event()
        self._sending = threading.Lock()
        self._what, self._whose, self.hangs = "", 0, False
        self._ended = threading.Event()  # all other processes have
        FailureDetector.newest = self
        if world.size == 1:
            self._ended.set()
            return
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
        self.connections = peers.connect(world.rank, world.size, os.environ["MASTER_ADDR"], world.broadcast)
        for connection in self.connections:
            # For sending: a process that is stopped reads nothing, and its buffer may be full.
            connection.settimeout(SEND_SECONDS)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEPALIVE.items():
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def _watch(self) -> None:
        waiting = dict(self.connections)
        received = dict.fromkeys(waiting, b"")
        silent = dict.fromkeys(waiting.values(), 0.0)  # {rank: seconds since its last heartbeat}
        interval = min(BEAT_SECONDS, 60 * self._minutes / 4)
        beaten = counted = time.monotonic()
        stuck, before = 0.0, None
        with selectors.DefaultSelector() as selector:
            for connection in waiting:
                selector.register(connection, selectors.EVENT_READ, connection)
            while waiting:
                for key, _ in selector.select(interval):
                    connection, rank = key.data, waiting[key.data]
                    data = peers.receive(connection)
                    *messages, received[connection] = (received[connection] + data).split(b"\n")
                    for message in messages:
                        if self._take(rank, message):
                            return
                    silent[rank] = 0.0
                    if not data:
                        if rank not in self._leaving_ranks:
                            what = f"rank {rank} ended without a word: it was killed, or crashed; {GO_ON}"
                            self._lose(rank, what)
                            return
                        selector.unregister(connection)
                        del waiting[connection], silent[rank]
                now = time.monotonic()
                # At most two intervals, because this process, too, may have been stopped with all others.
                elapsed, counted = min(now - counted, 2 * interval), now
                step, phase = self.where()
                now_at = (step, phase, _transferred_bytes())
                stuck, before = stuck + elapsed if phase in WAITS_FOR_DISK and now_at == before else 0.0, now_at
                self._beats[self._rank] = (step, phase, stuck)
                if now - beaten >= interval and not self._leaving.is_set():
                    beaten = now
                    answering = [each for each, rank in waiting.items() if silent[rank] < PATIENCE_SECONDS]
                    self._send({"beat": self._beats[self._rank]}, answering)
                if self._finds_hang(silent, elapsed):
                    return
        self._ended.set()

    def _take(self, rank: int, message: bytes) -> bool:
        """Takes a message; returns whether it says that a rank is lost."""
        try:
            ((kind, value),) = json.loads(message).items()
        except ValueError:  # the rest of a heartbeat that was not sent as a whole
            return False
        if kind == "beat":
            self._beats[rank] = tuple(value)
        elif kind == "goodbye":
            self._leaving_ranks.add(rank)
        elif kind == "failed":
            self._lose(rank, f"rank {rank} failed: {value}; {GO_ON}")
            return True
        elif kind == "lost":
            self._lose(*value)
            return True
        return False

    def _finds_hang(self, silent: dict[int, float], elapsed: float) -> bool:
        limit = 60 * self._minutes
        for rank in silent:
            silent[rank] += elapsed
            # Who has said goodbye sends no more heartbeats.
            if rank in self._leaving_ranks or self._leaving.is_set():
                continue
            if silent[rank] >= limit:
                self._lose(rank, self._describe_hang(rank, "gives no sign of life"), hangs=True)
                return True
            # One rank says so: of the others rank 0, of rank 0 rank 1.
            if silent[rank] >= PATIENCE_SECONDS > silent[rank] - elapsed and self._rank < 2:
                print(
                    f"waiting for rank {rank}: no sign of life for {PATIENCE_SECONDS} s, {self._last_seen(rank)}; "
                    f"the run ends after {self._minutes:g} minutes (train.hang_minutes)",
                    file=sys.stderr,
                    flush=True,
                )
        if self._rank == 0 and not self._leaving.is_set():
            for rank, (_, _, stuck) in self._beats.items():
                if stuck >= limit and rank not in self._leaving_ranks:
                    self._lose(rank, self._describe_hang(rank, "waits for its disk"), hangs=True)
                    return True
        return False

    def _describe_hang(self, rank: int, how: str) -> str:
        return (
            f"rank {rank} hangs: it {how} for {self._minutes:g} minutes (train.hang_minutes), {self._last_seen(rank)}; "
            f"what the ranks that answer were doing is in {self._run_dir / STACKS_FILE}; {GO_ON}"
        )

    def _last_seen(self, rank: int) -> str:
        if rank not in self._beats:
            return "last seen in the set-up"
        step, phase, _ = self._beats[rank]
        return f"last seen after step {step}, in {phase}"

    def _lose(self, rank: int, what: str, hangs: bool = False) -> None:
        self._what, self._whose, self.hangs = what, rank, hangs
        # Read before the event: at the event the main thread may leave the block, which forgets it.
        on_lost = self.on_lost
        # After _what, which another thread reads as soon as the event is set.
        self._lost.set()
        if hangs:  # at once, so that the others write their stacks now
            self._tell()
        noting = threading.Thread(target=self._note, args=(on_lost,), name="noting a lost rank", daemon=True)
        noting.start()
        noting.join(NOTING_SECONDS)
        self._told.set()
        if not self._leaving.wait(GRACE_SECONDS):
            print(f"error on rank {self._rank}: {visible(self._what)}", file=sys.stderr, flush=True)
            # The other ranks are connected only to rank 0, so rank 0 forwards the message.
            self._tell()
            self._end_process(1)  # the main thread may wait in NCCL, where no exception reaches it

    def _note(self, on_lost: Callable[[int, str], None] | None) -> None:
        try:
            if self.hangs:
                self._write_stacks()
            if on_lost is not None:
                on_lost(self._whose, self._what)
        except OSError as error:
            print(visible(f"{self._what}, but that could not be noted: {error}"), file=sys.stderr, flush=True)

    def _write_stacks(self) -> None:
        """Appends what all threads of this process are doing to the run's file."""
        with tempfile.TemporaryFile("w+") as stacks:
            faulthandler.dump_traceback(stacks)
            stacks.seek(0)
            step, phase = self.where()
            now = datetime.now(UTC).isoformat(timespec="seconds")
            text = f"{now} rank {self._rank}, after step {step}, in {phase}; {self._what}\n{stacks.read()}\n"
        self._run_dir.mkdir(parents=True, exist_ok=True)
        # All ranks append to one file, each in one write.
        file = os.open(self._run_dir / STACKS_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)

    def _tell(self, why: str | None = None) -> None:
        """Sends the last message: why this process fails, or which rank is lost; else a goodbye."""
        if self._lost.is_set():
            self._send({"lost": [self._whose, self._what, self.hangs]})
        else:
            self._send({"goodbye": None} if why is None else {"failed": " ".join(why.split())[:1000]})

    def _send(self, message: dict[str, Any], to: Iterable[socket.socket] | None = None) -> None:
        """to: connections; None: all."""
        # Both threads send, and a message must stay whole.
        with self._sending:
            for connection in self.connections if to is None else to:
                with contextlib.suppress(OSError):  # that rank may be gone, or read nothing
                    connection.sendall(json.dumps(message).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Set first, so that the thread does not end the process while it leaves the block.
        self._leaving.set()
        # These refer to the run, which would stay in memory as long as the detector.
        last = self.where()
        self.on_lost, self.where = None, lambda: last
        if self._lost.is_set():
            self._told.wait()  # otherwise the thread could end with the process before on_lost has returned
        name = "" if isinstance(error, UserError) or error is None else f"{type(error).__name__}: "
        self._tell(None if error is None else f"{name}{error}")


def wait_for_other_processes(seconds: float) -> None:
    """Waits until the other processes of the run that was last in this one have ended.

    Their connections are open until then.
    """
    if FailureDetector.newest is not None:
        FailureDetector.newest._ended.wait(seconds)


def _transferred_bytes() -> int:
    """Returns how many bytes this process has read from and written to disks; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text("ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("read_bytes", "write_bytes")))
