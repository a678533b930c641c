"""Shards as a torch Dataset: the batches of training in their order, from any position on."""

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from running import small_config
from torch.utils.data import DataLoader

import llm
from llm.data.manifest import read_manifest
from llm.data.object_store import read_data
from llm.data.shards import Loader


def equal(mine: Sequence[llm.Batch], theirs: Sequence[llm.Batch]) -> bool:
    pairs = zip(mine, theirs, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def taken(loader: Loader, count: int) -> list[llm.Batch]:
    with loader:
        return [llm.Batch(*(tensor.clone() for tensor in batch)) for batch in itertools.islice(loader, count)]


@pytest.fixture(scope="module")
def staged(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> llm.Config:
    """A config with two sources, whose shares change after two steps of 6 sequences of 32 tokens."""
    shards, more = small_shards, tmp_path_factory.mktemp("more") / "shards"
    shutil.copytree(shards, more)
    sources = [{"path": str(shards), "weight": 1.0}, {"path": str(more), "weight": 3.0}]
    changes: dict[str, Any] = {
        "data__path": None,
        "data__seq_len": 32,
        "data__stages": [{"from_tokens": 300, "sources": sources}],
        "train__global_batch_tokens": 6 * 32,
        "train__seed": 5,
    }
    return llm.load_config(small_config(shards, shards / "run", **changes, data__sources=sources[:1]))


@pytest.mark.parametrize("micro_batch", [None, 1, 4])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_batches_are_those_of_each_rank_of_a_training(
    staged: llm.Config, micro_batch: int | None, world_size: int
) -> None:
    for rank in range(world_size):
        dataset = llm.ShardDataset(staged, micro_batch=micro_batch, rank=rank, world_size=world_size)
        loader = Loader(
            read_data(staged.data),
            "train",
            seq_len=32,
            seed=5,
            global_batch=6,
            micro_batch=micro_batch or 6 // world_size,
            rank=rank,
            world_size=world_size,
        )
        assert equal(list(itertools.islice(dataset, 30)), taken(loader, 30))


def test_shards_alone_have_the_sequences_and_the_seed_of_a_config_s_defaults(small_shards: Path) -> None:
    dataset = llm.ShardDataset(small_shards)
    manifest = read_manifest(small_shards)
    assert dataset.sequences == manifest.sequences("train", 64)
    loader = Loader(manifest, "train", seq_len=64, seed=1337, global_batch=1, micro_batch=1)
    more = dataset.sequences + 3  # into the second epoch
    assert equal(list(itertools.islice(dataset, more)), taken(loader, more))


def test_a_dataset_goes_on_where_it_stopped_and_another_from_its_position(small_shards: Path) -> None:
    whole = list(itertools.islice(llm.ShardDataset(small_shards, global_batch=4, micro_batch=2), 12))
    dataset = llm.ShardDataset(small_shards, global_batch=4, micro_batch=2)
    assert equal(list(itertools.islice(dataset, 5)), whole[:5])
    assert dataset.position == 8, "two steps, and a half that begins anew"
    assert equal(list(itertools.islice(dataset, 4)), whole[4:8])
    assert dataset.position == 16
    again = llm.ShardDataset(small_shards, global_batch=4, micro_batch=2, position=dataset.position)
    assert equal(list(itertools.islice(again, 4)), whole[8:12])
    dataset.position = 0
    assert equal(list(itertools.islice(dataset, 3)), whole[:3])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_data_loader_keeps_the_order(small_shards: Path, workers: int) -> None:
    expected = list(itertools.islice(llm.ShardDataset(small_shards, global_batch=4), 7))
    loader = DataLoader(llm.ShardDataset(small_shards, global_batch=4), batch_size=None, num_workers=workers)
    found = list(itertools.islice(loader, 7))
    assert all(isinstance(batch, llm.Batch) for batch in found)
    assert equal(found, expected)


def test_the_validation_split_comes_once_in_its_stored_order(small_shards: Path) -> None:
    manifest = read_manifest(small_shards)
    dataset = llm.ShardDataset(small_shards, split="val", seq_len=16, global_batch=3)
    loader = Loader(
        manifest, "val", seq_len=16, seed=0, global_batch=3, micro_batch=3, shuffle=False, end=dataset.sequences
    )
    assert equal(list(dataset), taken(loader, 10**6))


def test_a_run_s_config_and_position_give_the_next_batches_of_the_run(
    small_shards: Path, random_checkpoint: Path
) -> None:
    model = llm.load(random_checkpoint)
    (batch,) = itertools.islice(llm.ShardDataset(model.config, position=model.position), 1)
    assert batch.input_ids.shape == (8, 64)
    assert batch.labels.shape == batch.doc_start.shape == (8, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split 'test'"),
        ({"seq_len": 10**6}, "seq_len 1000000 is longer than the data"),
        ({"seq_len": -1}, "seq_len is -1"),
        ({"rank": 1}, "rank is 1, not in"),
        ({"world_size": 0}, "world_size is 0"),
        ({"global_batch": 0}, "global_batch is 0"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"position": -1}, "position is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_number_out_of_range_is_a_user_error(small_shards: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(llm.UserError, match=message):
        llm.ShardDataset(small_shards, **options)


def test_what_is_missing_is_a_user_error(small_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(llm.UserError, match="nowhere"):
        llm.ShardDataset(tmp_path / "nowhere")
    tree = small_config(small_shards, tmp_path)
    del tree["train"]["global_batch_tokens"]
    with pytest.raises(llm.UserError, match=r"train\.global_batch_tokens is null"):
        llm.ShardDataset(llm.load_config(tree))
    assert llm.ShardDataset(llm.load_config(tree), global_batch=2).sequences > 0
