"""Targets without a short loss: what they weigh under every scheme, by hand."""

import math
from typing import Any

import pytest

from tests.weighting.test_schemes import INF, LONG, NAN, weigh


@pytest.mark.parametrize("missing", [NAN, INF])
def test_unscored_zero_scores_zero_and_is_counted(missing: float) -> None:
    short_loss = [missing, 1.0, 1.0, 4.0, missing]  # d = 0, -2, 0, 3, 0
    weights, counts = weigh({"scheme": "dense", "interpolation": 0.5}, LONG, short_loss)
    assert weights == pytest.approx([0.5, 1.5, 0.5, 2.0, 0.5])
    assert [int(count) for count in counts] == [5, 2, 0]
    weights, _ = weigh({"scheme": "longce", "max_weight": 4.0}, LONG, short_loss)
    assert weights == pytest.approx([1, math.exp(-2), 1, 4, 1])


# d = 1, -2, none, 3, none
PARTLY_SCORED = [3.0, 1.0, NAN, 4.0, NAN]
SELECTIONS: list[tuple[dict[str, Any], list[float]]] = [
    # max(0, d + 0.69) = 1.69, 0, none, 3.69, none
    ({"scheme": "ppmi", "keep_fraction": 1.0, "shift": 0.5}, [5 / 2, 0, 0, 5 / 2, 0]),
    # max(0, -d + 0.69) = 0, 2.69, none, 0, none
    ({"scheme": "npmi", "keep_fraction": 1.0, "shift": 0.5}, [0, 5, 0, 0, 0]),
    # -d = -1, 2, none, -3, none
    ({"scheme": "rho", "keep_fraction": 0.6}, [5 / 3, 5 / 3, 0, 5 / 3, 0]),
    ({"scheme": "rho", "keep_fraction": 0.4}, [5 / 2, 5 / 2, 0, 0, 0]),
    ({"scheme": "rho", "keep_fraction": 0.4, "unscored": "one"}, [0, 3, 1, 0, 1]),
    # an unscored target's d is no 0 that a bound below it would let in
    ({"scheme": "longppl", "min_difference": -0.5, "min_log_probability": -9.0},
     [5 / 2, 0, 0, 5 / 2, 0]),
    ({"scheme": "ppmi", "keep_fraction": 1.0, "shift": 0.5, "unscored": "one"},
     [3 / 2, 0, 1, 3 / 2, 1]),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "expected"), SELECTIONS)
def test_what_was_not_scored_is_never_kept_before_what_was(
    setting: dict[str, Any], expected: list[float]
) -> None:
    weights, counts = weigh(setting, LONG, PARTLY_SCORED)
    assert weights == pytest.approx(expected)
    assert [int(count) for count in counts] == [5, 2, 0]
    setting = {**setting, "interpolation": 0.25}
    blended = [0.25 + 0.75 * weight for weight in expected]
    if setting.get("unscored") == "one":
        blended = [1 if math.isnan(s) else b for s, b in zip(PARTLY_SCORED, blended, strict=True)]
    assert weigh(setting, LONG, PARTLY_SCORED)[0] == pytest.approx(blended)


def test_a_scored_zero_comes_before_an_unscored_target() -> None:
    short_loss = [2.0, 3.0, NAN, 4.0, NAN]  # d = 0, 0, none, 3, none
    kept, _ = weigh({"scheme": "sparse", "keep_fraction": 0.6}, LONG, short_loss)
    assert kept == pytest.approx([5 / 3, 5 / 3, 0, 5 / 3, 0])
    # Where κ asks for more than were scored, an unscored one fills up.
    kept, _ = weigh({"scheme": "sparse", "keep_fraction": 0.8}, LONG, short_loss)
    assert [kept[i] for i in (0, 1, 3)] == pytest.approx([5 / 4] * 3)
    assert sorted([kept[2], kept[4]]) == pytest.approx([0, 5 / 4])


@pytest.mark.parametrize("setting", [setting for setting, _ in SELECTIONS])
def test_a_selection_without_any_score_is_uniform(setting: dict[str, Any]) -> None:
    weights, counts = weigh(setting, LONG, [NAN] * 5)
    assert weights == [1] * 5
    assert [int(count) for count in counts] == [5, 5, "unscored" not in setting]


def test_unscored_one_stays_outside_the_normalisation() -> None:
    short_loss = [NAN, 1.0, 1.0, 4.0, NAN]  # the scored three: |d| = 2, 0, 3
    setting = {"scheme": "dense", "unscored": "one"}
    weights, counts = weigh(setting, LONG, short_loss)
    assert weights == pytest.approx([1, 6 / 5, 0, 9 / 5, 1])
    assert [int(count) for count in counts] == [5, 2, 0]
    # κ·n counts scored targets: ⌊0.5·3⌋ = 1
    setting = {"scheme": "sparse", "keep_fraction": 0.5, "unscored": "one"}
    assert weigh(setting, LONG, short_loss)[0] == pytest.approx([1, 0, 0, 3, 1])


@pytest.mark.parametrize("unscored", ["zero", "one"])
def test_a_sequence_without_any_score_is_uniform(unscored: str) -> None:
    weights, counts = weigh({"scheme": "dense", "unscored": unscored}, LONG, [NAN] * 5)
    assert weights == [1] * 5
    # Under `one` nothing fell back: weight 1 is what was asked for.
    assert [int(count) for count in counts] == [5, 5, unscored == "zero"]
