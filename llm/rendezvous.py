"""How the processes of a launcher find each other, and the process group that they form.

A process that was started alone forms a group of one, which needs no store and listens on the loopback interface only.
"""

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llm import launchers
from llm.errors import ReportedByRank0, UserError

PATIENCE_SECONDS = 30
"""Seconds of waiting for another process after which a line says so."""
LIMIT_MINUTES = 30.0
"""Minutes after which a process that has not come is an error. Nodes of a cluster may start minutes apart."""
POLL_SECONDS = 0.2  # Python's sleep, unlike a wait in the store's C++, is interrupted by Ctrl-C
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

_meetings = count()
_found: list[dist.Store] = []
_before: list[dict[str, str | None]] = []
"""The variables that a group of one has replaced."""


@dataclass(frozen=True)
class Place:
    """A process's place among the processes. store: where they exchange small values; None: there is one process."""

    rank: int
    local_rank: int
    size: int
    store: dist.Store | None


def meet() -> Place:
    """Waits until all processes have come. A process may meet the others again, all in the same order.

    Raises UserError if one does not come within LIMIT_MINUTES.
    """
    launchers.fill_environment()
    rank, size = launchers.rank(), launchers.world_size()
    if size == 1:
        return Place(rank, int(os.environ.get("LOCAL_RANK", "0")), 1, None)
    store = find_store()
    with lost_connection():
        store.set(str(rank), _host())
        if rank == 0:
            _wait_until(lambda: _name(_missing(store, size), size))
            store.set("hosts", json.dumps([store.get(str(other)).decode() for other in range(size)]))
        else:
            # Rank 0 has come, and says whom it waits for.
            while not store.check(["hosts"]):
                time.sleep(POLL_SECONDS)
        hosts = json.loads(store.get("hosts"))
    if "LOCAL_RANK" not in os.environ:
        # A process that sees one GPU has it for itself: its launcher has hidden the others.
        own = 0 if torch.cuda.device_count() == 1 else hosts[:rank].count(hosts[rank])
        os.environ["LOCAL_RANK"] = str(own)
    return Place(rank, int(os.environ["LOCAL_RANK"]), size, store)


def form_group(place: Place, device: torch.device) -> Any:
    """Makes torch's default process group: NCCL on GPUs, gloo on CPUs.

    Returns a group of all processes for values on the host; None if the default group (gloo) is one, or there is one
    process.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    leave_group()  # of a run that ended in an error
    if place.size > 1:
        with lost_connection():
            dist.init_process_group(backend, store=place.store, rank=place.rank, world_size=place.size)
        return dist.new_group(backend="gloo") if backend == "nccl" else None
    # By default gloo and NCCL listen on the interface of the host's name. leave_group restores the variables.
    variables = {**dict.fromkeys(INTERFACES, "lo"), "LOCAL_RANK": str(place.local_rank)}  # DeepSpeed's ZeRO 3 reads it
    _before.append({name: os.environ.get(name) for name in variables})
    os.environ.update(variables)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return None


def leave_group() -> None:
    """Leaves the process group, if there is one. Otherwise a rank could exit while another communicates with it."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for name, value in _before.pop().items() if _before else ():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def find_store() -> dist.Store:
    """Connects to the store of all processes, which rank 0 hosts, or the agent of torchrun. Waits until it is there.

    It stays open until the process ends, because others may still read from it.
    """
    if not _found:
        rank, size = launchers.rank(), launchers.world_size()
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        hosts_it = rank == 0 and not by_agent
        if not hosts_it:
            _wait_until(lambda: _missing_port(host, port))
        with lost_connection():
            _found.append(
                dist.TCPStore(host, port, size, hosts_it, timedelta(minutes=LIMIT_MINUTES), wait_for_workers=False)
            )
    # torchrun's store outlives its workers, and starts them again after a failure.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"llm/{attempt}/{next(_meetings)}", _found[0])


@contextmanager
def lost_connection() -> Iterator[None]:
    """Turns a failed connection between the processes into a UserError."""
    try:
        yield
    except dist.DistNetworkError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes cannot meet at {launchers.address()} ({reason}); give the launcher another port"
        ) from None


def run_on_rank_0(run: Callable[[], object]) -> None:
    """Calls run() in rank 0 while the other processes wait for its end.

    Raises ReportedByRank0 in these if it failed.
    """
    store, done = find_store(), "done"
    rank, size = launchers.rank(), launchers.world_size()
    if rank > 0:
        try:
            while not store.check([done]):
                time.sleep(POLL_SECONDS)
            failed = store.get(done) != b"0"
            store.set(str(rank), "")
        except dist.DistError:  # rank 0, which hosts the store, is gone
            failed = True
        if failed:
            raise ReportedByRank0("rank 0 prints why")
        return
    failed = True
    try:
        run()
        failed = False
    finally:
        store.set(done, str(int(failed)))
        # The store ends with this process, and the others have to read from it. One that comes later finds no rank 0.
        end = time.monotonic() + PATIENCE_SECONDS
        while (missing := _missing(store, size)) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        if missing:
            print(f"{_name(missing, size)} did not come (WORLD_SIZE={size})", file=sys.stderr, flush=True)


def _missing(store: dist.Store, size: int) -> list[int]:
    return [other for other in range(1, size) if not store.check([str(other)])]


def _name(ranks: list[int], size: int) -> str:
    """Returns "" for no ranks."""
    named = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return named and f"{'rank' if len(ranks) == 1 else 'ranks'} {named} of {size}"


def _wait_until(nobody_missing: Callable[[], str]) -> None:
    """Calls the function again and again until it returns no name of a process that is waited for.

    After PATIENCE_SECONDS a line says so. Raises UserError at the limit.
    """
    begin, told = time.monotonic(), False
    while whom := nobody_missing():
        waited = time.monotonic() - begin
        if waited > 60 * LIMIT_MINUTES:
            raise UserError(f"{whom} did not come to {launchers.address()} within {LIMIT_MINUTES:g} minutes")
        if waited > PATIENCE_SECONDS and not told:
            told = True
            print(
                f"rank {launchers.rank()} waits for {whom} at {launchers.address()} (MASTER_ADDR, MASTER_PORT); to "
                "work with one process, unset RANK and WORLD_SIZE",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(POLL_SECONDS)


def _missing_port(host: str, port: int) -> str:
    """Returns "" if rank 0 listens. Not left to the store's C++, which logs each try, and which Ctrl-C cannot end."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:  # the name may not be known yet, either
        return f"rank 0 ({error.strerror or error})"
    return ""


def _host() -> str:
    """Names this host. Machines may share a name, and containers a kernel."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:  # not Linux
        boot = ""
    return f"{platform.node()} {boot}"
