"""Errors over seeds and samples, by hand."""

import math

import numpy as np
import pytest

from lctw_megatron.evaluation.buckets import Estimate
from lctw_megatron.report.estimate import (
    Block,
    Measured,
    difference,
    is_beyond,
    level,
    of_blocks,
)


def measured(values: list, seeds: tuple = (1, 2), units: list | None = None, samples: str = "s"):
    block = Block(np.array(values, dtype=float), np.array(units or [1] * len(values[0])))
    return of_blocks(seeds, samples, [block])


OURS = [[1.0, 3.0], [2.0, 6.0]]  # means of the seeds: 2, 4; of the samples: 1.5, 4.5
THEIRS = [[0.0, 1.0], [1.0, 4.0]]  # 0.5, 2.5; gaps of the seeds: 1.5, 1.5; of the samples: 1, 2


def test_a_level_has_the_variance_over_seeds_and_that_over_samples():
    found = level(measured(OURS))
    over_seeds = math.sqrt(2 / 2)  # s² of 2 and 4 is 2
    over_samples = math.sqrt(4.5 / 2)  # s² of 1.5 and 4.5 is 4.5
    assert found.mean == 3
    assert found.error == pytest.approx(math.hypot(over_seeds, over_samples))


def test_a_difference_is_paired_by_seed_whatever_their_order_and_by_sample():
    expected = math.sqrt(0.5 / 2)  # the gaps of seeds are equal; s² of 1 and 2 is 0.5
    found = difference(measured(OURS), measured(THEIRS))
    assert found.mean == 1.5 and found.error == pytest.approx(expected)
    turned = measured(THEIRS[::-1], seeds=(2, 1))
    assert difference(measured(OURS), turned).error == pytest.approx(expected)


def test_with_other_seeds_only_samples_are_paired():
    found = difference(measured(OURS), measured(THEIRS, seeds=(3, 4)))
    # s² within the groups: 2 in both, so 2·(1/2 + 1/2).
    assert found.error == pytest.approx(math.hypot(math.sqrt(2), math.sqrt(0.25)))
    one = difference(measured(OURS), measured(THEIRS[:1], seeds=(1,)))
    assert one.mean == 2.5
    # s² = 2 from our two alone, 2·(1/2 + 1); gaps of the samples 1.5 and 3.5.
    assert one.error == pytest.approx(math.hypot(math.sqrt(3), math.sqrt(2 / 2)))


def test_one_seed_each_leaves_the_error_over_samples():
    found = difference(measured(OURS[:1], (1,)), measured(THEIRS[:1], (2,)))
    assert found.mean == 1.5 and found.error == pytest.approx(math.sqrt(0.5 / 2))


def test_means_are_ratios_and_the_mean_over_blocks_is_of_equals():
    one = Block(np.array([[2.0, 4.0]]), np.array([1, 2]))  # 6 / 3
    other = Block(np.array([[1.0, 1.0, 7.0]]), np.array([1, 1, 1]))  # 3, s² = 12
    found = level(of_blocks((1,), "s", [one, other]))
    assert found.mean == 2.5
    assert found.error == pytest.approx(math.sqrt(0 + 12 / 3) / 2)


def test_other_samples_and_what_was_not_measured_are_not_compared():
    assert difference(measured(OURS), measured(THEIRS, samples="t")) is None
    assert difference(measured(OURS), None) is None
    assert of_blocks((1,), "s", [Block(np.zeros((1, 2)), np.zeros(2))]) is None


def test_scores_without_their_samples_keep_the_error_that_came_with_them():
    ours = Measured((1, 2), "s", np.array([0.5, 0.7]), (), 0.03)
    theirs = Measured((1, 2), "s", np.array([0.4, 0.6]), (), 0.04)
    assert level(ours).error == pytest.approx(math.hypot(0.1, 0.03))
    assert difference(ours, theirs).error == pytest.approx(0.05)


def test_only_what_is_beyond_two_standard_errors_is_sure():
    assert is_beyond(Estimate(-2.01, 1.0)) and not is_beyond(Estimate(2.0, 1.0))
    assert not is_beyond(Estimate(5.0, None)) and not is_beyond(None)


def test_the_error_is_about_right_for_seeds_and_samples_drawn_anew():
    # 400 studies of 4 seeds and 25 samples: differences with a true mean of 0.
    rng = np.random.default_rng(0)
    sure = 0
    for _ in range(400):
        sample = rng.normal(0, 1, 25)
        runs = [
            measured(
                (sample + rng.normal(0, 0.3, (4, 1)) + rng.normal(0, 0.5, (4, 25))).tolist(),
                seeds=tuple(range(4)),
            )
            for _ in range(2)
        ]
        sure += is_beyond(difference(*runs))
    assert 0.02 < sure / 400 < 0.16  # 5 % with many seeds, 14 % where four tell the spread
