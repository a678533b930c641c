"""Packs groups of blocks as tasks of a Ray cluster, in the place of `packing.pack_all`'s processes.

The process that was started reads the text and writes the shards, as ever: groups travel to the nodes, and their tokens
come back. So the order of results, duplicates, the journal and every byte of the shards are those of one machine.
Ray runs a task again if its worker or its node dies. A node needs this project and the tokenizer's file, nothing else.
"""

import contextlib
import functools
import hashlib
import io
import logging
import os
import platform
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from llm import __version__
from llm.data.blocks import Block
from llm.data.packing import GROUPS_A_WORKER, PackAll, Packed, Settings, WorkerFailed, in_order, pack
from llm.data.tokenizer import Tokenizer, load_tokenizer
from llm.errors import UserError

RETRIES = 10
"""How often Ray runs a task again whose worker died. A text that ends each worker must not do so for ever."""
REACH_SECONDS = 10
ANSWER_SECONDS = 120  # a node may have to start a Python from a slow shared folder
CPUS_SECONDS = 10  # how long a number of CPUs is used before the cluster is asked again
SILENCE_SECONDS = 30
_START = "`ray start --head`, in the same environment as this command, starts a cluster"
_GOES_ON = "the same command goes on from the last whole shard"

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SENTENCE = re.compile(r".*?\.(?= |$)|.*", re.MULTILINE)
_REPEATED = re.compile(r"\[repeated \d+x across cluster\]")


@contextlib.contextmanager
def cluster(address: str, tokenizer: Tokenizer, say: Callable[[str], object]) -> Iterator[PackAll]:
    """Connects to a Ray cluster, checks its nodes, and yields a function that packs groups on them, in order.

    Args:
        address: "auto", the cluster of this machine or of the variable RAY_ADDRESS; or HOST:PORT of its head.
        tokenizer: every node has to find the same one at its path.
        say: shows a line to people: what the cluster is, and what Ray tells of nodes and workers that died.

    Raises UserError if Ray is not installed, if there is no cluster, or if a node cannot do the work; the function
    raises WorkerFailed for a task that Ray gives up, and what `pack` raises.
    """
    _check_address(address)
    ray = _import()
    # Ray prints of dead workers on stdout, which is for the command's result.
    with contextlib.redirect_stdout(_Notices(say)):
        _connect(ray, address)
        try:
            path = Path(os.path.abspath(tokenizer.path))
            nodes = _check_nodes(ray, address, path, tokenizer.sha256)
            say(f"--ray {address}: {nodes} {'node' if nodes == 1 else 'nodes'}, {_cpus(ray)} CPUs")
            yield functools.partial(_pack_all, ray, path, tokenizer.sha256, say)
        finally:
            # Ends the tasks that still run: their results are wanted no more.
            ray.shutdown()


def _check_address(address: str) -> None:
    """Raises UserError if nothing listens there. Ray itself would try for minutes, and then end the process."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or not host or "/" in host or not (port.isascii() and port.isdigit()):
        raise UserError(f"--ray {address}: is auto or HOST:PORT of the head of a cluster; {_START}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"--ray {address}: no cluster answers there ({error}); {_START}") from None


def _import() -> ModuleType:
    try:
        import ray
        import ray.exceptions
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise UserError(f"--ray needs the package ray ({error}): pip install 'llm-from-scratch[cluster]'") from None
    return ray


def _connect(ray: ModuleType, address: str) -> None:
    try:
        # No Ray process starts here: an address means a cluster that exists.
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    # SystemExit: a cluster that Ray remembers on this machine has ended.
    except (ConnectionError, RuntimeError, ValueError, SystemExit, ray.exceptions.RayError) as error:
        what = str(error) if isinstance(error, Exception) else "no cluster answers"
        raise UserError(f"--ray {address}: {what}; {_START}") from None


class _Notices(io.TextIOBase):
    """Passes on the first sentence of each text that is printed; the rest is ids and pages of Ray's log."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say

    def write(self, text: str) -> int:
        plain = _COLOUR.sub("", text).strip()
        if plain:
            # Ray joins equal messages of some seconds.
            repeated = _REPEATED.search(plain)
            self._say(f"Ray: {_SENTENCE.match(plain)[0]}{f' {repeated[0]}' if repeated else ''}")  # type: ignore[index]
        return len(text)


# The nodes.


