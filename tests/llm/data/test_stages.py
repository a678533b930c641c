"""Stages: other mixtures later in a run. A source goes on where it stopped, and all follows from the position."""

import hashlib
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference_loader
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.manifest import Manifest
from llm.data.mixture import PERIOD, Mixture, mix, mix_stages
from llm.data.shards import Loader
from llm.errors import UserError

TOKENIZER = hashlib.sha256(b"a tokenizer").digest()
S = 8
BATCH = 16


def make_source(directory: Path, number: int, sequences: int) -> Manifest:
    """Sequences of S tokens of one source, each beginning with 100 * source + its number."""
    directory.mkdir()
    tokens = np.full(sequences * S + 1, 5)
    tokens[:-1:S] = 100 * number + np.arange(sequences)
    made = reference_loader.write_dataset(directory, [(tokens, np.arange(0, len(tokens), 7))], 1000, TOKENIZER)
    return replace(made, dataset_hash=f"{number}" * 64)


@pytest.fixture
def sources(tmp_path: Path) -> list[Manifest]:
    return [make_source(tmp_path / f"source{n}", n, sequences) for n, sequences in enumerate((40, 12, 30))]


@pytest.fixture
def staged(sources: list[Manifest]) -> Mixture:
    """Source 0 alone; 0 and 1 from step 5 on; 2 and 0 from step 9 on, of steps of 16 sequences."""
    web, code, books = sources
    return mix_stages(
        [(0, [web], [1]), (5 * BATCH * S, [web, code], [3, 1]), (8 * BATCH * S + 1, [books, web], [1, 1])]
    )


def read(data: Mixture, position: int, steps: int, *, world_size: int = 1, micro_batch: int = BATCH) -> list[list[int]]:
    """The first token of every sequence in each step, in the order of the positions."""
    options = {"seq_len": S, "seed": 3, "global_batch": BATCH, "micro_batch": micro_batch, "world_size": world_size}
    ranks = []
    for rank in range(world_size):
        with Loader(data, "train", rank=rank, position=position, **options) as loader:
            count = steps * loader.micro_batches
            ranks.append([batch.input_ids[:, 0].tolist() for batch in itertools.islice(loader, count)])
    flat = [first for batches in zip(*ranks, strict=True) for batch in batches for first in batch]
    per_step = len(flat) // steps
    # The last slots of a step are empty where the batch does not divide.
    return [flat[i : i + BATCH] for i in range(0, len(flat), per_step)]


# --- What is read ----------------------------------------------------------------------------------------------------


