"""Weight statistics against their definitions."""

import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lctw_megatron.weighting.statistics import spearman_correlation, weight_statistics


def test_hand_computed() -> None:
    weights = torch.tensor([[0.0, 3.0, 1.0, 9.0]])
    loss = torch.tensor([[1.0, 3.0, 2.0, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    summary = weight_statistics(weights, loss, mask).summary()
    assert summary == {
        "max": 3.0,
        "zero_share": pytest.approx(1 / 3),
        "mean": pytest.approx(4 / 3),
        "n_eff": pytest.approx(16 / 10),
        "n_eff_share": pytest.approx(16 / 30),
        "spearman": pytest.approx(1.0),
    }


def test_a_loss_that_is_not_known_has_no_rank() -> None:
    weights = torch.tensor([[0.0, 3.0, 1.0, 9.0]])
    loss = torch.tensor([[1.0, 3.0, 2.0, float("nan")]])
    summary = weight_statistics(weights, loss, torch.ones(1, 4)).summary()
    assert summary["spearman"] == pytest.approx(1.0)
    assert (summary["max"], summary["mean"]) == (9.0, 13 / 4)


def test_uniform_weights_count_every_target_and_have_no_correlation() -> None:
    mask = torch.tensor([[1.0] * 5 + [0.0]])
    summary = weight_statistics(mask, torch.rand(1, 6), mask).summary()
    assert summary == {
        "max": 1.0,
        "zero_share": 0.0,
        "mean": 1.0,
        "n_eff": 5.0,
        "n_eff_share": 1.0,
    }


def test_no_targets_at_all() -> None:
    zero = torch.zeros(2, 3)
    assert weight_statistics(zero, zero, zero).summary() == {"max": 0.0}


def test_batches_add_up() -> None:
    weights, loss = torch.rand(2, 4, 50, generator=torch.Generator().manual_seed(1)).unbind()
    mask = (loss > 0.3).float()
    whole = weight_statistics(weights, loss, mask)
    first, second = (
        weight_statistics(weights[part], loss[part], mask[part])
        for part in (slice(0, 1), slice(1, 4))
    )
    assert (first + second).summary() == pytest.approx(whole.summary(), rel=1e-12)


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.booleans()), max_size=60),
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.booleans()), max_size=60),
)
@settings(max_examples=100, deadline=None)
def test_spearman_equals_scipys_with_ties(
    row: list[tuple[int, int, bool]], other: list[tuple[int, int, bool]]
) -> None:
    # Two sequences at once, dead targets between the live ones.
    length = max(len(row), len(other), 1)
    rows = [pairs + [(9, 9, False)] * (length - len(pairs)) for pairs in (row, other)]
    x, y, live = torch.tensor(rows, dtype=torch.float64).unbind(2)
    ours = spearman_correlation(x, y, live != 0).tolist()
    for pairs, found in zip(rows, ours, strict=True):
        xs, ys = ([pair[i] for pair in pairs if pair[2]] for i in (0, 1))
        if len(set(xs)) < 2 or len(set(ys)) < 2:
            assert math.isnan(found)
        else:
            assert found == pytest.approx(scipy.stats.spearmanr(xs, ys).statistic, abs=1e-12)
