"""`llm download`: fetches the text files of a data set from the Hugging Face Hub.

The Hub's library lists the files and knows endpoint, token and proxies. The bytes are fetched here: the library begins
a file anew after a kill, and checks only its size. A file that is being fetched is `.incomplete/HASH` in the data set's
folder, so whatever is found there later is the beginning of that content, and fetching goes on behind it.
"""

import fnmatch
import hashlib
import itertools
import json
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from llm.atomic import STAGING, atomic_text, sync_directory, sync_file
from llm.data.formats import COMPRESSED
from llm.display import Display
from llm.errors import UserError
from llm.locks import locked

CONNECTIONS = 4
TIMEOUT_SECONDS = 30
FAILURES = 6
"""So many failures of a file in a row, none of which brought a byte, end the command."""
WAIT_SECONDS = 1.0
"""Before the second try; each further wait is twice as long."""
RECORD = ".download.json"
"""The file that says which commit of the repository the folder holds."""


@dataclass(frozen=True)
class DataSet:
    """Files of a repository.

    bytes_per_token: bytes of these files per token, to choose as many files as --tokens needs; 0: `bytes_per_token`.
    """

    repository: str
    patterns: tuple[str, ...]
    bytes_per_token: float = 0.0
    source: str = ""  # of bytes_per_token


KNOWN = {
    "fineweb-edu": DataSet(
        "HuggingFaceFW/fineweb-edu",
        ("sample/10BT/*.parquet",),
        2.85,
        "14 files of 2.15 GB have 1e10 GPT-2 tokens of 4.7 bytes, says its card; 4.45 bytes of text a token",
    ),
    "climbmix": DataSet(
        "karpathy/climbmix-400b-shuffle", ("shard_*.parquet",), 1.64, "6,543 files of 100 MB have 4e11 tokens"
    ),
    "tinystories": DataSet(
        "roneneldan/TinyStories",
        ("data/train-*.parquet",),
        2.32,
        "4 files, together 991 MB, have 1.9 GB of text; 4.45 bytes of text a token",
    ),
    "wikitext": DataSet(
        "Salesforce/wikitext",
        ("wikitext-103-raw-v1/train-*.parquet",),
        3.05,
        "2 files of 157 MB have 103 million words; a token a word",
    ),
}
COMPRESSED_BYTES, TEXT_BYTES = 2.85, 4.45
"""Bytes of a file per token where nothing is known: compressed as FineWeb-Edu's, and text as it is."""


@dataclass(frozen=True)
class _File:
    path: str  # in the repository
    size: int
    sha256: str  # "" for a file that git holds itself
    blob_id: str  # git's hash

    @property
    def hash(self) -> str:
        return self.sha256 or self.blob_id

    def is_in(self, path: Path) -> bool:
        """Whether a file has this content."""
        if path.stat().st_size != self.size:
            return False
        with open(path, "rb") as file:
            if self.sha256:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
            digest = hashlib.sha1(b"blob %d\0" % self.size)  # as git hashes a file
            while data := file.read(1 << 20):
                digest.update(data)
            return digest.hexdigest() == self.blob_id


