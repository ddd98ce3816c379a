"""Windows: every target once, with as much context as the stride promises."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lctw_megatron.errors import InputError
from lctw_megatron.scoring.windows import (
    check_windows,
    document_windows,
    regions,
    window_statistics,
    windows,
)

TINY_LLAMA = Path(__file__).parents[1] / "golden" / "tiny_llama"


def test_hand_computed_windows() -> None:
    assert windows(10, 4, 2).tolist() == [
        [0, 4, 1, 4],
        [2, 6, 4, 6],
        [4, 8, 6, 8],
        [6, 10, 8, 10],
    ]
    # stride does not divide: the last window is shorter
    assert windows(9, 4, 3).tolist() == [[0, 4, 1, 4], [3, 7, 4, 7], [6, 9, 7, 9]]
    # stride == window: tokens 4 and 8 begin a window and have no context in it
    assert windows(10, 4, 4).tolist() == [[0, 4, 1, 4], [4, 8, 5, 8], [8, 10, 9, 10]]
    # a last token alone has no window of its own: the last input of the one before predicts it
    assert windows(9, 4, 4).tolist() == [[0, 4, 1, 4], [4, 8, 5, 9]]
    assert windows(9, 4, 2).tolist() == [[0, 4, 1, 4], [2, 6, 4, 6], [4, 8, 6, 9]]
    assert windows(5, 4, 2).tolist() == [[0, 4, 1, 5]]
    assert windows(6, 4, 2).tolist() == [[0, 4, 1, 4], [2, 6, 4, 6]]
    assert windows(3, 4, 2).tolist() == [[0, 3, 1, 3]]
    assert windows(4, 4, 2).tolist() == [[0, 4, 1, 4]]
    assert windows(1, 4, 2).tolist() == windows(0, 4, 2).tolist() == []


def test_the_papers_sequence_takes_four_windows_after_the_first() -> None:
    table = windows(32768 + 1, 8192, 6144)[1:]
    assert table[:, 0].tolist() == [6144, 12288, 18432, 24576]
    assert table[-1].tolist() == [24576, 32768, 26624, 32769]


def test_regions_share_the_token_that_is_a_label_in_one_and_an_input_in_the_next() -> None:
    assert regions(10).tolist() == [[0, 10]]
    assert regions(10, 4).tolist() == [[0, 5], [4, 9], [8, 10]]
    assert regions(9, 4).tolist() == [[0, 5], [4, 9]]  # token 8 is only a label
    assert regions(1, 4).tolist() == regions(1).tolist() == []


def test_windows_restart_at_every_multiple_of_the_sequence_length() -> None:
    # regions [0, 8) [7, 15) [14, 17)
    assert document_windows(17, 4, 2, sequence_length=7).tolist() == [
        [0, 4, 1, 4],
        [2, 6, 4, 6],
        [4, 8, 6, 8],
        [7, 11, 8, 11],
        [9, 13, 11, 13],
        [11, 15, 13, 15],
        [14, 17, 15, 17],
    ]
    # Without the first windows the last region needs none.
    assert document_windows(17, 4, 2, 7, score_first_window=False).tolist() == [
        [2, 6, 4, 6],
        [4, 8, 6, 8],
        [9, 13, 11, 13],
        [11, 15, 13, 15],
    ]


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, int | None]:
    window = draw(st.integers(2, 12))
    sequence_length = draw(st.none() | st.integers(window + 1, 30))
    return draw(st.integers(0, 120)), window, draw(st.integers(1, window)), sequence_length


@given(shapes(), st.booleans())
@settings(max_examples=500, deadline=None)
def test_every_target_is_scored_once_with_enough_context(
    shape: tuple[int, int, int, int | None], score_first_window: bool
) -> None:
    length, window, stride, sequence_length = shape
    table = document_windows(length, window, stride, sequence_length, score_first_window)
    region = sequence_length or max(length, 1)
    times = np.zeros(length, dtype=int)
    for start, end, score_start, score_end in table.tolist():
        assert 0 <= start < score_start < score_end <= length and end - start <= window
        region_end = min(start // region * region + region + 1, length)  # of the window's region
        assert score_end == end or (score_end == end + 1 == region_end and end - start == window)
        times[score_start:score_end] += 1
        context = score_start - start
        if score_start % region == 1 and context == 1 and score_first_window:
            continue  # a region's first window
        assert context == max(window - stride, 1)
    assert times[:1].sum() == 0 and (times <= 1).all()
    assert (np.diff(table[:, 2]) > 0).all()
    target = np.arange(1, length)
    in_region = (target - 1) % region + 1
    is_last = (in_region == region) | (target == length - 1)  # an input before it predicts it
    expected = np.ones(len(target), dtype=int)
    if stride == window:
        expected[(in_region % window == 0) & ~is_last] = 0
    if not score_first_window:
        expected[(in_region < window) | ((in_region == window) & is_last)] = 0
    assert times[1:].tolist() == expected.tolist()


@given(
    st.lists(st.integers(0, 90), max_size=6),
    shapes(),
    st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_statistics_equal_those_of_the_windows_themselves(
    lengths: list[int], shape: tuple[int, int, int, int | None], score_first_window: bool
) -> None:
    _, window, stride, sequence_length = shape
    statistics = window_statistics(lengths, window, stride, sequence_length, score_first_window)
    tables = [
        document_windows(length, window, stride, sequence_length, score_first_window)
        for length in lengths
    ]
    rows = [row for table in tables for row in table.tolist()]
    contexts = [target - start for start, _, first, last in rows for target in range(first, last)]
    assert statistics.windows == len(rows)
    assert statistics.tokens == sum(end - start for start, end, _, _ in rows)
    assert statistics.scored == len(contexts)
    assert statistics.min_context == min(contexts, default=0)
    mean = float(np.mean(contexts)) if contexts else 0.0
    assert statistics.mean_context == pytest.approx(mean, rel=1e-12)


def test_the_papers_setting_has_2048_to_8191_tokens_of_context() -> None:
    statistics = window_statistics([10**9], 8192, 6144, score_first_window=False)
    assert statistics.min_context == 2048
    assert statistics.mean_context == pytest.approx((2048 + 8191) / 2, rel=1e-4)
    assert statistics.tokens / 10**9 == pytest.approx(8192 / 6144, rel=1e-4)


@pytest.mark.parametrize(
    "window, stride, sequence_length, message",
    [
        (8, 9, None, "stride 9 > window 8: .*choose a stride of at most the window"),
        (8, 4, 8, "window 8 >= sequence length 8: .*choose a smaller window"),
        (9, 4, 8, "window 9 >= sequence length 8"),
        (1, 1, None, "window is 1; a window needs at least 2 tokens"),
        (8, 0, None, "stride is 0"),
    ],
)
def test_impossible_windows_are_refused(
    window: int, stride: int, sequence_length: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_windows(window, stride, sequence_length)
    with pytest.raises(InputError, match=message):
        document_windows(100, window, stride, sequence_length)
    with pytest.raises(InputError, match=message):
        window_statistics([100], window, stride, sequence_length)


def test_short_losses_of_these_windows_equal_the_golden_ones() -> None:
    """The golden Hugging Face model, run over our windows, gives the golden losses (1e-4)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA / "model", dtype=torch.float32)
    with np.load(TINY_LLAMA / "scores.npz") as file:
        tokens, golden = file["tokens"], file["short_loss"]
    table = windows(tokens.shape[1], window=128, stride=96)
    assert len(table) == 5
    found = np.full(golden.shape, np.nan, dtype=np.float32)
    for start, end, score_start, score_end in table.tolist():
        inputs = torch.from_numpy(tokens[:, start:end]).long()
        with torch.no_grad():
            logits = model(inputs).logits[:, score_start - start - 1 : score_end - start - 1]
        labels = torch.from_numpy(tokens[:, score_start:score_end]).long()
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2).float(), labels, reduction="none"
        )
        found[:, score_start - 1 : score_end - 1] = loss.numpy()  # golden: target t at t - 1
    np.testing.assert_allclose(found, golden, atol=1e-4, rtol=0)
