"""Distances to a token's last occurrence, against a walk back through the context."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lctw_megatron.weighting.occurrence import (
    batch_occurrence_distance,
    sum_by_distance,
)


def walk_back(tokens: list[int], labels: list[int], start: int, i: int) -> int:
    for j in range(i, start - 1, -1):
        if tokens[j] == labels[i]:
            return i + 1 - j
    return -1


def test_hand_computed_piece() -> None:
    #      target            a   b   a   c   c   a   b
    piece = torch.tensor([1, 1, 2, 1, 3, 3, 1, 2])
    found = batch_occurrence_distance(piece[None, :-1], piece[None, 1:])
    assert found.tolist() == [[1, -1, 2, -1, 1, 3, 5]]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_equals_a_walk_back_in_every_piece(data: st.DataObject) -> None:
    sequences, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 24))
    pieces = data.draw(st.integers(1, 4))
    token = st.integers(0, 4)

    def draw_rows(entry: st.SearchStrategy[int], size: int) -> list[list[int]]:
        row = st.lists(entry, min_size=size, max_size=size)
        return [data.draw(row) for _ in range(sequences)]

    # Labels need not be the next token: the last one of a piece is not, nor a replaced first one.
    tokens, labels = (
        draw_rows(token, length),
        draw_rows(st.sampled_from([0, 1, 2, 4, -100]), length),
    )
    inner = [sorted(row) for row in draw_rows(st.integers(0, length), pieces - 1)]
    boundaries = [[0, *row, length, length] for row in inner]
    found = batch_occurrence_distance(
        torch.tensor(tokens), torch.tensor(labels), torch.tensor(boundaries, dtype=torch.int32)
    ).tolist()
    for row in range(sequences):
        starts = [max(b for b in boundaries[row] if b <= i) for i in range(length)]
        expected = [walk_back(tokens[row], labels[row], starts[i], i) for i in range(length)]
        assert found[row] == expected
    whole = batch_occurrence_distance(torch.tensor(tokens), torch.tensor(labels)).tolist()
    assert whole == [
        [walk_back(tokens[row], labels[row], 0, i) for i in range(length)]
        for row in range(sequences)
    ]


def test_sums_of_near_far_and_first_seen_targets() -> None:
    loss = torch.tensor([[1.0, 2.0, 4.0, 8.0, torch.nan]])
    distance = torch.tensor([[3, 4, -1, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    assert sum_by_distance(loss, distance, mask, near=3).tolist() == [[9, 2], [2, 1], [4, 1]]
