"""torch's AdamW in the distributed optimizer saves and loads at any time, and its steps count."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.training.layouts import make_data, make_run
from tests.training.runs import checkpoints


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("torch_adam"))


def states(trainer: Any) -> list[dict[str, torch.Tensor]]:
    """torch's state of every parameter that this rank's optimizers own."""
    return [
        state
        for part in trainer.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
    ]


def new_trainer(data: str, folder: str) -> Any:
    from lctw_megatron.training.loop import Trainer

    # One layer: the first of four ranks owns a part of the head and nothing else.
    run = make_run(data, folder, {}, "chunk", "uniform", "frozen", model={"num_layers": 1})
    return Trainer(run)


def save_before_the_first_step_and_go_on(data: str, folder: str) -> list[Any]:
    """Steps that the states count: saved at 0, resumed, one step on, resumed, one step on.

    And how many parameters with and without weight decay this rank owns.
    """
    counts, shares = [], []
    for step in range(3):
        trainer = new_trainer(data, folder)
        assert trainer.first_step == max(step - 1, 0)
        steps = [state["step"] for state in states(trainer)]
        counts.append({float(value) for value in steps})
        # Every parameter counts its own: one shared tensor would be counted up by each.
        assert len({value.data_ptr() for value in steps}) == len(steps)
        groups = [
            group
            for part in trainer.optimizer.chained_optimizers
            for group in part.optimizer.param_groups
        ]
        # What the machine that saved had chosen is not what this one does.
        assert (
            {group["foreach"] for group in groups} == {group["fused"] for group in groups} == {None}
        )
        if step == 0:
            for group in groups:
                group["fused"], group["foreach"] = True, False
            trainer.save(0)
            shares = [len(group["params"]) for group in groups]
        else:
            trainer.stepper.step(step - 1, list(trainer.loader.step(step - 1)))
            counts.append({float(state["step"]) for state in states(trainer)})
            trainer.save(step)
        trainer.close()
    return [counts, shares]


def test_steps_count_through_saving_and_loading(data: str, tmp_path: Path) -> None:
    counts, _ = save_before_the_first_step_and_go_on(data, str(tmp_path))
    assert counts == [{0.0}, {0.0}, {1.0}, {1.0}, {2.0}]
    assert checkpoints(tmp_path) == [1, 2]


def test_a_rank_without_parameters_in_a_group_saves_and_loads_too(
    data: str, tmp_path: Path
) -> None:
    ranks = run_distributed(save_before_the_first_step_and_go_on, 4, data, str(tmp_path))
    assert any(0 in shares or len(shares) < 2 for _, shares in ranks), "no rank owns too little"
    for counts, _ in ranks:
        assert counts == [{0.0}, {0.0}, {1.0}, {1.0}, {2.0}]
