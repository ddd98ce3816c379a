"""The loader: every layout sees the same samples, and a resumed run the same ones again."""

import gc
import json
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lctw_megatron.data.zigzag import join
from lctw_megatron.errors import InputError
from tests.data.small_data import count_up, write_sidecar, write_tokens
from tests.data.small_loader import NAN, config, loader, losses


def rows(batches) -> dict[str, list]:
    """Batches, one below the other, as lists that compare NaN equal."""
    batches = list(batches)
    return {
        name: [[repr(x) for x in row] for batch in batches for row in batch[name].tolist()]
        for name in batches[0]
        if name != "boundaries"  # as wide as the batch needs
    }


def test_a_batch_by_eye(folder) -> None:
    data = config(folder, "a", shuffle=False, tails="keep")
    batches = list(loader(data, micro_batch_size=2, scores=True).step(0))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in batches[0].items()} == {
        "tokens": (torch.int64, (2, 8)),
        "labels": (torch.int64, (2, 8)),
        "loss_mask": (torch.float32, (2, 8)),
        "short_loss": (torch.float32, (2, 8)),
        "position_ids": (torch.int64, (2, 8)),
        "sequence_tokens": (torch.int64, (2, 8)),
        "sequence_labels": (torch.int64, (2, 8)),
    }
    # document 0: 9 tokens, one chunk; document 1: 30 tokens, chunks at 0, 8, 16, 24
    assert [b["tokens"][:, 0].tolist() for b in batches] == [[1000, 2000], [2008, 2016]]
    assert batches[0]["tokens"].tolist()[1] == list(range(2000, 2008))
    assert batches[0]["labels"].tolist()[1] == list(range(2001, 2009))
    assert batches[1]["tokens"].tolist()[0] == list(range(2008, 2016))
    # window 3: targets 1 and 2 after the beginning of a piece have no longer context
    np.testing.assert_allclose(
        batches[1]["short_loss"][0],
        [NAN, NAN, 1.11, 1.12, 1.13, 1.14, 1.15, 1.16],
        rtol=1e-6,
    )
    assert "boundaries" not in batches[0]


def test_a_packed_batch_by_eye(folder) -> None:
    data = config(folder, "b", shuffle=False, packing="pack")
    # 11 and 24 targets: full pieces of 8 from both, three from document 1, and a rest of 3
    batches = list(loader(data, micro_batch_size=4, global_batch_size=8).step(0))
    traced = loader(data, global_batch_size=8).documents(0)
    assert [list(map(tuple, sample.pieces)) for sample in traced[:5]] == [
        [(0, 0, 8)],
        [(1, 0, 8)],
        [(1, 8, 8)],
        [(1, 16, 8)],
        [(0, 8, 3)],
    ]
    assert batches[0]["boundaries"].dtype == torch.int32
    assert batches[0]["boundaries"].tolist() == [[0, 8]] * 4
    assert batches[1]["boundaries"].tolist() == [[0, 3, 8], [0, 8, 8], [0, 8, 8], [0, 8, 8]]
    assert batches[1]["loss_mask"].tolist()[0] == [1, 1, 1, 0, 0, 0, 0, 0]


def test_tokens_are_where_documents_says(folder) -> None:
    data = config(folder, packing="pack")
    ours = loader(data, micro_batch_size=4)
    datasets = {source.prefix: source.dataset for source in ours.sources}
    for step in (0, 1, 17):
        (batch,) = ours.step(step)
        traced = ours.documents(step)
        assert [sample.sample for sample in traced] == list(range(4 * step, 4 * step + 4))
        for row, sample in enumerate(traced):
            tokens, labels = [], []
            for document, offset, length in sample.pieces:
                document_tokens = datasets[sample.prefix][document].tolist()
                tokens += document_tokens[offset : offset + length]
                labels += document_tokens[offset + 1 : offset + length + 1]
            assert batch["tokens"][row, : len(tokens)].tolist() == tokens
            assert batch["labels"][row].tolist() == labels + [-100] * (8 - len(labels))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ranks=st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 8), (8, 1)]),
    step=st.integers(0, 30),
    packing=st.sampled_from(["chunk", "pack"]),
)
def test_any_number_of_ranks_sees_the_same_global_batch(folder, ranks, step, packing) -> None:
    data = config(folder, packing=packing)
    dp_size, micro = ranks
    whole = rows(loader(data, global_batch_size=8, scores=True).step(step))
    parts = [
        loader(
            data,
            global_batch_size=8,
            micro_batch_size=micro,
            dp_rank=rank,
            dp_size=dp_size,
            scores=True,
        ).step(step)
        for rank in range(dp_size)
    ]
    dealt = rows(batch for together in zip(*parts, strict=True) for batch in together)
    assert dealt == whole


