"""Attention equals a dense-mask float64 reference, however it is cut, and does no more work than it
must.

Longer than 350 lines: the reference, its random cases and what measures the work serve all tests.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lctw_megatron.data import zigzag
from lctw_megatron.model import attention
from lctw_megatron.model.attention import Rectangle, attend, rectangles
from tests.distributed import run_distributed

TOLERANCE = 1e-12  # absolute; outputs, and gradients of standard-normal inputs, are of order 1


def seen_keys(boundaries: list[int], length: int) -> Tensor:
    """bool [S, S]: whether a query (row) sees a key: of its own piece, and not later."""
    position = torch.arange(length)
    piece = torch.searchsorted(torch.tensor(boundaries), position, right=True)
    return (piece[:, None] == piece) & (position[:, None] >= position)


def reference(q: Tensor, k: Tensor, v: Tensor, boundaries: list[list[int]]) -> Tensor:
    """Attention with a dense mask; q [S, b, n, d]; k, v [S, b, g, d]; boundaries of every row."""
    repeat = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeat, dim=2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) / math.sqrt(q.shape[-1])
    mask = torch.stack([seen_keys(row, q.shape[0]) for row in boundaries])
    weights = scores.masked_fill(~mask[:, None], -math.inf).softmax(-1)
    return torch.einsum("bnst,tbnd->sbnd", weights, v)


@dataclass
class Case:
    """Sizes of one attention; the numbers in it follow from ``seed``."""

    length: int
    boundaries: list[list[int]] | None
    batch: int
    heads: int
    groups: int
    channels: int
    seed: int

    @property
    def rows(self) -> list[list[int]]:
        return self.boundaries or [[0, self.length]] * self.batch

    @property
    def padded(self) -> Tensor | None:
        """boundaries as the loader gives them: int32 [b, P + 1], padded with S."""
        if self.boundaries is None:
            return None
        most = max(map(len, self.boundaries))
        padded = [row + [self.length] * (most - len(row)) for row in self.boundaries]
        return torch.tensor(padded, dtype=torch.int32)

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """q, k, v (with gradient) and the gradient of the output."""
        generator = torch.Generator().manual_seed(self.seed)
        q, k, v, grad = (
            torch.randn(
                self.length, self.batch, heads, self.channels,
                dtype=torch.float64, generator=generator,
            ).to(dtype)
            for heads in (self.heads, self.groups, self.groups, self.heads)
        )  # fmt: skip
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


@st.composite
def cases(draw: Any, context: int = 1) -> Case:
    length = 2 * context * draw(st.integers(1, 40 // context))
    batch = draw(st.integers(1, 3))
    cuts = st.lists(st.integers(1, max(1, length - 1)), unique=True, max_size=6)
    rows = [[0, *sorted(draw(cuts)), length] for _ in range(batch)]
    groups = draw(st.integers(1, 3))
    return Case(
        length=length,
        boundaries=draw(st.sampled_from([None, rows])),
        batch=batch,
        heads=groups * draw(st.integers(1, 3)),
        groups=groups,
        channels=draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 2**31)),
    )


def check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], where: Any) -> None:
    """Output and gradients of q, k and v."""
    for name, one, other in zip(("out", "q", "k", "v"), found, expected, strict=True):
        torch.testing.assert_close(
            one, other, rtol=0, atol=TOLERANCE, msg=lambda text, name=name: f"{name} {where} {text}"
        )


def answer(case: Case) -> tuple[Tensor, ...]:
    """The reference's output and gradients."""
    q, k, v, grad = case.tensors()
    out = reference(q, k, v, case.rows)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


@given(case=cases())
@settings(max_examples=60)
def test_one_process_equals_the_dense_mask_reference(case: Case) -> None:
    q, k, v, grad = case.tensors()
    out = attend(q, k, v, case.padded)
    check((out.detach(), *torch.autograd.grad(out, (q, k, v), grad)), answer(case), case)


