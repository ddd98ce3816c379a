"""Samples and batches, by eye."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lctw_megatron.data.batch import (
    IGNORE,
    PieceData,
    assemble,
    collate,
    cut_batch,
    usable_scores,
)
from lctw_megatron.data.zigzag import join

NAN = float("nan")
BOS = 7


def piece(document: int, offset: int, tokens: list[int], short_loss=None) -> PieceData:
    losses = None if short_loss is None else np.array(short_loss, dtype=np.float32)
    return PieceData(document, offset, np.array(tokens, dtype=np.uint16), losses)


def test_pieces_lie_side_by_side() -> None:
    sample = assemble([piece(4, 0, [10, 11, 12]), piece(9, 6, [26, 27, 28, 29])], 7, None)
    assert sample.tokens.tolist() == [10, 11, 26, 27, 28, 0, 0]
    assert sample.labels.tolist() == [11, 12, 27, 28, 29, IGNORE, IGNORE]
    assert sample.boundaries.tolist() == [0, 2, 5, 7]
    assert sample.documents.tolist() == [4, 9, -1]
    assert sample.short_loss is None


def test_a_full_sequence_has_no_padding_piece() -> None:
    sample = assemble([piece(4, 0, [10, 11, 12]), piece(9, 6, [26, 27])], 3, None)
    assert sample.labels.tolist() == [11, 12, 27]
    assert sample.boundaries.tolist() == [0, 2, 3]
    assert sample.documents.tolist() == [4, 9]


def test_bos_replaces_the_first_input_in_mid_document_only() -> None:
    pieces = [piece(4, 0, [10, 11, 12]), piece(9, 6, [26, 27, 28])]
    sample = assemble(pieces, 5, BOS)
    assert sample.tokens.tolist() == [10, 11, BOS, 27, 0]  # at 0 stands what was stored
    assert sample.labels.tolist() == [11, 12, 27, 28, IGNORE]
    assert pieces[1].tokens.tolist() == [26, 27, 28]  # what was read stays as it is


def test_no_pieces_are_all_padding() -> None:
    sample = assemble([], 3, BOS)
    assert sample.labels.tolist() == [IGNORE] * 3
    assert (sample.boundaries.tolist(), sample.documents.tolist()) == ([0, 3], [-1])


def test_short_losses_lie_at_their_targets() -> None:
    pieces = [piece(0, 0, [10, 11, 12], [NAN, 2.5]), piece(1, 4, [24, 25], [0.5])]
    short_loss = assemble(pieces, 5, None).short_loss
    assert short_loss.dtype == np.float32
    np.testing.assert_array_equal(short_loss, [NAN, 2.5, 0.5, NAN, NAN])


def test_scores_in_the_first_window_say_nothing() -> None:
    # Targets at 1, 2, 3, ... after the beginning; window 4: from target 4 on contexts differ.
    losses = np.arange(1, 7, dtype=np.float32)
    np.testing.assert_array_equal(usable_scores(losses, 4, False), [NAN, NAN, NAN, 4, 5, 6])
    np.testing.assert_array_equal(usable_scores(losses, 4, True), losses)
    assert np.isnan(usable_scores(losses, 40, False)).all()
    assert losses.tolist() == [1, 2, 3, 4, 5, 6]  # the sidecar stays as it is


def test_batches_have_the_promised_names_types_and_values() -> None:
    one = assemble([piece(4, 0, [10, 11, 12]), piece(9, 6, [26, 27])], 4, None)
    two = assemble([piece(5, 0, [10, 11, 12, 13, 14])], 4, None)
    batch = collate([one, two], with_boundaries=True)
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "tokens": ("int64", (2, 4)),
        "labels": ("int64", (2, 4)),
        "loss_mask": ("float32", (2, 4)),
        "position_ids": ("int64", (2, 4)),
        "boundaries": ("int32", (2, 4)),
    }
    assert batch["loss_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch["boundaries"].tolist() == [[0, 2, 3, 4], [0, 4, 4, 4]]
    assert "boundaries" not in collate([one, two], with_boundaries=False)


def test_padding_rows_have_no_scores() -> None:
    scored = assemble([piece(0, 0, [10, 11, 12], [1, 2])], 2, None)
    batch = collate([scored, assemble([], 2, None)], with_boundaries=False)
    np.testing.assert_array_equal(batch["short_loss"], [[1, 2], [NAN, NAN]])


def test_a_batch_cut_for_two_ranks() -> None:
    sample = assemble([piece(0, 0, list(range(10, 19)), [0.5 * i for i in range(8)])], 8, None)
    batch = collate([sample], with_boundaries=True)
    first, second = (cut_batch(batch, rank, 2) for rank in range(2))
    assert first["tokens"].tolist() == [[10, 11, 16, 17]]
    assert second["tokens"].tolist() == [[12, 13, 14, 15]]
    assert first["labels"].tolist() == [[11, 12, 17, 18]]
    assert second["labels"].tolist() == [[13, 14, 15, 16]]
    assert first["position_ids"].tolist() == [[0, 1, 6, 7]]
    assert second["position_ids"].tolist() == [[2, 3, 4, 5]]
    assert first["short_loss"].tolist() == [[0, 0.5, 3, 3.5]]
    assert second["short_loss"].tolist() == [[1, 1.5, 2, 2.5]]
    assert second["loss_mask"].tolist() == [[1, 1, 1, 1]]
    assert first["boundaries"].tolist() == second["boundaries"].tolist() == [[0, 8]]


@pytest.mark.parametrize("size", [1, 2, 4])
@settings(deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=6))
def test_parts_of_all_ranks_join_to_the_batch(size: int, lengths: list[int]) -> None:
    samples = [
        assemble([piece(0, 0, list(range(n + 1)), list(range(n)))], 8, None) for n in lengths
    ]
    batch = collate(samples, with_boundaries=True)
    parts = [cut_batch(batch, rank, size) for rank in range(size)]
    for name, whole in batch.items():
        if name == "boundaries":
            for part in parts:
                np.testing.assert_array_equal(part[name], whole)
        else:
            np.testing.assert_array_equal(join([part[name] for part in parts], 1), whole)
