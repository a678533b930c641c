"""The C++ loader against its pure-Python reference, and through threads, many files, forks, exits and closing."""

import collections
import contextlib
import gc
import hashlib
import itertools
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference_loader
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.manifest import ShardInfo
from llm.data.shards import Loader
from llm.errors import UserError

TOKENIZER = hashlib.sha256(b"a tokenizer").digest()


def make_dataset(directory, shards, vocab_size=1000):
    arrays = [(np.asarray(tokens), np.asarray(starts)) for tokens, starts in shards]
    return reference_loader.write_dataset(directory, arrays, vocab_size, TOKENIZER)


def random_shard(rng, tokens, density, vocab_size=1000):
    return rng.integers(0, vocab_size, tokens), np.flatnonzero(rng.random(tokens) < density)


def copies(batch):
    return [tensor.clone().numpy() for tensor in batch]


def assert_same(batch, expected):
    for tensor, array in zip(batch, expected, strict=True):
        assert tensor.numpy().dtype == array.dtype
        assert np.array_equal(tensor.numpy(), array)


@pytest.fixture
def dataset(tmp_path):
    """Three shards of several checksum blocks and several pages of the document index."""
    rng = np.random.default_rng(1)
    return make_dataset(tmp_path, [random_shard(rng, n, 0.02) for n in (100_000, 50, 80_000)])


