"""LongPPL on numbers computed by hand, and beside the authors' published code."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lctw_megatron.evaluation.longppl import key_tokens, perplexity, summary
from lctw_megatron.scoring.windows import windows

NAN = float("nan")
PUBLISHED = Path(__file__).with_name("published_longppl.json")


def test_key_tokens_gain_from_long_context_and_are_likely_with_it():
    long_loss = np.array([0.5, 0.5, 2.5, 1.9, 0.1, 2.0])
    short_loss = np.array([2.6, 2.5, 9.0, 4.0, NAN, 9.0])
    # 0: LSD 2.1, LCL -0.5. 1: LSD exactly 2. 2: LCL -2.5. 4: not scored. 5: LCL exactly -2.
    expected = [True, False, False, True, False, False]
    assert key_tokens(long_loss, short_loss).tolist() == expected
    assert key_tokens(long_loss, short_loss, alpha=1.9)[1]
    assert key_tokens(long_loss, short_loss, beta=-3.0)[2]


def test_perplexity_is_taken_over_the_chosen_targets_only():
    loss = np.array([1.0, 3.0, 100.0, NAN], dtype=np.float32)
    chosen = np.array([True, True, False, False])
    assert perplexity(loss, chosen) == pytest.approx(math.exp(2.0), rel=1e-12)
    assert perplexity(loss, np.zeros(4, dtype=bool)) is None
    assert perplexity(np.array([1e4]), np.array([True])) == math.inf


def test_the_summary_holds_what_a_paired_comparison_needs():
    loss = np.array([[1.0, 3.0, 100.0, NAN], [2.0, 4.0, 5.0, 0.5]], dtype=np.float32)
    keys = np.array([[True, True, False, False], [False, False, False, True]])
    found = summary(loss, keys)
    assert (found["sequence_loss"], found["sequence_targets"]) == ([4.0, 0.5], [2, 1])
    assert found["longppl"] == pytest.approx(math.exp(4.5 / 3)) and found["key_share"] == 3 / 7
    assert found["keys"] == summary(loss + 1, keys)["keys"] != summary(loss, ~keys)["keys"]
    assert summary(loss, np.zeros_like(keys))["longppl"] is None
    assert summary(loss * 1e4, keys)["perplexity"] is None  # infinity is no JSON


def windowed_loss(tokens: int) -> Callable[[int, int], float]:
    """Made-up nats of a target when the text is read from a start on."""
    draw = np.random.default_rng(7)
    whole = draw.gamma(1.0, 1.0, tokens) + 0.01
    gain = draw.normal(1.5, 2.0, (tokens, tokens))

    def loss(target: int, start: int) -> float:
        return whole[target] if start == 0 else max(0.01, whole[target] + gain[target, start])

    return loss


@pytest.mark.parametrize(
    "published", json.loads(PUBLISHED.read_text()), ids=lambda p: f"{p['tokens']}-{p['alpha']}"
)
def test_equal_losses_give_the_numbers_of_the_published_code(published):
    """longppl 0.3.0 was run with trunc_len 64 and sliding_window 16 on a model that gives just
    these losses; texts that it scores are also computed from the paper's formula."""
    tokens, alpha, beta = (published[name] for name in ("tokens", "alpha", "beta"))
    loss = windowed_loss(tokens)
    long_loss = np.array([np.nan, *(loss(target, 0) for target in range(1, tokens))])
    short_loss = np.full(tokens, np.nan)
    for start, _, first, end in windows(tokens, window=64 + 16, stride=16)[1:].tolist():
        short_loss[first:end] = [loss(target, start) for target in range(first, end)]
    keys = key_tokens(long_loss, short_loss, alpha, beta)
    assert np.flatnonzero(keys).tolist() == published["keys"]
    assert keys.sum() == (published["key_tokens"] or 0)
    scored = np.arange(tokens) > 0
    assert perplexity(long_loss, scored) == pytest.approx(published["perplexity"], rel=1e-6)
    longppl = perplexity(long_loss, keys)
    if not published["keys"]:
        assert longppl is published["longppl"] is None
        return
    assert longppl == pytest.approx(published["longppl"], rel=1e-6)

    total, count = 0.0, 0
    for target in range(64, tokens):
        long_log_p = -loss(target, 0)
        short_log_p = -loss(target, 16 * ((target - 64) // 16))  # 64 to 79 tokens before it
        if long_log_p - short_log_p > alpha and long_log_p > beta:
            total, count = total - long_log_p, count + 1
    assert count == keys.sum()
    assert math.exp(total / count) == pytest.approx(published["longppl"], rel=1e-6)
