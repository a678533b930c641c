"""The loader once more, plainly: shard file, checksum, order and batches in pure Python and numpy.

The oracle that tests hold csrc/shards/ against, and the shortest description of what that code does. Nothing else uses
it. It shares no code with llm/data/shards.py but the records of the manifest.
"""

import itertools
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm.data.manifest import Manifest, ShardInfo

MAGIC = b"LLMSHARD"
PAGE_BYTES = 4096
BLOCK_BYTES = 65536
# magic, version, bytes of the header, of a token, of a block; vocab_size, tokens, documents; offsets of the tokens, the
# document starts and the checksums; bytes of the file; tokenizer sha256; checksum of the checksum table. The header's
# own checksum lies in its last four bytes.
HEADER = struct.Struct("<8s 4I 3Q 3Q Q 32s I")
MASK = 2**64 - 1


def crc32c(data: bytes) -> int:
    """CRC-32C (RFC 3720, appendix B.4), a byte at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _crc_of_byte(crc: int) -> int:
    for _ in range(8):
        crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc


_CRC_TABLE = [_crc_of_byte(byte) for byte in range(256)]


def token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 65536 else "<u4"


def pack_shard(tokens: NDArray[np.int64], starts: NDArray[np.int64], vocab_size: int, tokenizer_sha256: bytes) -> bytes:
    """The bytes of the shard with these tokens [n] and document starts [d]."""
    dtype = token_dtype(vocab_size)
    body = tokens.astype(dtype).tobytes()
    body += bytes(-len(body) % PAGE_BYTES)
    documents_offset = PAGE_BYTES + len(body)
    body += starts.astype("<u8").tobytes()
    checksums_offset = PAGE_BYTES + len(body)
    blocks = [body[i : i + BLOCK_BYTES] for i in range(0, len(body), BLOCK_BYTES)]
    table = b"".join(struct.pack("<I", crc32c(block)) for block in blocks)
    header = HEADER.pack(
        *(MAGIC, 1, PAGE_BYTES, np.dtype(dtype).itemsize, BLOCK_BYTES),
        *(vocab_size, len(tokens), len(starts)),
        *(PAGE_BYTES, documents_offset, checksums_offset),
        *(checksums_offset + len(table), tokenizer_sha256, crc32c(table)),
    )
    header += bytes(PAGE_BYTES - 4 - len(header))
    return header + struct.pack("<I", crc32c(header)) + body + table


def unpack_shard(data: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens [n] and document starts [d] of a shard, which is taken to be undamaged."""
    fields = HEADER.unpack_from(data)
    vocab_size, tokens, documents, tokens_offset, documents_offset = fields[5:10]
    return (
        np.frombuffer(data, token_dtype(vocab_size), tokens, tokens_offset).astype(np.int64),
        np.frombuffer(data, "<u8", documents, documents_offset).astype(np.int64),
    )


def write_dataset(
    directory: Path,
    shards: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    vocab_size: int,
    tokenizer_sha256: bytes,
) -> Manifest:
    """Writes a train split of (tokens [n], document starts [d]) shards. The manifest is returned, not written, and its
    hashes are zeros: the loader takes no notice of them.
    """
    infos = []
    for number, (tokens, starts) in enumerate(shards):
        content = pack_shard(tokens, starts, vocab_size, tokenizer_sha256)
        path = directory / f"train-{number:05}.bin"
        path.write_bytes(content)
        checksum = int.from_bytes(content[PAGE_BYTES - 4 : PAGE_BYTES], "little")
        infos.append(ShardInfo(path.name, len(tokens), len(starts), len(content), "00" * 32, checksum))
    return Manifest(
        path=directory,
        format_version=1,
        vocab_size=vocab_size,
        tokenizer_sha256=tokenizer_sha256.hex(),
        seq_len=16,
        packing={},
        shards={"train": tuple(infos), "val": ()},
        counters={},
        dataset_hash="00" * 32,
    )