def _check_nodes(ray: ModuleType, address: str, path: Path, sha256: str) -> int:
    """Returns the number of nodes with a CPU. Raises UserError for the first that cannot do the work."""
    expected = _sources()

    # A function inside a function travels as code, not as a name to import: a node may have no llm.
    def look() -> str:
        try:
            from llm.data.ray_pool import problem_here
        except ImportError as error:
            return f"has no llm of this version ({error}); install the same one on all nodes, in the same environment"
        return problem_here(path, sha256, expected)

    on_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    asked = {
        # Without a CPU, because another job may hold them all.
        ray.remote(num_cpus=0, scheduling_strategy=on_node(node["NodeID"], soft=False))(look).remote(): node
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU")
    }
    _, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS) if asked else ([], [])
    usable = 0
    for answer, node in asked.items():
        try:
            problem = f"no answer within {ANSWER_SECONDS} seconds" if answer in silent else ray.get(answer)
        except ray.exceptions.TaskUnschedulableError:  # it has just left the cluster
            continue
        except ray.exceptions.RayError as error:
            problem = f"cannot run a task ({_first_line(error)})"
        if problem:
            raise UserError(f"--ray {address}: node {node['NodeManagerHostname']}: {problem}")
        usable += 1
    if not usable:
        raise UserError(f"--ray {address}: no node of the cluster has a CPU; add one: ray start --address HOST:PORT")
    return usable


def problem_here(path: Path, sha256: str, expected: str) -> str:
    """Returns what keeps this machine from packing as another one does; empty: nothing.

    path, sha256: of the tokenizer; expected: `_sources` of the other machine.
    """
    if (here := _sources()) != expected:
        return f"has llm {here} in {Path(__file__).parents[1]}, not {expected}; install the same one on all nodes"
    shared = "name a file that all nodes have at the same path, such as on a shared folder"
    try:
        found = load_tokenizer(path).sha256
    except OSError as error:
        return f"{path}: {error.strerror}; {shared}"
    except UserError as error:
        return f"{error}; {shared}"
    return f"{path}: is another tokenizer there; {shared}" if found != sha256 else ""


@functools.cache
def _sources() -> str:
    """Returns the version and a hash of the sources that decide the tokens: a version may be worked on."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return f"{__version__} ({digest.hexdigest()[:8]})"


# The tasks.


def _pack_all(
    ray: ModuleType,
    path: Path,
    sha256: str,
    say: Callable[[str], object],
    groups: Iterable[list[Block]],
    settings: Settings,
) -> Iterator[tuple[list[Block], Packed]]:
    """Packs every group, in order. See `packing.pack_all`."""
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(_pack)
    settings, expected = replace(settings, tokenizer=path), _sources()
    cpus, asked = _cpus(ray), time.monotonic()

    def most() -> int:
        nonlocal cpus, asked
        if time.monotonic() - asked > CPUS_SECONDS:
            cpus, asked = _cpus(ray), time.monotonic()
        return GROUPS_A_WORKER * cpus

    def receive(result: Any) -> Packed:
        while not ray.wait([result], timeout=SILENCE_SECONDS)[0]:
            say(f"Ray: no result for {SILENCE_SECONDS} seconds; `ray status` tells whether CPUs are free")
        packed: Packed = _get(ray, result)
        return packed

    yield from in_order(groups, lambda group: task.remote(group, settings, sha256, expected), receive, most)


def _pack(group: list[Block], settings: Settings, sha256: str, expected: str) -> Packed:
    """Runs in a worker of the cluster."""
    return pack(_tokenizer(settings.tokenizer, sha256, expected), group, settings)


@functools.cache
def _tokenizer(path: Path, sha256: str, expected: str) -> Tokenizer:
    # Again, because a node may have come after the check.
    if problem := problem_here(path, sha256, expected):
        raise WorkerFailed(f"node {platform.node()}: {problem}; {_GOES_ON}")
    return load_tokenizer(path)


def _cpus(ray: ModuleType) -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _get(ray: ModuleType, result: Any) -> Any:
    """Returns the result of a task. Raises its UserError, or WorkerFailed for whatever else kept it from the end."""
    try:
        return ray.get(result)
    except ray.exceptions.RayTaskError as error:
        failed = error.cause
        if isinstance(failed, UserError):
            raise failed from None
    except ray.exceptions.RayError as error:
        failed = error
    # Also for a node that came later and cannot import what runs there.
    what = f"{type(failed).__name__}: {_first_line(failed)}"
    raise WorkerFailed(f"Ray could not finish a task ({what}); {_GOES_ON}") from failed


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
