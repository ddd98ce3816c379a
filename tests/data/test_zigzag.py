"""Cutting streams for context parallelism, in numbers that can be read."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lctw_megatron.data.zigzag import cut, join
from lctw_megatron.errors import InputError


def test_literal_parts() -> None:
    stream = np.arange(8)
    assert [cut(stream, rank, 2, 0).tolist() for rank in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert [cut(stream, rank, 4, 0).tolist() for rank in range(4)] == [
        [0, 7],
        [1, 6],
        [2, 5],
        [3, 4],
    ]


def test_literal_parts_of_a_batch() -> None:
    stream = torch.tensor([[0, 1, 2, 3], [10, 11, 12, 13]])
    assert cut(stream, 0, 2, 1).tolist() == [[0, 3], [10, 13]]
    assert cut(stream, 1, 2, 1).tolist() == [[1, 2], [11, 12]]
    assert cut(stream, 1, 2, -1).tolist() == [[1, 2], [11, 12]]
    assert cut(stream, 1, 2, 1).is_contiguous()


def test_join_undoes_literal_parts() -> None:
    assert join([np.array([0, 1, 6, 7]), np.array([2, 3, 4, 5])], 0).tolist() == list(range(8))


@settings(deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 2),
    st.sampled_from([np.asarray, torch.tensor]),
)
def test_joined_parts_are_the_whole(size: int, chunk: int, dim: int, kind) -> None:
    shape = [2, 3, 1]
    shape[dim] = 2 * size * chunk
    stream = kind(np.arange(np.prod(shape)).reshape(shape))
    parts = [cut(stream, rank, size, dim) for rank in range(size)]
    assert {part.shape[dim] for part in parts} == {2 * chunk}
    assert join(parts, dim).tolist() == stream.tolist()


def test_gradients_pass() -> None:
    stream = torch.arange(8.0, requires_grad=True)
    cut(stream, 1, 2, 0).sum().backward()
    assert stream.grad.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_a_length_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(InputError, match="10 tokens .* layout.context=2: .* multiple of 2 . 2 = 4"):
        cut(np.arange(10), 0, 2, 0)


def test_one_rank_holds_any_length() -> None:
    assert cut(np.arange(3), 0, 1, 0).tolist() == [0, 1, 2]
