"""The objective's sum and its gradient."""

import torch

from lctw_megatron.weighting import compute_weights, parse_weighting
from lctw_megatron.weighting.weighted_loss import weighted_sum


def losses() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    long_loss, short_loss, mask = torch.rand(3, 4, 333, generator=generator).unbind()
    return (long_loss * 9).requires_grad_(), short_loss * 9, (mask < 0.7).float()


def test_the_sum_is_over_live_targets_and_the_number_an_int() -> None:
    long_loss = torch.tensor([[1.0, 2.0, torch.inf], [torch.nan, 3.0, 4.0]], requires_grad=True)
    weights = torch.tensor([[0.5, 2.0, 7.0], [7.0, 0.0, 1.0]])
    total, number = weighted_sum(long_loss, weights, torch.tensor([[1, 1, 0], [0, 1, 1]]))
    assert float(total.detach()) == 0.5 + 4 + 4
    assert number.dtype == torch.int32 and int(number) == 4
    total.backward()
    assert long_loss.grad is not None
    assert long_loss.grad.tolist() == [[0.5, 2, 0], [0, 0, 1]]


def test_lambda_one_is_the_uniform_loss_bit_for_bit() -> None:
    results = []
    for setting in ({"scheme": "uniform"}, {"scheme": "dense", "interpolation": 1.0}):
        long_loss, short_loss, mask = losses()
        weights = compute_weights(parse_weighting(setting), long_loss, short_loss, mask)
        total, _ = weighted_sum(long_loss, weights, mask)
        total.backward()
        results.append((total, long_loss.grad))
    (uniform, uniform_gradient), (dense, dense_gradient) = results
    assert torch.equal(uniform, dense)
    assert torch.equal(uniform_gradient, dense_gradient)


def test_weights_a_64th_give_a_gradient_a_64th_exactly() -> None:
    long_loss, short_loss, mask = losses()
    setting = {"scheme": "dense", "interpolation": 0.3}
    weights = compute_weights(parse_weighting(setting), long_loss, short_loss, mask)
    total, number = weighted_sum(long_loss, weights, mask)
    small, same_number = weighted_sum(long_loss, weights / 64, mask)
    (gradient,) = torch.autograd.grad(total, long_loss)
    (small_gradient,) = torch.autograd.grad(small, long_loss)
    assert torch.equal(small, total / 64) and torch.equal(small_gradient, gradient / 64)
    assert int(number) == int(same_number) == int(mask.sum())


def test_low_precision_losses_are_summed_in_float32() -> None:
    # 4096 ones: bfloat16 would stop counting at 256.
    ones = torch.ones(1, 4096)
    total, _ = weighted_sum(ones.bfloat16(), ones.bfloat16(), ones)
    assert total.dtype == torch.float32 and float(total) == 4096
    total, _ = weighted_sum(ones.double(), ones, ones)
    assert total.dtype == torch.float64


def test_no_live_target_is_zero_with_a_zero_gradient() -> None:
    long_loss = torch.full((1, 3), torch.nan, requires_grad=True)
    total, number = weighted_sum(long_loss, torch.zeros(1, 3), torch.zeros(1, 3))
    total.backward()
    assert float(total.detach()) == 0 and int(number) == 0
    assert long_loss.grad is not None and not long_loss.grad.any()
