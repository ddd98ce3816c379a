"""Every scheme on numbers worked out by hand, and what happens at the edges."""

import math
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lctw_megatron.config.schemes import SCHEME_NEEDS, needs_short_loss
from lctw_megatron.weighting import compute_weights, parse_weighting
from lctw_megatron.weighting.compute import WeightCounts, compute_weights_and_counts
from lctw_megatron.weighting.schemes import SCHEMES, Dense, Scheme, Targets

NAN, INF = math.nan, math.inf

# One sequence of five targets: d = short - long = 1, -2, 0, 3, -2
LONG = [2.0, 3.0, 1.0, 1.0, 4.0]
SHORT = [3.0, 1.0, 1.0, 4.0, 2.0]

LONGCE_SUM = math.e + 1 + 4 + 2 * math.exp(-2)
"""Of the weights under γ = 4."""

ALL_SETTINGS: list[dict[str, Any]] = [
    {"scheme": "uniform"},
    {"scheme": "dense"},
    {"scheme": "sparse", "keep_fraction": 0.4},
    {"scheme": "longce", "max_weight": 5.0},
    {"scheme": "longce", "max_weight": 5.0, "normalise": "sequence"},
    {"scheme": "longppl", "min_difference": 0.5, "min_log_probability": -4.0},
    {"scheme": "ppmi", "keep_fraction": 0.4, "shift": 0.9},
    {"scheme": "npmi", "keep_fraction": 0.4, "shift": 0.9},
    {"scheme": "rho", "keep_fraction": 0.4},
    {"scheme": "eslm", "keep_fraction": 0.4},
    {"scheme": "position"},
    {"scheme": "custom", "function": f"{__name__}:long_loss_as_weight"},
]


def long_loss_as_weight(long_loss: Tensor, short_loss: Tensor, mask: Tensor) -> Tensor:
    return long_loss


def short_loss_as_weight(long_loss: Tensor, short_loss: Tensor, mask: Tensor) -> Tensor:
    return short_loss


def weigh(
    setting: dict[str, Any],
    long_loss: list[float],
    short_loss: list[float] | None,
    mask: list[int] | None = None,
) -> tuple[list[float], WeightCounts]:
    """Weights of one sequence in float64."""

    def row(values: Any) -> Any:
        return None if values is None else torch.tensor([values], dtype=torch.float64)

    weights, counts = compute_weights_and_counts(
        parse_weighting(setting), row(long_loss), row(short_loss), row(mask)
    )
    return weights[0].tolist(), counts


