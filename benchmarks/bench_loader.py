"""Compares the loader with other readers of the same tokens, and with the speed of a memory copy.

    python -m benchmarks.bench_loader [--tokens 100_000_000] [--seconds 2] [--rounds 3] [--output FOLDER]

Every reader yields micro-batches of 16 sequences of 1,024 tokens, int64 inputs and labels (ours also doc_start), from
the same tokens of one shard, in a warm page cache. litdata and mosaicml-streaming, if installed, read the same tokens
in their own formats. Each reader runs in a new process, in turn, `--rounds` times; the table shows medians. Columns:

tokens/s        wall clock; the consumer does nothing else
tokens/s of CPU per second of processor time of all threads; unknown for worker processes
of memcpy       bytes/s of inputs, labels and doc_start, relative to a memory copy measured in the same process
first, resume   seconds from start to the first batch: of an epoch, and in the middle of one in the same order
memory          memory of the process and its workers, without the page cache
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm.atomic import atomic_text
from llm.data.manifest import read_manifest, write_manifest
from llm.data.shards import Loader, ShardWriter

SEQ_LEN, MICRO_BATCH, SEED = 1024, 16, 1
HEADER_BYTES = 4096  # header of a shard; the tokens follow
DOCUMENT_TOKENS = 700
LITDATA_PART = (SEQ_LEN + 1) * 1024
LITDATA_CHUNK = LITDATA_PART * 16  # tokens; about 32 MiB
OUTPUT = Path(__file__).resolve().parent.parent / "artifacts" / "bench"

Batches = Iterator[tuple[torch.Tensor, ...]]
# Makes an iterator over batches that begins at a given sequence of an epoch.
Reader = Callable[[Path, int], Batches]


def write_shards(folder: Path, tokens: int) -> None:
    """Writes one shard of random tokens, with a vocabulary of 32,000 and documents of about 700 tokens."""
    rng = np.random.default_rng(SEED)
    settings = {"vocab_size": 32_000, "tokenizer_sha256": "00" * 32}
    with ShardWriter(folder / "train-00000.bin", **settings) as writer:
        for _ in range(10):
            ids = rng.integers(0, 32_000, tokens // 10, dtype=np.uint16)
            writer.append(ids, np.flatnonzero(rng.random(len(ids)) < 1 / DOCUMENT_TOKENS).astype(np.uint64))
        info = writer.finish()
    write_manifest(folder, seq_len=SEQ_LEN, packing={}, shards={"train": [info], "val": []}, counters={}, **settings)


def ours(folder: Path, sequence: int, *, threads: int) -> Batches:
    order = {"seq_len": SEQ_LEN, "seed": SEED, "global_batch": MICRO_BATCH, "micro_batch": MICRO_BATCH}
    return iter(Loader(read_manifest(folder), "train", position=sequence, threads=threads, **order))


def flat(folder: Path) -> np.ndarray:
    """Returns the shard's tokens as an array in a file, the format of other projects."""
    count = read_manifest(folder).shards["train"][0].tokens
    return np.memmap(folder / "train-00000.bin", np.uint16, "r", HEADER_BYTES, (count,))


def random_crops(folder: Path, sequence: int) -> Batches:
    """As nanoGPT: a new memmap for each batch, and crops at random places, without epochs or resumption."""
    rng = np.random.default_rng(SEED)
    while True:
        data = flat(folder)
        places = rng.integers(0, len(data) - SEQ_LEN, MICRO_BATCH)
        inputs = torch.stack([torch.from_numpy(data[i : i + SEQ_LEN].astype(np.int64)) for i in places])
        labels = torch.stack([torch.from_numpy(data[i + 1 : i + SEQ_LEN + 1].astype(np.int64)) for i in places])
        yield inputs, labels


