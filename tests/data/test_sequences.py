"""Virtual packing: every target has its place, and none two."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lctw_megatron.data.sequences import SequenceIndex, build_index, packing_cost

LENGTHS = st.lists(st.integers(0, 60), max_size=40)
SIZES = st.integers(1, 17)


def sequences(index: SequenceIndex) -> list[list[tuple[int, int, int]]]:
    return [[tuple(piece) for piece in index.pieces(number)] for number in range(len(index))]


def covered(index: SequenceIndex) -> Counter:
    """How often each (document, token) is the target of a piece."""
    return Counter(
        (document, offset + 1 + i)
        for pieces in sequences(index)
        for document, offset, length in pieces
        for i in range(length)
    )


def test_chunks_of_hand_made_documents() -> None:
    # 9 tokens are 8 targets: two chunks of 4. 7 tokens are 6 targets: a chunk of 4, a tail of 2.
    index = build_index(np.array([9, 1, 7]), 4, "chunk", "keep")
    assert sequences(index) == [[(0, 0, 4)], [(0, 4, 4)], [(2, 0, 4)], [(2, 4, 2)]]
    index = build_index(np.array([9, 1, 7]), 4, "chunk", "drop")
    assert sequences(index) == [[(0, 0, 4)], [(0, 4, 4)], [(2, 0, 4)]]


def test_packing_of_hand_made_documents() -> None:
    # Targets 14, 3, 7, 2, 4. Document 0 gives a full piece of 10 and a rest of 4. Longest first:
    # 7 opens a sequence, 4 and 4 share another, 3 fits the room of 3 best, 2 the room of 2.
    index = build_index(np.array([15, 4, 8, 3, 5]), 10, "pack", "drop")
    assert sequences(index) == [
        [(0, 0, 10)],
        [(2, 0, 7), (1, 0, 3)],
        [(0, 10, 4), (4, 0, 4), (3, 0, 2)],
    ]


@pytest.mark.parametrize("packing", ["chunk", "pack"])
def test_arrays_have_the_promised_types(packing: str) -> None:
    index = build_index(np.array([15, 4, 8], dtype=np.int32), 10, packing, "keep")
    types = {name: array.dtype.name for name, array in vars(index).items()}
    assert types == {
        "piece_document": "int64",
        "piece_offset": "int64",
        "piece_length": "int32",
        "sequence_start": "int64",
    }


@pytest.mark.parametrize("lengths", [[], [0], [1, 0, 1]])
@pytest.mark.parametrize("packing", ["chunk", "pack"])
def test_documents_without_a_target_make_no_sequence(lengths: list[int], packing: str) -> None:
    assert sequences(build_index(np.array(lengths, dtype=np.int32), 4, packing, "keep")) == []


@settings(deadline=None)
@given(LENGTHS, SIZES, st.sampled_from(["chunk", "pack"]))
def test_every_target_is_covered_once(lengths: list[int], size: int, packing: str) -> None:
    index = build_index(np.array(lengths, dtype=np.int32), size, packing, "keep")
    assert covered(index) == {(d, t): 1 for d, n in enumerate(lengths) for t in range(1, n)}


@settings(deadline=None)
@given(LENGTHS, SIZES)
def test_dropping_tails_loses_exactly_the_last_shorter_chunks(lengths: list[int], size: int):
    index = build_index(np.array(lengths, dtype=np.int32), size, "chunk", "drop")
    assert covered(index) == {
        (d, t): 1 for d, n in enumerate(lengths) for t in range(1, (n - 1) // size * size + 1)
    }


@settings(deadline=None)
@given(LENGTHS, SIZES, st.sampled_from([("chunk", "keep"), ("chunk", "drop"), ("pack", "keep")]))
def test_pieces_fit_their_sequence_and_every_input_has_a_label(lengths, size, way) -> None:
    index = build_index(np.array(lengths, dtype=np.int32), size, *way)
    for pieces in sequences(index):
        assert 1 <= sum(length for _, _, length in pieces) <= size
        assert way[0] == "pack" or len(pieces) == 1
        for document, offset, length in pieces:
            assert length >= 1
            assert offset % size == 0
            assert offset + length + 1 <= lengths[document]


@settings(deadline=None)
@given(LENGTHS, SIZES)
def test_packing_cuts_only_what_is_longer_than_a_sequence(lengths: list[int], size: int) -> None:
    index = build_index(np.array(lengths, dtype=np.int32), size, "pack", "keep")
    pieces = Counter(document for pieces in sequences(index) for document, _, _ in pieces)
    assert pieces == {d: -(-(n - 1) // size) for d, n in enumerate(lengths) if n > 1}


@settings(deadline=None)
@given(LENGTHS, SIZES)
def test_packing_leaves_the_same_rooms_as_plain_best_fit_decreasing(
    lengths: list[int], size: int
) -> None:
    rooms: list[int] = []
    for rest in sorted(((n - 1) % size for n in lengths if n > 1), reverse=True):
        tightest = min((room for room in rooms if room >= rest), default=size)
        if rest and tightest in rooms:
            rooms.remove(tightest)
        if rest:
            rooms.append(tightest - rest if tightest != size or rest else size)
    index = build_index(np.array(lengths, dtype=np.int32), size, "pack", "keep")
    full = sum((n - 1) // size for n in lengths if n > 1)
    ours = [size - sum(length for _, _, length in pieces) for pieces in sequences(index)]
    assert sorted(ours) == sorted(rooms + [0] * full)


@settings(deadline=None)
@given(LENGTHS, SIZES, st.sampled_from([("chunk", "keep"), ("chunk", "drop"), ("pack", "keep")]))
def test_price_counts_what_is_there(lengths, size, way) -> None:
    lengths = np.array(lengths, dtype=np.int32)
    index = build_index(lengths, size, *way)
    cost = packing_cost(lengths, size, index)
    targets = sum(max(n - 1, 0) for n in lengths.tolist())
    assert cost.dropped_targets == targets - covered(index).total()
    assert cost.padding == len(index) * size - covered(index).total()
    assert (cost.sequences, cost.pieces) == (len(index), len(index.piece_length))
    assert cost.short_documents == sum(n < 2 for n in lengths)
    for tails, field in (("drop", "dropped_targets"), ("keep", "padding")):
        other = packing_cost(lengths, size, build_index(lengths, size, "chunk", tails))
        assert (
            getattr(other, field) == {"drop": cost.tail_targets, "keep": cost.tail_padding}[tails]
        )


def test_price_line_names_both_prices() -> None:
    lengths = np.array([9, 1, 8])
    line = packing_cost(lengths, 5, build_index(lengths, 5, "chunk", "keep")).line(
        "chunk", "keep", 5
    )
    assert line == (
        "3 documents -> 4 sequences of 5 (chunk), 15 targets, 5 padding (25.00 %); tails=keep "
        "costs 5 padding (25.00 %), tails=drop would lose 5 targets (33.33 %); 1 documents of "
        "fewer than 2 tokens left out"
    )
    line = packing_cost(lengths, 5, build_index(lengths, 5, "chunk", "drop")).line(
        "chunk", "drop", 5
    )
    assert "10 targets, 0 padding (0.00 %); tails=drop loses 5 targets (33.33 %)" in line
    line = packing_cost(lengths, 5, build_index(lengths, 5, "pack", "keep")).line("pack", "keep", 5)
    assert "3 sequences of 5 (pack), 15 targets, 0 padding (0.00 %); chunk would cost" in line


def test_a_million_documents_take_seconds() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 9000, 1_000_000, dtype=np.int32)
    index = build_index(lengths, 4096, "pack", "keep")
    assert index.piece_length.sum(dtype=np.int64) == (lengths - 1).sum(dtype=np.int64)
    # Best-fit-decreasing wastes next to nothing on so many lengths: less than 0.1 % padding.
    assert len(index) * 4096 < 1.001 * index.piece_length.sum(dtype=np.int64)