class _Rank:
    """Stands for rank ``rank`` of a context-parallel group of ``size``."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = lambda: rank, lambda: size


def all_ranks_in_turn(
    case: Case, context: int, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """Output and gradients of ``context`` ranks played by one process.

    Each takes its zigzag part of q and is handed all keys and values instead of gathering them.
    """
    q, k, v, grad = (x.to(device) for x in case.tensors(dtype))

    class Gathered:
        @staticmethod
        def apply(part: Tensor, group: Any) -> Tensor:
            whole = torch.cat([k, v], dim=-1)
            assert part.equal(zigzag.cut(whole, group.rank(), context, dim=0))
            return whole

    with (
        mock.patch.object(attention, "_GatherSequence", Gathered),
        # Large chunks on a GPU, which gather by themselves: tests/gpu/test_context_attention.py.
        mock.patch.object(attention.context_attention, "takes", lambda *_: False),
    ):
        parts = []
        for rank in range(context):
            own = (zigzag.cut(x, rank, context, dim=0) for x in (q, k, v))
            parts.append(attend(*own, case.padded, _Rank(rank, context)))
        out = zigzag.join(parts, dim=0)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


@pytest.mark.parametrize("context", [2, 3, 4])
@given(data=st.data())
@settings(max_examples=25)
def test_zigzag_parts_equal_the_dense_mask_reference(context: int, data: Any) -> None:
    case = data.draw(cases(context))
    rows = data.draw(st.sampled_from([1, 2, 5, 1024]), "rows of a block")
    with mock.patch.object(attention, "_ROW_BLOCK", rows):
        check(all_ranks_in_turn(case, context), answer(case), (case, context, rows))


def _fixed_case(seed: int, context: int) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    length, batch, groups = 2 * context * draw(1, 12), draw(1, 3), draw(1, 3)
    rows = [
        [0, *sorted({draw(1, length - 1) for _ in range(draw(0, 5))}), length] for _ in range(batch)
    ]
    whole = seed % 4 == 0
    return Case(
        length, None if whole else rows, batch, groups * draw(1, 3), groups, draw(1, 9), seed
    )


def attend_on_ranks(seeds: list[int]) -> dict[tuple[int, int, int], list[Tensor]]:
    """(context size, first rank, seed) -> this rank's parts of output and gradients."""
    everyone = dist.new_group(list(range(4)))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results = {}
    for context, group in ((4, everyone), (2, pairs[dist.get_rank() // 2])):
        first = dist.get_rank() - group.rank()
        for seed in seeds:
            case = _fixed_case(seed, context)
            attention._ROW_BLOCK = (1024, 1, 3)[seed % 3]
            parts = [zigzag.cut(x, group.rank(), context, dim=0) for x in case.tensors()]
            q, k, v, grad = (x.detach().requires_grad_() for x in parts)
            out = attend(q, k, v, case.padded, group)
            gradients = torch.autograd.grad(out, (q, k, v), grad)
            results[context, first, seed] = [out.detach(), *gradients]
    return results


def test_gloo_ranks_equal_the_dense_mask_reference() -> None:
    seeds = list(range(24))
    ranks = run_distributed(attend_on_ranks, 4, seeds)
    for context, first in ((4, 0), (2, 0), (2, 2)):
        for seed in seeds:
            parts = [ranks[first + i][context, first, seed] for i in range(context)]
            found = tuple(zigzag.join(list(same), dim=0) for same in zip(*parts, strict=True))
            case = _fixed_case(seed, context)
            check(found, answer(case), (case, context))


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, **options):  # type: ignore[no-untyped-def]
    """What torch documents for its flash kernel, in a loop."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    assert options["window_size"] == (-1, 0)
    outputs = []
    for number in range(len(cu_q) - 1):
        rows, keys = (slice(int(c[number]), int(c[number + 1])) for c in (cu_q, cu_k))
        n, m = rows.stop - rows.start, keys.stop - keys.start
        repeat = q.shape[1] // k.shape[1]
        key, value = (x[keys].repeat_interleave(repeat, dim=1) for x in (k, v))
        scores = torch.einsum("snd,tnd->nst", q[rows], key) * scale
        hidden = torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        outputs.append(torch.einsum("nst,tnd->snd", weights, value))
    return torch.cat(outputs)


@contextmanager
def flash_kernel_replaced() -> Iterator[None]:
    """The GPU's way through ``attend``, with ``varlen`` in the place of the flash kernel."""
    replaced = functools.partial(varlen, **attention._varlen_attention().keywords)
    with (
        mock.patch.object(attention, "_varlen_attention", lambda: replaced),
        mock.patch.object(attention, "_runs_varlen", lambda *_: True),
    ):
        yield


@given(case=cases(2), context=st.sampled_from([1, 2]))
@settings(max_examples=25)
def test_the_one_call_of_the_flash_kernel_gets_the_right_rectangles(
    case: Case, context: int
) -> None:
    with flash_kernel_replaced():
        check(all_ranks_in_turn(case, context), answer(case), (case, context))


def brute_force(boundaries: list[int], length: int, rank: int, size: int) -> set[tuple[int, int]]:
    """All (query of this rank, key) pairs that causality and the pieces allow."""
    own = zigzag.cut(torch.arange(length), rank, size, dim=0).tolist()
    seen = seen_keys(boundaries, length)
    return {(i, key) for i, place in enumerate(own) for key in range(length) if seen[place, key]}


def pairs_of(rectangle: Rectangle) -> Iterator[tuple[int, int]]:
    for i in range(rectangle.query_start, rectangle.query_end):
        for key in range(rectangle.key_start, rectangle.key_end - (rectangle.query_end - 1 - i)):
            yield i, key


@pytest.mark.parametrize(("length", "size"), [(1, 1), (8, 1), (4, 2), (8, 2), (12, 3), (8, 4)])
def test_rectangles_cover_every_allowed_pair_once(length: int, size: int) -> None:
    inner = range(1, length)
    for boundaries in (
        [0, *cuts, length] for count in range(length) for cuts in combinations(inner, count)
    ):
        for rank in range(size):
            found = rectangles(boundaries, length, rank, size)
            pairs = [pair for rectangle in found for pair in pairs_of(rectangle)]
            assert len(pairs) == len(set(pairs)), (boundaries, rank)
            assert set(pairs) == brute_force(boundaries, length, rank, size), (boundaries, rank)
            # In the order of the queries, so that their outputs need only be put together.
            assert [r.query_start for r in found] == [0, *(r.query_end for r in found[:-1])]


@contextmanager
def recorded_calls() -> Iterator[list[tuple[int, int, bool]]]:
    """(query rows, keys, whether there is a mask) of every call of torch's attention."""
    calls: list[tuple[int, int, bool]] = []
    real = attention.scaled_dot_product_attention

    def record(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        mask = options.get("attn_mask")
        assert (mask is None) == options.get("is_causal", False)
        if mask is not None:
            assert mask.shape == (q.shape[-2], k.shape[-2])
        calls.append((q.shape[-2], k.shape[-2], mask is not None))
        return real(q, k, v, **options)

    with mock.patch.object(attention, "scaled_dot_product_attention", record):
        yield calls


@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("pieces", [1, 7])
def test_masks_are_row_blocks_and_work_is_the_unmasked_area(context: int, pieces: int) -> None:
    length, block = 512, 16
    boundaries = torch.linspace(0, length, pieces + 1).int().tolist()
    case = Case(length, [boundaries], 1, 2, 1, 4, seed=1)
    with recorded_calls() as calls, mock.patch.object(attention, "_ROW_BLOCK", block):
        all_ranks_in_turn(case, context)
    unmasked = int(seen_keys(boundaries, length).sum())
    # A square call of n rows works on n(n+1)/2 pairs, a masked one on all pairs of its mask.
    work = sum(n * keys if masked else n * (n + 1) // 2 for n, keys, masked in calls)
    for n, keys, masked in calls:
        if masked:
            assert n <= block, "a mask higher than a row block"
        else:
            assert n == keys
    assert unmasked <= work <= unmasked + length * (block - 1) / 2
    if context == 1:
        assert work == unmasked and not any(masked for _, _, masked in calls)


class Traffic(TorchDispatchMode):
    """Counts what every operation of torch writes, in elements; views write nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in old:
                self.total += x.numel()
                self.largest = max(self.largest, x.numel())
        return result


def traffic(case: Case, context: int) -> Traffic:
    with Traffic() as counted:
        all_ranks_in_turn(case, context)
    return counted


@pytest.mark.parametrize("context", [1, 2])
def test_nothing_of_size_s_by_s_is_ever_made(context: int) -> None:
    length, block = 1024, 16
    case = Case(length, None, 1, 2, 2, 4, seed=2)
    with mock.patch.object(attention, "_ROW_BLOCK", block):
        # The largest thing is keys and values joined, or one row block's mask.
        assert traffic(case, context).largest <= max(length * 2 * 2 * 4, block * length)


@pytest.mark.parametrize("context", [1, 2])
def test_many_short_pieces_move_no_more_than_one_long_piece(context: int) -> None:
    length = 512
    totals = []
    for pieces in (1, 64):
        boundaries = [list(range(0, length + 1, length // pieces))]
        totals.append(traffic(Case(length, boundaries, 1, 2, 2, 4, seed=3), context).total)
    one, many = totals
    assert many <= 1.5 * one, totals
