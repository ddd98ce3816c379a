"""Validation batches: the same on every layout, padded to whole microbatches."""

from pathlib import Path

import pytest

from lctw_megatron.config.schema import Corpus, DataConfig
from lctw_megatron.data.validation import ValidationLoader
from tests.data.small_data import count_up, write_tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    """Corpus a has 5 chunks of 4 targets, b has 2; tokens say where they are."""
    folder: Path = tmp_path_factory.mktemp("held_out")
    write_tokens(folder / "a", count_up([9, 13]))
    write_tokens(folder / "b", [[9000 + t for t in range(9)]])
    corpora = [Corpus(prefix=str(folder / name), weight=i) for i, name in ((1, "a"), (5, "b"))]
    return DataConfig(train=[], validation=corpora, sequence_length=4)


def first_tokens(batches) -> list[list[int | None]]:
    """The first token of every row, None where the row is masked altogether."""
    return [
        [
            int(token) if mask.any() else None
            for token, mask in zip(batch["tokens"][:, 0], batch["loss_mask"], strict=True)
        ]
        for batch in batches
    ]


def test_all_sequences_once_and_then_masked_rows(data) -> None:
    loader = ValidationLoader(data, sequences=100, micro_batch_size=4)
    expected = [[1000, 1004, 2000, 2004], [2008, 9000, 9004, None]]
    assert first_tokens(loader) == first_tokens(loader) == expected
    assert len(loader) == 2
    padding = {name: tensor[3].tolist() for name, tensor in list(loader)[1].items()}
    assert padding == {
        "tokens": [0] * 4,
        "labels": [-100] * 4,
        "loss_mask": [0] * 4,
        "position_ids": [0, 1, 2, 3],
        "sequence_tokens": [0] * 4,
        "sequence_labels": [-100] * 4,
    }


def test_microbatches_come_in_multiples(data) -> None:
    loader = ValidationLoader(data, sequences=3, micro_batch_size=1, multiple=2)
    assert len(loader) == 4
    assert first_tokens(loader) == [[1000], [2000], [2008], [None]]


def test_a_few_sequences_are_evenly_spaced(data) -> None:
    loader = ValidationLoader(data, sequences=3, micro_batch_size=1)
    assert first_tokens(loader) == [[1000], [2000], [2008]]  # numbers 0, 2 and 4 of 7


def test_every_rank_has_as_many_microbatches(data) -> None:
    ranks = [
        ValidationLoader(data, sequences=100, micro_batch_size=2, dp_rank=r, dp_size=3)
        for r in range(3)
    ]
    assert [first_tokens(rank) for rank in ranks] == [
        [[1000, 1004], [9004, None]],
        [[2000, 2004], [None, None]],
        [[2008, 9000], [None, None]],
    ]
    assert [len(rank) for rank in ranks] == [2, 2, 2]


def test_context_parallel_ranks_get_their_parts(data) -> None:
    parts = [
        next(iter(ValidationLoader(data, sequences=1, micro_batch_size=1, cp_rank=r, cp_size=2)))
        for r in range(2)
    ]
    assert [part["tokens"].tolist() for part in parts] == [[[1000, 1003]], [[1001, 1002]]]


def test_packed_padding_rows_are_one_piece(data) -> None:
    packed = data.model_copy(update={"packing": "pack"})
    (*_, last) = ValidationLoader(packed, sequences=100, micro_batch_size=4)
    assert last["boundaries"].tolist()[-1] == [0, 4]


def test_no_validation_data_is_no_batches() -> None:
    none = DataConfig(train=[], sequence_length=4)
    assert list(ValidationLoader(none, sequences=3, micro_batch_size=1)) == []