# --- The same bytes as the reference ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_batches_and_targets_equal_the_reference(tmp_path_factory, data):
    draw = data.draw
    vocab_size = draw(st.sampled_from([300, 65536, 65537, 2**31]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    seq_len = draw(st.integers(1, 40))
    sizes = [*draw(st.lists(st.integers(0, 300), max_size=4)), draw(st.integers(seq_len + 1, 300))]
    density = draw(st.sampled_from([0, 0.03, 0.5, 1]))
    shards = [random_shard(rng, size, density, vocab_size) for size in draw(st.permutations(sizes))]
    manifest = make_dataset(tmp_path_factory.mktemp("shards"), shards, vocab_size)
    sequences = reference_loader.read_sequences(manifest, "train", seq_len)
    position = draw(st.one_of(st.integers(0, 5 * len(sequences)), st.integers(0, 2**62 - 1)))
    order = {
        "seq_len": seq_len,
        "seed": draw(st.integers(0, 2**64 - 1)),
        "global_batch": draw(st.integers(1, 20)),
        "micro_batch": draw(st.integers(1, 5)),
        "world_size": draw(st.integers(1, 4)),
        "position": position,
        "shuffle": draw(st.booleans()),
        "end": draw(st.one_of(st.none(), st.integers(max(0, position - 1), min(position + 70, 2**62 - 1)))),
    }
    run = {"threads": draw(st.integers(1, 4)), "prefetch": draw(st.integers(1, 4))}
    labels_of_step = collections.Counter()
    for rank in range(order["world_size"]):
        expected = reference_loader.batches(sequences, rank=rank, **order)
        with Loader(manifest, "train", rank=rank, **run, **order) as loader:
            assert loader.sequences == len(sequences)
            for count, wanted in enumerate(itertools.islice(expected, 25)):
                batch = next(loader)
                assert_same(batch, wanted)
                labels_of_step[count // loader.micro_batches] += int((batch.labels != -100).sum())
            else:
                if next(expected, None) is None:
                    with pytest.raises(StopIteration):
                        next(loader)
            whole_steps = 25 // loader.micro_batches
            for step in range(whole_steps) if rank == order["world_size"] - 1 else ():
                begin = position + step * order["global_batch"]
                assert loader.targets(begin, order["global_batch"]) == labels_of_step[step]


@pytest.mark.parametrize(("seq_len", "density"), [(1, 0.02), (100, 0.02), (3000, 0.02), (70_000, 0.5)])
def test_sequences_across_blocks_and_index_pages_equal_the_reference(tmp_path, seq_len, density):
    rng = np.random.default_rng(2)
    # Documents of one token in the second shard: several pages of its document index lie in one sequence.
    clustered = np.union1d(np.arange(2000, 4000), np.arange(50_000, 80_000, 777))
    shards = [random_shard(rng, 100_000, density), (rng.integers(0, 1000, 80_000), clustered)]
    manifest = make_dataset(tmp_path, shards)
    sequences = reference_loader.read_sequences(manifest, "train", seq_len)
    count = min(len(sequences), 3000)
    order = {"seq_len": seq_len, "seed": 3, "global_batch": 10, "micro_batch": 10, "end": count}
    with Loader(manifest, "train", **order) as loader:
        seen = 0
        for batch, expected in zip(loader, reference_loader.batches(sequences, **order), strict=True):
            assert_same(batch, expected)
            seen += int((batch.labels != -100).sum())
        assert loader.targets(0, count + 100) == seen


def test_threads_world_size_and_micro_batch_change_nothing_in_a_step(dataset):
    def steps(**options):
        """The set of non-empty sequences of each of the first three steps, over all ranks."""
        seen = [set(), set(), set()]
        for rank in range(options.get("world_size", 1)):
            with Loader(dataset, "train", seq_len=50, seed=9, global_batch=24, rank=rank, **options) as loader:
                for step, _ in itertools.product(range(3), range(loader.micro_batches)):
                    batch = next(loader)
                    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
                        if (labels != -100).any():
                            seen[step].add(ids.numpy().tobytes())
        return seen

    expected = steps(micro_batch=24)
    assert [len(step) for step in expected] == [24, 24, 24]
    assert steps(micro_batch=1, threads=4) == expected
    assert steps(micro_batch=5, world_size=3, threads=1, prefetch=1) == expected
    assert steps(micro_batch=8, world_size=8) == expected


def test_a_run_continues_where_it_stood(dataset):
    def run(position, count, **options):
        with Loader(dataset, "train", seq_len=64, seed=4, micro_batch=4, position=position, **options) as loader:
            return [copies(next(loader)) for _ in range(count)]

    # Two epochs and a half: more than one permutation.
    whole = run(0, 1800, global_batch=4)
    for position in (4, 2816, 5000):
        for continued, expected in zip(run(position, 10, global_batch=4), whole[position // 4 :], strict=False):
            assert all(map(np.array_equal, continued, expected))
    # Also with another global batch.
    assert np.array_equal(run(8, 1, global_batch=8)[0][0], whole[2][0])


def test_validation_sees_every_sequence_once_in_order(dataset):
    sequences = reference_loader.read_sequences(dataset, "train", 100)
    seen = []
    for rank in range(2):
        with Loader(
            dataset,
            "train",
            seq_len=100,
            seed=0,
            global_batch=64,
            micro_batch=16,
            rank=rank,
            world_size=2,
            shuffle=False,
            end=len(sequences),
        ) as loader:
            batches = [copies(batch) for batch in loader]
        # The same number on each rank: what is missing carries no labels.
        assert len(batches) == 2 * -(-len(sequences) // 64)
        seen.append(batches)
    interleaved = [
        sequence for pair in zip(*seen, strict=True) for batch in pair for sequence in zip(*batch, strict=True)
    ]
    for sequence, expected in zip(interleaved, sequences, strict=False):
        assert all(map(np.array_equal, sequence, expected))
    for ids, labels, doc_start in interleaved[len(sequences) :]:
        assert (ids == 0).all()
        assert (labels == -100).all()
        assert (doc_start == 0).all()


def sparse_shard(path, tokens, marked, starts):
    """A shard of `tokens` tokens of two bytes, zeros but for the last ones, that takes hardly any disk."""
    block_bytes = reference_loader.BLOCK_BYTES
    body = reference_loader.PAGE_BYTES + tokens * 2
    documents_offset = -(-body // reference_loader.PAGE_BYTES) * reference_loader.PAGE_BYTES
    checksums_offset = documents_offset + 8 * len(starts)
    blocks = -(-(checksums_offset - reference_loader.PAGE_BYTES) // block_bytes)
    table = bytearray(struct.pack("<I", reference_loader.crc32c(bytes(block_bytes))) * blocks)
    with open(path, "w+b") as file:
        file.seek(reference_loader.PAGE_BYTES + (tokens - len(marked)) * 2)
        file.write(marked.astype("<u2").tobytes())
        file.seek(documents_offset)
        file.write(np.array(starts, "<u8").tobytes())
        for block in {blocks - 2, blocks - 1}:
            file.seek(reference_loader.PAGE_BYTES + block * block_bytes)
            content = file.read(min(block_bytes, checksums_offset - file.tell()))
            struct.pack_into("<I", table, block * 4, reference_loader.crc32c(content))
        header = reference_loader.HEADER.pack(
            *(reference_loader.MAGIC, 1, 4096, 2, block_bytes, 1001, tokens, len(starts)),
            *(4096, documents_offset, checksums_offset, checksums_offset + len(table), TOKENIZER),
            reference_loader.crc32c(bytes(table)),
        )
        header += bytes(4092 - len(header))
        file.seek(checksums_offset)
        file.write(table)
        file.seek(0)
        file.write(header + struct.pack("<I", reference_loader.crc32c(header)))
    assert path.stat().st_blocks * 512 < 2**24
    return ShardInfo(
        path.name, tokens, len(starts), checksums_offset + len(table), "00" * 32, reference_loader.crc32c(header)
    )


def test_shards_above_four_gib_are_read_at_their_ends(tmp_path):
    tokens, marked = 4_500_000_000, np.arange(1, 1001)
    info = sparse_shard(tmp_path / "train-00000.bin", tokens, marked, [7, 2**31 + 5, 2**32 + 5, tokens - 700])
    manifest = replace(make_dataset(tmp_path, [], 1001), shards={"train": (info,), "val": ()})

    def sequence_at(token, seq_len=1000):
        # 999 = (tokens - 1) % 1000: the last sequence ends one token before the last.
        order = {"seq_len": seq_len, "seed": 0, "global_batch": 1, "micro_batch": 1, "shuffle": False}
        with Loader(manifest, "train", position=token // seq_len, **order) as loader:
            return [array[0] for array in copies(next(loader))], loader.targets(token // seq_len, 1)

    (ids, labels, doc_start), targets = sequence_at(tokens - 1500, seq_len=750)  # (tokens - 1500) is a multiple of 750
    assert ids.tolist() == [0] * 500 + marked[:250].tolist()
    assert labels.tolist() == [0] * 499 + marked[:251].tolist()
    assert (targets, set(doc_start.tolist())) == (750, {0})
    for start in (2**31 + 5, 2**32 + 5):
        (ids, labels, doc_start), targets = sequence_at(start)
        place = start % 1000
        assert targets == 999
        assert np.flatnonzero(labels == -100).tolist() == [place - 1]
        assert doc_start.tolist() == [0] * place + [place] * (1000 - place)


@pytest.mark.parametrize("position", [0, 777_777_777])
def test_a_run_over_a_trillion_tokens_begins_anywhere_with_the_shards_of_its_sequences_alone(tmp_path, position):
    """5,000 names of one sparse shard. No sequence is counted, no order stored, no other shard opened."""
    tokens = 200_000_001
    info = sparse_shard(tmp_path / "train-00000.bin", tokens, np.arange(1, 1001), [0, 150_000_000])
    infos = [replace(info, file=f"train-{number:05}.bin") for number in range(5000)]
    for one in infos[1:]:
        os.link(tmp_path / info.file, tmp_path / one.file)
    manifest = replace(
        make_dataset(tmp_path / "..", [], 1001), path=tmp_path, shards={"train": tuple(infos), "val": ()}
    )
    sequences = manifest.sequences("train", 1000)
    assert sequences * 1000 == 10**12
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = {"seq_len": 1000, "seed": 6, "global_batch": 8, "micro_batch": 8, "prefetch": 1, "threads": 1}
    with Loader(manifest, "train", position=position, **options) as loader:
        assert next(loader).input_ids.shape == (8, 1000)
        wanted = {
            reference_loader.sequence_at(6, 0, sequences, position + i) // 200_000 for i in range(16)
        }  # one batch ahead
        assert open_files(tmp_path) <= {f"train-{number:05}.bin" for number in wanted}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50_000  # kB


def open_files(directory):
    """The names of the files in a directory that this process has open."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed just now
            names.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
    return {path.name for path in names if path.parent == directory}


# --- Threads, memory, files, processes -----------------------------------------------------------------------------


@pytest.fixture
def descriptors(request):
    """`ulimit -n` for this process."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (request.param, before[1]))
    yield request.param
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("descriptors", [1024, 256], indirect=True)
def test_many_shards_are_opened_lazily_closed_again_and_must_stay_the_same(tmp_path, descriptors):
    rng = np.random.default_rng(7)
    manifest = make_dataset(tmp_path, [random_shard(rng, 60, 0.1) for _ in range(300)])
    sequences = reference_loader.read_sequences(manifest, "train", 16)
    order = {"seq_len": 16, "seed": 8, "global_batch": 3, "micro_batch": 3}

    with Loader(manifest, "train", prefetch=1, **order) as loader:
        for batch, expected in zip(
            loader, itertools.islice(reference_loader.batches(sequences, **order), 600), strict=False
        ):
            assert_same(batch, expected)
            assert len(open_files(tmp_path)) <= descriptors // 4 + 2  # each thread may hold one more for a moment
        deadline = time.monotonic() + 20
        while len(open_files(tmp_path)) != descriptors // 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(open_files(tmp_path)) == descriptors // 4
        for info in manifest.shards["train"]:
            path = tmp_path / info.file
            path.with_suffix(".new").write_bytes(path.read_bytes())
            path.with_suffix(".new").rename(path)
        with pytest.raises(UserError, match=r"train-\d+\.bin: was replaced or changed while in use"):
            collections.deque(loader, maxlen=0)
    del loader
    assert not open_files(tmp_path)


def threads_alive():
    return len(os.listdir("/proc/self/task"))


def threads_left(expected):
    """threads_alive() once it is `expected`, or after ten seconds: the system may list a joined thread for a moment."""
    end = time.monotonic() + 10
    while threads_alive() != expected and time.monotonic() < end:
        time.sleep(0.01)
    return threads_alive()


def loader_of(manifest, **options):
    return Loader(manifest, "train", **{"seq_len": 64, "seed": 1, "global_batch": 8, "micro_batch": 8, **options})


@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_a_batch_stays_valid_for_prefetch_calls_and_its_memory_is_used_again(dataset, prefetch):
    with loader_of(dataset, prefetch=prefetch) as loader:
        held = collections.deque(maxlen=prefetch)
        places = set()
        for _ in range(20):
            batch = next(loader)
            held.append((batch, copies(batch)))
            places.add(batch.input_ids.data_ptr())
            time.sleep(0.002)  # for threads that would overtake
            for earlier, values in held:
                assert_same(earlier, values)
        assert len(places) == 2 * prefetch


def test_batches_keep_their_values_after_closing(dataset):
    loader = loader_of(dataset)
    batch = next(loader)
    values = copies(batch)
    loader.close()
    loader.close()
    del loader
    gc.collect()
    assert_same(batch, values)


def test_a_dropped_loader_frees_its_memory_except_the_batches_that_are_held(dataset):
    loader = loader_of(dataset)
    held, freed = next(loader), weakref.ref(next(loader).input_ids)
    values = copies(held)
    del loader
    gc.collect()
    assert freed() is None
    assert_same(held, values)


def test_a_closed_loader_says_so(dataset):
    loader = loader_of(dataset)
    loader.close()
    with pytest.raises(ValueError, match="the loader is closed"):
        next(loader)


def test_closing_while_threads_are_busy_ends_them(dataset):
    before = threads_alive()
    for i in range(60):
        loader = loader_of(dataset, threads=1 + i % 8, prefetch=1 + i % 5, micro_batch=64, global_batch=64)
        for _ in range(i % 3):
            next(loader)
        loader.close()
    assert threads_left(before) == before


def test_a_dropped_loader_ends_its_threads(dataset):
    before = threads_alive()
    loaders = [loader_of(dataset, threads=3) for _ in range(10)]
    assert threads_alive() == before + 30
    for loader in loaders[::2]:
        next(loader)
    cycle = [loaders.pop()]
    cycle.append(cycle)
    del cycle, loader
    loaders.clear()
    gc.collect()
    assert threads_left(before) == before


def test_closing_from_another_thread_ends_the_consumer(dataset):
    loader = loader_of(dataset)
    results = []

    def consume():
        try:
            for _ in loader:
                pass
        except ValueError as error:
            results.append(str(error))

    consumers = [threading.Thread(target=consume) for _ in range(3)]
    for thread in consumers:
        thread.start()
    time.sleep(0.05)
    loader.close()
    for thread in consumers:
        thread.join(20)
    assert results == ["the loader is closed"] * 3


def test_consumers_in_several_threads_share_the_batches(dataset):
    with loader_of(dataset, prefetch=64, end=800, global_batch=8, micro_batch=8) as loader:
        expected = collections.Counter(b[0].tobytes() for b in map(copies, loader_of(dataset, end=800)))
        seen = collections.Counter()

        def consume():
            for batch in loader:
                seen[batch.input_ids.numpy().tobytes()] += 1

        consumers = [threading.Thread(target=consume) for _ in range(4)]
        for thread in consumers:
            thread.start()
        for thread in consumers:
            thread.join(20)
    assert seen == expected


def test_worker_threads_leave_signals_to_the_program(dataset):
    with loader_of(dataset) as loader:
        next(loader)
        blocked = {
            name: int(line.split()[1], 16)
            for name in os.listdir("/proc/self/task")
            for line in Path(f"/proc/self/task/{name}/status").read_text().splitlines()
            if line.startswith("SigBlk:")
        }
        terminate = 1 << (signal.SIGTERM - 1)
        assert sum(bool(mask & terminate) for mask in blocked.values()) >= 2
        assert not blocked[str(os.getpid())] & terminate


def in_child(check):
    """Runs check() in a forked child; true where it returned."""
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            check()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_a_forked_child_goes_on_by_itself(dataset):
    sequences = reference_loader.read_sequences(dataset, "train", 64)
    expected = [
        *itertools.islice(reference_loader.batches(sequences, seq_len=64, seed=1, global_batch=8, micro_batch=8), 20)
    ]
    loader = loader_of(dataset)
    for _ in range(5):
        held = next(loader)

    def check():
        assert_same(held, expected[4])
        assert loader.targets(40, 8) == int((expected[5][1] != -100).sum())
        for wanted in expected[5:15]:
            assert_same(next(loader), wanted)
        loader.close()

    def grandchild():
        assert_same(next(loader), expected[5])
        assert in_child(lambda: assert_same(next(loader), expected[6]))

    for _ in range(5):
        assert in_child(check)
    assert in_child(grandchild)
    for wanted in expected[5:]:
        assert_same(next(loader), wanted)


def test_a_forked_child_may_drop_or_close_what_it_did_not_use(dataset):
    loaders = [loader_of(dataset, threads=4)]

    def drop():
        loaders.clear()
        gc.collect()

    assert in_child(loaders[0].close)
    assert in_child(drop)
    next(loaders[0])


PROGRAM = """
import atexit, ctypes, os, pickle, sys

def check():  # runs after every handler that is registered later
    if len(os.listdir("/proc/self/task")) != threads:
        os._exit(3)

atexit.register(check)

import torch
from llm.data.shards import Loader

threads = len(os.listdir("/proc/self/task"))
manifest = pickle.load(open(sys.argv[1], "rb"))
loader = Loader(manifest, "train", seq_len=64, seed=1, global_batch=64, micro_batch=64, threads=4)
next(loader)
if sys.argv[2] == "leaked":
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(loader))
elif sys.argv[2] == "raised":
    raise SystemExit(0)
"""


@pytest.mark.parametrize("how", ["global", "leaked", "raised"])
def test_a_program_may_end_with_a_loader_in_use(dataset, tmp_path, how):
    (tmp_path / "manifest.pickle").write_bytes(pickle.dumps(dataset))
    subprocess.run([sys.executable, "-c", PROGRAM, tmp_path / "manifest.pickle", how], check=True, timeout=60)


KILLED = """
import os, pickle, signal, sys
from llm.data.shards import Loader

manifest = pickle.load(open(sys.argv[1], "rb"))
loader = Loader(manifest, "train", seq_len=64, seed=1, global_batch=64, micro_batch=64, threads=4)
next(loader)
children = [open(f"/proc/self/task/{task}/children").read() for task in os.listdir("/proc/self/task")]
print("".join(children).split(), sorted(os.listdir("/dev/shm")), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_program_leaves_no_process_no_shared_memory_and_no_file(dataset, tmp_path):
    (tmp_path / "manifest.pickle").write_bytes(pickle.dumps(dataset))
    files = sorted(os.listdir(tmp_path))
    shared = sorted(os.listdir("/dev/shm"))
    program = [sys.executable, "-c", KILLED, tmp_path / "manifest.pickle"]
    killed = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout == f"[] {shared}\n"
    assert sorted(os.listdir(tmp_path)) == files


@pytest.mark.gpu
def test_pinned_batches_are_copied_to_the_gpu(dataset):
    with loader_of(dataset, pin_memory=True) as loader:
        batch = next(loader)
        assert all(tensor.is_pinned() for tensor in batch)
        values = copies(batch)
        on_gpu = [tensor.to("cuda", non_blocking=True) for tensor in batch]
        torch.cuda.synchronize()
        assert all(np.array_equal(tensor.cpu().numpy(), array) for tensor, array in zip(on_gpu, values, strict=True))
