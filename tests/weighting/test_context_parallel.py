"""Weights and statistics are the same, bit for bit, however sequences are cut over ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lctw_megatron.data.zigzag import cut, join
from lctw_megatron.weighting import parse_weighting
from lctw_megatron.weighting.compute import WeightCounts, compute_weights_and_counts
from lctw_megatron.weighting.statistics import WeightStatistics, weight_statistics
from lctw_megatron.weighting.weighted_loss import weighted_sum
from tests.distributed import run_distributed
from tests.weighting.test_schemes import ALL_SETTINGS
from tests.weighting.test_unscored import SELECTIONS

SEQUENCES, TARGETS = 7, 240
BOUNDARIES = torch.tensor([[0, 100, 130, TARGETS]] * SEQUENCES, dtype=torch.int32)


def cases() -> dict[str, tuple[dict[str, Any], torch.dtype]]:
    settings = [*ALL_SETTINGS, {"scheme": "sparse", "keep_fraction": 0.001}]
    settings += [{"scheme": "dense", "unscored": "one", "interpolation": 0.25}]
    settings += [setting for setting, _ in SELECTIONS]
    result = {}
    for dtype in (torch.float32, torch.float64):
        for setting in settings:
            result[f"{'-'.join(map(str, setting.values()))}-{dtype}"] = (setting, dtype)
    return result


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences with everything awkward in them, [SEQUENCES, TARGETS] each."""
    generator = torch.Generator().manual_seed(7)
    shape = (SEQUENCES, TARGETS)
    long_loss = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) * 5
    short_loss = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) * 5
    mask = (torch.rand(shape, generator=generator) < 0.8).to(dtype)
    long_loss[1], short_loss[1] = long_loss[1].round(), short_loss[1].round()  # ties
    short_loss[2] = long_loss[2]  # scores all zero
    short_loss[3] = long_loss[3] + 1  # scores all equal
    mask[4] = 0  # nothing live
    mask[5, 30:210] = 0  # for CP 4, rank 0 holds targets 0-29 and 210-239: the others hold nothing
    short_loss[6, :50] = torch.nan  # not scored
    long_loss[6, 100] = torch.inf  # a masked target may hold anything
    mask[6, 100] = 0
    return long_loss, short_loss, mask


def weigh_all(group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Every case on this rank's part; joined over the group, with counts summed over it."""
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    results = {}
    for name, (setting, dtype) in cases().items():
        parts = [cut(stream, rank, size, dim=1) for stream in batch(dtype)]
        weighting = parse_weighting(setting)
        weights, counts = compute_weights_and_counts(
            weighting, *parts, group=group, boundaries=BOUNDARIES
        )
        statistics = weight_statistics(weights, parts[0], parts[2], group)
        total, number = weighted_sum(parts[0], weights, parts[2])
        sums = torch.stack([*counts, number]).long()
        if group:
            gathered = [torch.empty_like(weights) for _ in range(size)]
            dist.all_gather(gathered, weights, group=group)
            weights = join(gathered, dim=1)
            dist.all_reduce(sums, group=group)
            dist.all_reduce(total, group=group)
            dist.all_reduce(statistics.sums, group=group)
            dist.all_reduce(statistics.largest, dist.ReduceOp.MAX, group=group)
        results[name] = (weights, sums, float(total), statistics)
    return results


def weigh_under_every_size() -> dict[int, dict[str, Any]]:
    """World of 4: context parallel over all, over pairs, and over groups of one."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    single = [dist.new_group([rank]) for rank in range(4)]
    rank = dist.get_rank()
    return {
        1: weigh_all(single[rank]),
        2: weigh_all(pairs[rank // 2]),
        4: weigh_all(dist.group.WORLD),
    }


def test_weights_are_bit_equal_under_context_parallel_1_2_and_4() -> None:
    expected = weigh_all(None)
    weights, sums, *_ = expected["dense-torch.float32"]
    assert not weights[4].any() and (weights[2] == batch(torch.float32)[2][2]).all()
    unscored = int(batch(torch.float32)[2][6, :50].sum())
    live = int(batch(torch.float32)[2].sum())
    assert sums.tolist() == [live, unscored, 1, live]
    for rank, results in enumerate(run_distributed(weigh_under_every_size, 4)):
        for size, by_case in results.items():
            for name, (weights, sums, total, statistics) in by_case.items():
                where = f"{name} on rank {rank}, CP {size}"
                alone, alone_sums, alone_total, alone_statistics = expected[name]
                assert weights.dtype == alone.dtype
                assert torch.equal(weights, alone), where
                assert torch.equal(sums, alone_sums), f"{where}: {sums} {alone_sums}"
                # Sums of other parts round differently: 1e-5 in float32, 1e-12 in float64.
                rtol = 1e-5 if weights.dtype == torch.float32 else 1e-12
                assert abs(total - alone_total) <= rtol * abs(alone_total), where
                _assert_same_statistics(statistics, alone_statistics, where)


def _assert_same_statistics(one: WeightStatistics, other: WeightStatistics, where: str) -> None:
    torch.testing.assert_close(one.sums, other.sums, rtol=1e-12, atol=0, msg=where)
    assert torch.equal(one.largest, other.largest), where


def a_rank_without_live_targets() -> tuple[Tensor, WeightCounts, Tensor, Tensor, int]:
    """Only the middle of a sequence of 8 is live, which rank 1 of 2 holds."""
    mask = torch.tensor([[0.0, 0, 1, 1, 1, 1, 0, 0]])
    long_loss = torch.arange(8.0)[None]
    short_loss = long_loss + torch.tensor([[torch.nan] * 2 + [1, 2, 3, 2] + [torch.nan] * 2])
    rank = dist.get_rank()
    parts = [cut(stream, rank, 2, dim=1) for stream in (long_loss, short_loss, mask)]
    loss = parts[0].clone().requires_grad_()
    weighting = parse_weighting({"scheme": "dense"})
    weights, counts = compute_weights_and_counts(
        weighting, loss, parts[1], parts[2], dist.group.WORLD
    )
    total, number = weighted_sum(loss, weights, parts[2])
    total.backward()
    assert loss.grad is not None
    return weights, counts, total.detach(), loss.grad, int(number)


def test_a_rank_without_live_targets_gives_zeros_not_nan() -> None:
    results = run_distributed(a_rank_without_live_targets, 2)
    weights, counts, total, gradient, number = results[0]
    assert weights.tolist() == gradient.tolist() == [[0] * 4]
    assert [int(count) for count in counts] == [0, 0, 0]
    assert float(total) == 0 and number == 0
    weights, counts, total, gradient, number = results[1]
    assert weights.tolist() == gradient.tolist() == [[0.5, 1, 1.5, 1]]
    assert [int(count) for count in counts] == [4, 0, 0]
    assert float(total) == 2 * 0.5 + 3 + 4 * 1.5 + 5 and number == 4
