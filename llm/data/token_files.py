"""Files of token ids that other programs have made: nanoGPT's, llm.c's and Megatron-LM's.

    nanoGPT        the ids, without a header: uint16, or what `--tokens` names
    llm.c          256 int32 (magic, version, number of ids, ...), then the ids; the magic tells their type
    Megatron-LM    x.bin has the ids, x.idx their type and where documents end

A document ends at EOS, before BOS, and where an .idx says so. BOS and EOS themselves are left out: packing puts them
where documents begin and end. Ids travel to the processes that pack them as uint32.
"""

import glob
import itertools
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from llm.data import blocks
from llm.data.blocks import START, Block, Place, blocks_of_values
from llm.data.text_files import Source, Sources, stat_of
from llm.errors import UserError

KINDS = ("auto", "uint16", "uint32")
"""What `--tokens` takes; auto: the file has a header that tells."""
IDS = np.dtype("<u4")
READ_IDS = 1 << 20
_LLM_C = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
"""{magic: (version, type of the ids)}"""
_LLM_C_BYTES = 1024
_MEGATRON = b"MMIDIDX\0\0"
_MEGATRON_TYPES = {1: "uint8", 4: "int32", 5: "int64", 8: "uint16"}


@dataclass(frozen=True)
class Layout:
    """Where the ids of a file are."""

    kind: str  # for people
    dtype: np.dtype
    offset: int  # bytes before the first id
    count: int
    # int64 [documents]: of a Megatron file, the number of ids before each document's end
    ends: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def find_token_files(inputs: Iterable[str | os.PathLike[str]], tokens: str) -> Sources:
    """Finds the files of token ids: files, folders (every .bin in them and below) and patterns.

    tokens: one of KINDS.

    Returns the files in the order of `inputs`; an .idx comes before its .bin, with the mode "index". Raises UserError
    for a file that is missing, damaged, or without a header that tells the type of its ids.
    """
    if tokens not in KINDS:
        raise UserError(f"--tokens {tokens}: is one of {', '.join(KINDS)}")
    files: dict[Path, Source] = {}
    lines = []
    for name in inputs:
        for path in _paths(os.path.expanduser(os.fspath(name))):
            layout = read_layout(path, tokens)
            if layout.kind.startswith("Megatron"):
                files[_index_of(path)] = Source(_index_of(path), "index")
            files[path] = Source(path, f"ids {layout.dtype}")
            lines.append(f"{path}: {layout.count:,} token ids, {layout.dtype}, {layout.kind}")
    if not files:
        raise UserError("no input: name at least one file of token ids")
    return Sources(tuple(files.values()), tuple(lines), {path: stat_of(path) for path in files})


