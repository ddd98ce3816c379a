"""Large rectangles are merged of two calls of a kernel for squares and full blocks. Here torch's
kernel for the CPU, which has the same words, is in cuDNN's place; tests/gpu has cuDNN's own."""

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lctw_megatron.model import cudnn_attention
from lctw_megatron.model.cudnn_attention import Block
from tests.model.test_attention import (
    Case,
    all_ranks_in_turn,
    answer,
    cases,
    check,
    flash_kernel_replaced,
)

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Block]:
    repeat = q.shape[1] // k.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    out, log_sum_exp = flash(q, key, value, 0.0, causal, scale=scale)
    return out, Block(log_sum_exp[..., None], ())


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, block: Block, causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    repeat = q.shape[1] // k.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    log_sum_exp = block.log_sum_exp[..., 0]
    dq, *others = flash_backward(grad, q, key, value, out, log_sum_exp, 0.0, causal, scale=scale)
    return dq, *(x.unflatten(1, (-1, repeat)).sum(2) for x in others)


@given(case=cases(2), context=st.sampled_from([1, 2]), rows=st.sampled_from([1, 2, 3, 5]))
@settings(max_examples=50)
def test_large_rectangles_are_merged_of_two_blocks(case: Case, context: int, rows: int) -> None:
    """Beside smaller ones, which go on to the flash kernel."""
    calls: list[Any] = []

    def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
        calls.append(q.shape[0])
        return q.shape[0] >= rows

    with (
        flash_kernel_replaced(),
        mock.patch.object(cudnn_attention, "takes", takes),
        mock.patch.object(cudnn_attention, "forward", forward),
        mock.patch.object(cudnn_attention, "backward", backward),
    ):
        check(all_ranks_in_turn(case, context), answer(case), (case, context, rows))
    assert calls


@pytest.mark.parametrize(
    "rows, keys, large",
    [(3072, 3072, True), (3071, 3071, False), (2048, 16384, True), (1024, 16384, True),
     (1024, 8192, False), (512, 32768, False)],
)  # fmt: skip
def test_large_is_an_area_that_is_not_too_narrow(rows: int, keys: int, large: bool) -> None:
    assert cudnn_attention.is_large(rows, keys) == large
