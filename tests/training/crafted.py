"""Batches and scores with something awkward in them, made on purpose, under any layout.

Runs on the ranks of a layout: names travel to them, not functions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lctw_megatron.data import zigzag
from lctw_megatron.data.batch import IGNORE
from tests.training.layouts import SEQUENCE, make_run, one_pass, three_steps


@dataclass(frozen=True)
class Craft:
    """What is changed. Masks leave the beginning of a sequence live, as padding does."""

    dead: Callable[[int, int], bool] | None = None
    """(row of the global batch, position) -> whether the target there is masked."""
    losses: tuple[float, float] | None = None
    """The long and the short loss that the scheme sees at every target."""


# With CP 4 zigzag chunks are 8 positions long, with CP 2 they are 16; rank 0 holds the first.
CRAFTS = {
    "as it is": Craft(),
    "targets on the first rank only": Craft(dead=lambda row, position: position >= 8),
    "a sequence without targets": Craft(dead=lambda row, position: row == 3),
    "a micro batch without targets": Craft(dead=lambda row, position: row in (2, 3)),
    "a batch without targets": Craft(dead=lambda row, position: True),
    "one target in the batch": Craft(dead=lambda row, position: row > 0 or position > 0),
    "all scores equal": Craft(losses=(1.0, 2.0)),
    "all scores zero": Craft(losses=(1.0, 1.0)),
}

CraftedCase = tuple[str, dict[str, Any], str, str, str]
"""Name in CRAFTS, layout, packing, scheme, mode."""


def crafted_pass(prefix: str, folder: str, craft: str, *case: Any) -> dict[str, Any]:
    """``one_pass`` in float64 of a crafted batch."""

    def change(batches: list[dict[str, Tensor]]) -> None:
        dead = CRAFTS[craft].dead
        for number, batch in enumerate(batches) if dead else ():
            _mask(batch, number, dead)

    with _scheme_sees(CRAFTS[craft].losses):
        return one_pass(make_run(prefix, folder, *case), change=change)


def crafted_passes(prefix: str, folder: str, cases: list[CraftedCase]) -> list[dict[str, Any]]:
    return [crafted_pass(prefix, folder, *case) for case in cases]


def _mask(batch: dict[str, Tensor], number: int, dead: Callable[[int, int], bool]) -> None:
    """Take the targets away where ``dead`` says so; ``number``: which micro batch of this rank."""
    from megatron.core import parallel_state

    rows = batch["sequence_labels"].shape[0]
    data_rank = parallel_state.get_data_parallel_rank()
    first = (number * parallel_state.get_data_parallel_world_size() + data_rank) * rows
    where = [[dead(first + row, i) for i in range(SEQUENCE)] for row in range(rows)]
    labels = batch["sequence_labels"].masked_fill(torch.tensor(where), IGNORE)
    batch["sequence_labels"] = labels
    rank, size = (
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_world_size(),
    )
    batch["labels"] = zigzag.cut(labels, rank, size, dim=1)
    batch["loss_mask"] = (batch["labels"] != IGNORE).float()


@contextmanager
def _scheme_sees(losses: tuple[float, float] | None) -> Iterator[None]:
    from lctw_megatron.training import step

    if losses is None:
        yield
        return
    real = step.compute_weights_and_counts

    def compute(weighting: Any, long_loss: Tensor, short_loss: Tensor, *rest: Any) -> Any:
        long, short = (torch.full_like(long_loss, loss) for loss in losses)
        return real(weighting, long, short, *rest)

    with mock.patch.object(step, "compute_weights_and_counts", compute):
        yield


def scaled_steps(
    prefix: str, folder: str, cases: list[tuple[dict[str, Any], str, str, str]], factor: float
) -> list[dict[str, float]]:
    """Metrics of one step of every case, all weights multiplied by ``factor``."""
    from lctw_megatron.training import step

    real = step.compute_weights_and_counts

    def compute(*arguments: Any) -> Any:
        weights, counts = real(*arguments)
        return weights * factor, counts

    with mock.patch.object(step, "compute_weights_and_counts", compute):
        runs = [
            make_run(prefix, f"{folder}/{factor}/{number}", *case, training={"steps": 1})
            for number, case in enumerate(cases)
        ]
        return [three_steps(run)["metrics"][0] for run in runs]