def test_parts_of_context_parallel_ranks_join_to_the_batch(folder) -> None:
    data = config(folder, packing="pack")
    (whole,) = loader(data, micro_batch_size=4, scores=True).step(3)
    parts = [
        next(loader(data, micro_batch_size=4, scores=True, cp_rank=r, cp_size=2).step(3))
        for r in range(2)
    ]
    assert [part["position_ids"][0].tolist() for part in parts] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    for name, tensor in whole.items():
        got = [part[name] for part in parts]
        if name in ("boundaries", "sequence_tokens", "sequence_labels"):
            assert all(torch.equal(part, tensor) for part in got)
        else:
            assert all(part.is_contiguous() for part in got)
            assert torch.equal(join(got, 1).nan_to_num(-1), tensor.nan_to_num(-1))


def test_reading_ahead_changes_nothing(folder) -> None:
    """In whatever order steps are asked for, and by several iterators at once."""
    data = config(folder)
    fresh = {step: rows(loader(data).step(step)) for step in range(6)}
    one = loader(data)
    for step in (0, 1, 2, 5, 1, 0, 4, 3):
        assert rows(one.step(step)) == fresh[step]
    first, second = one.step(2), one.step(2)
    together = [batch for pair in zip(first, second, strict=True) for batch in pair]
    assert rows(together[0::2]) == rows(together[1::2]) == fresh[2]


def test_the_next_microbatches_are_read_ahead(folder, monkeypatch) -> None:
    readers: dict[int, str] = {}
    ours = loader(config(folder, "a", shuffle=False))
    (source,) = ours.sources
    read = source.read

    def watched(sequence: int):
        readers[sequence] = threading.current_thread().name
        return read(sequence)

    monkeypatch.setattr(source, "read", watched)
    assert len(list(ours.step(0))) == 4
    assert readers.pop(0) == threading.current_thread().name
    assert all(readers.pop(sequence).startswith("lctw-loader") for sequence in (1, 2, 3))


def test_consumed_samples_advance_by_the_global_batch(folder) -> None:
    ours = loader(config(folder))
    assert ours.consumed_samples == 0
    ours.step(0)
    assert ours.consumed_samples == 4
    ours.step(1)
    ours.step(1)  # the second model chunk of an interleaved pipeline
    assert ours.consumed_samples == 8


