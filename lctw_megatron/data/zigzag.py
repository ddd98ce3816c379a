"""The one function that cuts per-token streams for context parallelism, and its inverse.

A causal model works harder on late tokens, so each of C ranks gets an early and a late chunk: of
2·C equal chunks, rank r holds chunks r and 2·C-1-r. For C = 2 and eight tokens::

    0 1 | 2 3 | 4 5 | 6 7      rank 0: 0 1 6 7      rank 1: 2 3 4 5
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from lctw_megatron.errors import InputError

Stream = TypeVar("Stream")
"""A numpy array or a torch tensor."""


def cut(stream: Stream, rank: int, size: int, dim: int) -> Stream:
    """The part of ``stream`` that rank ``rank`` of ``size`` holds: 1/size of dimension ``dim``.

    Contiguous, except for size 1, which gives the stream itself. Differentiable on tensors.
    Raises InputError if the dimension is no multiple of 2·size.
    """
    if size == 1:
        return stream
    whole: Any = stream
    length = whole.shape[dim]
    if length % (2 * size):
        raise InputError(
            f"a sequence of {length} tokens cannot be cut for layout.context={size}: the length "
            f"must be a multiple of 2 * {size} = {2 * size}; change data.sequence_length or "
            "layout.context"
        )
    chunk = length // (2 * size)
    both = (rank, 2 * size - 1 - rank)
    return _concatenate([_part(whole, i * chunk, (i + 1) * chunk, dim) for i in both], dim)


def join(parts: Sequence[Stream], dim: int) -> Stream:
    """The whole stream from the parts of all ranks, in the order of the ranks."""
    if len(parts) == 1:
        return parts[0]
    known: list[Any] = list(parts)
    length = known[0].shape[dim]
    early = [_part(part, 0, length // 2, dim) for part in known]
    late = [_part(part, length // 2, length, dim) for part in reversed(known)]
    return _concatenate(early + late, dim)


def _part(stream: Any, start: int, end: int, dim: int) -> Any:
    where = [slice(None)] * stream.ndim
    where[dim] = slice(start, end)
    return stream[tuple(where)]


def _concatenate(parts: list[Any], dim: int) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis=dim)
    import torch

    return torch.cat(parts, dim=dim)
