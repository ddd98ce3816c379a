"""What must hold to the last bit, and what must hold in the corners, on every layout."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import run_distributed
from tests.training.crafted import CraftedCase, crafted_passes, scaled_steps
from tests.training.layouts import Case, gather, make_data, relative_error, trainings

DEEP = {"tensor": 2, "pipeline": 2, "context": 2}
"""Eight ranks: everything at once."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("exactness"))


# The same objective, computed the plain way and by schemes with lambda 1.
INTERPOLATED: dict[str, list[tuple[str, str, str]]] = {
    "chunk": [
        ("chunk", "uniform", "frozen"),
        ("chunk", "dense, all uniform", "frozen"),
        ("chunk", "sparse, all uniform", "self"),
    ],
    "pack": [
        ("pack", "uniform", "frozen"),
        ("pack", "dense, all uniform", "self"),
        ("pack", "longce, all uniform", "frozen"),
    ],
}
SCALED = [
    ("pack", "dense", "frozen"),
    ("chunk", "sparse", "self"),
    ("chunk", "uniform", "frozen"),
]


def bit_exact_runs(
    prefix: str, folder: str, layout: dict[str, Any], packings: list[str], scaled: int
) -> dict[str, Any]:
    """The runs of the bit-exact tests on one group of ranks: all of INTERPOLATED with these
    packings, and the first ``scaled`` of SCALED with full and with small weights."""

    def lay(cases: list[tuple[str, str, str]]) -> list[Case]:
        return [(layout, *case) for case in cases]

    return {
        "interpolated": {
            packing: [
                run["metrics"]
                for run in trainings(prefix, f"{folder}/{packing}", lay(INTERPOLATED[packing]))
            ]
            for packing in packings
        },
        "full": scaled_steps(prefix, folder, lay(SCALED[:scaled]), 1.0),
        "small": scaled_steps(prefix, folder, lay(SCALED[:scaled]), 1 / 64),
    }


def assert_bit_exact(runs: dict[str, Any]) -> None:
    for packing, (uniform, *others) in runs["interpolated"].items():
        for other in others:
            for found, expected in zip(other, uniform, strict=True):
                # All but what only a scheme with scores can count.
                scoring = ("targets/unscored", "targets/fallback_sequences")
                same = [name for name in expected if name not in scoring]
                assert {n: found[n] for n in same} == {n: expected[n] for n in same}, packing
    for full, small in zip(runs["full"], runs["small"], strict=True):
        assert full["grad_norm"] > 0
        assert small["grad_norm"] == full["grad_norm"] / 64
        assert small["loss/weighted"] == full["loss/weighted"] / 64
        assert small["loss/plain"] == full["loss/plain"]


def test_lambda_1_is_uniform_and_small_weights_scale_the_norm_bit_for_bit_on_one_process(
    data: str, tmp_path: Path
) -> None:
    assert_bit_exact(bit_exact_runs(data, str(tmp_path), {}, ["chunk", "pack"], 3))


def test_lambda_1_is_uniform_and_small_weights_scale_the_norm_bit_for_bit_on_eight_ranks(
    data: str, tmp_path: Path
) -> None:
    arguments = (data, str(tmp_path), DEEP, ["chunk"], 2)
    assert_bit_exact(run_distributed(bit_exact_runs, 8, *arguments)[0])


@pytest.mark.long
def test_lambda_1_is_uniform_and_small_weights_scale_the_norm_bit_for_bit_in_packed_sequences(
    data: str, tmp_path: Path
) -> None:
    arguments = (data, str(tmp_path), DEEP, ["pack"], 3)
    assert_bit_exact(run_distributed(bit_exact_runs, 8, *arguments)[0])


# CP2xDP2 is CP2 with another order of the global batch on top.
CORNER_LAYOUTS: dict[str, dict[str, Any]] = {
    "CP4": {"context": 4},
    "CP2xDP2": {"context": 2},
    "TP2xCP2": {"tensor": 2, "context": 2},
}
CORNERS: list[tuple[str, str, str, str]] = [
    ("targets on the first rank only", "chunk", "uniform", "frozen"),
    ("targets on the first rank only", "chunk", "dense", "frozen"),
    ("targets on the first rank only", "pack", "sparse", "self"),
    ("a sequence without targets", "pack", "dense", "frozen"),
    ("a sequence without targets", "chunk", "longce", "self"),
    ("a micro batch without targets", "chunk", "dense", "self"),
    ("a batch without targets", "chunk", "sparse", "frozen"),
    ("one target in the batch", "chunk", "dense", "frozen"),
    ("all scores equal", "chunk", "dense", "frozen"),
    ("all scores equal", "pack", "sparse", "frozen"),
    ("all scores zero", "pack", "dense", "frozen"),
    ("all scores zero", "chunk", "sparse", "self"),
    ("as it is", "chunk", "sparse, one kept", "frozen"),
    ("as it is", "pack", "sparse, one kept", "self"),
]
SEQUENCES = 8


