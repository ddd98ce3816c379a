"""Half precision runs flash kernels for all rectangles, and gives what float64 gives."""

import pytest
import torch

from tests.model.test_attention import Case, all_ranks_in_turn, reference


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_half_precision_on_a_gpu_runs_flash_kernels(context: int, packed: bool) -> None:
    boundaries = [[0, 100, 130, 384], [0, 250, 384]] if packed else None
    case = Case(384, boundaries, 2, 4, 2, 64, seed=4)
    with torch.profiler.profile() as profile:
        found = all_ranks_in_turn(case, context, torch.bfloat16, "cuda")
    kernels = {event.key for event in profile.key_averages()}
    assert any("flash" in kernel for kernel in kernels), kernels
    assert not any("efficient" in kernel or "_math" in kernel for kernel in kernels), kernels
    q, k, v, grad = (x.double() for x in case.tensors(torch.bfloat16))
    out = reference(q, k, v, case.rows)
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    for one, other in zip(found, (out, *gradients), strict=True):
        # bfloat16 keeps 8 bits of numbers of order 1, and gradients add up hundreds of them.
        torch.testing.assert_close(one.cpu().double(), other, rtol=0.02, atol=0.05)
