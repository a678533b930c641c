"""Checksums of a checkpoint, kept in its state.json, so that the folder stays a plain Hugging Face model.

    "files":    {file: CRC-32C of its bytes; of a .safetensors only the header}
    "tensors":  {file stem: {tensor's name: CRC-32C of its values}}
    "checksum": CRC-32C of all other entries of state.json, as canonical JSON

Together they cover every byte. A tensor has one of its own, so that whoever reads it need not read the others.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.data.shards import crc32c

if TYPE_CHECKING:  # finding a checkpoint does not need torch
    import torch

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library; a longer header is damaged."""


@dataclass
class Checksums:
    """The checksums of files and tensors, in hexadecimal, as in state.json."""

    files: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, other: "Checksums") -> None:
        """Adds those of other files and tensors, such as another rank's."""
        self.files |= other.files
        for stem, named in other.tensors.items():
            self.tensors[stem] = self.tensors.get(stem, {}) | named


def of_tensor(tensor: "torch.Tensor") -> str:
    """Returns the checksum of a contiguous tensor on the host. Other threads run meanwhile."""
    return to_hex(crc32c(tensor.numpy()))


def of_file(path: Path) -> str:
    """Returns the checksum of a file's bytes; of a .safetensors only of its header. Raises OSError."""
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            length = file.read(8)
            return to_hex(crc32c(length + file.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES))))
        size = os.fstat(file.fileno()).st_size
        return to_hex(crc32c(file.read(size)))


def sealed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of state.json with their checksum."""
    return {**tree, "checksum": _of_tree(tree)}


def is_intact(tree: Mapping[str, Any]) -> bool:
    """Whether the entries are those that `sealed` got."""
    return tree.get("checksum") == _of_tree(tree)


def _of_tree(tree: Mapping[str, Any]) -> str:
    others = {key: value for key, value in tree.items() if key != "checksum"}
    return to_hex(crc32c(json.dumps(others, sort_keys=True, separators=(",", ":")).encode()))


def to_hex(crc: int) -> str:
    """Returns a checksum as state.json has it."""
    return f"{crc:08x}"
