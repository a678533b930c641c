"""Types of the C++ extension that csrc/shards/bindings.cpp defines."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION: int
ORDER_VERSION: str
Spec = tuple[bytes, int, int, int, int]  # path, tokens, documents, bytes, checksum of the header
CRC32C_IMPLEMENTATION: str  # "sse4.2", "armv8-crc" or "table"

def crc32c(data: bytes | memoryview | NDArray[Any], crc: int = 0, portable: bool = False) -> int: ...
def token_bytes(vocab_size: int) -> int: ...
def slots_needed(prefetch: int) -> int: ...
def verify_shard(
    shard: Spec, vocab_size: int, tokenizer_sha256: bytes, bos: int, eos: int, in_text: bool
) -> list[str]: ...
def document_starts(shard: Spec, vocab_size: int, tokenizer_sha256: bytes) -> NDArray[np.uint64]: ...
def sequence_at(seed: int, epoch: int, sequences: int, index: int) -> int: ...

class ShardWriter:
    def __init__(self, path: bytes, vocab_size: int, tokenizer_sha256: bytes) -> None: ...
    def append(
        self,
        tokens: NDArray[np.uint16] | NDArray[np.uint32] | NDArray[np.int32],
        document_starts: NDArray[np.uint64],
    ) -> None: ...
    def finish(self) -> int: ...
    def abandon(self) -> None: ...
    @property
    def tokens(self) -> int: ...
    @property
    def documents(self) -> int: ...

class Loader:
    def __init__(
        self,
        *,
        vocab_size: int,
        tokenizer_sha256: bytes,
        shards: list[Spec],
        slots: list[tuple[int, int, int]],  # addresses of input_ids, labels, doc_start
        memory: object,  # kept alive as long as threads write to the slots
        seq_len: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        position: int,
        end: int | None,
        shuffle: bool,
        threads: int,
        prefetch: int,
        source_shards: list[int],  # shards of each source, in order
        stages: list[tuple[int, list[int]]],  # where each begins, and its schedule: sources, repeated until the next
    ) -> None: ...
    def next(self) -> int: ...
    def targets(self, position: int, count: int) -> int: ...
    def close(self) -> None: ...
