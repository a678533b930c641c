"""Tensors by name in a folder: in STEM.safetensors, or in several files with an index that names each tensor's file.

    STEM-00001-of-00003.safetensors, ...
    STEM.safetensors.index.json         {"metadata": {"total_size": bytes}, "weight_map": {tensor's name: file}}

The layout is Hugging Face's; its programs read files with the stem `model`.
"""

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from llm.errors import DamagedCheckpoint, UserError
from llm.model import checksums
from llm.model.checksums import Checksums


def part_file(stem: str, part: int, parts: int) -> str:
    """Returns the name of file number `part`, from 0, of `parts` files."""
    return f"{stem}.safetensors" if parts == 1 else f"{stem}-{part + 1:05d}-of-{parts:05d}.safetensors"


def index_file(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def write_index(folder: Path, stem: str, files: Mapping[str, str], total_size: int) -> None:
    """Writes the index. files: {tensor's name: file}; total_size: bytes of all tensors."""
    tree = {"metadata": {"total_size": total_size}, "weight_map": dict(files)}
    (folder / index_file(stem)).write_text(json.dumps(tree, indent=2) + "\n")


def write_tensors(
    path: Path, shapes: Mapping[str, torch.Size], blocks: Callable[[str], Iterator[torch.Tensor]]
) -> dict[str, str]:
    """Writes one safetensors file in fp32 that need not fit into memory. Returns the tensors' checksums.

    Args:
        shapes: {tensor's name: shape}, in the order of the file.
        blocks: yields a tensor by its name, in consecutive blocks of its rows, fp32 on the CPU.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers reads this entry
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)  # the data begin at a multiple of 8 bytes
    sums = {}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(described)) + described)
        for name in shapes:
            sums[name] = _write_blocks(file, blocks(name))
    return sums


def _write_blocks(file: BinaryIO, blocks: Iterator[torch.Tensor]) -> str:
    """Writes a tensor; returns its checksum. A function, so that no block is held when the next tensor is read."""
    crc = 0
    for block in blocks:
        array = block.contiguous().numpy()
        file.write(array.data)
        crc = checksums.crc32c(array, crc)
    return checksums.to_hex(crc)


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a .safetensors file, with the permissions of the folder's config.json. Raises OSError if it cannot."""
    try:
        # transformers reads the format from this entry.
        if _is_utf8(file):
            save_file(dict(tensors), file, {"format": "pt"})
        else:
            file.write_bytes(save(dict(tensors), {"format": "pt"}))
    except SafetensorError as error:
        # The library puts the system's error into its text.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(f"{file}: {error}") from None
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from None
    # safetensors makes files that only their owner can read.
    shutil.copymode(file.parent / "config.json", file)


@contextmanager
def utf8_path(file: Path) -> Iterator[str]:
    """Yields a path to read the file by that safetensors takes: it refuses names that are not UTF-8."""
    if _is_utf8(file):
        yield str(file)
        return
    with file.open("rb") as opened:
        yield f"/proc/self/fd/{opened.fileno()}"  # Linux's name of an open file


def _is_utf8(file: Path) -> bool:
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def open_tensors(
    folder: Path, stem: str, least: float = -math.inf, sums: Checksums | None = None
) -> Iterator[Callable[[str], torch.Tensor]]:
    """Yields a function that reads one fp32 tensor by its name.

    Args:
        least: every number must be finite and at least this.
        sums: checksums of what is read; None: there are none.

    The function raises UserError for a missing or damaged file, a missing tensor and invalid numbers.
    """
    index = folder / index_file(stem)
    if index.is_file():
        check_file(index, sums)
    files = read_index(index, DamagedCheckpoint) if index.is_file() else None
    only = folder / f"{stem}.safetensors"
    with ExitStack() as stack:
        opened: dict[Path, tuple[safe_open, set[str]]] = {}

        def get(name: str) -> torch.Tensor:
            if files is not None and name not in files:
                raise UserError(f"{index}: no tensor {name}; the checkpoint is of another model")
            file = only if files is None else folder / files[name]
            try:
                # A file stays open, so that its header is parsed only once.
                if file not in opened:
                    # Checked here, because safe_open raises FileNotFoundError, which is not a SafetensorError.
                    if not file.is_file():
                        raise DamagedCheckpoint(f"{file}: missing")
                    check_file(file, sums)
                    path = stack.enter_context(utf8_path(file))
                    reader = stack.enter_context(safe_open(path, framework="pt"))
                    opened[file] = reader, set(reader.keys())
                reader, names = opened[file]
                # get_tensor raises SafetensorError for an unknown name, which would be reported as damage.
                if name not in names:
                    raise UserError(f"{file}: no tensor {name}; the checkpoint is of another model")
                tensor: torch.Tensor = reader.get_tensor(name)
            except SafetensorError as error:
                raise DamagedCheckpoint(f"{file}: damaged ({error})") from None
            if wrong := _what_is_wrong(tensor, least):
                raise DamagedCheckpoint(f"{file}: damaged ({name} {wrong})")
            if sums is not None and checksums.of_tensor(tensor) != sums.tensors.get(stem, {}).get(name):
                raise DamagedCheckpoint(f"{file}: damaged (the checksum of {name} does not match)")
            return tensor

        yield get


def check_file(file: Path, sums: Checksums | None) -> None:
    """Raises DamagedCheckpoint if a file, of a .safetensors its header, does not have its checksum."""
    if sums is not None and checksums.of_file(file) != sums.files.get(file.name):
        part = "its header" if file.suffix == ".safetensors" else "the file"
        raise DamagedCheckpoint(f"{file}: damaged (the checksum of {part} does not match)")


def _what_is_wrong(tensor: torch.Tensor, least: float) -> str | None:
    if tensor.dtype != torch.float32:
        return f"is {str(tensor.dtype).removeprefix('torch.')}, not float32"
    # aminmax raises for an empty tensor.
    if tensor.numel() == 0:
        return "is empty"
    low, high = map(float, tensor.aminmax())  # one pass; both are NaN where any number is
    if not math.isfinite(low) or not math.isfinite(high):
        return "is not finite"
    return f"holds {low:g}, below {least:g}" if low < least else None


def read_index(path: Path, kind: type[UserError] = UserError) -> dict[str, str]:
    """Returns {tensor's name: file in the same folder}. Raises an error of this kind for a damaged index."""
    try:
        files = json.loads(path.read_text("utf-8"))["weight_map"]
        # An index must not lead to files outside by "../" or an absolute path.
        if any(not isinstance(f, str) or Path(f).name != f or not f.isprintable() for f in files.values()):
            raise ValueError("a file outside its folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise kind(f"{path}: damaged ({type(error).__name__}: {error})") from None
    named: dict[str, str] = files
    return named
