import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.data.bigram import Bigram

VOCAB = 7


def pairs_of(*documents):
    """(token, next token) of each document, with a label of -100 where one document ends and the next begins."""
    tokens = np.concatenate([np.array(document) for document in documents])
    labels = np.append(tokens[1:], -100)
    ends = np.cumsum([len(document) for document in documents])
    labels[ends - 1] = -100
    return tokens, labels


def by_the_formula(documents, v, w):
    """The module's docstring, term by term, in plain Python."""
    bigrams = Counter(pair for document in documents for pair in pairwise(document))

    def discount(counts):
        n1, n2 = counts.count(1), counts.count(2)
        return n1 / (n1 + 2 * n2) if n1 and n2 else 0.5

    contexts = Counter(after for _, after in bigrams)
    d, d1 = discount(list(bigrams.values())), discount(list(contexts.values()))
    p1 = max(contexts[w] - d1, 0) / len(bigrams) + d1 * len(contexts) / len(bigrams) / VOCAB
    total = sum(count for (before, _), count in bigrams.items() if before == v)
    if total == 0:
        return p1
    followers = sum(1 for before, _ in bigrams if before == v)
    return max(bigrams[v, w] - d, 0) / total + d * followers / total * p1


documents_strategy = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=30), min_size=1, max_size=5)


@given(documents_strategy)
def test_is_the_formula_of_its_docstring(documents):
    model = Bigram([pairs_of(*documents)], VOCAB)
    before, after = np.divmod(np.arange(VOCAB * VOCAB), VOCAB)
    wanted = [by_the_formula(documents, int(v), int(w)) for v, w in zip(before, after, strict=True)]
    np.testing.assert_allclose(model.probability(before, after), wanted, rtol=1e-12)


@given(documents_strategy)
def test_probabilities_after_any_token_sum_to_one_and_none_is_zero(documents):
    model = Bigram([pairs_of(*documents)], VOCAB)
    before, after = np.divmod(np.arange(VOCAB * VOCAB), VOCAB)
    probabilities = model.probability(before, after).reshape(VOCAB, VOCAB)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-12)
    assert (probabilities > 0).all()


@given(documents_strategy, st.integers(1, 40))
def test_the_chunks_that_pairs_come_in_do_not_matter(documents, size):
    tokens, labels = pairs_of(*documents)
    chunks = [(tokens[i : i + size], labels[i : i + size]) for i in range(0, len(tokens), size)]
    before, after = np.divmod(np.arange(VOCAB * VOCAB), VOCAB)
    whole = Bigram([(tokens, labels)], VOCAB).probability(before, after)
    np.testing.assert_array_equal(Bigram(chunks, VOCAB).probability(before, after), whole)


def test_without_pairs_there_is_no_model():
    with pytest.raises(ValueError, match="at least one pair"):
        Bigram([(np.array([1]), np.array([-100]))], VOCAB)


class Letters:
    """A tokenizer of single letters: a=2, b=3, ...; BOS 0, EOS 1."""

    bos_id, eos_id = 0, 1

    def encode(self, text):
        return [ord(letter) - ord("a") + 2 for letter in text]


def test_bits_per_byte_leaves_eos_out_and_is_given_bos():
    model = Bigram([pairs_of([0, 2, 3, 2, 1], [0, 2, 2, 3, 1])], VOCAB)
    score = model.score(Letters(), ["ab", "b"])
    steps = [(0, 2), (2, 3), (0, 3)]
    ends = [(3, 1), (3, 1)]
    text_nll = -sum(math.log(model.probability(np.array([v]), np.array([w]))[0]) for v, w in steps)
    end_nll = -sum(math.log(model.probability(np.array([v]), np.array([w]))[0]) for v, w in ends)
    assert score.text_bytes == 3
    assert score.tokens == 5
    assert math.isclose(score.bits_per_byte, text_nll / math.log(2) / 3, rel_tol=1e-12)
    assert math.isclose(score.nll, text_nll + end_nll, rel_tol=1e-12)


def test_on_random_tokens_it_pays_the_full_price():
    random = np.random.default_rng(0)
    model = Bigram([pairs_of(random.integers(0, VOCAB, 20_000))], VOCAB)
    fresh = random.integers(0, VOCAB, 20_000)
    nll = -np.log(model.probability(fresh[:-1], fresh[1:])).mean()
    assert nll == pytest.approx(math.log(VOCAB), abs=0.01)
