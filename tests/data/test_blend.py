"""The order of samples: exact shares at every moment, every sequence once an epoch."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lctw_megatron.data.blend import (
    LARGEST_PERIOD,
    SampleOrder,
    interleave,
    permute,
    whole_shares,
)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([1.0], [1]),
        ([5.0], [1]),
        ([0.7, 0.3], [7, 3]),
        ([0.1, 0.2, 0.7], [1, 2, 7]),
        ([2.0, 4.0, 6.0], [1, 2, 3]),
        ([1e-3, 0.999], [1, 999]),
    ],
)
def test_shares_of_decimal_weights_are_exact(weights: list[float], shares: list[int]) -> None:
    assert whole_shares(weights) == shares


@settings(deadline=None)
@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=20))
def test_shares_of_any_weights_are_close(weights: list[float]) -> None:
    shares = whole_shares(weights)
    assert sum(shares) <= LARGEST_PERIOD
    assert min(shares) >= 1
    total = sum(Fraction(weight) for weight in weights)
    for share, weight in zip(shares, weights, strict=True):
        # Every corpus gets at least one turn; the others make room for at most 20 of those.
        assert abs(Fraction(share, sum(shares)) - Fraction(weight) / total) < 20 / LARGEST_PERIOD


def test_hand_made_blends() -> None:
    assert interleave([1]).tolist() == [0]
    assert interleave([1, 1]).tolist() == [0, 1]
    assert interleave([3, 1]).tolist() == [0, 0, 1, 0]
    assert interleave([1, 2, 4]).tolist() == [2, 1, 2, 2, 0, 1, 2]


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=25))
def test_every_prefix_of_a_blend_is_nearer_than_one_to_exact(shares: list[int]) -> None:
    order = interleave(shares)
    counts = np.cumsum(order[:, None] == np.arange(len(shares)), axis=0)  # [samples, corpora]
    samples = np.arange(1, len(order) + 1)[:, None]
    # |count - samples · share / total| <= 1 - 1/(2n - 2), in whole numbers
    slack = max(2 * len(shares) - 2, 1)
    farthest = np.abs(counts * sum(shares) - samples * np.array(shares)).max()
    assert farthest * slack <= (slack - 1) * sum(shares)


@settings(deadline=None)
@given(st.integers(1, 500), st.binary(max_size=20))
def test_permutations_are_bijections(size: int, key: bytes) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_of_huge_ranges_are_one_to_one() -> None:
    size = 3_000_000_019
    images = {permute(i, size, b"key") for i in range(2000)}
    assert len(images) == 2000
    assert 0 <= min(images) < size / 100 < size * 99 / 100 < max(images) < size


def test_permutations_look_random() -> None:
    # Where does position 0 of 10 go, over 5000 keys? Chi-squared with 9 degrees of freedom is
    # above 33.7 once in 10^4; and after 3 comes 4 as often as chance has it: 1 in 10.
    images = [[permute(i, 10, str(key).encode()) for i in range(10)] for key in range(5000)]
    for position in range(10):
        counts = Counter(image[position] for image in images)
        assert sum((counts[value] - 500) ** 2 / 500 for value in range(10)) < 33.7
    follows = sum(image[i + 1] == image[i] + 1 for image in images for i in range(9))
    assert 0.09 < follows / (9 * 5000) < 0.11


def test_keys_give_different_permutations() -> None:
    orders = {tuple(permute(i, 30, str(key).encode()) for i in range(30)) for key in range(100)}
    assert len(orders) == 100


def test_a_literal_order_that_must_never_change() -> None:
    # Checkpoints hold only how many samples were consumed: another order here would silently
    # change what every resumed run trains on.
    order = SampleOrder([5, 3], [2.0, 1.0], seed=1234, shuffle=True)
    assert [tuple(order[k]) for k in range(12)] == [
        (0, 0, 1),
        (1, 0, 1),
        (0, 0, 4),
        (0, 0, 0),
        (1, 0, 2),
        (0, 0, 2),
        (0, 0, 3),
        (1, 0, 0),
        (0, 1, 4),
        (0, 1, 2),
        (1, 1, 1),
        (0, 1, 0),
    ]


def test_unshuffled_order_by_hand() -> None:
    order = SampleOrder([3, 2], [2.0, 1.0], seed=0, shuffle=False)
    assert [tuple(order[k]) for k in range(9)] == [
        (0, 0, 0),
        (1, 0, 0),
        (0, 0, 1),
        (0, 0, 2),
        (1, 0, 1),
        (0, 1, 0),
        (0, 1, 1),
        (1, 1, 0),
        (0, 1, 2),
    ]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(0, 2**40),
    st.booleans(),
)
def test_each_epoch_of_each_corpus_holds_every_sequence_once(corpora, seed, shuffle) -> None:
    sizes, weights = zip(*corpora, strict=True)
    order = SampleOrder(sizes, [float(weight) for weight in weights], seed, shuffle)
    drawn = Counter(order[k] for k in range(400))
    assert max(drawn.values()) == 1
    for corpus, size in enumerate(sizes):
        last = max((epoch for c, epoch, _ in drawn if c == corpus), default=0)
        for epoch in range(last):
            assert {s for c, e, s in drawn if (c, e) == (corpus, epoch)} == set(range(size))


def test_epochs_and_corpora_are_shuffled_differently() -> None:
    order = SampleOrder([50, 50], [1.0, 1.0], seed=7, shuffle=True)
    places = [order[k] for k in range(400)]
    orders = {
        tuple(p.sequence for p in places if (p.corpus, p.epoch) == (corpus, epoch))
        for corpus in range(2)
        for epoch in range(4)
    }
    assert len(orders) == 8
    assert {len(order) for order in orders} == {50}
