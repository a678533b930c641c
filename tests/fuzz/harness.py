"""Feeds damaged files to a reader. Each must be read or refused: no stack trace, no crash, no hang, bounded memory.

Input number i of a target depends only on the target's name and i, so a failure can be repeated. Forked workers share
the inputs: a worker may crash or hang, and the next one goes on with the input after it.
"""

import copy
import json
import mmap
import os
import resource
import signal
import struct
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from llm.errors import UserError

HANG_SECONDS = 5.0
WAITS_SECONDS = 60.0
"""After this a worker hangs even if it has hardly computed: it waits for what never comes, or the machine is busy."""
MEMORY_BYTES = 2 << 30  # address space above what the worker has when it starts
MANY_FAILURES = 10  # of one target: it is not read further

Mutate = Callable[[Random, bytes, bytes], bytes]
"""(chance, a valid file, another valid file) -> a damaged file"""


@dataclass(frozen=True)
class Target:
    """A reader, and valid files for it.

    make: writes valid files, and what else the reader needs, into an empty folder; returns the files to damage, one of
        which each input replaces.
    read: reads the damaged file at this path. It may raise UserError, or an OSError that names a file.
    inputs: how many are enough: fewer where a library, not this project, reads the format.
    """

    name: str
    make: Callable[[Path], Sequence[Path]]
    read: Callable[[Path], object]
    mutate: Mutate
    inputs: int = 100_000


@dataclass
class Result:
    inputs: int = 0
    read: int = 0
    refused: int = 0
    slowest: float = 0.0  # seconds
    failures: list[str] = field(default_factory=list)


