"""Half precision runs flash kernels for all rectangles, and gives what float64 gives."""

import pytest
import torch

from lctw_megatron.model import cudnn_attention
from tests.model.test_attention import Case, all_ranks_in_turn, reference

BOUNDARIES = [[0, 100, 130, 384], [0, 250, 384]]


def kernels_of_right_answers(case: Case, context: int) -> set[str]:
    """The kernels that ran, after their answers have been compared with float64."""
    with torch.profiler.profile() as profile:
        found = all_ranks_in_turn(case, context, torch.bfloat16, "cuda")
    q, k, v, grad = (x.double() for x in case.tensors(torch.bfloat16))
    out = reference(q, k, v, case.rows)
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    for one, other in zip(found, (out, *gradients), strict=True):
        # bfloat16 keeps 8 bits of numbers of order 1, and gradients add up hundreds of them.
        torch.testing.assert_close(one.cpu().double(), other, rtol=0.02, atol=0.05)
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_half_precision_on_a_gpu_runs_flash_kernels(context: int, packed: bool) -> None:
    case = Case(384, BOUNDARIES if packed else None, 2, 4, 2, 64, seed=4)
    kernels = kernels_of_right_answers(case, context)
    assert any("flash" in kernel for kernel in kernels), kernels
    assert not any("efficient" in kernel or "_math" in kernel for kernel in kernels), kernels


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="torch prefers cuDNN's attention from Hopper on",
)
@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_large_rectangles_run_on_cudnn(
    context: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cudnn_attention, "LARGE_ROWS", 64)
    case = Case(384, BOUNDARIES if packed else None, 2, 4, 2, 64, seed=4)
    kernels = kernels_of_right_answers(case, context)
    assert any("cudnn" in kernel for kernel in kernels), kernels
    assert any("flash_fwd" in kernel for kernel in kernels) == packed, kernels  # of what is short
