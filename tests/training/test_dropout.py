"""Ranks that work on other layers or tokens draw other masks, those that hold the same draw alike;
and a resumed run draws what it would have drawn."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from lctw_megatron.config.schema import LayoutConfig
from lctw_megatron.training.loop import Trainer
from tests.distributed import run_distributed
from tests.training.layouts import KINDS, make_data, make_run

LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 2, "pipeline": 2},
    {"tensor": 2, "context": 2},
    {"tensor": 2},
    {"pipeline": 2, "context": 2},
    {"context": 2},
    {"pipeline": 2},
]
"""On four ranks; what is left is data parallelism."""


def draws(layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """This rank's place, and what it draws for what is replicated and what is split over TP."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from lctw_megatron.platform.world import initialize
    from lctw_megatron.training.dropout_seed import seed_dropout

    answers = []
    for layout in layouts:
        world = initialize(LayoutConfig.model_validate(layout), 7)
        answer: dict[str, Any] = {
            "tensor": world.tensor_rank,
            "place": (world.pipeline_rank, world.context_rank, world.data_rank),
        }
        for seed, step in [(7, 3), (7, 4), (8, 3)]:
            seed_dropout(seed, step)
            replicated = torch.rand(4).tolist()
            with get_cuda_rng_tracker().fork():
                answer[f"{seed}/{step}"] = replicated, torch.rand(4).tolist()
        answers.append(answer)
    return answers


def test_masks_differ_where_the_work_differs() -> None:
    ranks = run_distributed(draws, 4, LAYOUTS)
    for number, layout in enumerate(LAYOUTS):
        for one, other in combinations([rank[number] for rank in ranks], 2):
            replicated, split = (a == b for a, b in zip(one["7/3"], other["7/3"], strict=True))
            same_place = one["place"] == other["place"]
            assert replicated == same_place, (layout, one, other)
            assert not split, (layout, one, other)
        for rank in ranks:
            drawn = [rank[number][key][i] for key in ("7/3", "7/4", "8/3") for i in (0, 1)]
            assert len({tuple(values) for values in drawn}) == 6


def test_the_states_that_a_layer_was_built_with_follow_the_step() -> None:
    """TransformerEngine's attention binds the tracker's fork once."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from lctw_megatron.platform.world import initialize, shut_down
    from lctw_megatron.training.dropout_seed import seed_dropout

    initialize(LayoutConfig(), 7)
    bound, drawn = get_cuda_rng_tracker().fork, []
    for step in (1, 2, 1):
        seed_dropout(7, step)
        with bound():
            drawn.append(torch.rand(4).tolist())
    shut_down()
    assert drawn[0] == drawn[2] != drawn[1]


DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
RECOMPUTED: list[dict[str, Any]] = [
    {"tensor": 2},
    {"tensor": 2, "recompute": "full"},
    {"tensor": 2, "recompute": "selective"},
    {"tensor": 2, "sequence": True},
    {"tensor": 2, "sequence": True, "recompute": "full"},
    {"tensor": 2, "sequence": True, "recompute": "selective"},
]


def norms(data: str, folder: str, layouts: list[dict[str, Any]], kind: str) -> list[float]:
    """The gradient norm of one step under each layout, with dropout."""
    answers = []
    for number, layout in enumerate(layouts):
        run = make_run(
            data, f"{folder}/{number}", layout, "pack", "uniform", "frozen", model=DROPOUT,
            megatron={"model": kind},
        )  # fmt: skip
        trainer = Trainer(run)
        try:
            answers.append(trainer.stepper.step(0, list(trainer.loader.step(0)))["grad_norm"])
        finally:
            trainer.close()
    return answers


def heads(size: int) -> list[list[list[float]]]:
    """What our core attention gives equal heads of this rank, without and with SP's fork around."""
    from types import SimpleNamespace

    from lctw_megatron.model.attention import SDPACoreAttention
    from lctw_megatron.platform.world import initialize
    from lctw_megatron.training.dropout_seed import seed_dropout

    initialize(LayoutConfig(tensor=size), 7)
    config = SimpleNamespace(
        attention_dropout=0.5, context_parallel_size=1, sequence_parallel=False
    )
    attention = SDPACoreAttention(config, 1, None, "self", pg_collection=SimpleNamespace(cp=None))
    x = torch.arange(64.0).view(8, 1, 2, 4).sin()
    answers = []
    for step in (1, 1, 2):
        seed_dropout(7, step)
        answers.append(attention(x, x, x, None).tolist())
    return answers


def test_tensor_ranks_drop_other_probabilities_of_their_own_heads() -> None:
    one, other = run_distributed(heads, 2, 2)
    assert one[0] == one[1] != one[2]
    assert one[0] != other[0]


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_drop_what_the_forward_dropped(tmp_path: Path, kind: str) -> None:
    found = run_distributed(norms, 2, make_data(tmp_path), str(tmp_path), RECOMPUTED, kind)[0]
    plain, full, selective, sequence, sequence_full, sequence_selective = found
    assert full == selective == plain
    assert sequence_full == sequence_selective == sequence
    assert plain != sequence  # masks of their own, so the above compares more than one number


def test_a_resumed_run_drops_what_the_whole_one_drops(tmp_path: Path) -> None:
    data = make_data(tmp_path)

    def losses(name: str, numbers: range, save: bool = False) -> list[float]:
        run = make_run(data, str(tmp_path / name), {}, "pack", "dense", "self", model=DROPOUT)
        trainer = Trainer(run)
        try:
            assert trainer.first_step == numbers.start
            steps = [trainer.stepper.step(n, list(trainer.loader.step(n))) for n in numbers]
            if save:
                trainer.save(numbers.stop)
            return [step["loss/weighted"] for step in steps]
        finally:
            trainer.close()

    whole = losses("whole", range(3))
    assert losses("parts", range(2), save=True) + losses("parts", range(2, 3)) == whole
    assert len(set(whole)) == 3
