"""What must hold for any losses, not only for chosen ones."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lctw_megatron.weighting import compute_weights, parse_weighting
from tests.weighting.test_schemes import ALL_SETTINGS

SETTINGS = [setting for setting in ALL_SETTINGS if setting["scheme"] != "uniform"]
NORMALISED = [s for s in SETTINGS if s["scheme"] not in ("longce", "custom") or "normalise" in s]


@st.composite
def batches(draw: st.DrawFn, quantised: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and a mask: [1..4 sequences, 1..40 targets]; often coarse, so that scores tie."""
    sequences, targets = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    long_loss = torch.rand(sequences, targets, generator=generator) * 6
    short_loss = long_loss + torch.randn(sequences, targets, generator=generator)
    if quantised and draw(st.booleans()):
        long_loss, short_loss = long_loss.round(), short_loss.round()
    share = draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    mask = (torch.rand(sequences, targets, generator=generator) < share).float()
    return long_loss, short_loss, mask


@pytest.mark.parametrize("setting", NORMALISED, ids=lambda s: s["scheme"])
@given(batch=batches(), interpolation=st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=25, deadline=None)
def test_mean_weight_of_every_sequence_is_one(
    setting: dict[str, Any], batch: tuple[Tensor, Tensor, Tensor], interpolation: float
) -> None:
    weights = compute_weights(parse_weighting({**setting, "interpolation": interpolation}), *batch)
    n = batch[2].sum(1)
    torch.testing.assert_close(weights.sum(1), n, rtol=1e-5, atol=0)
    assert (weights >= 0).all()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s["scheme"])
@given(batch=batches(), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_the_order_of_sequences_does_not_matter(
    setting: dict[str, Any], batch: tuple[Tensor, Tensor, Tensor], seed: int
) -> None:
    order = torch.randperm(len(batch[0]), generator=torch.Generator().manual_seed(seed))
    weighting = parse_weighting(setting)
    shuffled = compute_weights(weighting, *(stream[order] for stream in batch))
    assert torch.equal(shuffled, compute_weights(weighting, *batch)[order])


@pytest.mark.parametrize(
    "setting", [s for s in SETTINGS if s["scheme"] != "position"], ids=lambda s: s["scheme"]
)
@given(batch=batches(), before=st.integers(0, 7), after=st.integers(0, 7))
@settings(max_examples=25, deadline=None)
def test_padding_does_not_matter(
    setting: dict[str, Any], batch: tuple[Tensor, Tensor, Tensor], before: int, after: int
) -> None:
    # Ties included: the same ones are kept. 1e-6: the float64 sum may round differently.
    weighting = parse_weighting(setting)
    padded = compute_weights(
        weighting,
        *(torch.nn.functional.pad(stream, (before, after), value=0.0) for stream in batch),
    )
    inside = padded[:, before : before + batch[0].shape[1]]
    torch.testing.assert_close(inside, compute_weights(weighting, *batch), rtol=1e-6, atol=0)
    assert padded.sum() == pytest.approx(float(inside.sum()), rel=1e-6)


@given(batch=batches())
@settings(max_examples=50, deadline=None)
def test_dense_weights_rise_with_the_difference(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    long_loss, short_loss, _ = batch
    weights = compute_weights(parse_weighting({"scheme": "dense"}), long_loss, short_loss)
    difference = (short_loss - long_loss).abs()
    order = difference.argsort(dim=1)
    assert (weights.gather(1, order).diff(dim=1) >= 0).all()


@given(batch=batches(), percent=st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_sparse_keeps_exactly_the_k_largest(
    batch: tuple[Tensor, Tensor, Tensor], percent: int
) -> None:
    long_loss, short_loss, mask = batch
    fraction = percent / 100
    setting = {"scheme": "sparse", "keep_fraction": fraction}
    weights = compute_weights(parse_weighting(setting), long_loss, short_loss, mask)
    for row in range(len(weights)):
        live = mask[row] > 0
        n = int(live.sum())
        scores = (short_loss[row] - long_loss[row]).abs()[live]
        kept = weights[row][live] > 0
        if not n:
            assert not weights[row].any()
        elif not scores.any():
            assert kept.all()
        else:
            k = max(1, percent * n // 100)  # integers: no rounding
            assert int(kept.sum()) == k
            assert not (~kept).any() or scores[kept].min() >= scores[~kept].max()
            torch.testing.assert_close(weights[row][live][kept], torch.full((k,), n / k))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s["scheme"])
@given(batch=batches())
@settings(max_examples=15, deadline=None)
def test_interpolation_is_a_straight_line_to_uniform(
    setting: dict[str, Any], batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    plain = compute_weights(parse_weighting(setting), *batch)
    mixed = compute_weights(parse_weighting({**setting, "interpolation": 0.25}), *batch)
    torch.testing.assert_close(mixed, (0.25 + 0.75 * plain) * batch[2], rtol=1e-6, atol=1e-7)
