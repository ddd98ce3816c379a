"""What the user's own function returns is checked before it weighs anything."""

import pytest
import torch
from torch import Tensor

from lctw_megatron.errors import InputError
from lctw_megatron.weighting.custom_function import call
from tests.weighting.test_schemes import LONG, SHORT, weigh


def minus_one(long_loss: Tensor, short_loss: Tensor, mask: Tensor) -> Tensor:
    return -torch.ones_like(long_loss)


def too_few(long_loss: Tensor, short_loss: Tensor, mask: Tensor) -> Tensor:
    return long_loss[:, 1:]


def fails(long_loss: Tensor, short_loss: Tensor, mask: Tensor) -> Tensor:
    raise KeyError("no such thing")


def beyond_float32(long_loss: Tensor, short_loss: Tensor, mask: Tensor) -> Tensor:
    return torch.full_like(long_loss, 1e39, dtype=torch.float64)


@pytest.mark.parametrize(
    "name, message",
    [
        ("minus_one", "negative, infinite or NaN"),
        ("too_few", r"returned \(1, 4\), expected"),
        ("fails", "failed: KeyError: 'no such thing'"),
    ],
)
def test_custom_weights_are_checked(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        weigh({"scheme": "custom", "function": f"{__name__}:{name}"}, LONG, SHORT)


def test_weights_are_checked_as_the_losses_hold_them() -> None:
    long, live = torch.tensor([LONG]), torch.ones(1, 5) > 0
    call(f"{__name__}:beyond_float32", long.double(), long.double(), live)
    with pytest.raises(InputError, match="negative, infinite or NaN"):
        call(f"{__name__}:beyond_float32", long, long, live)


def in_place(long_loss: Tensor, short_loss: Tensor, mask: Tensor) -> Tensor:
    """max(short - long, 0), as one writes it to save memory."""
    mask &= short_loss > long_loss
    return short_loss.sub_(long_loss).masked_fill_(~mask, 0.0)


def test_a_function_may_work_in_place() -> None:
    """Its arguments are no longer the losses that are trained on, nor the mask that counts."""
    long, short, live = torch.tensor([LONG]), torch.tensor([SHORT]), torch.ones(1, 5) > 0
    weights = call(f"{__name__}:in_place", long, short, live)
    assert weights.tolist() == [[1.0, 0.0, 0.0, 3.0, 0.0]]
    assert long.tolist() == [LONG] and short.tolist() == [SHORT] and live.all()