@pytest.mark.parametrize("change", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(folder, change) -> None:
    """Also with another number of data-parallel ranks before and after."""
    data = config(folder)

    def run(steps, ranks: int, state=None) -> tuple[list, dict]:
        loaders = [loader(data, dp_rank=r, dp_size=ranks) for r in range(ranks)]
        seen = []
        for one in loaders:
            if state:
                one.load_state_dict(state)
        for step in steps:
            parts = [one.step(step) for one in loaders]
            seen.append(rows(batch for row in zip(*parts, strict=True) for batch in row))
        return seen, json.loads(json.dumps(loaders[-1].state_dict()))

    uninterrupted, _ = run(range(7), 1)
    before, state = run(range(3), change[0])
    after, _ = run(range(3, 7), change[1], state)
    assert before + after == uninterrupted


@pytest.mark.parametrize(
    ("fields", "options", "named"),
    [
        ({"sequence_length": 16}, {}, "sequence_length was 8, is 16"),
        ({"packing": "pack"}, {}, "packing was chunk, is pack"),
        ({"tails": "drop"}, {}, "tails was keep, is drop"),
        ({"shuffle": False}, {}, "shuffle was True, is False"),
        ({}, {"seed": 2}, "seed was 1, is 2"),
        ({}, {"global_batch_size": 8}, "global_batch_size was 4, is 8"),
        ({}, {"scores": True}, r"short losses was \[None, None\], is \['"),
        ({"names": "ba"}, {}, r"tokens was \['\w+', '\w+'\], is \['"),
        ({"names": "a"}, {}, r"weights was \[1.0, 2.0\], is \[1.0\]; tokens was"),
    ],
)
def test_resuming_on_other_data_is_refused(folder, fields, options, named) -> None:
    state = loader(config(folder)).state_dict()
    changed = loader(config(folder, **fields), **options)
    with pytest.raises(InputError, match=named) as error:
        changed.load_state_dict(state)
    assert "\n" not in str(error.value)
    assert "pass --allow-changes to tools/train.py" in str(error.value)  # launch.py has no such
    changed.load_state_dict(state, allow_changes=True)


def test_another_batch_size_goes_on_where_the_old_one_stopped(folder) -> None:
    data = config(folder)
    old = loader(data)
    for step in range(3):
        old.step(step)
    new = loader(data, global_batch_size=2)
    new.load_state_dict(old.state_dict(), allow_changes=True)
    assert new.consumed_samples == 12
    new.step(3)
    assert new.consumed_samples == 14
    # and steps before and after can still be traced, also by the next loader
    last = loader(data, global_batch_size=2)
    last.load_state_dict(new.state_dict())
    assert [[s.sample for s in last.documents(step)] for step in (2, 3, 4)] == [
        [8, 9, 10, 11],
        [12, 13],
        [14, 15],
    ]


def test_steps_on_other_data_are_not_told_from_the_data_of_now(folder) -> None:
    old = loader(config(folder))
    old.step(2)
    new = loader(config(folder, "ba"), global_batch_size=2)
    new.load_state_dict(old.state_dict(), allow_changes=True)
    new.step(3)
    after = loader(config(folder, "ba"), scores=True, global_batch_size=4)
    after.load_state_dict(json.loads(json.dumps(new.state_dict())), allow_changes=True)
    for one in (new, after):
        assert [traced.sample for traced in one.documents(3)] == [12, 13]
        with pytest.raises(
            InputError, match=r"step 2 was trained on other data, before .*/b under"
        ):
            one.documents(2)
    other_size = loader(config(folder), global_batch_size=2)
    other_size.load_state_dict(old.state_dict(), allow_changes=True)
    assert other_size.documents(2) == old.documents(2)


def test_scores_of_a_first_window_made_on_purpose_are_used(tmp_path) -> None:
    dataset = write_tokens(tmp_path / "c", count_up([17]))
    data = config(tmp_path, "c", shuffle=False)
    write_sidecar(dataset, losses([17], first_scored=1), score_first_window=True)
    batches = list(loader(data, scores=True, global_batch_size=2).step(0))
    assert torch.isnan(batches[0]["short_loss"]).tolist() == [[False] * 8]
    # its windows went on into the second chunk, so there the first two say nothing
    assert torch.isnan(batches[1]["short_loss"]).tolist() == [[True] * 2 + [False] * 6]
    write_sidecar(dataset, losses([17], first_scored=1), score_first_window=True, sequence_length=8)
    batches = list(loader(data, scores=True, global_batch_size=2).step(0))
    assert torch.isnan(batches[1]["short_loss"]).tolist() == [[False] * 8]


def test_bos_begins_every_sequence(tmp_path) -> None:
    write_tokens(tmp_path / "c", [[1, *range(10, 26)]], bos_id=1, add_bos=True)
    first, second = loader(config(tmp_path, "c", shuffle=False), global_batch_size=2).step(0)
    assert first["tokens"].tolist() == [[1, 10, 11, 12, 13, 14, 15, 16]]
    assert second["tokens"].tolist() == [[1, 18, 19, 20, 21, 22, 23, 24]]
    assert second["labels"].tolist() == [[18, 19, 20, 21, 22, 23, 24, 25]]


def test_price_lines_name_every_corpus(folder) -> None:
    lines = loader(config(folder, tails="drop")).packing_cost_lines()
    assert [line.split(": ")[0] for line in lines] == [str(folder / "a"), str(folder / "b")]
    assert "5 documents -> 6 sequences of 8 (chunk)" in lines[0]
    assert "tails=drop loses 11 targets" in lines[0]


def test_the_reading_thread_ends(folder) -> None:
    def reading() -> int:
        return sum(thread.name.startswith("lctw-loader") for thread in threading.enumerate())

    gc.collect()
    before = reading()
    closed, forgotten = loader(config(folder)), loader(config(folder))
    next(closed.step(0))
    next(forgotten.step(0))
    assert reading() == before + 2
    closed.close()
    assert reading() == before + 1
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("lctw-loader")]
    del forgotten
    gc.collect()
    for thread in threads:
        thread.join(timeout=10)
    assert reading() <= before
