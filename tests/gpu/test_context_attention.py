"""Large chunks under context parallelism: cuDNN's kernels beside NCCL's, against float64."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lctw_megatron.data import zigzag
from lctw_megatron.model import context_attention, cudnn_attention
from lctw_megatron.model.attention import attend
from tests.gpu.runs import Case as Training
from tests.gpu.runs import on_gpus, trainings
from tests.model.test_attention import Case, reference

CASES = [
    Case(1024, None, 1, 8, 2, 128, seed=1),
    Case(1024, None, 2, 4, 4, 64, seed=2),
    Case(2048, None, 1, 6, 3, 64, seed=3),
]


def attend_on_ranks(cases: list[Case]) -> list[list[Tensor]]:
    """This rank's parts of output and gradients of every case, twice over: the second round's
    kernels run while the first's memory is used again."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(size)))
    torch.cuda.set_device(rank)
    results = []
    with mock.patch.object(cudnn_attention, "LARGE_ROWS", 64):
        for case in cases * 2:
            parts = [zigzag.cut(x, rank, size, dim=0) for x in case.tensors(torch.bfloat16)]
            q, k, v, grad = (x.detach().cuda().requires_grad_() for x in parts)
            assert context_attention.takes(q, k, v, size)
            out = attend(q, k, v, None, group)
            assert out.is_contiguous() or case.batch > 1  # as training/estimate.py counts it
            gradients = torch.autograd.grad(out, (q, k, v), grad)
            results.append([x.detach().cpu() for x in (out, *gradients)])
    return results


@pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.gpus(n)) for n in (2, 4)])
def test_chunks_equal_the_reference(ranks: int) -> None:
    found = on_gpus(attend_on_ranks, ranks, CASES)
    for number, case in enumerate(CASES * 2):
        q, k, v, grad = (x.double() for x in case.tensors(torch.bfloat16))
        out = reference(q, k, v, case.rows)
        expected = (out, *torch.autograd.grad(out, (q, k, v), grad))
        parts = zip(*(rank[number] for rank in found), strict=True)
        for same, other in zip(parts, expected, strict=True):
            one = zigzag.join(list(same), dim=0)
            # bfloat16 keeps 8 bits of numbers of order 1, and gradients add up hundreds of them.
            torch.testing.assert_close(one.double(), other, rtol=0.02, atol=0.05)


def trainings_in_large_chunks(prefix: str, folder: str, cases: list[Training]) -> list[Any]:
    """And how often the chunks went this way."""
    attend = mock.Mock(side_effect=context_attention.attend)
    with (
        mock.patch.object(cudnn_attention, "LARGE_ROWS", 64),
        mock.patch.object(context_attention, "attend", attend),
    ):
        return [trainings(prefix, folder, cases), attend.call_count]


@pytest.mark.gpus(2)
@pytest.mark.parametrize("weighting", ["uniform", "longce self"])
@pytest.mark.usefixtures("nothing_is_compiled")
def test_two_ranks_train_as_one_gpu(weighting: str, prefix: str, tmp_path: Path) -> None:
    """As tests/gpu/test_layouts.py, whose chunks are too short for it."""
    answers = {}
    for ranks in (1, 2):
        case = ("ours bf16", {"context": ranks}, "chunk", weighting)
        found = on_gpus(
            trainings_in_large_chunks, ranks, prefix, str(tmp_path / f"{ranks}"), [case]
        )
        (answers[ranks],), calls = found[0]
        assert (calls > 0) == (ranks > 1)
    for one, other in zip(*(answers[ranks]["metrics"] for ranks in (1, 2)), strict=True):
        assert other["loss/weighted"] == pytest.approx(one["loss/weighted"], rel=2e-3)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-2)