def download(
    name: str,
    out_dir: str | os.PathLike[str],
    *,
    tokens: int | None = None,
    files: Sequence[str] = (),
) -> dict[str, Any]:
    """Fetches files of a data set into `out_dir/NAME`, under their paths in the repository; goes on after a kill.

    Files that are there are checked and not fetched again. A run that goes on takes the same commit of the repository.

    Args:
        name: one of KNOWN, or hf:OWNER/NAME for any other repository of data sets.
        tokens: take only as many files, in the order of their names, as hold this many tokens, by a known or assumed
            number of bytes per token, which is shown; None: all.
        files: patterns of paths in the repository, in which * stands for any characters, also slashes. (): those of
            KNOWN.

    Returns {"out_dir" (the folder of the files), "files", "bytes", "tokens" (estimated), "repository", "commit"}.
    Raises UserError: no such data set, no file matches, no network, no room on the disk, a file that is there but has
    another content, or contents that are not those that the Hub lists; OSError.
    """
    data_set = _find(name, files)
    hub = _Hub(name, data_set.repository)
    folder = Path(out_dir) / (name if name in KNOWN else data_set.repository.split("/")[1])
    with locked(folder, "another download is writing here"), hub.errors():
        listed = hub.list_files(data_set.patterns, _commit_of(folder, data_set.repository))
        chosen, estimate = _choose(listed, data_set, tokens, name)
        size = sum(file.size for file in chosen)
        about = f"{name}: {data_set.repository} at {hub.commit[:12]}, {len(chosen):,} of {len(listed):,} files"
        with Display("downloading", total=size) as display:
            display.line(f"{about}, {_bytes(size)}: {estimate}")
            missing = [file for file in chosen if not _is_there(folder / file.path, file)]
            _check_room(folder, missing, display)
            folder.mkdir(parents=True, exist_ok=True)
            atomic_text(folder / RECORD, json.dumps({"repository": data_set.repository, "commit": hub.commit}) + "\n")
            _Fetching(hub, folder, display, size, missing).run()
    return {
        "out_dir": str(folder),
        "files": len(chosen),
        "bytes": size,
        "tokens": round(_tokens(chosen, data_set)),
        "repository": data_set.repository,
        "commit": hub.commit,
    }


# What to fetch.


def _find(name: str, files: Sequence[str]) -> DataSet:
    if name in KNOWN:
        known = KNOWN[name]
        # Other files of the repository may be compressed otherwise.
        return DataSet(known.repository, tuple(files)) if files else known
    if not (match := re.fullmatch(r"hf:([\w.-]+/[\w.-]+)", name)):
        raise UserError(f"{name}: no known data set; name one of {', '.join(KNOWN)}, or hf:OWNER/NAME with --files")
    return DataSet(match[1], tuple(files))


