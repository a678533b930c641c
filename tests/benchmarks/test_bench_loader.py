"""The loader's benchmark on a small shard: every reader reads the same sequences, and every column has its figure."""

import numpy as np
import pytest

from benchmarks import bench_loader
from benchmarks.bench_loader import MICRO_BATCH, READERS, SEQ_LEN


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("shards")
    bench_loader.write_shards(made, 200_000)
    return made


@pytest.mark.parametrize("name", ["ours, 1 thread", "ours, 2 threads", "DataLoader, 0 workers"])
def test_readers_yield_sequences_of_the_shard_with_their_next_tokens(folder, name):
    tokens = bench_loader.flat(folder).astype(np.int64)
    sequences = {tokens[i : i + SEQ_LEN].tobytes() for i in range(0, len(tokens) - SEQ_LEN, SEQ_LEN)}
    inputs, labels, *_ = next(READERS[name](folder, 0))
    assert inputs.shape == labels.shape == (MICRO_BATCH, SEQ_LEN)
    assert {sequence.numpy().tobytes() for sequence in inputs} <= sequences
    here = labels[:, :-1] != -100
    assert (labels[:, :-1][here] == inputs[:, 1:][here]).all()


@pytest.mark.parametrize("name", ["ours, 2 threads", "random crops of a memmap", "DataLoader, 0 workers"])
def test_every_column_has_its_figure(folder, name):
    found = bench_loader.measure(name, folder, seconds=0.05)
    unknown = {"resume_seconds"} if name == "random crops of a memmap" else set()
    assert {key for key, value in found.items() if value is None} == unknown
    assert all(value > 0 for key, value in found.items() if value is not None and key != "memory_bytes")
    result = {"command": "c", "hardware": "h", "versions": {"torch": "1"}, "readers": {name: found, "litdata": None}}
    lines = bench_loader.table(result).splitlines()
    assert lines[2].startswith(f"| {name} | ")
    assert lines[3].startswith("| litdata | not installed | ")


@pytest.mark.parametrize("name", bench_loader.WRITERS)
def test_readers_with_a_format_of_their_own_yield_the_same_tokens(folder, name):
    if bench_loader.installed(name) is None:
        pytest.skip(f"{name} is not installed")
    bench_loader.WRITERS[name](folder)
    tokens = bench_loader.flat(folder).astype(np.int64).tobytes()
    for sequence in (0, 3 * MICRO_BATCH):
        inputs, labels = next(READERS[name](folder, sequence))
        assert inputs.shape == labels.shape == (MICRO_BATCH, SEQ_LEN)
        assert all(sequence.numpy().tobytes() in tokens for sequence in inputs)
        assert (labels[:, :-1] == inputs[:, 1:]).all()
