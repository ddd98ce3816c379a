"""Blocks, shards and forwards: every window once, and the same whatever the number of shards."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lctw_megatron.scoring import window_plan
from lctw_megatron.scoring.window_plan import WindowPlan, forwards
from lctw_megatron.scoring.windows import (
    Windowing,
    document_windows,
    tokens_read,
    window_statistics,
)


@st.composite
def windowings(draw: st.DrawFn) -> Windowing:
    window = draw(st.integers(2, 12))
    sequence_length = draw(st.none() | st.integers(window + 1, 30))
    return Windowing(window, draw(st.integers(1, window)), sequence_length, draw(st.booleans()))


CORPORA = st.lists(st.integers(0, 60), max_size=30)


def lengths_of(corpus: list[int]) -> np.ndarray:
    return np.array(corpus, dtype=np.int32)


@given(CORPORA, windowings())
def test_tokens_read_is_the_sum_of_the_windows_lengths(
    corpus: list[int], windowing: Windowing
) -> None:
    tables = [document_windows(length, *windowing) for length in corpus]
    expected = [int((table[:, 1] - table[:, 0]).sum()) for table in tables]
    assert tokens_read(lengths_of(corpus), *windowing).tolist() == expected


@given(CORPORA, windowings(), st.integers(1, 40), st.integers(1, 9), st.integers(1, 5))
def test_shards_hold_every_window_once_in_the_order_of_the_corpus(
    corpus: list[int], windowing: Windowing, tokens_per_forward: int, count: int, chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_plan, "_CHUNK", chunk)  # documents in memory at a time: no influence
        plan = WindowPlan(lengths_of(corpus), windowing, tokens_per_forward)
        split = [
            table for number in range(count) for table in plan.tables(plan.shard(number, count))
        ]
    expected = [
        [document, *row]
        for document, length in enumerate(corpus)
        for row in document_windows(length, *windowing).tolist()
    ]
    assert [row for table in split for row in table.tolist()] == expected
    # Blocks, and with them the batches, are those of one undivided run.
    whole = WindowPlan(lengths_of(corpus), windowing, tokens_per_forward)
    undivided = list(whole.tables(range(whole.blocks)))
    assert whole.blocks - 1 <= len(undivided) <= whole.blocks
    assert len(split) == len(undivided)
    assert all(np.array_equal(a, b) for a, b in zip(undivided, split, strict=True))
    assert plan.statistics == window_statistics(corpus, *windowing)


@given(CORPORA, windowings(), st.integers(1, 60))
def test_a_forward_fits_its_windows_and_its_budget(
    corpus: list[int], windowing: Windowing, tokens_per_forward: int
) -> None:
    plan = WindowPlan(lengths_of(corpus), windowing, tokens_per_forward)
    for table in plan.tables(range(plan.blocks)):
        batches = list(forwards(table, tokens_per_forward, windowing.window))
        assert sorted(row for rows, _ in batches for row in rows) == list(range(len(table)))
        for rows, width in batches:
            assert width >= (table[rows, 2] - table[rows, 1]).max()
            assert len(rows) == 1 or len(rows) * width <= tokens_per_forward
        whole = forwards(table, tokens_per_forward, windowing.window, windowing.window)
        assert all(width == windowing.window for _, width in whole)


def test_forwards_have_few_shapes_and_little_padding() -> None:
    # Kernels are compiled for every shape on a GPU, at most 64 of them.
    draw = np.random.default_rng(0)
    lengths = lengths_of(np.exp(draw.normal(7.5, 1.5, 20_000)).astype(int).tolist())
    for windowing, most_shapes, most_padding in (
        (Windowing(2048, 512), 5, 1.02),
        (Windowing(2000, 2000, None, True), 45, 1.1),
    ):
        plan = WindowPlan(lengths, windowing, 16384)
        shapes, computed = set(), 0
        for table in plan.tables(range(plan.blocks)):
            for rows, width in forwards(table, 16384, windowing.window):
                shapes.add((len(rows), width))
                computed += len(rows) * width
        assert len(shapes) <= most_shapes
        assert computed <= most_padding * plan.tokens


def test_shards_carry_equal_work_whatever_the_documents() -> None:
    # One long document, many without work: half the corpus is not half the work.
    plan = WindowPlan(lengths_of([100_000] + [50] * 10_000), Windowing(64, 32), 256)
    work = [
        sum(int((t[:, 2] - t[:, 1]).sum()) for t in plan.tables(plan.shard(number, 8)))
        for number in range(8)
    ]
    assert sum(work) == plan.tokens
    assert max(work) - min(work) <= plan.tokens_per_block + 64
    assert [plan.tokens_in(plan.shard(number, 8)) for number in range(8)] == pytest.approx(
        work, abs=64
    )


def test_blocks_do_not_shrink_to_nothing_when_a_window_is_longer_than_a_forward() -> None:
    plan = WindowPlan(lengths_of([500] * 40), Windowing(100, 50), 1)
    sizes = [len(table) for table in plan.tables(range(plan.blocks))]
    assert min(sizes[:-1]) >= window_plan.FORWARDS_PER_BLOCK


def test_planning_a_large_corpus_takes_no_memory_for_its_documents(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "lengths"
    with open(path, "wb") as file:
        for _ in range(20):
            file.write(np.full(100_000, 700, dtype="<i4").tobytes())
    lengths = np.memmap(path, "<i4", "r")
    tracemalloc.start()
    plan = WindowPlan(lengths, Windowing(512, 256), 16384)
    next(plan.tables(plan.shard(7, 10)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan.statistics.windows == len(lengths)
    assert peak < 16e6, f"{peak / 1e6:.1f} MB for {len(lengths)} documents"