@pytest.mark.parametrize(
    "setting, expected",
    [
        ({"scheme": "uniform"}, [1, 1, 1, 1, 1]),
        # Σ|d| = 8, so n/Σ|d| = 5/8
        ({"scheme": "dense"}, [5 / 8, 10 / 8, 0, 15 / 8, 10 / 8]),
        # 0.6 + 0.4·w
        ({"scheme": "dense", "interpolation": 0.6}, [0.85, 1.1, 0.6, 1.35, 1.1]),
        # ⌊0.6·5⌋ = 3 largest |d|: 3, 2, 2
        ({"scheme": "sparse", "keep_fraction": 0.6}, [0, 5 / 3, 0, 5 / 3, 5 / 3]),
        # ⌊0.39·5⌋ = 1
        ({"scheme": "sparse", "keep_fraction": 0.39}, [0, 0, 0, 5, 0]),
        # ⌊0.01·5⌋ = 0, but one is always kept
        ({"scheme": "sparse", "keep_fraction": 0.01}, [0, 0, 0, 5, 0]),
        ({"scheme": "sparse", "keep_fraction": 1.0}, [1, 1, 1, 1, 1]),
        (
            {"scheme": "sparse", "keep_fraction": 0.39, "interpolation": 0.5},
            [0.5, 0.5, 0.5, 3, 0.5],
        ),
        (
            {"scheme": "longce", "max_weight": 4.0},
            [math.e, math.exp(-2), 1, 4, math.exp(-2)],
        ),
        (
            {"scheme": "longce", "max_weight": 4.0, "interpolation": 0.5},
            [(1 + math.e) / 2, (1 + math.exp(-2)) / 2, 1, 2.5, (1 + math.exp(-2)) / 2],
        ),
        # 5 / (e + 1 + 4 + 2·exp(-2)) times them
        (
            {"scheme": "longce", "max_weight": 4.0, "normalise": "sequence"},
            [w * 5 / LONGCE_SUM for w in (math.e, math.exp(-2), 1, 4, math.exp(-2))],
        ),
        # Key tokens: d > 2 and long loss < 2 is only the fourth
        ({"scheme": "longppl"}, [0, 0, 0, 5, 0]),
        # d > 0.9: the first and the fourth; their long losses are 2 and 1
        (
            {"scheme": "longppl", "min_difference": 0.9, "min_log_probability": -2.1},
            [2.5, 0, 0, 2.5, 0],
        ),
        ({"scheme": "longppl", "min_difference": 0.9}, [0, 0, 0, 5, 0]),
        # The bounds themselves are outside.
        ({"scheme": "longppl", "min_difference": 1, "min_log_probability": -9}, [0, 0, 0, 5, 0]),
        # The ⌊0.4·5⌋ = 2 largest long losses: 4 and 3
        ({"scheme": "eslm", "keep_fraction": 0.4}, [0, 2.5, 0, 0, 2.5]),
        ({"scheme": "eslm", "keep_fraction": 0.6}, [5 / 3, 5 / 3, 0, 0, 5 / 3]),
        # d - log 2: 0.31, -, -, 2.31, -: only two are positive, of the four that κ allows
        ({"scheme": "ppmi", "keep_fraction": 0.8, "shift": 2.0}, [2.5, 0, 0, 2.5, 0]),
        ({"scheme": "ppmi", "keep_fraction": 0.2, "shift": 2.0}, [0, 0, 0, 5, 0]),
        # s < 1: d = 0 counts as positive (0.69)
        ({"scheme": "ppmi", "keep_fraction": 1.0, "shift": 0.5}, [5 / 3, 0, 5 / 3, 5 / 3, 0]),
        ({"scheme": "npmi", "keep_fraction": 0.8, "shift": 2.0}, [0, 2.5, 0, 0, 2.5]),
        # long - short = -1, 2, 0, -3, 2
        ({"scheme": "rho", "keep_fraction": 0.4}, [0, 2.5, 0, 0, 2.5]),
        # negative excess is kept too, if κ asks for it
        ({"scheme": "rho", "keep_fraction": 0.8}, [1.25, 1.25, 1.25, 0, 1.25]),
        (
            {"scheme": "custom", "function": f"{__name__}:long_loss_as_weight"},
            [2, 3, 1, 1, 4],
        ),
        (
            {
                "scheme": "custom",
                "function": f"{__name__}:long_loss_as_weight",
                "normalise": "sequence",
            },
            [10 / 11, 15 / 11, 5 / 11, 5 / 11, 20 / 11],
        ),
    ],
    ids=str,
)
def test_hand_computed(setting: dict[str, Any], expected: list[float]) -> None:
    weights, counts = weigh(setting, LONG, SHORT)
    assert weights == pytest.approx(expected, rel=1e-12, abs=0)
    assert [int(count) for count in counts] == [5, 0, 0]


def test_position_gives_every_long_bucket_the_same_share() -> None:
    # 12 targets, window 2: contexts 3..12 are long; buckets (2, 4], (4, 8], (8, 16] hold 2, 4, 4.
    weights, _ = weigh({"scheme": "position", "window": 2}, [1.0] * 12, None)
    assert weights == pytest.approx([0, 0, *[2] * 2, *[1] * 4, *[1] * 4])
    # The default window is a quarter of the sequence: contexts 4..12, buckets of 1, 4, 4.
    weights, _ = weigh({"scheme": "position"}, [1.0] * 12, None)
    assert weights == pytest.approx([0, 0, 0, 4, *[1] * 4, *[1] * 4])


def test_position_counts_the_context_inside_the_piece_and_live_targets_only() -> None:
    # Pieces of 5 and 7 targets; contexts 1..5, 1..7. Window 3: long are 4 5 | 4 5 6 7, of which the
    # last is masked. Buckets: (2, 4] holds 2 targets, (4, 8] holds 1 + 2.
    loss = torch.ones(1, 12, dtype=torch.float64)
    mask = torch.ones(1, 12)
    mask[0, -1] = 0
    weights = compute_weights(
        parse_weighting({"scheme": "position", "window": 3}),
        loss,
        None,
        mask,
        boundaries=torch.tensor([[0, 5, 12, 12]], dtype=torch.int32),
    )
    share = 11 / 2
    expected = [0, 0, 0, share / 2, share / 3, 0, 0, 0, share / 2, share / 3, share / 3, 0]
    assert weights[0].tolist() == pytest.approx(expected)


