"""Every layout gives the losses and the gradients of one process, with GPTModel's layers in it and
with HybridModel's.

float64: one forward and backward, losses and every parameter's gradient to 1e-10 of the largest
entry. float32: three steps of the real trainer, losses and gradient norms to 1e-5.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.training.layouts import (
    KINDS,
    Case,
    gather,
    make_data,
    make_run,
    one_pass,
    passes,
    relative_error,
    three_steps,
    trainings,
    variants,
)

# name: ranks, layout. What the layout leaves of the ranks is data parallelism.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP2+VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "DP2": (2, {}),
    "CP2 recompute": (2, {"context": 2, "recompute": "full"}),
    "CP4": (4, {"context": 4}),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}),
    "TP2xCP2": (4, {"tensor": 2, "context": 2}),
    "TP2+SPxCP2": (4, {"tensor": 2, "sequence": True, "context": 2}),
    "PP2xCP2": (4, {"pipeline": 2, "context": 2}),
    "PP2+VPP2xCP2": (4, {"pipeline": 2, "virtual_pipeline": 2, "context": 2}),
    "CP2xDP2": (4, {"context": 2}),
    "TP2xPP2xCP2": (8, {"tensor": 2, "pipeline": 2, "context": 2}),
    "TP2xCP2xDP2": (8, {"tensor": 2, "context": 2}),
}
PACKINGS = ("chunk", "pack")
WEIGHTINGS = (
    ("uniform", "frozen"),
    *itertools.product(("dense", "sparse", "longce"), ("frozen", "self")),
)
CROSS = [(packing, *weighting) for packing, weighting in itertools.product(PACKINGS, WEIGHTINGS)]

# Pairwise coverage: over the layouts, every packing meets every weighting, and every layout meets
# both packings, both modes and uniform or sparse weights. Numbers of a weighting with chunk, pack:
_PAIRS = [(0, 2), (1, 4), (2, 0), (3, 6), (4, 1), (5, 4), (6, 3), (4, 5)]
PAIRWISE = {
    name: [CROSS[chunk], CROSS[7 + pack]]
    for name, (chunk, pack) in zip(LAYOUTS, _PAIRS * 2, strict=True)
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def alone(data: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The one-process answer of a case, computed once."""
    answers: dict[Any, Any] = {}
    folder = tmp_path_factory.mktemp("alone")

    def answer(kind: Any, *case: str) -> Any:
        if (kind, case) not in answers:
            run = make_run(data, str(folder / f"{len(answers)}"), {}, *case)
            answers[kind, case] = kind(run)
        return answers[kind, case]

    return answer


def _check_passes(
    data: str, folder: Path, alone: Any, ranks: int, cases: list[Case], kind: str
) -> None:
    answers = run_distributed(passes, ranks, data, str(folder), cases, kind)
    for number, (layout, *case) in enumerate(cases):
        expected = alone(one_pass, *case)
        metrics = answers[0][number]["metrics"]
        assert metrics.keys() == expected["metrics"].keys()
        for name, value in expected["metrics"].items():
            assert metrics[name] == pytest.approx(value, rel=1e-10, abs=1e-12), (layout, case, name)
        found = gather([answer[number]["gradients"] for answer in answers])
        for name, gradient in gather([expected["gradients"]]).items():
            assert relative_error(found[name], gradient) < 1e-10, (layout, case, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_losses_and_all_gradients_equal_one_process_pairwise(
    data: str, alone: Any, tmp_path: Path, ranks: int, kind: str
) -> None:
    cases: list[Case] = [
        (layout, *case)
        for name, (size, layout) in LAYOUTS.items()
        if size == ranks
        for case in PAIRWISE[name]
    ]
    _check_passes(data, tmp_path, alone, ranks, cases, kind)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_all_gradients_equal_one_process_full_cross(
    data: str, alone: Any, tmp_path: Path, name: str, kind: str
) -> None:
    ranks, layout = LAYOUTS[name]
    _check_passes(data, tmp_path, alone, ranks, [(layout, *case) for case in CROSS], kind)


def test_the_pairwise_table_covers_what_it_says() -> None:
    used = [case for cases in PAIRWISE.values() for case in cases]
    assert {(packing, scheme, mode) for packing, scheme, mode in used} == set(CROSS)
    for cases in PAIRWISE.values():
        assert {packing for packing, _, _ in cases} == set(PACKINGS)
        assert {mode for _, _, mode in cases} == {"frozen", "self"}
        assert {scheme for _, scheme, _ in cases} & {"uniform", "sparse"}


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_PHI = {"architecture": "phi", "qk_norm": False, "partial_rotary_factor": 0.5}
# The windows of self-scoring are 16 tokens, sequences 64: dynamic turns the two by other angles.
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 12},
    "yarn": _YARN | {"mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False},
    "llama3": {"factor": 4.0, "original_max_position_embeddings": 16},
}
MODELS: dict[str, dict[str, Any]] = {name: {"rope_scaling": rope} for name, rope in ROPES.items()}
MODELS |= {"phi": _PHI, "phi, tied": _PHI | {"tie_word_embeddings": True}}
MODEL_LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "linear": [{"context": 2}],
    "dynamic": [{"tensor": 2, "sequence": True}, {"context": 2}, {"pipeline": 2}],
    "yarn": [{"tensor": 2}, {"context": 2}, {"pipeline": 2}],
    "llama3": [{"context": 2}],
    "phi": [
        {"tensor": 2},
        {"tensor": 2, "sequence": True, "recompute": "mlp"},
        {"context": 2, "recompute": "full"},
        {"pipeline": 2, "virtual_pipeline": 2},
    ],
    "phi, tied": [{"tensor": 2, "sequence": True}, {"pipeline": 2}],
}
"""On two ranks."""