@given(st.data())
def test_the_reference_counts_what_came_before(data: st.DataObject) -> None:
    """The oracle itself, against counting one by one."""
    periods = st.lists(st.integers(0, 3), min_size=1, max_size=9)
    begins = [0, *sorted(data.draw(st.lists(st.integers(1, 40), max_size=3)))]
    stages = [(begin, data.draw(periods)) for begin in begins]
    seen = []
    for position in range(60):
        source, earlier = reference_loader.place(position, stages)
        assert earlier == seen.count(source)
        seen.append(source)


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_batches_equal_the_reference(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    draw, directory = data.draw, tmp_path_factory.mktemp("stages")
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=4))
    sources = [make_source(directory / str(n), n, count) for n, count in enumerate(sizes)]
    batch = draw(st.integers(1, 9))
    tokens = sorted(draw(st.sets(st.integers(1, 9 * PERIOD * S), max_size=3)))
    named = st.lists(st.sampled_from(range(len(sources))), min_size=1, unique=True)
    # The first stage names all sources in order, so that the reference numbers them alike.
    asked = [(0, list(range(len(sources)))), *((from_tokens, draw(named)) for from_tokens in tokens)]
    weights = [[draw(st.floats(0.05, 1)) for _ in chosen] for _, chosen in asked]
    mixture = mix_stages(
        [(begin, [sources[n] for n in chosen], w) for (begin, chosen), w in zip(asked, weights, strict=True)]
    )
    begins = [-(-begin // (batch * S)) * batch for begin, _ in asked]
    stages = [
        (begin, reference_loader.make_schedule(stage.counts))
        for begin, stage in zip(begins, mixture.stages, strict=True)
    ]
    order = {
        "seq_len": S,
        "seed": draw(st.integers(0, 2**64 - 1)),
        "global_batch": batch,
        "micro_batch": draw(st.integers(1, 5)),
        "world_size": draw(st.sampled_from([1, 2, 4])),
        # At a boundary, just before one, or anywhere, also where no step of this batch begins.
        "position": draw(
            st.one_of(st.sampled_from(begins), st.sampled_from(begins).map(lambda b: max(0, b - batch)))
            | st.integers(0, 10 * PERIOD)
        ),
    }
    sequences = [sequence for source in sources for sequence in reference_loader.read_sequences(source, "train", S)]
    for rank in range(order["world_size"]):
        expected = reference_loader.batches(sequences, source_sequences=sizes, stages=stages, rank=rank, **order)
        with Loader(mixture, "train", rank=rank, **order) as loader:
            for found, wanted in zip(itertools.islice(loader, 8), expected, strict=False):
                assert all(np.array_equal(tensor.numpy(), array) for tensor, array in zip(found, wanted, strict=True))


def test_each_stage_begins_with_a_step_and_reads_its_sources_only(staged: Mixture) -> None:
    # 8 steps and a token are rounded up to 9 steps.
    assert staged.begins(S, BATCH) == [0, 5 * BATCH, 9 * BATCH]
    steps = read(staged, 0, 14)
    kinds = [{first // 100 for first in step} for step in steps]
    assert kinds == [{0}] * 5 + [{0, 1}] * 4 + [{0, 2}] * 5
    assert [sum(first >= 200 for first in step) for step in steps[9:]] == [BATCH // 2] * 5


def test_a_source_goes_on_where_it_stopped(staged: Mixture, sources: list[Manifest]) -> None:
    """Each source's sequences over all stages are those of a run on it alone: no sequence twice in an epoch."""
    drawn = [first for step in read(staged, 0, 40) for first in step]
    for number, source in enumerate(sources):
        mine = [first for first in drawn if first // 100 == number]
        size = source.sequences("train", S)
        places = (divmod(count, size) for count in range(len(mine)))
        order = [reference_loader.sequence_at(3 + number, epoch, size, index) for epoch, index in places]
        assert [first - 100 * number for first in mine] == order


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, 3), (4, 2)])
def test_world_size_and_stopping_anywhere_change_nothing(staged: Mixture, world_size: int, micro_batch: int) -> None:
    whole = read(staged, 0, 12)
    for step in (0, 4, 5, 10):
        options = {"world_size": world_size, "micro_batch": micro_batch}
        assert [sorted(found) for found in read(staged, step * BATCH, 2, **options)] == [
            sorted(expected) for expected in whole[step : step + 2]
        ]


def test_stages_to_come_change_nothing_before_them(staged: Mixture, sources: list[Manifest]) -> None:
    assert read(staged, 0, 5) == read(mix(sources[:1], [1]), 0, 5)


def test_targets_are_counted_across_a_boundary(staged: Mixture) -> None:
    with Loader(staged, "train", seq_len=S, seed=3, global_batch=BATCH, micro_batch=BATCH) as loader:
        for step, batch in enumerate(itertools.islice(loader, 12)):
            assert loader.targets(step * BATCH, BATCH) == int((batch.labels >= 0).sum())


def test_epochs_are_counted_by_stage(staged: Mixture) -> None:
    counts = [stage.counts for stage in staged.stages]
    stages = list(zip(staged.begins(S, BATCH), map(reference_loader.make_schedule, counts), strict=True))
    for positions in (0, 3 * BATCH, 5 * BATCH, 7 * BATCH + 3, 40 * BATCH):
        drawn = np.zeros((3, 3))
        for position in range(positions):
            source, _ = reference_loader.place(position, stages)
            drawn[sum(begin <= position for begin, _ in stages) - 1, source] += 1
        assert staged.epochs(positions, S, BATCH) == pytest.approx(drawn / [40, 12, 30])


# --- What it is ------------------------------------------------------------------------------------------------------


def test_the_hash_is_that_of_what_was_read(staged: Mixture, sources: list[Manifest]) -> None:
    """So stages that have not begun may be added, changed and dropped, and no other."""
    web, code, books = sources

    def hash_at(data: Mixture, steps: int, batch: int = BATCH) -> str:
        return data.hash_at(steps * BATCH, S, batch)

    first, second, third = 5 * BATCH * S, 9 * BATCH * S, 12 * BATCH * S
    start = (0, [web], [1])
    assert hash_at(staged, 0) == hash_at(staged, 5) == web.dataset_hash
    two = mix_stages([start, (first, [web, code], [3, 1])])
    assert hash_at(staged, 6) == hash_at(staged, 9) == hash_at(two, 9) != web.dataset_hash
    assert hash_at(staged, 10) != hash_at(two, 10)
    identity = {
        "mixture": "largest-deficit-v1",
        "sources": ["0" * 64, "1" * 64],
        "stages": [[0, [4096, 0]], [80, [3072, 1024]]],
    }
    canonical = json.dumps(identity, separators=(",", ":"))
    assert hash_at(two, 9) == hashlib.sha256(canonical.encode()).hexdigest()
    others = [
        mix_stages([start, (first + BATCH * S, [web, code], [3, 1])]),  # later
        mix_stages([start, (first, [web, code], [2, 1])]),  # other weights
        mix_stages([start, (first, [web, books], [3, 1])]),  # another source
        mix_stages([start, (second, [web, code], [3, 1])]),  # not yet
        mix_stages([(0, [web, code], [1, 1]), (first, [web, code], [3, 1])]),  # another beginning
        mix_stages([start, (first - 5, [web, code], [3, 1]), (second, [books], [1])]),  # the same, then another
    ]
    assert [hash_at(other, 9) == hash_at(two, 9) for other in others] == [False] * 5 + [True]
    # Another global batch that leaves the beginning where it is changes nothing; one that moves it does.
    assert hash_at(two, 9, batch=5 * BATCH) == hash_at(two, 9) != hash_at(two, 9, batch=3 * BATCH)
    assert hash_at(mix_stages([start, (third, [code], [1])]), 12) == web.dataset_hash


def test_a_directory_is_one_source_however_it_is_named(sources: list[Manifest], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(sources[0].path)
    linked = replace(sources[0], path=tmp_path / "link")
    found = mix_stages([(0, [sources[0]], [1]), (100, [sources[1], linked], [1, 3])])
    assert found.sources == (sources[0], sources[1])
    assert [stage.counts for stage in found.stages] == [(4096, 0), (3072, 1024)]


def test_impossible_stages_are_refused(sources: list[Manifest], tmp_path: Path) -> None:
    web, code, _ = sources
    stranger = replace(code, tokenizer_sha256="ab" * 32)
    with pytest.raises(UserError, match=r"data\.stages\.0\.sources: .*source0 and .*source1 were made with different"):
        mix_stages([(0, [web], [1]), (9, [stranger], [1])])
    with pytest.raises(UserError, match=r"data\.stages\.1\.sources: the weight 0\.0001 of .*source1 is less than"):
        mix_stages([(0, [web], [1]), (5, [web], [1]), (9, [web, code], [1, 0.0001])])
    with pytest.raises(UserError, match=r"data\.stages\.0\.sources: .*source1 comes twice"):
        mix_stages([(0, [web], [1]), (9, [code, code], [1, 1])])
    short = make_source(tmp_path / "short", 3, 1)
    late = mix_stages([(0, [web], [1]), (9, [short], [1])])
    # At the start of the run, not when its stage begins.
    with pytest.raises(UserError, match="short: seq_len 16 is longer than the data"):
        Loader(late, "train", seq_len=16, seed=0, global_batch=1, micro_batch=1)


def test_the_core_refuses_stages_out_of_order(staged: Mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"seq_len": S, "seed": 0, "global_batch": 1, "micro_batch": 1}
    for begins in ([0, 9, 8], [1, 2, 3]):
        monkeypatch.setattr(Mixture, "begins", lambda *_, begins=begins: begins)
        with pytest.raises(ValueError, match="stage"):
            Loader(staged, "train", **options)