def _mix(x: int) -> int:
    """The output function of SplitMix64."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def sequence_at(seed: int, epoch: int, sequences: int, index: int) -> int:
    """An alternating Feistel network of eight rounds over the smallest power of two >= sequences (and >= 64), walked
    until the value lies below `sequences`.
    """
    bits = max(6, (sequences - 1).bit_length())
    low_bits = bits // 2
    low_mask, high_mask = 2**low_bits - 1, 2 ** (bits - low_bits) - 1
    golden = 0x9E3779B97F4A7C15
    stream = _mix((_mix((seed + golden) & MASK) + epoch) & MASK)
    keys = [_mix((stream + (round + 1) * golden) & MASK) for round in range(8)]
    while True:
        low, high = index & low_mask, index >> low_bits
        for round in range(0, 8, 2):
            high ^= _mix(low ^ keys[round]) & high_mask
            low ^= _mix(high ^ keys[round + 1]) & low_mask
        index = high << low_bits | low
        if index < sequences:
            return index


def make_schedule(counts: Sequence[int]) -> list[int]:
    """The source at each position of a mixture's period: the one furthest behind its share, the earlier on a tie."""
    given = [0] * len(counts)
    order = []
    for position in range(1, sum(counts) + 1):
        behind = [count * position - sum(counts) * has for count, has in zip(counts, given, strict=True)]
        order.append(behind.index(max(behind)))
        given[order[-1]] += 1
    return order


Stages = Sequence[tuple[int, Sequence[int]]]
"""(position at which it begins, period: the source at each of its positions, repeated until the next stage)"""


def place(position: int, stages: Stages) -> tuple[int, int]:
    """The source of a position, and the number of earlier positions that have the same source."""

    def count(period: Sequence[int], source: int, length: int) -> int:
        whole, part = divmod(length, len(period))
        return whole * period.count(source) + period[:part].count(source)

    begun = [(begin, list(period)) for begin, period in stages if begin <= position]
    begin, period = begun[-1]
    source = period[(position - begin) % len(period)]
    ends = [begin for begin, _ in begun[1:]] + [position]
    earlier = (count(period, source, end - begin) for (begin, period), end in zip(begun, ends, strict=True))
    return source, sum(earlier)


CutSequence = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]


def cut_sequences(tokens: NDArray[np.int64], starts: NDArray[np.int64], seq_len: int) -> list[CutSequence]:
    """All sequences of a shard as (input_ids int64 [S], labels int64 [S], doc_start int32 [S])."""
    begins = np.zeros(len(tokens), dtype=bool)
    begins[starts] = True
    sequences = []
    for first in range(0, len(tokens) - seq_len, seq_len):
        input_ids = tokens[first : first + seq_len]
        labels = tokens[first + 1 : first + seq_len + 1].copy()
        labels[begins[first + 1 : first + seq_len + 1]] = -100
        doc_start = np.zeros(seq_len, dtype=np.int32)
        for i in range(1, seq_len):
            doc_start[i] = i if begins[first + i] else doc_start[i - 1]
        sequences.append((input_ids, labels, doc_start))
    return sequences


def read_sequences(manifest: Manifest, split: str, seq_len: int) -> list[CutSequence]:
    """All sequences of a split, shard after shard."""
    shards: tuple[ShardInfo, ...] = manifest.shards[split]
    return [
        sequence
        for shard in shards
        for sequence in cut_sequences(*unpack_shard(Path(manifest.path, shard.file).read_bytes()), seq_len)
    ]


def batches(
    sequences: list[CutSequence],
    *,
    source_sequences: Sequence[int] | None = None,
    stages: Stages = ((0, (0,)),),
    seq_len: int,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    position: int = 0,
    shuffle: bool = True,
    end: int | None = None,
) -> Iterator[CutSequence]:
    """The micro-batches of one rank, each array [micro_batch, seq_len]; the arguments are llm.data.shards.Loader's.

    sequences: of all sources, one after the other. source_sequences: how many each source has; None: there is one
        source. stages: of a mixture.
    """
    sizes = [len(sequences)] if source_sequences is None else source_sequences
    first_sequences = [sum(sizes[:source]) for source in range(len(sizes))]
    empty = (
        np.zeros(seq_len, np.int64),
        np.full(seq_len, -100, np.int64),
        np.zeros(seq_len, np.int32),
    )
    for step_begin in itertools.count(position, global_batch):
        if end is not None and step_begin >= end:
            return
        for micro in range(-(-global_batch // (micro_batch * world_size))):
            chosen = []
            for slot in range(micro_batch):
                offset = (micro * world_size + rank) * micro_batch + slot
                p = step_begin + offset
                if offset >= global_batch or (end is not None and p >= end):
                    chosen.append(empty)
                    continue
                if not shuffle:
                    chosen.append(sequences[p % len(sequences)])
                    continue
                source, earlier = place(p, stages)
                epoch, index = divmod(earlier, sizes[source])
                chosen.append(
                    sequences[first_sequences[source] + sequence_at(seed + source, epoch, sizes[source], index)]
                )
            input_ids, labels, doc_start = zip(*chosen, strict=True)
            yield np.stack(input_ids), np.stack(labels), np.stack(doc_start)
