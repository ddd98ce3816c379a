"""How many are kept, and which of equals."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lctw_megatron.weighting.selection import keep_largest, number_to_keep


@given(st.integers(1, 10**5), st.integers(1, 131072))
def test_the_number_kept_is_exact_for_decimal_fractions(numerator: int, n: int) -> None:
    exact = max(1, math.floor(Fraction(numerator, 10**5) * n))
    assert int(number_to_keep(torch.tensor(n), numerator / 10**5)) == exact


@pytest.mark.parametrize(
    "fraction, n, kept",
    [
        (0.29, 100, 29),  # 28.999999999999996 in floating point
        (0.1, 30, 3),
        (0.07, 100, 7),  # 7.000000000000001
        (1 / 3, 30, 10),
        (2 / 3, 131072, 87381),
        (0.1, 9, 1),
        (1e-6, 1000, 1),
        (1e-12, 1000, 1),
        (1.0, 7, 7),
        (0.5, 0, 0),
        (0.123456789123, 10**9, 123456789),
    ],
)
def test_the_number_kept(fraction: float, n: int, kept: int) -> None:
    assert int(number_to_keep(torch.tensor(n), fraction)) == kept


def test_equals_are_chosen_without_positional_bias() -> None:
    # 4000 sequences whose scores take three values only, so that about a third of the targets tie
    # at the threshold. Every position must be kept equally often.
    generator = torch.Generator().manual_seed(0)
    sequences, targets = 4000, 64
    scores = torch.randint(0, 3, (sequences, targets), generator=generator).float()
    live = torch.ones_like(scores, dtype=torch.bool)
    kept = keep_largest(scores, live, 0.5)
    assert (kept.sum(1) == targets // 2).all()
    # Deviations in units of a binomial's standard deviation. Among 64 positions 3.5 is exceeded
    # with probability 3 %, and the seed is fixed; preferring late ties gives above 20.
    deviation = (kept.double().mean(0) - 0.5) / (0.5 / math.sqrt(sequences))
    assert float(deviation.abs().max()) < 3.5
    # No trend either: the mean position of the kept, in standard errors.
    position = torch.arange(targets).double()
    mean_position = (kept * position).sum(1) / kept.sum(1)
    error = mean_position.std() / math.sqrt(sequences)
    assert abs(float(mean_position.mean()) - (targets - 1) / 2) < 3 * float(error)


def test_equals_far_apart_are_chosen_independently() -> None:
    # All scores equal, sequences of different lengths: 300 different choices of about one in ten.
    shares = []
    for n in range(1000, 1300):
        kept = keep_largest(torch.ones(1, n), torch.ones(1, n, dtype=torch.bool), 0.1)[0]
        shares.append(torch.stack([part.double().mean() for part in kept.tensor_split(4)]))
    quarters = torch.stack(shares).mean(0)
    # Standard error of a quarter's mean share: sqrt(0.1 * 0.9 / 250 / 300) = 0.0011.
    torch.testing.assert_close(quarters, torch.full_like(quarters, 0.1), rtol=0, atol=0.0035)


def test_the_choice_among_equals_ignores_padding_and_the_batch() -> None:
    scores = torch.tensor([[1.0, 2, 1, 1, 1, 2, 1, 1]])
    live = torch.ones_like(scores, dtype=torch.bool)
    alone = keep_largest(scores, live, 0.5)
    spread_scores, spread_live = torch.full((2, 16), 9.0), torch.zeros(2, 16, dtype=torch.bool)
    spread_scores[1, 1::2], spread_live[1, 1::2] = scores[0], True
    spread = keep_largest(spread_scores, spread_live, 0.5)
    assert spread[1, 1::2].tolist() == alone[0].tolist()
    assert not spread[1, ::2].any() and not spread[0].any()
