"""Mixtures: exact shares at every position, each source in its own order, the same samples however they are read."""

import hashlib
import itertools
import json
import re
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import reference_loader
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.manifest import read_manifest
from llm.data.mixture import PERIOD, Mixture, make_schedule, mix, round_weights
from llm.data.shards import Loader
from llm.errors import UserError

TOKENIZER = hashlib.sha256(b"a tokenizer").digest()
weights = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=64)

# make_schedule((2458, 1229, 409)): the first positions. A run that is resumed relies on them.
GOLDEN_COUNTS = (2458, 1229, 409)
GOLDEN = "0100102010010010201001001020100100102010"


def make_source(directory, number, sequences, seq_len, tokenizer=TOKENIZER):
    """Sequences of one source, each beginning with 100 * source + its number."""
    directory.mkdir()
    tokens = np.full(sequences * seq_len + 1, 5)
    tokens[:-1:seq_len] = 100 * number + np.arange(sequences)
    made = reference_loader.write_dataset(directory, [(tokens, np.arange(0, len(tokens), 7))], 1000, tokenizer)
    return replace(made, dataset_hash=f"{number}" * 64)


@pytest.fixture
def mixture(tmp_path):
    """Three sources of 40, 12 and 3 sequences of 8 tokens."""
    sources = [make_source(tmp_path / f"source{n}", n, sequences, 8) for n, sequences in enumerate((40, 12, 3))]
    return mix(sources, [6, 3, 1])


# --- Weights and layout ----------------------------------------------------------------------------------------------


@given(weights)
def test_rounded_weights_fill_the_period_and_are_off_by_less_than_one(chosen):
    counts = round_weights(chosen)
    assert sum(counts) == PERIOD
    assert all(abs(count - PERIOD * weight / sum(chosen)) < 1 for count, weight in zip(counts, chosen, strict=True))


@settings(deadline=None, max_examples=15)
@given(weights)
def test_no_source_is_ever_one_and_a_half_sequences_from_its_share(chosen):
    counts = np.array(round_weights(chosen))
    order = make_schedule(tuple(counts.tolist()))
    given_so_far = np.cumsum(order[:, None] == np.arange(len(counts)), axis=0)
    share = np.arange(1, PERIOD + 1)[:, None] * counts / PERIOD
    assert np.abs(given_so_far - share).max() < 1.5
    assert given_so_far[-1].tolist() == counts.tolist()


@pytest.mark.parametrize("counts", [(4096,), (1, 4095), GOLDEN_COUNTS, (2048, 2048), (1366, 1365, 1365)])
def test_the_schedule_equals_the_reference(counts):
    assert make_schedule(counts).tolist() == reference_loader.make_schedule(counts)


def test_layout_is_frozen():
    assert "".join(map(str, make_schedule(GOLDEN_COUNTS)[:40])) == GOLDEN


# --- What is read ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_batches_equal_the_reference(tmp_path_factory, data):
    draw, directory = data.draw, tmp_path_factory.mktemp("mixture")
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    sources = [make_source(directory / str(n), n, sequences, 8) for n, sequences in enumerate(sizes)]
    mixture = mix(sources, [draw(st.floats(0.05, 1)) for _ in sources])
    sequences = [sequence for source in sources for sequence in reference_loader.read_sequences(source, "train", 8)]
    order = {
        "seq_len": 8,
        "seed": draw(st.integers(0, 2**64 - 1)),
        "global_batch": draw(st.integers(1, 9)),
        "micro_batch": draw(st.integers(1, 5)),
        "world_size": draw(st.integers(1, 3)),
        "position": draw(st.one_of(st.integers(0, 3 * PERIOD), st.integers(0, 2**61))),
        "shuffle": draw(st.booleans()),
    }
    stages = [(0, reference_loader.make_schedule(mixture.stages[0].counts))]
    for rank in range(order["world_size"]):
        expected = reference_loader.batches(sequences, source_sequences=sizes, stages=stages, rank=rank, **order)
        with Loader(mixture, "train", rank=rank, threads=draw(st.integers(1, 3)), **order) as loader:
            assert loader.sequences == sum(sizes)
            for batch, wanted in zip(itertools.islice(loader, 10), expected, strict=False):
                assert all(np.array_equal(tensor.numpy(), array) for tensor, array in zip(batch, wanted, strict=True))


def markers(mixture, position, steps, *, world_size=1, micro_batch=16):
    """The first token of every sequence, for each step."""
    seen = [Counter() for _ in range(steps)]
    options = {"seq_len": 8, "seed": 3, "global_batch": 64, "micro_batch": micro_batch, "world_size": world_size}
    for rank in range(world_size):
        with Loader(mixture, "train", rank=rank, position=position, **options) as loader:
            for step in range(steps):
                for _ in range(loader.micro_batches):
                    seen[step].update(int(ids[0]) for ids in next(loader).input_ids if ids[1] != 0)
    return seen