def test_context_length_starts_again_at_every_piece() -> None:
    loss = torch.ones(2, 5)
    boundaries = torch.tensor([[0, 2, 5, 5], [0, 5, 5, 5]], dtype=torch.int32)
    context = Targets(loss, loss, loss > 0, loss > 0, boundaries).context_length
    assert context.tolist() == [[1, 2, 1, 2, 3], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize("setting", ALL_SETTINGS, ids=lambda s: s["scheme"])
def test_lambda_one_is_exactly_one_on_live_targets(setting: dict[str, Any]) -> None:
    mask = [1, 1, 0, 1, 1]
    weights, _ = weigh({**setting, "interpolation": 1.0}, LONG, SHORT, mask)
    assert weights == mask


@pytest.mark.parametrize("setting", ALL_SETTINGS, ids=lambda s: s["scheme"])
def test_what_is_masked_never_matters(setting: dict[str, Any]) -> None:
    mask = [1, 1, 0, 1, 0, 1, 0]
    expected, _ = weigh(setting, [2, 3, 5, 1, 5, 4, 5], [3, 1, 6, 1, 6, 2, 6], mask)
    weights, counts = weigh(
        setting, [2, 3, NAN, 1, INF, 4, 1e30], [3, 1, INF, 1, 1.0, 2, NAN], mask
    )
    assert weights == expected
    assert all(math.isfinite(weight) for weight in weights)
    assert [weights[i] for i in (2, 4, 6)] == [0, 0, 0]
    assert [int(count) for count in counts] == [4, 0, 0]


@pytest.mark.parametrize("setting", ALL_SETTINGS, ids=lambda s: s["scheme"])
def test_a_fully_masked_sequence_has_zero_weights_and_changes_no_other(
    setting: dict[str, Any],
) -> None:
    long_loss, short_loss = torch.tensor([LONG, LONG]), torch.tensor([SHORT, SHORT])
    mask = torch.tensor([[0.0] * 5, [1.0] * 5])
    weighting = parse_weighting(setting)
    weights, counts = compute_weights_and_counts(weighting, long_loss, short_loss, mask)
    alone = compute_weights(weighting, long_loss[1:], short_loss[1:])
    assert weights[0].tolist() == [0] * 5
    assert torch.equal(weights[1:], alone)
    assert [int(count) for count in counts] == [5, 0, 0]


@pytest.mark.parametrize(
    "setting",
    [s for s in ALL_SETTINGS if s["scheme"] in ("dense", "sparse", "rho", "longppl")],
    ids=str,
)
def test_all_zero_scores_fall_back_to_uniform_and_are_counted(setting: dict[str, Any]) -> None:
    weights, counts = weigh({**setting, "interpolation": 0.3}, LONG, LONG, [1, 1, 1, 0, 1])
    assert weights == [1, 1, 1, 0, 1]
    assert [int(count) for count in counts] == [4, 0, 1]


def test_ppmi_without_any_positive_score_falls_back_to_uniform() -> None:
    setting = {"scheme": "ppmi", "keep_fraction": 0.5, "shift": 1.0}
    weights, counts = weigh(setting, [3.0, 2.0], [1.0, 1.0])
    assert weights == [1, 1]
    assert int(counts.fallback_sequences) == 1


def test_longppl_without_any_key_token_falls_back_to_uniform_and_is_counted() -> None:
    weights, counts = weigh({"scheme": "longppl"}, [3.0, 1.0], [9.0, 2.0])  # unlikely; too little
    assert weights == [1, 1]
    assert int(counts.fallback_sequences) == 1


def test_eslm_keeps_what_is_at_least_the_value_at_risk() -> None:
    # The empirical quantile of level 1 - κ of 100 different losses, by numpy's definition of it.
    loss = torch.rand(1, 100, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = compute_weights(parse_weighting({"scheme": "eslm", "keep_fraction": 0.3}), loss, None)
    value_at_risk = np.quantile(loss[0].numpy(), 0.7, method="higher")
    assert ((weights[0] > 0) == (loss[0] >= value_at_risk)).all()
    # The objective is then the conditional value at risk.
    tail = loss[0][loss[0] >= value_at_risk]
    assert float((weights * loss).mean()) == pytest.approx(float(tail.mean()))


def test_all_scores_equal() -> None:
    # Equal but not zero: dense is uniform, sparse still keeps exactly k of them.
    long_loss, short_loss = [1.0] * 10, [2.0] * 10
    dense, counts = weigh({"scheme": "dense"}, long_loss, short_loss)
    assert dense == pytest.approx([1.0] * 10)
    assert int(counts.fallback_sequences) == 0
    sparse, _ = weigh({"scheme": "sparse", "keep_fraction": 0.3}, long_loss, short_loss)
    assert sorted(sparse) == pytest.approx([0.0] * 7 + [10 / 3] * 3)


def test_a_broken_long_loss_does_not_spread() -> None:
    weights, counts = weigh({"scheme": "dense"}, [2.0, NAN, 1.0], [3.0, 1.0, 3.0])
    assert weights == pytest.approx([1, 0, 2])
    assert int(counts.unscored) == 1


def test_low_precision_losses_are_compared_in_float32() -> None:
    long_loss = torch.tensor([LONG], dtype=torch.bfloat16, requires_grad=True)
    short_loss = torch.tensor([SHORT], dtype=torch.bfloat16)
    for setting in ({"scheme": "dense"}, {"scheme": "uniform"}):
        weights = compute_weights(parse_weighting(setting), long_loss, short_loss)
        assert weights.dtype == torch.float32
        assert not weights.requires_grad


def test_uniform_position_and_eslm_need_no_short_loss() -> None:
    loss = torch.ones(2, 8)
    for setting in (
        {"scheme": "uniform"},
        {"scheme": "position"},
        {"scheme": "eslm", "keep_fraction": 0.5},
    ):
        weighting = parse_weighting(setting)
        assert not weighting.scheme.needs_short_loss
        assert compute_weights(weighting, loss, None).shape == loss.shape
    with pytest.raises(ValueError, match="short_loss is None"):
        compute_weights(parse_weighting({"scheme": "dense"}), loss, None)


def test_every_scheme_takes_the_parameters_that_config_says() -> None:
    assert list(SCHEMES) == list(SCHEME_NEEDS)
    for name, scheme in SCHEMES.items():
        default = {field.name: field.default for field in fields(scheme)}  # type: ignore[arg-type]
        needs = SCHEME_NEEDS[name]
        required = [field for field in default if default[field] is MISSING]
        assert required == list(needs.parameters), name
        assert all(default[field] is None for field in default if field not in required), name
        # position's window is a field of all schemes.
        optional = [field for field in default if field not in (*required, "window")]
        assert optional == list(needs.optional), name
        assert scheme.needs_short_loss == needs.short_loss, name
        assert scheme.needs_long_loss == needs.long_loss, name


@pytest.mark.parametrize("setting", ALL_SETTINGS, ids=lambda s: s["scheme"])
def test_the_losses_matter_where_config_says_that_they_are_needed(
    setting: dict[str, Any],
) -> None:
    if setting["scheme"] == "custom":
        setting = {**setting, "function": f"{__name__}:short_loss_as_weight"}
    before, _ = weigh(setting, LONG, SHORT)
    after, _ = weigh(setting, LONG, SHORT[::-1])
    assert (before != after) == needs_short_loss(setting["scheme"])
    after, _ = weigh(setting, LONG[::-1], SHORT)
    assert (before != after or setting["scheme"] == "custom") == SCHEME_NEEDS[
        setting["scheme"]
    ].long_loss


def test_a_scheme_that_config_does_not_know_needs_short_losses() -> None:
    try:

        @dataclass(frozen=True)
        class Own(Scheme):
            scores = Dense.scores
            weights = Dense.weights

        assert Own.needs_short_loss and needs_short_loss("own")
        assert parse_weighting({"scheme": "own"}).scheme.needs_short_loss
    finally:
        SCHEMES.pop("own", None)


def test_streams_of_different_shapes_are_refused() -> None:
    weighting = parse_weighting({"scheme": "dense"})
    with pytest.raises(ValueError, match=r"mask is \(2, 7\) but long_loss is \(2, 8\)"):
        compute_weights(weighting, torch.ones(2, 8), torch.ones(2, 8), torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"expected \[sequences, targets\]"):
        compute_weights(weighting, torch.ones(8), torch.ones(8))