class _Hub:
    """One repository of data sets on the Hub."""

    def __init__(self, name: str, repository: str) -> None:
        self.name, self.repository = name, repository
        # Here, because the library reads the variable only when it is imported.
        self.api = HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None)
        self.commit = ""

    def list_files(self, patterns: Sequence[str], commit: str | None) -> list[_File]:
        """Returns the files that match, in the order of their paths. commit: None is the newest."""
        try:
            info = self.api.dataset_info(self.repository, revision=commit, timeout=TIMEOUT_SECONDS)
            self.commit = info.sha or ""
            names = sorted(sibling.rfilename for sibling in info.siblings or [])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, HTTPError):
                raise
            raise UserError(f"{self.api.endpoint}: is no Hugging Face Hub ({error}); correct HF_ENDPOINT") from None
        if not patterns:
            raise UserError(f"{self.name} needs --files PATTERN; the repository has {_summary(names)}")
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise UserError(f"{self.name}: no file matches --files {pattern!r}; it has {_summary(names)}")
        # Only the folders that the patterns name: a repository may have a hundred thousand files.
        folders = {re.split(r"[*?\[]", pattern)[0].rpartition("/")[0] for pattern in patterns}
        entries = [
            entry
            for folder in sorted(folders)
            for entry in self.api.list_repo_tree(
                self.repository, folder or None, recursive=True, revision=self.commit, repo_type="dataset"
            )
            if isinstance(entry, RepoFile) and any(fnmatch.fnmatchcase(entry.path, pattern) for pattern in patterns)
        ]
        found = {
            entry.path: _File(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else "", entry.blob_id)
            for entry in entries
        }
        for path in found:
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise UserError(f"{self.name}: the name {path!r} leads out of the folder; it is not fetched")
        return [found[path] for path in sorted(found)]

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns the errors of the library and of the network into one line."""
        where, repository = self.api.endpoint, self.repository
        try:
            yield
        except GatedRepoError:
            raise UserError(
                f"{self.name}: {repository} asks for your consent; give it on {where}/datasets/{repository}, and "
                "set HF_TOKEN"
            ) from None
        except RepositoryNotFoundError:
            raise UserError(
                f"{self.name}: {where} has no data set {repository}, or it is private; check the name, or set HF_TOKEN"
            ) from None
        except HfHubHTTPError as error:
            code = error.response.status_code
            raise UserError(f"{self.name}: {where} answers {code} for {repository}; {_way_out(code)}") from None
        except OfflineModeIsEnabled:
            raise UserError(f"{self.name}: HF_HUB_OFFLINE is set; unset it to download") from None
        except HTTPError as error:
            raise UserError(
                f"{self.name}: cannot reach {where} ({error or type(error).__name__}); check the network or name a "
                "mirror with HF_ENDPOINT; the same command goes on"
            ) from None


def _way_out(status: int) -> str:
    if status in (401, 403):
        return "set HF_TOKEN to a token that may read it"
    return "wait, then give the same command" if status == 429 or status >= 500 else "check the name and HF_ENDPOINT"


def _summary(names: Sequence[str]) -> str:
    """Returns what a repository holds, as patterns: `8 data/*.parquet, 1 *.md`."""
    patterns = Counter(
        str(PurePosixPath(name).with_name(f"*{PurePosixPath(name).suffix}" if "." in name else "*")) for name in names
    )
    most = [f"{count:,} {pattern}" for pattern, count in patterns.most_common(8)]
    return ", ".join(most) + (", ..." if len(patterns) > 8 else "") or "no file"


def _tokens(files: Sequence[_File], data_set: DataSet) -> float:
    return sum(file.size / (data_set.bytes_per_token or bytes_per_token(file.path)) for file in files)


def bytes_per_token(path: str) -> float:
    """Returns the assumed bytes of a file per token, for a repository of which nothing is known."""
    return COMPRESSED_BYTES if path.endswith((".parquet", ".arrow", *COMPRESSED)) else TEXT_BYTES


def _choose(files: list[_File], data_set: DataSet, tokens: int | None, name: str) -> tuple[list[_File], str]:
    """Returns as many of the first files as have `tokens`, and how many they have, in words."""
    all_of_them = _tokens(files, data_set)
    rule = (
        f"{data_set.bytes_per_token:g} bytes of its files a token ({data_set.source})"
        if data_set.bytes_per_token
        else f"{COMPRESSED_BYTES:g} bytes a token of a compressed file and {TEXT_BYTES:g} of another, an assumption"
    )
    if tokens is not None:
        if tokens < 1:
            raise UserError(f"--tokens {tokens}: at least 1")
        if tokens > all_of_them:
            raise UserError(
                f"--tokens {tokens:,}: the {len(files):,} files {' '.join(data_set.patterns)} of {name} have about "
                f"{all_of_them:.3g}, by {rule}; leave --tokens out to take all, or name more with --files"
            )
        so_far = itertools.accumulate(_tokens([file], data_set) for file in files)
        files = files[: 1 + next(i for i, count in enumerate(so_far) if count >= tokens)]
    return files, f"about {_tokens(files, data_set):.3g} tokens, by {rule}"


def _commit_of(folder: Path, repository: str) -> str | None:
    """Returns the commit that an earlier call has taken for this folder. Raises UserError if it holds another one."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        found, commit = record["repository"], record["commit"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / RECORD}: is damaged; delete it to take the newest commit") from None
    if found != repository:
        raise UserError(f"{folder}: holds files of {found}; name another --out_dir")
    return str(commit)


def _is_there(path: Path, file: _File) -> bool:
    if not path.exists():
        return False
    if not path.is_file() or not file.is_in(path):
        raise UserError(f"{path}: is there, with another content than in the repository; move it away to fetch it")
    return True


def _check_room(folder: Path, missing: Sequence[_File], display: Display) -> None:
    parts = (folder / STAGING / file.hash for file in missing)
    needed = sum(file.size for file in missing) - sum(part.stat().st_size for part in parts if part.exists())
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{folder}: {_bytes(needed)} are to be fetched and the disk has {_bytes(free)}; name another --out_dir, or "
            "fewer --tokens"
        )
    display.line(f"{folder}: {_bytes(needed)} to fetch, the disk has room for {_bytes(free)}")


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


