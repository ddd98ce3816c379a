"""What the user's own function returns is checked before it weighs anything."""

import pytest
import torch
from torch import Tensor

from lctw_megatron.errors import InputError
from tests.weighting.test_schemes import LONG, SHORT, weigh


def minus_one(long_loss: Tensor, short_loss: Tensor, mask: Tensor) -> Tensor:
    return -torch.ones_like(long_loss)


def too_few(long_loss: Tensor, short_loss: Tensor, mask: Tensor) -> Tensor:
    return long_loss[:, 1:]


def fails(long_loss: Tensor, short_loss: Tensor, mask: Tensor) -> Tensor:
    raise KeyError("no such thing")


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