class Files:
    """The valid files of a target in a folder of one worker."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target = target
        folder.mkdir(parents=True, exist_ok=True)
        self.paths = list(target.make(folder))
        self.valid = [path.read_bytes() for path in self.paths]

    def damaged(self, number: int) -> tuple[Path, bytes]:
        """Returns the file that input `number` replaces, and its contents."""
        chance = Random(f"{self.target.name} {number}")
        at = chance.randrange(len(self.paths))
        return self.paths[at], self.target.mutate(chance, self.valid[at], chance.choice(self.valid))

    def read(self, number: int) -> bool:
        """Whether the reader accepts the input; raises what is a failure."""
        path, data = self.damaged(number)
        path.write_bytes(data)
        try:
            self.target.read(path)
            return True
        except UserError as error:
            if "\n" in str(error):
                raise AssertionError(f"more than one line: {error}") from error
            return False
        except OSError as error:
            # The command line prints such an error in one line.
            if error.filename is None:
                raise
            return False
        finally:
            path.write_bytes(self.valid[self.paths.index(path)])


class _Shared:
    """What a worker tells its parent: the input that it reads now, since when, and its counts."""

    LAYOUT = struct.Struct("<q d 3q d")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self.LAYOUT.size)
        self.set(-1, 0.0, 0, 0, 0, 0.0)

    def set(self, *values: float) -> None:
        self.LAYOUT.pack_into(self._memory, 0, *values)

    def get(self) -> tuple[Any, ...]:
        return self.LAYOUT.unpack_from(self._memory, 0)


def run(target: Target, folder: Path, *, seconds: float, inputs: int | None = None, workers: int = 2) -> Result:
    """Reads inputs until there are enough or the time is over. Failures are kept as files in `folder`/failures."""
    files = Files(target, folder / "parent")
    (folder / "failures").mkdir(exist_ok=True)
    result = Result()
    wanted = target.inputs if inputs is None else inputs
    shared = [_Shared() for _ in range(workers)]
    pids: dict[int, int] = {}
    computed = [(-1, 0.0)] * workers  # the input that each reads, and its processor time before
    end = time.monotonic() + seconds

    def start(worker: int, first: int) -> None:
        shared[worker].set(-1, 0.0, 0, 0, 0, 0.0)
        pid = os.fork()
        if not pid:
            _work(target, folder, worker, range(first, wanted, workers), shared[worker], end)
        pids[worker] = pid

    def finish(worker: int) -> int:
        number, _, done, read, failed, slowest = shared[worker].get()
        result.inputs += done
        result.read += read
        result.refused += done - read - failed
        result.slowest = max(result.slowest, slowest)
        return int(number)

    for worker in range(workers):
        start(worker, worker)
    while pids:
        time.sleep(0.01)
        for worker, pid in list(pids.items()):
            number, since = shared[worker].get()[:2]
            computed[worker] = computed[worker] if computed[worker][0] == number else (number, _cpu_seconds(pid))
            waited = time.monotonic() - since if number >= 0 and since else 0.0
            hangs = waited > WAITS_SECONDS or (
                waited > HANG_SECONDS and _cpu_seconds(pid) - computed[worker][1] > HANG_SECONDS / 2
            )
            if hangs:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, 0 if hangs else os.WNOHANG)
            if not ended:
                continue
            del pids[worker]
            number = finish(worker)
            if status and number >= 0:
                what = f"hangs (more than {HANG_SECONDS:g} s)" if hangs else f"ends the process with status {status}"
                _keep(folder, files, number, what)
                result.inputs += 1
                if len(list((folder / "failures").glob("*.txt"))) < MANY_FAILURES and time.monotonic() < end:
                    start(worker, number + workers)
    result.failures = sorted(path.read_text("utf-8", "replace") for path in (folder / "failures").glob("*.txt"))
    return result


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _work(target: Target, folder: Path, worker: int, numbers: range, shared: _Shared, end: float) -> None:
    """Runs in a worker process, which ends here."""
    status = 1
    try:
        # Readers print what they leave out.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        files = Files(target, folder / f"worker-{worker}-{os.getpid()}")
        for path in files.paths:
            target.read(path)  # a valid file; also imports what the reader needs
        held = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, held + MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        read = failed = done = 0
        slowest = 0.0
        for number in numbers:
            if time.monotonic() >= end or failed >= MANY_FAILURES:
                break
            begun = time.monotonic()
            shared.set(number, begun, done, read, failed, slowest)
            try:
                read += files.read(number)
            except BaseException:
                failed += 1
                _keep(folder, files, number, traceback.format_exc())
            done += 1
            slowest = max(slowest, time.monotonic() - begun)
        shared.set(-1, 0.0, done, read, failed, slowest)
        status = 0
    except BaseException:
        (folder / "failures" / "valid.txt").write_text(
            f"{target.name}: a valid file is refused: {traceback.format_exc()}"
        )
    finally:
        os._exit(status)


def _keep(folder: Path, files: Files, number: int, what: str) -> None:
    path, data = files.damaged(number)
    (folder / "failures" / f"{number}-{path.name}").write_bytes(data)
    (folder / "failures" / f"{number}.txt").write_text(f"{files.target.name} {number}: {what}", "utf-8", "replace")


# Damage.

_NUMBERS = [
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


def damage_bytes(*words: bytes) -> Mutate:
    """Returns a function that changes bytes anywhere. words: what the format gives a meaning to, inserted too."""

    def mutate(chance: Random, valid: bytes, other: bytes) -> bytes:
        data = bytearray(valid)
        for _ in range(chance.choice([1, 1, 1, 2, 4, 16])):
            at = chance.randrange(len(data) + 1)
            size = min(chance.choice([1, 2, 4, 8, 64, 4096]), len(data))
            what = chance.randrange(9)
            if what == 0 and data:
                data[min(at, len(data) - 1)] ^= 1 << chance.randrange(8)
            elif what == 1:
                data[at : at + size] = chance.randbytes(size)
            elif what == 2:
                width = chance.choice([1, 2, 4, 8])
                order = chance.choice(["little", "big"])
                value = (chance.choice(_NUMBERS) + chance.randint(-2, 2)) % 2 ** (8 * width)
                data[at : at + width] = value.to_bytes(width, order)
            elif what == 3:
                del data[at : at + size]
            elif what == 4:
                data[at:at] = data[at : at + size]
            elif what == 5:
                del data[at:]
            elif what == 6:
                begin = chance.randrange(len(other) + 1)
                data[at : at + size] = other[begin : begin + size]
            elif words:
                data[at : at + chance.choice([0, 0, 1, 4])] = chance.choice(words)
        return bytes(data)

    return mutate


_JUNK: list[Any] = [
    *(None, True, False, 0, -1, 0.5, 1e308, -0.0, 2**31, 2**53, 2**63, 10**30, float("nan"), float("inf")),
    *("", ".", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "\n", "x" * 5000, "1", "train-00001.bin"),
    *([], {}, [[]], {"": {}}, [None], {"a": 1}),
]


def damage_json(chance: Random, valid: bytes, other: bytes) -> bytes:
    """Replaces, removes, repeats or adds values anywhere in a file of JSON; sometimes changes its bytes instead."""
    if chance.random() < 0.2:
        return _json_bytes(chance, valid, other)
    tree = json.loads(valid)
    for _ in range(chance.choice([1, 1, 2, 4])):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = chance.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and chance.random() < 0.75:
                node = node[key]
                continue
            what = chance.randrange(6)
            if what == 0:
                del node[key]
            elif what == 1 and isinstance(node, list):
                node.insert(key, copy.deepcopy(node[key]))
            elif what == 2 and isinstance(node, dict):
                node[chance.choice(["", "x", "\ud800", "text", str(key) * 2])] = copy.deepcopy(node[key])
            elif what == 3 and isinstance(node[key], int | float):
                node[key] = chance.choice([*_NUMBERS, -node[key], node[key] + 1, str(node[key])])
            else:
                node[key] = copy.deepcopy(chance.choice(_JUNK))
            break
    return json.dumps(tree).encode()


JSON_WORDS = (
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"\\",
        b"\\ud800",
        b"null",
        b"NaN",
        b"-",
        b"1e999",
        b"\xef\xbb\xbf",
        b"\n",
    ),
    *(b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"\0", b"\xff"),
)
"""What a reader of JSON may stumble over."""
_json_bytes = damage_bytes(*JSON_WORDS)
