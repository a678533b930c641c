"""Shards as a torch Dataset, in the exact order of training."""

import os
import threading
from collections.abc import Iterator
from typing import Literal

from torch.utils.data import IterableDataset, get_worker_info

from llm.config import Config, DataConfig, TrainConfig
from llm.data.object_store import copy, read_data
from llm.data.shards import Batch, Loader
from llm.display import Display
from llm.errors import UserError

DEFAULT_SEED: int = TrainConfig.model_fields["seed"].default


class ShardDataset(IterableDataset[Batch]):
    """An iterable-style dataset of micro-batches: those that one rank of a training run computes, in their order.

    A step takes the `global_batch` sequences from `position` on. Rank r of `world_size` gets its micro-batches; the
    last ones may have empty sequences (`Loader`). The training split has no end: an epoch is `sequences` long, and each
    is shuffled anew. The validation split ends after all sequences, in their stored order.

    Iterating begins at `position`, which moves with the batches: a second loop goes on where the first one stopped, and
    `ShardDataset(..., position=dataset.position)` does so in another process. In the middle of a step, it is that
    step's first position.

    With torch's DataLoader, give it batch_size=None, since batches are made here, in C++ threads. Its workers
    (num_workers) are not needed; with them the order is the same, and `position` moves only in their processes.

    Args:
        source: a directory of shards, here or in an object store, or a Config: its data.* with all sources and stages,
            its seed, its global batch. A run's config, with nothing left open, is `llm.load(RUN).config`.
        split: "train" or "val".
        seq_len: tokens per sequence; None: as in the config, or as the shards were prepared for.
        seed: of the order; None: as in the config, or the default of train.seed.
        global_batch: sequences per step; None: as in the config, or 1.
        micro_batch: sequences per batch; None: a rank's share of the step.
        position: of the first step, in sequences since the beginning of the run, a multiple of global_batch in a run.

    Raises UserError for missing or damaged shards, and for numbers out of range.
    """

    position: int
    """The position of the step of the batch that comes next."""
    sequences: int
    """The number of sequences of the split: the length of an epoch."""

    def __init__(
        self,
        source: str | os.PathLike[str] | Config,
        *,
        split: Literal["train", "val"] = "train",
        seq_len: int | None = None,
        seed: int | None = None,
        global_batch: int | None = None,
        micro_batch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        position: int = 0,
    ) -> None:
        if split not in ("train", "val"):
            raise UserError(f"split {split!r}: is none of train, val")
        tokens = None
        if not isinstance(source, Config):
            data = DataConfig(path=str(source))
        else:
            data = source.data
            seq_len = seq_len or source.data.seq_len
            seed = source.train.seed if seed is None else seed
            tokens = source.train.global_batch_tokens
        self._data = read_data(data)
        if any(manifest.url for manifest in self._data.sources):
            with Display("copying", 1) as display:
                copy(self._data.sources, data, display, threading.Event())
        prepared = {manifest.seq_len for manifest in self._data.sources}
        if seq_len is None and len(prepared) > 1:
            raise UserError(
                f"{self._data.name}: were prepared for sequences of {sorted(prepared)} tokens; give seq_len"
            )
        self._split, self._seq_len = split, seq_len or prepared.pop()
        if tokens is None and global_batch is None and isinstance(source, Config):
            raise UserError(
                "train.global_batch_tokens is null, so the steps are not known: give global_batch, or the config of a "
                "run, llm.load(RUN).config"
            )
        self._global_batch = global_batch if global_batch is not None else (tokens or self._seq_len) // self._seq_len
        self._seed = DEFAULT_SEED if seed is None else seed
        # Of a world_size of 0 the Loader complains.
        self._micro_batch = -(-self._global_batch // max(1, world_size)) if micro_batch is None else micro_batch
        self._rank, self._world_size, self.position = rank, world_size, position
        self.sequences = self._data.sequences(split, self._seq_len)
        self._open().close()  # checks everything

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        begin = self.position
        with self._open() as loader:
            for taken, batch in enumerate(loader, 1):
                # The DataLoader takes a batch from each worker in turn.
                if (taken - 1) % workers == number:
                    self.position = begin + taken // loader.micro_batches * self._global_batch
                    # Copies, because the loader writes to its memory again.
                    yield Batch(*(tensor.clone() for tensor in batch))

    def _open(self) -> Loader:
        training = self._split == "train"
        try:
            return Loader(
                self._data,
                self._split,
                seq_len=self._seq_len,
                seed=self._seed,
                global_batch=self._global_batch,
                micro_batch=self._micro_batch,
                rank=self._rank,
                world_size=self._world_size,
                position=self.position,
                shuffle=training,
                end=None if training else self.sequences,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
