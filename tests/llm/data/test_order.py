"""The order of sequences: a permutation for each seed and epoch that must never change under a name that stays."""

import itertools
from collections import Counter

import pytest
import reference_loader
from hypothesis import given
from hypothesis import strategies as st

from llm.data.shards import ORDER_VERSION, sequence_at

# (seed, epoch, sequences): the sequences at the given places. A run that is resumed relies on them: where they change,
# so must ORDER_VERSION.
GOLDEN = {
    (0, 0, 1): {0: 0},
    (5, 7, 1): {0: 0},
    (0, 0, 2): {0: 0, 1: 1},
    (0, 1, 2): {0: 1, 1: 0},
    (0, 0, 3): {0: 0, 1: 1, 2: 2},
    (1, 0, 3): {0: 1, 1: 2, 2: 0},
    (1337, 0, 64): {0: 62, 1: 38, 2: 40, 3: 19, 4: 37, 5: 1, 6: 53, 7: 60},
    (1337, 0, 65): {0: 12, 1: 15, 2: 54, 3: 5, 4: 18, 5: 25, 6: 64, 7: 43},
    (1337, 1, 65): {0: 0, 1: 59, 2: 11, 3: 25, 4: 23, 5: 17, 6: 2, 7: 10},
    (1337, 0, 1000): {0: 276, 1: 917, 2: 563, 3: 530, 4: 171, 5: 282, 6: 798, 7: 566},
    (2**64 - 1, 0, 1000): {0: 816, 1: 496, 2: 463, 3: 215, 4: 817, 5: 189, 6: 503, 7: 438},
    (1337, 2**40, 1000): {0: 816, 1: 91, 2: 606, 3: 554, 4: 594, 5: 275, 6: 635, 7: 921},
    (1, 2, 2**32): {0: 2645711142, 1: 3462764515, 2: 134080652, 3: 3308935660},
    (1, 2, 2**32 + 1): {0: 945317631, 1: 3462764515, 2: 3278026297, 3: 4218749735},
    (1, 2, 2**63): {0: 672272614995024370, 1: 3875029026088838498, 2**63 - 1: 836500170332384684},
}

seeds = st.integers(0, 2**64 - 1)


def permutation(seed, epoch, sequences):
    return [sequence_at(seed, epoch, sequences, index) for index in range(sequences)]


def test_order_is_frozen():
    assert ORDER_VERSION == "feistel-v1"
    found = {key: {index: sequence_at(*key, index) for index in sequences} for key, sequences in GOLDEN.items()}
    assert found == GOLDEN


@given(seeds, st.integers(0, 2**64 - 1), st.integers(1, 2**63), st.data())
def test_order_equals_the_reference(seed, epoch, sequences, data):
    index = data.draw(st.integers(0, sequences - 1))
    assert sequence_at(seed, epoch, sequences, index) == reference_loader.sequence_at(seed, epoch, sequences, index)


@pytest.mark.parametrize(
    "sequences", [*range(1, 20), 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 70001]
)
def test_every_epoch_holds_every_sequence_once(sequences):
    for epoch in range(3):
        assert sorted(permutation(1337, epoch, sequences)) == list(range(sequences))


def test_epochs_and_seeds_differ():
    orders = {tuple(permutation(seed, epoch, 50)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def chi_square_excess(counts, cells):
    """How many standard deviations the chi-square statistic of `counts` over `cells` cells lies above its mean."""
    expected = sum(counts.values()) / cells
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    statistic += (cells - len(counts)) * expected
    return (statistic - (cells - 1)) / (2 * (cells - 1)) ** 0.5


@pytest.mark.parametrize("sequences", [2, 3, 4, 5])
def test_few_sequences_come_in_every_order_equally_often(sequences):
    cells = len(list(itertools.permutations(range(sequences))))
    counts = Counter(tuple(permutation(7, epoch, sequences)) for epoch in range(100 * cells))
    assert chi_square_excess(counts, cells) < 4


@pytest.mark.parametrize("sequences", [10, 64, 65, 1000])
def test_sequences_go_everywhere_and_neighbours_part(sequences):
    places = Counter(sequence_at(7, epoch, sequences, sequences // 3) for epoch in range(20 * sequences))
    assert chi_square_excess(places, sequences) < 4
    # Uniform orders have one pair of neighbours r, r + 1 an epoch on average.
    epochs = 400 if sequences < 1000 else 40
    orders = (permutation(7, epoch, sequences) for epoch in range(epochs))
    neighbours = sum(b == a + 1 for order in orders for a, b in itertools.pairwise(order))
    assert abs(neighbours - epochs) < 5 * epochs**0.5


@pytest.mark.parametrize(("sequences", "index"), [(0, 0), (3, 3), (2**63 + 1, 0)])
def test_impossible_places_are_refused(sequences, index):
    with pytest.raises(ValueError, match="index < sequences"):
        sequence_at(1, 0, sequences, index)