@pytest.fixture(scope="module")
def corners(data: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The one-process answers of CORNERS."""
    cases: list[CraftedCase] = [(craft, {}, *case) for craft, *case in CORNERS]
    return crafted_passes(data, str(tmp_path_factory.mktemp("corners")), cases)


def test_corners_are_finite_and_right_on_one_process(corners: list[dict[str, Any]]) -> None:
    for (craft, packing, scheme, _), answer in zip(CORNERS, corners, strict=True):
        metrics, where = answer["metrics"], (craft, packing, scheme)
        gradients = gather([answer["gradients"]])
        assert all(np.isfinite(gradient).all() for gradient in gradients.values()), where
        assert all(map(math.isfinite, metrics.values())), where
        largest = max(np.abs(gradient).max() for gradient in gradients.values())
        if craft == "a batch without targets":
            assert metrics["targets/all"] == metrics["loss/weighted"] == largest == 0
            continue
        assert largest > 0, where
        if craft == "targets on the first rank only":
            assert metrics["targets/all"] <= 8 * SEQUENCES
        if craft == "one target in the batch":
            assert metrics["targets/all"] == 1
            assert metrics["loss/weighted"] == pytest.approx(metrics["loss/plain"], rel=1e-12)
        if craft == "all scores zero":
            assert metrics["targets/fallback_sequences"] == SEQUENCES
        if craft == "all scores zero" or (craft, scheme) == ("all scores equal", "dense"):
            assert metrics["weights/max"] == pytest.approx(1, rel=1e-12)
            assert metrics["loss/weighted"] == pytest.approx(metrics["loss/plain"], rel=1e-12)
        if (craft, scheme) == ("all scores equal", "sparse"):
            # Every sequence keeps a fifth, rounded down.
            assert 0.8 <= metrics["weights/zero_share"] < 0.82
        if scheme == "sparse, one kept":
            kept = (1 - metrics["weights/zero_share"]) * metrics["targets/all"]
            assert kept == pytest.approx(SEQUENCES)
            assert metrics["weights/mean"] == pytest.approx(1, rel=1e-12)


def assert_same_corners(
    data: str,
    folder: Path,
    expected: list[dict[str, Any]],
    chosen: list[tuple[dict[str, Any], int]],
) -> None:
    """chosen: layouts of four ranks, each with the number of a corner."""
    cases: list[CraftedCase] = [
        (CORNERS[number][0], layout, *CORNERS[number][1:]) for layout, number in chosen
    ]
    ranks = run_distributed(crafted_passes, 4, data, str(folder), cases)
    for index, ((_, number), case) in enumerate(zip(chosen, cases, strict=True)):
        metrics, right = ranks[0][index]["metrics"], expected[number]["metrics"]
        assert metrics.keys() == right.keys(), case
        for name, value in right.items():
            assert metrics[name] == pytest.approx(value, rel=1e-10, abs=1e-12), (case, name)
        found = gather([rank[index]["gradients"] for rank in ranks])
        for name, gradient in gather([expected[number]["gradients"]]).items():
            # Where one token sees only itself, queries have no gradient but rounding.
            if np.abs(gradient).max() < 1e-15:
                assert np.abs(found[name]).max() < 1e-15, (case, name)
            else:
                assert relative_error(found[name], gradient) < 1e-10, (case, name)


def test_corners_are_the_same_on_every_layout(
    data: str, corners: list[dict[str, Any]], tmp_path: Path
) -> None:
    cp4, cp2, tp2 = CORNER_LAYOUTS.values()
    numbers = range(len(CORNERS))
    chosen = [(cp4, number) for number in numbers]
    chosen += [(tp2 if number % 2 else cp2, number) for number in numbers[::3]]
    assert_same_corners(data, tmp_path, corners, chosen)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["CP2xDP2", "TP2xCP2"])
def test_all_corners_are_the_same_on_every_layout(
    data: str, corners: list[dict[str, Any]], tmp_path: Path, layout: str
) -> None:
    chosen = [(CORNER_LAYOUTS[layout], number) for number in range(len(CORNERS))]
    assert_same_corners(data, tmp_path, corners, chosen)