def _paths(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        found = sorted(path.rglob("*.bin"), key=os.fsencode)
        if not found:
            raise UserError(f"{path}: holds no .bin with token ids")
        return found
    if not os.path.lexists(path) and glob.has_magic(name):
        found = [Path(match).with_suffix(".bin") for match in sorted(glob.glob(name, recursive=True), key=os.fsencode)]
        if not found:
            raise UserError(f"{name}: no file matches")
        return list(dict.fromkeys(found))
    return [path.with_suffix(".bin") if path.suffix == ".idx" else path]


def _index_of(path: Path) -> Path:
    return path.with_suffix(".idx")


def read_layout(path: Path, tokens: str) -> Layout:
    """Tells where the ids of a file are, and of which type. Raises UserError if it cannot be told, or is damaged."""
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: is no regular file; inputs are read more than once")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(_LLM_C_BYTES)
    magic, version, count = struct.unpack("<3i", head[:12].ljust(12, b"\0"))
    if _index_of(path).exists():
        layout = _read_index(path, size)
    elif magic in _LLM_C and len(head) == _LLM_C_BYTES and version == _LLM_C[magic][0]:
        dtype = np.dtype(_LLM_C[magic][1])
        layout = Layout("llm.c's header", dtype, _LLM_C_BYTES, count)
        if size != _LLM_C_BYTES + count * dtype.itemsize:
            held = (size - _LLM_C_BYTES) // dtype.itemsize
            raise UserError(f"{path}: has {held:,} ids, its header says {count:,}; fetch or make it again")
    elif tokens == "auto":
        raise UserError(f"{path}: has no header that tells the type of its ids; name it, such as --tokens uint16")
    else:
        dtype = np.dtype(tokens)
        layout = Layout("no header", dtype, 0, size // dtype.itemsize)
        if size % dtype.itemsize:
            raise UserError(f"{path}: its {size:,} bytes are no whole number of ids of {tokens}; name another --tokens")
    if tokens not in ("auto", layout.dtype.name):
        raise UserError(f"{path}: has ids of {layout.dtype}, by {layout.kind}; give --tokens {layout.dtype} or auto")
    if not layout.count:
        raise UserError(f"{path}: is empty")
    return layout


def _read_index(path: Path, size: int) -> Layout:
    """Reads the .idx of a Megatron file. size: bytes of the .bin."""
    index = _index_of(path)
    damaged = UserError(f"{index}: is damaged, or not the index of {path}; fetch or make both again")
    content = np.memmap(index, np.uint8, mode="r") if index.stat().st_size else np.zeros(0, np.uint8)
    if content[:9].tobytes() != _MEGATRON or len(content) < 34:
        raise UserError(f"{index}: is no index of Megatron-LM; move it away if {path} has nothing to do with it")
    version, code, sequences, documents = struct.unpack("<QBQQ", content[9:34].tobytes())
    if version != 1 or code not in _MEGATRON_TYPES:
        raise UserError(f"{index}: has version {version} and type {code} of ids, which are not read")
    dtype = np.dtype(_MEGATRON_TYPES[code])
    if len(content) < 34 + 12 * sequences + 8 * documents or not documents:
        raise damaged
    lengths = content[34 : 34 + 4 * sequences].view("<i4")
    begins = content[34 + 4 * sequences : 34 + 12 * sequences].view("<i8")
    document = content[34 + 12 * sequences : 34 + 12 * sequences + 8 * documents].view("<i8")
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    fits = (lengths >= 0).all() and (begins == ends[:-1] * dtype.itemsize).all() and ends[-1] * dtype.itemsize == size
    if not fits or not ((document >= 0) & (document <= sequences)).all() or (np.diff(document) < 0).any():
        raise damaged
    return Layout("Megatron-LM's index", dtype, 0, size // dtype.itemsize, ends[document])


def read_token_blocks(
    sources: Sequence[Source], tokens: str, separators: Sequence[int], start: Place = START
) -> Iterator[Block]:
    """Splits files of ids into blocks of the mode "ids": `values` are whole documents, `data` is a part of a long one.

    Args:
        separators: ids that divide documents, and are left out.
        start: as for `document_reader.read_blocks`; its offset counts ids.
    """
    before = 0
    for number, source in enumerate(sources):
        size = source.path.stat().st_size
        if number >= start.file and source.mode != "index":
            layout = read_layout(source.path, tokens)
            place = start if number == start.file else Place(number)
            for block in _blocks(_parts(source.path, layout, separators, place), source.path):
                position = before + layout.offset + block.place.offset * layout.dtype.itemsize
                yield replace(block, position=position)
        before += size


def _blocks(parts: Iterator[tuple[Block, bool]], path: Path) -> Iterator[Block]:
    for is_long, group in itertools.groupby(parts, lambda part: part[1]):
        if is_long:
            yield from (block for block, _ in group)
        else:
            documents = ((block.place, block.data) for block, _ in group)
            yield from blocks_of_values(documents, Block(path, "ids", Place()))


def _parts(path: Path, layout: Layout, separators: Sequence[int], place: Place) -> Iterator[tuple[Block, bool]]:
    """Yields each document, or the parts of a long one, as (block with its ids as data, whether it is a long one)."""
    # The parts depend on where the document begins, and not on where reading does.
    limit = blocks.BLOCK_BYTES // IDS.itemsize
    block = Block(path, "ids", place, first=True, last=False)
    held = np.zeros(0, IDS)
    with open(path, "rb") as file:
        for at in range(place.offset, layout.count, READ_IDS):
            file.seek(layout.offset + at * layout.dtype.itemsize)
            read = file.read(min(READ_IDS, layout.count - at) * layout.dtype.itemsize)
            ids = _as_ids(np.frombuffer(read, layout.dtype), path, at)
            begin = 0
            for end, following in [*_divisions(ids, layout.ends, separators, at), (len(ids), None)]:
                held = np.concatenate([held, ids[begin:end]])
                while len(held) > limit:
                    yield replace(block, data=held[:limit].tobytes()), True
                    held, block = held[limit:], replace(block, first=False, can_start=False)
                if following is None:
                    continue
                if len(held):
                    yield replace(block, data=held.tobytes(), last=True), not block.first
                begin, held = following, held[:0]
                block = Block(path, "ids", replace(place, offset=at + following), first=True, last=False)
    if len(held):
        yield replace(block, data=held.tobytes(), last=True), not block.first


def _as_ids(ids: np.ndarray, path: Path, at: int) -> np.ndarray:
    found = ids.astype(IDS)
    if (found != ids).any():  # negative, or of more than 32 bits
        i = int(np.argmax(found != ids))
        raise UserError(f"{path}: {ids[i]} at {at + i:,} is no token id; fetch or make it again")
    return found


def _divisions(ids: np.ndarray, ends: np.ndarray, separators: Sequence[int], at: int) -> Iterator[tuple[int, int]]:
    """Yields where a document ends in `ids` and where the next begins. at: number of ids before these."""
    found = [(int(i), int(i) + 1) for i in np.flatnonzero(np.isin(ids, separators))]
    low, high = np.searchsorted(ends, [at, at + len(ids)], side="right")
    found += [(int(end) - at, int(end) - at) for end in ends[low:high]]
    # An end just behind an EOS divides nothing more: the document between them is empty.
    yield from sorted(found)