def test_a_mixture_keeps_its_shares_and_goes_through_each_source_evenly(mixture):
    period = markers(mixture, 0, PERIOD // 64)
    drawn = sum(period, Counter())
    assert [sum(drawn[n] for n in drawn if n // 100 == source) for source in range(3)] == list(mixture.stages[0].counts)
    for source, sequences in enumerate((40, 12, 3)):
        times = [drawn[100 * source + sequence] for sequence in range(sequences)]
        assert max(times) - min(times) <= 1  # every epoch holds every sequence once
    expected = [count / sequences for count, sequences in zip(mixture.stages[0].counts, (40, 12, 3), strict=True)]
    assert mixture.epochs(PERIOD, 8, 64)[0] == pytest.approx(expected)
    assert mixture.epochs(5 * PERIOD + 1, 8, 64)[0] == pytest.approx(
        [5 * expected[0] + 1 / 40, 5 * expected[1], 5 * expected[2]]
    )


def test_world_size_and_stopping_anywhere_change_nothing(mixture):
    whole = markers(mixture, 0, 12)
    assert markers(mixture, 0, 12, world_size=3, micro_batch=5) == whole
    assert markers(mixture, 7 * 64, 5, world_size=2, micro_batch=7) == whole[7:]


def test_one_source_alone_is_read_as_without_a_mixture(mixture):
    (source, *_) = mixture.sources
    alone = mix([source], [17])
    assert hash_of(alone) == source.dataset_hash
    assert markers(alone, 64, 6) == markers(source, 64, 6)


def test_sources_are_permuted_apart(tmp_path):
    sources = [make_source(tmp_path / str(n), n, 50, 8) for n in range(2)]
    with Loader(mix(sources, [1, 1]), "train", seq_len=8, seed=3, global_batch=100, micro_batch=100) as loader:
        drawn = next(loader).input_ids[:, 0].numpy()
    orders = [drawn[drawn // 100 == source] % 100 for source in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert (orders[0] != orders[1]).any()


def test_validation_of_a_mixture_reads_every_sequence_of_every_source_once(mixture):
    held_out = [replace(source, shards={"train": (), "val": source.shards["train"]}) for source in mixture.sources]
    pool = Mixture(tuple(held_out), mixture.stages)
    options = {"seq_len": 8, "seed": 0, "global_batch": 55, "micro_batch": 55, "end": 55}
    expected = [
        100 * source + sequence for source, sequences in enumerate((40, 12, 3)) for sequence in range(sequences)
    ]
    for shuffle in (False, True):
        with Loader(pool, "val", shuffle=shuffle, **options) as loader:
            drawn = next(loader).input_ids[:, 0].tolist()
        assert (sorted(drawn) if shuffle else drawn) == expected


# --- What it is ------------------------------------------------------------------------------------------------------


def hash_of(mixture, position=0):
    return mixture.hash_at(position, seq_len=8, global_batch=64)


def test_the_hash_is_frozen(mixture):
    """A run that was begun before there were stages has this hash in its checkpoints."""
    sources = [["0" * 64, 2457], ["1" * 64, 1229], ["2" * 64, 410]]
    canonical = json.dumps({"mixture": "largest-deficit-v1", "sources": sources}, separators=(",", ":"))
    for position in (0, 64, 10**9):
        assert hash_of(mixture, position) == hashlib.sha256(canonical.encode()).hexdigest()


def test_the_hash_identifies_contents_order_and_rounded_weights(mixture):
    assert hash_of(mix(mixture.sources, [60, 30, 10.0001])) == hash_of(mixture)
    others = [
        mix(mixture.sources, [6, 3, 1.01]),
        mix(mixture.sources[::-1], [1, 3, 6]),
        mix([replace(mixture.sources[0], dataset_hash="9" * 64), *mixture.sources[1:]], [6, 3, 1]),
    ]
    assert len({hash_of(other) for other in [mixture, *others]}) == 4


def test_impossible_mixtures_are_refused(mixture, tmp_path):
    stranger = make_source(tmp_path / "stranger", 4, 5, 8, tokenizer=hashlib.sha256(b"another").digest())
    with pytest.raises(UserError, match=r"source0 and .*stranger were made with different tokenizers"):
        mix([*mixture.sources, stranger], [1, 1, 1, 1])
    with pytest.raises(UserError, match=r"the weight 0\.0001 of .*source1 is less than half of 1/4096"):
        mix(mixture.sources, [1, 0.0001, 1])
    with pytest.raises(UserError, match=r"source2 comes twice"):
        mix([*mixture.sources, mixture.sources[2]], [1, 1, 1, 1])
    with pytest.raises(
        UserError, match=r"source2: seq_len 30 is longer than the data: .* the longest train shard has 25"
    ):
        Loader(mixture, "train", seq_len=30, seed=0, global_batch=1, micro_batch=1)


def test_a_run_trains_on_a_mixture_and_goes_on_with_the_same_one_only(small_shards, write_config, tmp_path, llm_here):
    shutil.copytree(small_shards, tmp_path / "copy")
    sources = [{"path": str(small_shards), "weight": 3}, {"path": str(tmp_path / "copy"), "weight": 1}]
    config = write_config(data__path=None, data__sources=sources, train__total_tokens=1024)
    code, _, err = llm_here("train", "--config", config)
    assert code == 0, err
    assert f"3072/4096 (75.00 %) of the sequences from {small_shards}: " in err
    assert "epochs planned" in err
    assert "epochs done" in err
    # No epochs of the whole, because each source has its own.
    assert re.search(r"1,024 tokens: 0\.0\d+ tokens a parameter", err)
    state = json.loads((tmp_path / "run/latest/state.json").read_text())
    expected = mix([read_manifest(source["path"]) for source in sources], [3, 1])
    assert (state["data"]["dataset_hash"], state["data"]["position"]) == (hash_of(expected), 1024 // 64)
    more = f"data.sources={json.dumps(sources)}", "train.total_tokens=1536"
    assert llm_here("train", "--config", config, *more)[0] == 0
    sources[1]["weight"] = 2
    code, _, err = llm_here(
        "train", "--config", config, f"data.sources={json.dumps(sources)}", "train.total_tokens=2048"
    )
    assert code == 1
    assert "cannot go on with another model, other data or another optimizer (dataset_hash: " in err
