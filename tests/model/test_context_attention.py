"""Large chunks of a context rank: what it can do alone, while the other ranks' keys are gathered,
and blocks of them. Here torch's kernel for the CPU is in cuDNN's place; tests/gpu has cuDNN's."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lctw_megatron.data import zigzag
from lctw_megatron.model import context_attention, cudnn_attention
from lctw_megatron.model.attention import attend
from lctw_megatron.model.cudnn_attention import merge_
from lctw_megatron.platform.gpu import compiled
from tests.distributed import run_distributed
from tests.model.test_attention import Case, answer, check
from tests.model.test_cudnn_attention import backward, forward

CASES = [
    Case(8 * length, None, batch, groups * repeat, groups, channels, seed=seed)
    for seed, (length, batch, groups, repeat, channels) in enumerate(
        [(1, 1, 1, 1, 1), (3, 1, 2, 2, 4), (2, 2, 1, 3, 8), (5, 3, 2, 1, 5)]
    )
]


def attend_on_ranks(cases: list[Case]) -> dict[tuple[int, int, int], list[Tensor]]:
    """(context size, first rank, number of the case) -> this rank's parts of output and
    gradients."""
    everyone = dist.new_group(list(range(4)))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results = {}
    with (
        mock.patch.object(context_attention, "takes", lambda *_: True),
        mock.patch.object(cudnn_attention, "forward", forward),
        mock.patch.object(cudnn_attention, "backward", backward),
    ):
        for context, group in ((4, everyone), (2, pairs[dist.get_rank() // 2])):
            first = dist.get_rank() - group.rank()
            for number, case in enumerate(cases):
                parts = [zigzag.cut(x, group.rank(), context, dim=0) for x in case.tensors()]
                q, k, v, grad = (x.detach().requires_grad_() for x in parts)
                out = attend(q, k, v, None, group)
                gradients = torch.autograd.grad(out, (q, k, v), grad)
                results[context, first, number] = [out.detach(), *gradients]
    return results


def test_gloo_ranks_equal_the_dense_mask_reference() -> None:
    ranks = run_distributed(attend_on_ranks, 4, CASES)
    for context, first in ((4, 0), (2, 0), (2, 2)):
        for number, case in enumerate(CASES):
            parts = [ranks[first + i][context, first, number] for i in range(context)]
            found = tuple(zigzag.join(list(same), dim=0) for same in zip(*parts, strict=True))
            check(found, answer(case), (case, context))


@pytest.mark.parametrize("one_kernel", [False, True])
def test_what_is_merged_is_the_softmax_over_all_keys(one_kernel: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 30 * torch.randn(2, 3, 8, 12, generator=generator, dtype=torch.float64)
    values = torch.randn(2, 3, 12, 4, generator=generator, dtype=torch.float64)
    out, other = (
        scores[..., part].softmax(-1) @ values[..., part, :]
        for part in (slice(5), slice(5, None))
    )  # fmt: skip
    lse, other_lse = (x.logsumexp(-1, keepdim=True) for x in scores.split([5, 7], -1))
    out, lse = (torch.stack([x, x])[1] for x in (out, lse))  # parts of something larger
    if one_kernel:
        compiled(cudnn_attention._merge_)(out, lse, other, other_lse)
    else:
        merge_(out, lse, other, other_lse)
    torch.testing.assert_close(out, scores.softmax(-1) @ values, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1, keepdim=True), rtol=0, atol=1e-12)