class Sequences(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A map-style data set over the memmap."""

    def __init__(self, folder: Path) -> None:
        self.data = flat(folder)

    def __len__(self) -> int:
        return (len(self.data) - 1) // SEQ_LEN

    def __getitem__(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.from_numpy(self.data[sequence * SEQ_LEN : sequence * SEQ_LEN + SEQ_LEN + 1].astype(np.int64))
        return tokens[:-1], tokens[1:]


def data_loader(folder: Path, sequence: int, *, workers: int) -> Batches:
    """torch's DataLoader over a shuffled epoch. It resumes by skipping the sequences that were read."""
    sequences = Sequences(folder)
    epochs = (
        torch.randperm(len(sequences), generator=torch.Generator().manual_seed(SEED + e)).tolist() for e in range(10**6)
    )
    order = itertools.islice(itertools.chain.from_iterable(epochs), sequence, None)
    context = "fork" if workers else None  # the default here, but not in a spawned process
    loader = torch.utils.data.DataLoader(
        sequences, MICRO_BATCH, sampler=order, num_workers=workers, multiprocessing_context=context
    )
    return iter(loader)


def crops(shard: Path, begin: int) -> torch.Tensor:
    """Returns tokens of a part of the shard, as litdata stores them; the vocabulary fits into int16."""
    return torch.from_numpy(flat(shard)[begin : begin + LITDATA_PART].astype(np.int16))


def write_litdata(folder: Path) -> None:
    import litdata

    litdata.optimize(
        partial(crops, folder),
        list(range(0, len(flat(folder)), LITDATA_PART)),
        str(folder / "litdata"),
        chunk_size=LITDATA_CHUNK,
        item_loader=litdata.TokensLoader(),
        num_workers=1,
        verbose=False,
    )


def lit(folder: Path, sequence: int) -> Batches:
    """litdata's shuffled blocks of 1,025 tokens, none shared."""
    import litdata

    options = {"item_loader": litdata.TokensLoader(block_size=SEQ_LEN + 1), "shuffle": True, "seed": SEED}
    data = litdata.StreamingDataset(str(folder / "litdata"), drop_last=True, **options)
    loader = litdata.StreamingDataLoader(data, batch_size=MICRO_BATCH)
    if sequence:  # the state that it saves after this many sequences
        place = {"current_epoch": 1, "num_samples_yielded": sequence, "latest_worker_idx": 0}
        loader.load_state_dict({"dataset": data.state_dict(sequence, 0, MICRO_BATCH), **place})
    while True:
        for tokens in loader:
            yield tokens[:, :-1].long(), tokens[:, 1:].long()


def write_mds(folder: Path) -> None:
    from streaming import MDSWriter

    tokens = flat(folder)
    with MDSWriter(out=str(folder / "mds"), columns={"tokens": f"ndarray:uint16:{SEQ_LEN + 1}"}) as writer:
        for begin in range(0, len(tokens) - SEQ_LEN, SEQ_LEN):
            writer.write({"tokens": np.asarray(tokens[begin : begin + SEQ_LEN + 1])})


def mds(folder: Path, sequence: int) -> Batches:
    """mosaicml-streaming's shuffled samples; each is a sequence with its last label."""
    from streaming import StreamingDataLoader, StreamingDataset

    order = {"shuffle": True, "shuffle_seed": SEED, "num_canonical_nodes": 1}
    data = StreamingDataset(local=str(folder / "mds"), batch_size=MICRO_BATCH, **order)
    loader = StreamingDataLoader(data, MICRO_BATCH)
    if sequence:
        place = {"epoch": 0, "sample_in_epoch": sequence, "initial_physical_nodes": 1}
        loader.load_state_dict({**place, "num_canonical_nodes": 1, "shuffle_seed": SEED})
    while True:
        for batch in loader:
            yield batch["tokens"][:, :-1].long(), batch["tokens"][:, 1:].long()


READERS: dict[str, Reader] = {
    "ours, 1 thread": partial(ours, threads=1),
    "ours, 2 threads": partial(ours, threads=2),
    "ours, 4 threads": partial(ours, threads=4),
    "random crops of a memmap": random_crops,
    "DataLoader, 0 workers": partial(data_loader, workers=0),
    "DataLoader, 2 workers": partial(data_loader, workers=2),
    "DataLoader, 4 workers": partial(data_loader, workers=4),
    "litdata": lit,
    "mosaicml-streaming": mds,
}
# For each optional package: its module, and the function that writes the tokens in its format.
MODULES = {"litdata": "litdata", "mosaicml-streaming": "streaming"}
WRITERS: dict[str, Callable[[Path], None]] = {"litdata": write_litdata, "mosaicml-streaming": write_mds}


def installed(name: str) -> str | None:
    """Returns the version of a reader's package; "" if it needs none; None if it is not installed."""
    try:
        return version(name) if name in WRITERS else ""
    except PackageNotFoundError:
        return None


def measure(name: str, folder: Path, seconds: float) -> dict[str, float | None]:
    """Measures one reader; called in a new process."""
    reader = READERS[name]
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores is intended here
    resumes = name != "random crops of a memmap"
    if name in MODULES:
        import_module(MODULES[name])  # an import takes seconds and is not part of the first batch
    memory = _anonymous_bytes()
    middle, resume = _first_batch(reader, folder, 16 * 1000) if resumes else (None, None)
    del middle
    batches, first = _first_batch(reader, folder, 0)
    _read(batches, seconds)  # warms up; also verifies most blocks
    begin, cpu = time.perf_counter(), time.process_time()
    count, size = _read(batches, seconds)
    elapsed, cpu = time.perf_counter() - begin, time.process_time() - cpu
    memory = _anonymous_bytes() - memory
    workers = active_children()
    del batches
    return {
        "tokens_per_second": count / elapsed,
        "tokens_per_cpu_second": None if workers else count / cpu,
        "of_memcpy": size / elapsed / _memcpy_rate(),
        "first_batch_seconds": first,
        "resume_seconds": resume,
        "memory_bytes": memory,
    }


def _first_batch(reader: Reader, folder: Path, sequence: int) -> tuple[Batches, float]:
    begin = time.perf_counter()
    batches = reader(folder, sequence)
    next(batches)
    return batches, time.perf_counter() - begin


def _read(batches: Batches, seconds: float) -> tuple[int, int]:
    """Reads batches for `seconds`; returns their tokens and bytes."""
    end, count, size = time.perf_counter() + seconds, 0, 0
    while time.perf_counter() < end:
        batch = next(batches)
        count += batch[0].numel()
        size += sum(tensor.nbytes for tensor in batch)
    return count, size


def _anonymous_bytes() -> int:
    """Returns bytes of memory of this process and its workers, without file-backed memory."""
    pids = [os.getpid(), *(child.pid for child in active_children())]
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def _memcpy_rate() -> float:
    """Measures bytes/s that one thread copies between arrays larger than the caches."""
    source, target = np.ones(2**27, np.uint8), np.zeros(2**27, np.uint8)
    taken = []
    for _ in range(5):
        begin = time.perf_counter()
        np.copyto(target, source)
        taken.append(time.perf_counter() - begin)
    return source.nbytes / statistics.median(taken)


def run(tokens: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Measures every reader, in turn. Returns medians by name (None: not installed), hardware and versions."""
    found: dict[str, list[dict[str, float | None]]] = {name: [] for name in READERS}
    names = [name for name in READERS if installed(name) is not None]
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), tokens)
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            for name in WRITERS.keys() & set(names):
                pool.submit(WRITERS[name], Path(folder)).result()
            for _ in range(rounds):
                for name in names:
                    found[name].append(pool.submit(measure, name, Path(folder), seconds).result())
    readers = {
        name: {key: _median([one[key] for one in taken]) for key in taken[0]} if taken else None
        for name, taken in found.items()
    }
    packages = {name: number for name in WRITERS if (number := installed(name))}
    return {
        "command": f"python -m benchmarks.bench_loader --tokens {tokens} --seconds {seconds} --rounds {rounds}",
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        | packages,
        "readers": readers,
    }


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def table(result: dict[str, Any]) -> str:
    """Formats the result as a Markdown table."""
    lines = [
        "| reader | M tokens/s | M tokens/s of CPU | of memcpy | first batch ms | resume ms | memory MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in result["readers"].items():
        if one is None:
            lines.append(f"| {name} | not installed | | | | | |")
            continue
        scaled = [
            (one["tokens_per_second"], 1e-6, 0),
            (one["tokens_per_cpu_second"], 1e-6, 0),
            (one["of_memcpy"], 1, 2),
            (one["first_batch_seconds"], 1e3, 1),
            (one["resume_seconds"], 1e3, 1),
            (one["memory_bytes"], 1e-6, 0),
        ]
        cells = ["-" if value is None else f"{value * unit:.{digits}f}" for value, unit, digits in scaled]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join([*lines, "", f"`{result['command']}`; {result['hardware']}; {versions}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="tokens in the shard (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a measurement (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for loader.json and loader.md")
    options = parser.parse_args()
    result = run(options.tokens, options.seconds, options.rounds)
    text = table(result)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    atomic_text(options.output / "loader.json", json.dumps(result, indent=2) + "\n")
    atomic_text(options.output / "loader.md", f"# The loader and others\n\n{text}\n")


if __name__ == "__main__":
    main()
