"""Context and distance of every target, and what is summed up by them, by hand."""

import numpy as np
import pytest

from lctw_megatron.data.batch import PieceData, Sample, assemble
from lctw_megatron.evaluation.probes import (
    Probes,
    class_of,
    context_of,
    distance_of,
    short_length,
)

NAN = float("nan")


def sample() -> Sample:
    """Two pieces of 4 and 3 targets and one position of padding."""
    return assemble(
        [
            PieceData(0, 0, np.array([7, 8, 7, 9, 8])),
            PieceData(5, 0, np.array([8, 8, 7, 8])),
        ],
        8,
        None,
    )


def test_context_counts_the_inputs_of_the_piece():
    assert context_of(sample()).tolist() == [1, 2, 3, 4, 1, 2, 3, 0]


def test_distance_looks_back_no_further_than_the_piece():
    #             labels:                  8   7  9  8   8   7  8  -
    assert distance_of(sample()).tolist() == [-1, 2, -1, 3, 1, -1, 2, -1]


def test_classes():
    assert class_of(np.array([-1, 1, 4, 5]), near=4).tolist() == [2, 0, 0, 1]


def test_the_short_length_is_a_bucket_s_beginning_within_a_quarter_of_the_sequence():
    lengths = {32768: 2048, 8192: 2048, 3000: 512, 64: 16, 2: 1}
    assert {length: short_length(length) for length in lengths} == lengths


def test_probes_by_hand():
    probes = Probes(sequences=1, sequence_length=8, near=2)
    long_loss = np.array([1, 2, 3, 4, 5, 6, 7, NAN])
    short_loss = np.array([NAN, NAN, NAN, 6, NAN, NAN, 8, NAN])
    probes.add(0, long_loss, short_loss, context_of(sample()), distance_of(sample()))
    found = probes.summary(with_gain=True)
    classes = found["classes"]
    assert classes["bins"] == ["near", "far", "first_seen"]
    assert classes["loss"] == [pytest.approx((2 + 5 + 7) / 3), 4.0, pytest.approx((1 + 3 + 6) / 3)]
    assert classes["targets"] == [3, 1, 3]
    assert classes["gain"] == [1.0, 2.0, None]
    assert found["position"]["bins"] == [1, 2, 3, 4, 6]
    assert found["position"]["loss"] == [3.0, 4.0, 5.0, 4.0, None]
    assert found["short"] == {"length": 2, "loss": 3.0, "targets": 2}
    assert found["distance"]["bins"] == [1, 2, 3, 4, 6, "first_seen"]
    assert found["distance"]["targets"] == [1, 2, 1, 0, 0, 3]
    assert found["distance"]["gain"] == [None, 1.0, 2.0, None, None, None]
    for group in ("classes", "position", "distance"):
        assert np.sum(found[group]["sequence_loss"]) == 28  # padding is in none
