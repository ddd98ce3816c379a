"""The row-block loss equals torch's cross-entropy, works only where it must, and never holds the
logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lctw_megatron.model.cross_entropy import (
    IGNORE,
    row_block_cross_entropy,
    row_block_is_likeliest,
)
from tests.distributed import run_distributed


def problem(
    rows: int, hidden_size: int, vocabulary: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, labels (a fifth of them IGNORE), gradient of the losses (a third of it 0)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    hidden, weight, grad = normal(rows, hidden_size), normal(vocabulary, hidden_size), normal(rows)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.2] = IGNORE
    grad[torch.rand(rows, generator=generator) < 0.3] = 0
    return hidden.to(dtype), weight.to(dtype), labels, grad


def loss_and_gradients(function: Any, hidden: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    loss = function(hidden, weight)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight), grad.to(loss.dtype))]


def torch_way(hidden: Tensor, weight: Tensor, labels: Tensor, grad: Tensor) -> list[Tensor]:
    return loss_and_gradients(
        lambda h, w: cross_entropy(h @ w.t(), labels, reduction="none", ignore_index=IGNORE),
        hidden, weight, grad,
    )  # fmt: skip


def our_way(
    hidden: Tensor, weight: Tensor, labels: Tensor, grad: Tensor, block_rows: int
) -> list[Tensor]:
    return loss_and_gradients(
        lambda h, w: row_block_cross_entropy(h, w, labels, block_rows=block_rows),
        hidden, weight, grad,
    )  # fmt: skip


@given(
    rows=st.integers(1, 40),
    hidden_size=st.integers(1, 12),
    vocabulary=st.integers(1, 50),
    block_rows=st.integers(1, 50),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80)
def test_equals_torch_in_float64(
    rows: int, hidden_size: int, vocabulary: int, block_rows: int, seed: int
) -> None:
    case = problem(rows, hidden_size, vocabulary, seed)
    for found, expected in zip(our_way(*case, block_rows), torch_way(*case), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, labels, _ = problem(9, 5, 7, seed=1)
    labels[2] = IGNORE
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda h, w: row_block_cross_entropy(h, w, labels, block_rows=4), inputs
    )


def with_bias(weight: Tensor) -> Tensor:
    """A bias for every row of ``weight``, so that parts of it get their parts."""
    return weight.sum(1).sin()


def torch_way_with_bias(
    hidden: Tensor, weight: Tensor, labels: Tensor, grad: Tensor
) -> list[Tensor]:
    return loss_and_gradients(
        lambda h, w: cross_entropy(
            h @ w.t() + with_bias(w), labels, reduction="none", ignore_index=IGNORE
        ),
        hidden, weight, grad,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_bias_is_added_and_gets_its_gradient(dtype: torch.dtype) -> None:
    hidden, weight, labels, grad = problem(40, 8, 50, seed=5, dtype=dtype)
    parts = [hidden, weight, 3 * with_bias(weight)]
    wide = [x.to(torch.float64).requires_grad_() for x in parts]
    logits = wide[0] @ wide[1].t() + wide[2]
    expected = cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
    right = torch.autograd.grad(expected, wide, grad)
    own = [x.detach().requires_grad_() for x in parts]
    loss = row_block_cross_entropy(own[0], own[1], labels, block_rows=7, bias=own[2])
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    found = torch.autograd.grad(loss, own, grad.to(loss.dtype))
    near, gap = (1e-12, 1e-12) if dtype == torch.float64 else (1e-6, 1e-2)
    assert (loss - expected).abs().max() < near * expected.abs().max()
    for value, exact in zip(found, right, strict=True):
        assert value.dtype == dtype
        assert (value - exact).norm() < gap * exact.norm()
    likeliest = row_block_is_likeliest(own[0], own[1], labels, block_rows=7, bias=own[2])
    choice = (logits.argmax(1) == labels) & (labels != IGNORE)
    assert likeliest.equal(choice.to(likeliest.dtype))
    assert not choice.equal((wide[0] @ wide[1].t()).argmax(1) == labels)  # the bias decides


def test_float32_equals_torch_in_float32() -> None:
    case = problem(300, 64, 1000, seed=2, dtype=torch.float32)
    for found, expected in zip(our_way(*case, 128), torch_way(*case), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_bfloat16_losses_are_those_of_float32_on_the_same_values() -> None:
    hidden, weight, labels, grad = problem(300, 64, 1000, seed=3, dtype=torch.bfloat16)
    loss, grad_hidden, grad_weight = our_way(hidden, weight, labels, grad, 128)
    expected = torch_way(hidden.float(), weight.float(), labels, grad)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6)
    # A product in bfloat16 would be off by about 1e-2 of a loss of order 10.
    rounded = cross_entropy((hidden @ weight.t()).float(), labels, reduction="none")
    assert (rounded - expected[0]).abs().max() > 1e-3
    for found, right in ((grad_hidden, expected[1]), (grad_weight, expected[2])):
        assert found.dtype == torch.bfloat16
        # bfloat16 keeps 8 bits: 2^-8 of a row's largest entry, a few roundings deep.
        error = (found.float() - right).norm() / right.norm()
        assert error < 1e-2, error


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels, grad = problem(20, 8, 30, seed=4)
    case = (hidden * 300, weight * 300, labels, grad)  # logits of order 1e5
    for found, expected in zip(our_way(*case, 7), torch_way(*case), strict=True):
        assert found.isfinite().all()
        # float64 rounds such logits by 1e-11, a factor of the probability.
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-6)


def test_no_live_row_gives_zeros_and_a_gradient_of_zeros() -> None:
    hidden, weight, labels, grad = problem(6, 4, 9, seed=5)
    for out in our_way(hidden, weight, torch.full_like(labels, IGNORE), grad, 2):
        assert not out.any()


class Recorder(TorchDispatchMode):
    """What matrix products multiply, and how large the largest new tensor is."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplications = 0
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "matmul"):
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
        # A view has its base's storage, however large.
        old = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in old:
                self.largest = max(self.largest, x.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_label_or_gradient_do_no_work(dtype: torch.dtype) -> None:
    rows, hidden_size, vocabulary = 100, 6, 30
    hidden, weight, labels, grad = problem(rows, hidden_size, vocabulary, 6, dtype)
    live = labels != IGNORE
    trained = live & (grad != 0)
    assert 0 < trained.sum() < live.sum() < rows
    hidden.requires_grad_()
    weight.requires_grad_()
    with Recorder() as forward:
        loss = row_block_cross_entropy(hidden, weight, labels, block_rows=16)
    assert forward.multiplications == int(live.sum()) * hidden_size * vocabulary
    with Recorder() as backward:
        loss.backward(grad.to(loss.dtype))
    # Logits again, the gradient of hidden, the gradient of the weight.
    assert backward.multiplications == 3 * int(trained.sum()) * hidden_size * vocabulary


def test_only_asked_for_gradients_are_computed() -> None:
    hidden, weight, labels, grad = problem(40, 6, 30, seed=7)
    kept = int(((labels != IGNORE) & (grad != 0)).sum())
    hidden.requires_grad_()
    with Recorder() as backward:
        loss = row_block_cross_entropy(hidden, weight, labels)
        backward.multiplications = 0
        loss.backward(grad)
    assert backward.multiplications == 2 * kept * 6 * 30


def test_the_size_of_a_block_changes_nothing_but_the_order_of_sums() -> None:
    hidden, weight, labels, grad = problem(100, 8, 60, 5, torch.float32)
    whole, *others = (our_way(hidden, weight, labels, grad, block) for block in (4096, 64, 16))
    for other in others:
        for found, expected in zip(other, whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@contextmanager
def kept_for_backward() -> Iterator[list[Tensor]]:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_larger_than_a_block_of_logits_is_made_and_only_row_sums_are_kept(
    dtype: torch.dtype,
) -> None:
    rows, hidden_size, vocabulary, block = 2048, 4, 1000, 32
    hidden, weight, labels, grad = problem(rows, hidden_size, vocabulary, 8, dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    with Recorder() as recorder, kept_for_backward() as kept:
        loss = row_block_cross_entropy(hidden, weight, labels, block_rows=block)
        loss.backward(grad.to(loss.dtype))
    assert recorder.largest <= max(block * vocabulary, rows * hidden_size)
    inputs = {hidden.data_ptr(), weight.data_ptr()}
    own = sum(x.numel() for x in kept if x.data_ptr() not in inputs)
    assert own <= 4 * rows  # row, column, whether it is ours, log-sum-exp


# Vocabulary parallelism. (true vocabulary, columns on every rank): the last ranks hold few or none.
SPLITS = {2: [(128, 64), (65, 64), (64, 64)], 4: [(256, 64), (129, 64), (64, 64), (1, 32)]}


def vocabulary_parallel(seed: int) -> dict[tuple[int, int, int, int], list[Tensor]]:
    """(ranks, first rank, vocabulary, case) -> this rank's loss and gradients."""
    everyone = dist.new_group(list(range(4)))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results = {}
    for size, group in ((2, pairs[dist.get_rank() // 2]), (4, everyone)):
        for vocabulary, columns in SPLITS[size]:
            for case, (hidden, weight, labels, grad) in enumerate(label_cases(vocabulary, seed)):
                first = group.rank() * columns
                own = weight[min(first, vocabulary) : min(first + columns, vocabulary)]

                def loss(h: Tensor, w: Tensor, labels=labels, first=first, group=group) -> Tensor:  # type: ignore[no-untyped-def]
                    return row_block_cross_entropy(
                        h, w, labels, first, group, block_rows=7, bias=with_bias(w)
                    )

                found = loss_and_gradients(loss, hidden, own, grad)
                results[size, dist.get_rank() - group.rank(), vocabulary, case] = found
    return results


def label_cases(vocabulary: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Labels anywhere, labels on the first rank only, no labels at all."""
    hidden, weight, labels, grad = problem(30, 5, vocabulary, seed)
    low = labels.where(labels == IGNORE, labels % 32)
    none = torch.full_like(labels, IGNORE)
    return [(hidden, weight, choice, grad) for choice in (labels, low, none)]


def test_vocabulary_parallel_equals_one_process_also_without_live_columns() -> None:
    ranks = run_distributed(vocabulary_parallel, 4, 9)
    for size, first_rank in ((2, 0), (2, 2), (4, 0)):
        for vocabulary, _ in SPLITS[size]:
            for case, inputs in enumerate(label_cases(vocabulary, 9)):
                loss, grad_hidden, grad_weight = torch_way_with_bias(*inputs)
                key = (size, first_rank, vocabulary, case)
                answers = [ranks[first_rank + i][key] for i in range(size)]
                for answer in answers:
                    torch.testing.assert_close(answer[0], loss, rtol=1e-12, atol=1e-12)
                found = sum(answer[1] for answer in answers)
                torch.testing.assert_close(found, grad_hidden, rtol=1e-12, atol=1e-12)
                found = torch.cat([answer[2] for answer in answers])
                torch.testing.assert_close(found, grad_weight, rtol=1e-12, atol=1e-12)
