"""The manifest of a data set: its shards, counts of their contents, and the hash that identifies the data set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llm.atomic import atomic_text
from llm.data._shards import FORMAT_VERSION
from llm.errors import UserError

MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class ShardInfo:
    """The manifest's entry for a shard."""

    file: str  # its name in the directory
    tokens: int
    documents: int  # number of documents that begin in it
    bytes: int
    sha256: str  # of the whole file
    header_crc32c: int  # identifies the whole file too (the header holds its checksums); checked at every opening


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`."""

    path: Path  # the directory
    format_version: int
    vocab_size: int
    tokenizer_sha256: str
    seq_len: int  # --seq_len of `llm prepare_data`, the default of data.seq_len
    packing: dict[str, Any]  # the settings that decided which tokens are stored, and in which split
    shards: dict[str, tuple[ShardInfo, ...]]  # "train", "val"
    counters: dict[str, Any]
    dataset_hash: str
    tokenizer: dict[str, Any] = field(default_factory=dict)  # Tokenizer.describe(); empty if made by an earlier version
    url: str = ""  # the object store that `path` is a copy of, perhaps one to make; empty: there is none

    @property
    def name(self) -> str:
        """What the user calls the data set: its URL or its directory."""
        return self.url or str(self.path)

    @property
    def tokenizer_files(self) -> list[str]:
        """The names of the tokenizer's files in the directory."""
        return list(self.tokenizer.get("files", ["tokenizer.model"]))

    @property
    def all_shards(self) -> list[ShardInfo]:
        """The shards of every split."""
        return [shard for split in SPLITS for shard in self.shards[split]]

    def sequences(self, split: str, seq_len: int) -> int:
        """Returns the number of sequences of `seq_len` tokens in the split."""
        return sum(_sequences(shard, seq_len) for shard in self.shards[split])

    def unused_tokens(self, split: str, seq_len: int) -> int:
        """Returns the number of tokens that belong to no sequence: those after the last full sequence of each shard."""
        return sum(
            shard.tokens - (sequences * seq_len + 1 if (sequences := _sequences(shard, seq_len)) else 0)
            for shard in self.shards[split]
        )

    @property
    def bytes_per_piece_byte(self) -> float:
        """Bytes of text for each byte of its tokens: 1 unless the tokenizer changes the text."""
        pieces = self.counters.get("piece_bytes")
        return self.counters["bytes"] / pieces if pieces else 1.0


def _sequences(shard: ShardInfo, seq_len: int) -> int:
    # A sequence needs one token more than its length, for its last label; the next sequence begins with that token.
    return max(0, (shard.tokens - 1) // seq_len)


def dataset_hash(
    *, tokenizer_sha256: str, packing: Mapping[str, Any], shards: Mapping[str, Sequence[ShardInfo]]
) -> str:
    """Returns the hex sha256 of a data set's contents. It does not depend on path, time or host."""
    identity = {
        "format_version": FORMAT_VERSION,
        "tokenizer_sha256": tokenizer_sha256,
        "packing": packing,
        "shards": {split: [[shard.sha256, shard.tokens] for shard in shards[split]] for split in SPLITS},
    }
    # Sorted keys and no blanks, so that equal contents give equal bytes.
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_manifest(
    directory: str | os.PathLike[str],
    *,
    vocab_size: int,
    tokenizer_sha256: str,
    seq_len: int,
    packing: Mapping[str, Any],
    shards: Mapping[str, Sequence[ShardInfo]],
    counters: Mapping[str, Any],
    tokenizer: Mapping[str, Any] | None = None,
) -> Manifest:
    """Writes `manifest.json`. It is written last, so a directory that has it is complete.

    Args:
        packing: JSON values that decided the contents (document mode, split rule); part of the hash.
        shards: "train" and "val", in order.
        counters: JSON values to show (documents, bytes, what was dropped); not part of the hash.
        tokenizer: what `Tokenizer.describe` returns; not part of the hash, which has tokenizer_sha256.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "dataset_hash": dataset_hash(tokenizer_sha256=tokenizer_sha256, packing=packing, shards=shards),
        "vocab_size": vocab_size,
        "tokenizer_sha256": tokenizer_sha256,
        "tokenizer": dict(tokenizer or {}),
        "seq_len": seq_len,
        "packing": packing,
        "counters": counters,
        "shards": {split: [asdict(shard) for shard in shards[split]] for split in SPLITS},
    }
    atomic_text(Path(directory) / MANIFEST_NAME, json.dumps(content, indent=2, allow_nan=False) + "\n")
    # Read back, so that the result has passed the checks of every later reader.
    return read_manifest(directory)


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Reads and checks `manifest.json`; the shards themselves are not touched.

    Raises:
        UserError: the directory or its manifest is missing, or the manifest is damaged, changed or of another version.
    """
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if not directory.exists():
            raise UserError(f"{directory}: no such directory; make the shards with `llm prepare_data`") from None
        if not directory.is_dir():
            raise UserError(f"{directory}: not a directory; name the one that `llm prepare_data` made") from None
        raise UserError(
            f"{directory}: holds no {MANIFEST_NAME}: `llm prepare_data` was interrupted or never ran here; run it"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_manifest(content, directory, str(path))


def parse_manifest(text: bytes, directory: Path, path: str) -> Manifest:
    """Checks the content of a manifest. path: where it was read, for errors; `directory` is that of its shards.

    Raises UserError as `read_manifest`.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise UserError(f"{path}: not JSON ({error}); run `llm prepare_data` again") from None
    if not isinstance(content, dict) or "format_version" not in content:
        raise UserError(f"{path}: not the manifest of a data set; run `llm prepare_data` again")
    # Checked before any other key, because another version may have other keys.
    if content["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: shard format version {content['format_version']!r}, but this program reads version "
            f"{FORMAT_VERSION}; run `llm prepare_data` again"
        )
    try:
        shards = {split: tuple(_shard_info(shard) for shard in content["shards"][split]) for split in SPLITS}
        for split in SPLITS:
            # Each count is below 2**63, but their sum may not be.
            _integer(sum(shard.tokens for shard in shards[split]))
        manifest = Manifest(
            path=directory,
            format_version=content["format_version"],
            vocab_size=_integer(content["vocab_size"]),
            tokenizer_sha256=_digest(content["tokenizer_sha256"]),
            seq_len=_integer(content["seq_len"]),
            packing=dict(content["packing"]),
            shards=shards,
            counters=dict(content["counters"]),
            dataset_hash=_digest(content["dataset_hash"]),
            tokenizer=dict(content.get("tokenizer", {})),
        )
        for name in manifest.tokenizer_files:
            _check_name(name)
        expected = dataset_hash(tokenizer_sha256=manifest.tokenizer_sha256, packing=manifest.packing, shards=shards)
    except KeyError as error:
        raise UserError(f"{path}: the key {error} is missing; run `llm prepare_data` again") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}; run `llm prepare_data` again") from None
    if manifest.dataset_hash != expected:
        raise UserError(
            f"{path}: dataset_hash does not match the contents: it was changed; run `llm prepare_data` again"
        )
    return manifest


def _shard_info(entry: Mapping[str, Any]) -> ShardInfo:
    info = ShardInfo(**{each.name: entry[each.name] for each in fields(ShardInfo)})
    _check_name(info.file)
    for name in ("tokens", "documents", "bytes", "header_crc32c"):
        _integer(entry[name])
    if info.header_crc32c >= 2**32:
        raise ValueError(f"{info.header_crc32c} where a crc32c is due")
    _digest(info.sha256)
    return info


def _check_name(name: Any) -> None:
    # The name is joined to the directory: a name with a path in it could lead to any file of the machine.
    if not isinstance(name, str) or not name.isprintable() or name != os.path.basename(name) or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not the name of a file in this directory")


def _integer(value: Any) -> int:
    # Not isinstance: True and False are ints too.
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} where a count is due")
    return value


def _digest(value: Any) -> str:
    # bytes.fromhex skips white space, so 64 characters may be fewer than 32 bytes.
    if not isinstance(value, str) or len(value) != 64 or len(bytes.fromhex(value)) != 32:
        raise ValueError(f"{value!r} where a sha256 is due")
    return value
