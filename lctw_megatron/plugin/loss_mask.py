"""What `loss_mask` carries: beside which labels are live, what their weights are made from.

Megatron-LM's and Megatron-Bridge's get_batch hand on the keys they know and drop all others, but
both broadcast `loss_mask` over tensor ranks and cut it over context ranks like the labels. So what
a scheme needs travels in it, a number a label: ``dataset.py`` puts it in, ``forward_step.py`` takes
it out again.

    DEAD               the label does not count
    0 and above, NaN   its short loss; NaN: not scored
    below DEAD         DEAD - 1 - the tokens of its own document's piece that it follows
"""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lctw_megatron.errors import InputError
from lctw_megatron.weighting.context_parallel import whole_sequences
from lctw_megatron.weighting.schemes import Position, Scheme

DEAD = -1.0

Carries = Literal["only 0 and 1", "short losses", "lengths of contexts"]
MADE_BY: dict[Carries, str] = {
    "only 0 and 1": "GPTDataset",
    "short losses": "ShortLossGPTDataset",
    "lengths of contexts": "ContextGPTDataset",
}
"""The dataset whose loss_mask holds what."""


def carries(scheme: Scheme) -> Carries:
    """What the loss_mask has to hold for ``scheme``."""
    if isinstance(scheme, Position):
        return "lengths of contexts"
    return "short losses" if scheme.needs_short_loss else "only 0 and 1"


def carry_contexts(context: Tensor) -> Tensor:
    """Lengths of contexts, at least 0, as loss_mask carries them; float32, exact up to 2^24."""
    return DEAD - 1 - context


class TakeOut:
    """Which labels are live, bool, and their short losses (NaN elsewhere), out of a loss_mask.

    InputError if the first mask that tells holds something else than ``carries``: the dataset is
    not the one that the scheme needs. Looked for once, since a GPU's host waits for the answer.
    """

    def __init__(self, carries: Carries) -> None:
        self.carries = carries
        self.looked = False

    def __call__(self, carried: Tensor) -> tuple[Tensor, Tensor]:
        plain = self.carries == "only 0 and 1"
        if not self.looked:
            found = _held(carried)
            # Of nothing but dead labels it cannot be told which of both it is.
            if found != self.carries and (plain or found is not None):
                raise InputError(
                    f"loss_mask holds {found or 'short losses'}, but weighting.scheme needs "
                    f"{self.carries}; build the datasets of {MADE_BY[self.carries]}"
                )
            self.looked = found is not None
        live = carried != (0 if plain else DEAD)
        return live, carried.where(live & (self.carries == "short losses"), torch.nan)


def _held(carried: Tensor) -> Carries | None:
    if bool(((carried == 0) | (carried == 1)).all()):
        return "only 0 and 1"
    if bool((carried == DEAD).all()):
        return None
    return "lengths of contexts" if bool((carried < DEAD).any()) else "short losses"


def boundaries(carried: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """int64 [sequences, S + 1], rising: where the pieces of live labels begin, S where there are no
    more, from a loss_mask of contexts: this rank's part of ``group``, a collective call.

    A label that is its document's first token follows none of it: it is a piece of its own, in
    which its context is as short as any.
    """
    (whole,) = whole_sequences([carried], group)
    rows, length = whole.shape
    position = torch.arange(length, device=whole.device).expand(rows, length)
    context = (DEAD - 1 - whole).clamp(min=1).long()
    begins = (position + 1 - context).where(whole < DEAD, length)
    return torch.cat([begins.new_zeros(rows, 1), begins.sort(1).values], 1)