# Fetching.


class _Stopped(Exception):
    """Another file has failed."""


class _Fetching:
    """Fetches files, several at a time."""

    def __init__(self, hub: _Hub, folder: Path, display: Display, size: int, missing: Sequence[_File]) -> None:
        self._hub, self._folder, self._display, self._missing = hub, folder, display, missing
        # Given to the session at each request; it does not send the token on to another host.
        self._headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._done = size - sum(file.size for file in missing)
        self._fetched = 0
        self._begun = time.monotonic()

    def run(self) -> None:
        staging = self._folder / STAGING
        staging.mkdir(exist_ok=True)
        # Equal files would share a part, so the second waits for the first.
        locks = {file.hash: threading.Lock() for file in self._missing}
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            futures = [pool.submit(self._fetch, file, locks[file.hash]) for file in self._missing]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:
                self._stop.set()
                for future in futures:
                    future.cancel()
        # Parts of other files stay, for another command.
        if not any(staging.iterdir()):
            staging.rmdir()

    def _fetch(self, file: _File, lock: threading.Lock) -> None:
        part, path = self._folder / STAGING / file.hash, self._folder / file.path
        with lock:
            for is_again in (False, True):
                self._complete(file, part)
                if file.is_in(part):
                    break
                part.unlink()
                self._count(-file.size, 0)
                what = f"{path}: what was fetched has another hash than the Hub lists"
                if is_again:
                    raise UserError(f"{what}, twice; try later or with another HF_ENDPOINT")
                self._display.line(f"{what}; it is fetched again")
            path.parent.mkdir(parents=True, exist_ok=True)
            sync_file(part)
            os.replace(part, path)
            sync_directory(path.parent)
        self._display.line(f"{path}: {_bytes(file.size)}")

    def _complete(self, file: _File, part: Path) -> None:
        """Appends to a part until it has the size of the file."""
        part.touch()
        self._count(part.stat().st_size, 0)
        failures = 0
        while (size := part.stat().st_size) < file.size:
            try:
                self._append(file, part, size)
                failure: Exception | None = None
            except HTTPError as error:
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else 500
                if status < 500 and status not in (408, 416, 429):
                    raise
                failure = error
            failures = 0 if part.stat().st_size > size else failures + 1
            if failures == FAILURES:
                # A connection that ends early without an error has no exception.
                raise failure or UserError(f"{file.path}: the Hub ends it {file.size - size:,} bytes early; try later")
            if failures and self._stop.wait(WAIT_SECONDS * 2 ** (failures - 1)):
                raise _Stopped

    def _append(self, file: _File, part: Path, size: int) -> None:
        """Appends what one answer brings to a part that has `size` bytes."""
        url = hf_hub_url(
            self._hub.repository,
            file.path,
            repo_type="dataset",
            revision=self._hub.commit,
            endpoint=self._hub.api.endpoint,
        )
        headers = self._headers | ({"Range": f"bytes={size}-"} if size else {})
        request = get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS)
        with request as response, open(part, "ab") as out:
            hf_raise_for_status(response)
            # Not every server knows ranges; a part cannot be used if the answer begins elsewhere.
            if size and not response.headers.get("content-range", "").startswith(f"bytes {size}-"):
                out.truncate(0)
                self._count(-size, 0)
                size = 0
                if response.status_code != 200:
                    return
            for data in response.iter_bytes():
                if self._stop.is_set():
                    raise _Stopped
                size += len(data)
                if size > file.size:
                    raise UserError(
                        f"{file.path}: the server sends more than the {file.size:,} bytes that the Hub lists; try "
                        "later or with another HF_ENDPOINT"
                    )
                out.write(data)
                self._count(len(data), len(data))

    def _count(self, done: int, fetched: int) -> None:
        """done: bytes that are there; fetched: those that came through the network."""
        with self._lock:
            self._done += done
            self._fetched += fetched
            speed = self._fetched / max(1e-9, time.monotonic() - self._begun) / 1e6
            self._display.update(self._done, f"downloading, {speed:.1f} MB/s")
