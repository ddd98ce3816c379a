"""HybridModel is GPTModel by another name: the loss of every token, every gradient, every file.

The tables of test_layouts.py, test_dropout.py and tests/conversion/test_layouts.py run on both.
"""

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from lctw_megatron.model.checkpoint import check_files, find_checkpoint
from tests.distributed import run_distributed
from tests.training.layouts import (
    make_data,
    make_run,
    needs_hybrid,
    one_pass,
    relative_error,
)
from tests.training.runs import checkpoints, logged, sigterm_after
from tests.training.test_layouts import LAYOUTS

pytestmark = needs_hybrid


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("hybrid"))


def token_losses(prefix: str, folder: str, layouts: list[dict[str, Any]]) -> list[list[Any]]:
    """Of both models under every layout: the losses of every forward of this rank (windows of
    self-scoring too), and its gradients by name and place."""
    from lctw_megatron.model.gpt import PerTokenLossMixin

    real, answers = PerTokenLossMixin.compute_language_model_loss, []
    for layout, kind in itertools.product(layouts, ("gpt", "hybrid")):
        losses: list[np.ndarray] = []

        def compute(self: Any, *inputs: Any, losses: list[np.ndarray] = losses) -> Any:
            found = real(self, *inputs)
            losses.append(found.detach().numpy().copy())
            return found

        run = make_run(prefix, folder, layout, "pack", "dense", "self", megatron={"model": kind})
        with mock.patch.object(PerTokenLossMixin, "compute_language_model_loss", compute):
            parts = one_pass(run)["gradients"]
        answers.append([losses, {(name, place): array for name, _, place, array in parts}])
    return answers


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_token_and_every_gradient_are_those_of_gptmodel_on_every_layout(
    data: str, tmp_path: Path, ranks: int
) -> None:
    table = LAYOUTS | {"alone": (1, {}), "alone, MLP recomputed": (1, {"recompute": "mlp"})}
    names = [name for name, (size, _) in table.items() if size == ranks]
    layouts = [table[name][1] for name in names]
    everyone = run_distributed(token_losses, ranks, data, str(tmp_path), layouts)
    for number, name in enumerate(names):
        seen = 0
        for answers in everyone:
            (gpt, right), (hybrid, found) = answers[2 * number : 2 * number + 2]
            assert len(gpt) == len(hybrid) and right.keys() == found.keys(), name
            for one, other in zip(gpt, hybrid, strict=True):
                np.testing.assert_allclose(other, one, rtol=1e-10, atol=1e-12, err_msg=name)
                seen += one.size
            for key, gradient in right.items():
                assert relative_error(found[key], gradient) < 1e-10, (name, key)
        assert seen >= 8 * 64, name  # all tokens of the batch, on the last stages together


# Checkpoints.

STEPS = 5
TRAINING = dict(steps=STEPS, save_interval=2, schedule="cosine", warmup_steps=2, clip_grad=1.0)
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def train(data: str, folder: Path, kind: str, layout: dict[str, Any], model: dict[str, Any]) -> int:
    from lctw_megatron.training.loop import train

    return train(
        make_run(
            data,
            str(folder),
            layout,
            "pack",
            "dense",
            "self",
            training=TRAINING,
            model=model,
            megatron={"model": kind},
        )  # fmt: skip
    )


def stored(folder: Path) -> dict[str, Any]:
    """Name -> sizes and dtype of the tensors in a run's newest checkpoint, None for the rest."""
    entries = check_files(find_checkpoint(folder)).state_dict_metadata
    return {
        name: (tuple(entry.size), entry.properties.dtype) if hasattr(entry, "chunks") else None
        for name, entry in entries.items()
    }


def test_a_checkpoint_of_either_goes_on_as_the_other_bit_for_bit(data: str, tmp_path: Path) -> None:
    assert train(data, tmp_path / "whole", "gpt", {}, DROPOUT) == 0
    expected = logged(tmp_path / "whole")
    names = {}
    for first, second in (("gpt", "hybrid"), ("hybrid", "gpt")):
        folder = tmp_path / first
        with sigterm_after(3):
            assert train(data, folder, first, {}, DROPOUT) == 75
        assert checkpoints(folder) == [2, 3]
        names[first] = stored(folder)
        assert train(data, folder, second, {}, DROPOUT) == 0
        assert logged(folder) == expected
    assert names["gpt"] == names["hybrid"]


SPLIT = {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2}


def stopped_on_four_ranks(data: str, folder: str) -> None:
    for kind in ("gpt", "hybrid"):
        with sigterm_after(3):
            assert (
                train(data, Path(folder) / kind, kind, SPLIT, {"tie_word_embeddings": True}) == 75
            )


def test_a_checkpoint_of_either_and_of_one_layout_goes_on_as_the_other_under_another(
    data: str, tmp_path: Path
) -> None:
    run_distributed(stopped_on_four_ranks, 4, data, str(tmp_path))
    tied = {"tie_word_embeddings": True}
    assert stored(tmp_path / "gpt") == stored(tmp_path / "hybrid")
    for first, second in (("gpt", "hybrid"), ("hybrid", "gpt")):
        assert train(data, tmp_path / first, second, {}, tied) == 0
    assert train(data, tmp_path / "whole", "gpt", {}, tied) == 0
    for name in ("gpt", "hybrid"):
        for found, right in zip(logged(tmp_path / name), logged(tmp_path / "whole"), strict=True):
            for key in ("loss/weighted", "loss/plain", "grad_norm", "learning_rate"):
                assert found[key] == pytest.approx(right[key], rel=1e-5), (name, key)
