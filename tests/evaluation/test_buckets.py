"""Bins and paired differences, on numbers computed by hand and against plain loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lctw_megatron.evaluation.buckets import (
    LEFT_OUT,
    Pair,
    SequenceSums,
    bucket_of,
    bucket_starts,
    paired_difference,
)


def test_buckets_double_in_two_steps_and_none_holds_the_largest_value_alone():
    assert bucket_starts(1).tolist() == [1]
    assert bucket_starts(20).tolist() == [1, 2, 3, 4, 6, 8, 12, 16]
    assert bucket_starts(64).tolist() == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
    starts = bucket_starts(64)
    assert bucket_of(np.array([-1, 0, 1, 5, 6, 48, 64, 99]), starts).tolist() == [
        LEFT_OUT, LEFT_OUT, 0, 3, 4, 10, 10, 10,
    ]  # fmt: skip


@given(st.integers(1, 5000), st.data())
def test_every_value_lies_in_the_bucket_that_begins_at_or_below_it(largest, data):
    starts = bucket_starts(largest)
    value = data.draw(st.integers(1, largest))
    bucket = int(bucket_of(np.array([value]), starts)[0])
    assert starts[bucket] <= value
    assert bucket == len(starts) - 1 or value < starts[bucket + 1]


def test_sums_by_hand():
    sums = SequenceSums(sequences=2, bins=3)
    nan = float("nan")
    sums.add(0, np.array([1.0, 2.0, 4.0, nan, 8.0]), np.array([0, 0, 2, 2, LEFT_OUT]))
    sums.add(1, np.array([5.0]), np.array([2]))
    assert sums.loss.tolist() == [[3, 0, 4], [0, 0, 5]]
    assert sums.targets.tolist() == [[2, 0, 1], [0, 0, 1]]
    assert sums.means() == [1.5, None, 4.5]
    assert sums.summary()["targets"] == [2, 0, 2]


def test_paired_difference_by_hand():
    # Gaps -1 and -3 over 2 targets each: mean -1; residuals +1, -1; sqrt(2/1 * 2) / 4 = 0.5.
    found = paired_difference(Pair(np.array([4.0, 1.0]), np.array([5.0, 4.0]), np.array([2, 2])))
    assert found is not None
    assert found.mean == -1.0
    assert found.error == pytest.approx(0.5, rel=1e-12)


def test_a_difference_without_targets_or_with_one_sequence():
    nothing = np.zeros(2)
    assert paired_difference(Pair(nothing, nothing, np.zeros(2, dtype=int))) is None
    single = paired_difference(Pair(np.array([3.0, 0]), np.array([1.0, 0]), np.array([4, 0])))
    assert single is not None
    assert (single.mean, single.error) == (0.5, None)


@given(
    st.lists(st.tuples(st.floats(0, 1e3), st.integers(1, 50)), min_size=2, max_size=8),
    st.floats(-5, 5),
)
def test_the_same_shift_of_every_target_has_no_error(rows, shift):
    theirs, targets = np.array([a for a, _ in rows]), np.array([n for _, n in rows])
    found = paired_difference(Pair(theirs + shift * targets, theirs, targets))
    assert found is not None and found.error is not None
    assert math.isclose(found.mean, shift, abs_tol=1e-9)
    assert found.error < 1e-9


def test_the_error_is_that_of_many_draws():
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        targets = rng.integers(5, 20, 40)
        theirs = rng.normal(3, 1, 40) * targets
        ours = theirs + rng.normal(-0.1, 0.3, 40) * targets
        found = paired_difference(Pair(ours, theirs, targets))
        assert found is not None and found.error is not None
        means.append(found.mean)
        errors.append(found.error)
    assert np.mean(means) == pytest.approx(-0.1, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
