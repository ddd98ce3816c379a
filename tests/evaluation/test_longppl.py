"""LongPPL on numbers computed by hand."""

import math

import numpy as np
import pytest

from lctw_megatron.evaluation.longppl import key_tokens, perplexity

NAN = float("nan")


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