def _check_variants(
    data: str, folder: Path, ranks: int, layouts: dict[str, Any], kind: str = "gpt"
) -> None:
    answers = run_distributed(
        variants, ranks, data, str(folder), layouts, MODELS, kind, timeout=900
    )
    losses = set()
    for model, own in layouts.items():
        run = make_run(data, str(folder), {}, "pack", "dense", "self", model=MODELS[model])
        expected = one_pass(run)
        losses.add(expected["metrics"]["loss/weighted"])
        whole = gather([expected["gradients"]])
        assert all(gradient.any() for gradient in whole.values())
        for number, layout in enumerate(own):
            metrics = answers[0][model][number]["metrics"]
            for name, value in expected["metrics"].items():
                assert metrics[name] == pytest.approx(value, rel=1e-10, abs=1e-12), (model, layout)
            found = gather([answer[model][number]["gradients"] for answer in answers])
            assert found.keys() == whole.keys()
            for name, gradient in whole.items():
                assert relative_error(found[name], gradient) < 1e-10, (model, layout, name)
    assert len(losses) == len(layouts)  # or they would prove nothing


@pytest.mark.parametrize("kind", KINDS)
def test_every_stretched_rope_and_every_kind_of_layer_equals_one_process(
    data: str, tmp_path: Path, kind: str
) -> None:
    known = {name: own for name, own in MODEL_LAYOUTS.items() if kind == "gpt" or name in ROPES}
    _check_variants(data, tmp_path, 2, known, kind)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_phi_equals_one_process_under_every_layout(data: str, tmp_path: Path, ranks: int) -> None:
    layouts = [layout for size, layout in LAYOUTS.values() if size == ranks]
    _check_variants(data, tmp_path, ranks, {"phi": layouts, "phi, tied": layouts})


THREE_STEPS = [("chunk", "uniform", "frozen"), ("pack", "sparse", "self")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (2, ["TP2", "PP2+VPP2", "CP2", "DP2"]),
        (4, ["TP2+SPxCP2", "CP2xDP2"]),
        (8, ["TP2xPP2xCP2"]),
    ],
)
def test_three_steps_of_the_trainer_equal_one_process(
    data: str, alone: Any, tmp_path: Path, ranks: int, names: list[str], kind: str
) -> None:
    cases: list[Case] = [(LAYOUTS[name][1], *case) for name in names for case in THREE_STEPS]
    answers = run_distributed(trainings, ranks, data, str(tmp_path), cases, kind)
    for number, (layout, *case) in enumerate(cases):
        expected = alone(three_steps, *case)
        for found, right in zip(answers[0][number]["metrics"], expected["metrics"], strict=True):
            for name in ("loss/weighted", "loss/plain", "grad_norm", "weights/n_eff"):
                assert found[name] == pytest.approx(right[name], rel=1e-5), (layout, case, name)
        validation = answers[0][number]["validation"]
        assert (
            validation["validation/targets/all"] == expected["validation"]["validation/targets/all"]
        )
        assert validation == pytest.approx(expected["validation"], rel=1e-5), (layout, case)
        weights = gather([answer[number]["weights"] for answer in answers])
        for name, weight in gather([expected["weights"]]).items():
            # Adam turns a gradient near 0 into a step of full size, whatever its sign.
            assert relative_error(weights[name], weight) < 1e-3, (layout, case, name)
