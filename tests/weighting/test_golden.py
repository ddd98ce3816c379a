"""Weights equal those that the paper's published functions gave (relative 1e-5)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lctw_megatron.weighting import compute_weights, parse_weighting

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "weights.json").read_text())


@pytest.fixture(scope="module")
def arrays() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "weights.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def setting(case: dict[str, Any]) -> dict[str, Any]:
    return {key: case[key] for key in case if key not in ("index", "weighted_loss")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, setting(case).values())))
def test_weights_and_loss_equal_the_papers(
    case: dict[str, Any], arrays: dict[str, torch.Tensor]
) -> None:
    long_loss, short_loss = arrays["long_loss"], arrays["short_loss"]
    weights = compute_weights(parse_weighting(setting(case)), long_loss, short_loss)
    assert weights.dtype == torch.float32
    golden = arrays[f"weights_{case['index']}"]
    torch.testing.assert_close(weights, golden, rtol=1e-5, atol=0)
    assert float((weights * long_loss).mean()) == pytest.approx(case["weighted_loss"], rel=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, setting(case).values())))
def test_float64_losses_give_the_formula_exactly(
    case: dict[str, Any], arrays: dict[str, torch.Tensor]
) -> None:
    # The table of the design, once more, row by row in plain numpy: 1e-12 relative.
    long_loss, short_loss = arrays["long_loss"].double(), arrays["short_loss"].double()
    weights = compute_weights(parse_weighting(setting(case)), long_loss, short_loss)
    assert weights.dtype == torch.float64
    for row in range(len(long_loss)):
        d = (short_loss[row] - long_loss[row]).numpy()
        n, scheme, s = len(d), case["scheme"], case.get("shift", 1.0)
        signed = {"ppmi": d - np.log(s), "npmi": -d - np.log(s)}.get(scheme, np.abs(d))
        scores = np.maximum(0, signed)
        if scheme == "longce":
            expected = np.minimum(np.exp(d), case["max_weight"])
        elif scheme == "dense":
            lam = case["interpolation"]
            expected = lam + (1 - lam) * n * scores / scores.sum()
        else:
            k = round(case["keep_fraction"] * n)
            expected = np.where(scores >= np.sort(scores)[-k], n / k, 0.0)
        np.testing.assert_allclose(weights[row].numpy(), expected, rtol=1e-12)
