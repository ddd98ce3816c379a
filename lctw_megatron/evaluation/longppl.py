"""LongPPL: perplexity on the tokens for which a long context matters.

Fang, Wang, Liu, Zhang, Jegelka, Gao, Ding, Wang, "What is Wrong with Perplexity for Long-context
Language Modeling?", ICLR 2025 (arXiv:2410.23771). An *evaluator* model reads every target with the
whole context and with a short one, and picks the key tokens, where

    long-short difference    LSD = log p_long - log p_short > α    (long context makes it likelier)
    long-context likelihood  LCL = log p_long               > β    (and then likely at all)

LongPPL of the model under test is exp(mean long loss) over the key tokens. Models are comparable
only on the same key tokens: give all of them one evaluator. The paper's settings are α = 2, β = -2.
Its published code gives a target from 4,096 to 5,119 tokens of short context; windows of 5,120
tokens, 1,024 apart, do the same here (WINDOW, STRIDE).

On equal losses of one text the key tokens and LongPPL are those of the authors' longppl 0.3.0. What
remains: here all key tokens of all texts count alike, there every text's LongPPL is averaged,
weighted by its key tokens; here short contexts begin with BOS where the tokenizer puts one, there
only a whole text does, and only for the evaluator; here one tokenizer serves both models, there key
tokens are matched by characters. A text that leaves its last window one token ends in an error
there; here that token is scored with 5,120 tokens of context.

Pure numpy: losses are arrays of one shape, in nats; NaN = not scored.
"""

import hashlib
import math
from typing import Any

import numpy as np

from lctw_megatron.weighting.schemes import KEY_ALPHA, KEY_BETA

WINDOW = 5120
STRIDE = 1024


def key_tokens(
    long_loss: np.ndarray, short_loss: np.ndarray, alpha: float = KEY_ALPHA, beta: float = KEY_BETA
) -> np.ndarray:
    """bool: the targets with LSD > ``alpha`` and LCL > ``beta`` under the evaluator's losses.

    A target without a short loss is none.
    """
    with np.errstate(invalid="ignore"):
        return (short_loss - long_loss > alpha) & (-long_loss > beta)


def perplexity(loss: np.ndarray, chosen: np.ndarray) -> float | None:
    """exp of the mean of ``loss`` where ``chosen``; None if nothing is, infinity beyond floats."""
    if not chosen.any():
        return None
    mean = float(loss[chosen].mean(dtype=np.float64))
    return math.exp(mean) if mean < 700 else math.inf


def summary(loss: np.ndarray, keys: np.ndarray) -> dict[str, Any]:
    """What evaluation.json says of the losses [N, S] of the model under test and the key tokens,
    bool [N, S]: LongPPL and the perplexity of all targets (None beyond floats), how many key tokens
    there are, their summed loss and number in every sequence, for paired comparisons, and a digest
    of which they are."""
    live = ~np.isnan(loss)
    found = {"longppl": perplexity(loss, keys), "perplexity": perplexity(loss, live)}
    values: dict[str, Any] = {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in found.items()
    }
    return values | {
        "key_tokens": int(keys.sum()),
        "key_share": int(keys.sum()) / int(live.sum()),
        "sequence_loss": np.where(keys, loss, 0).sum(1, dtype=np.float64).round(6).tolist(),
        "sequence_targets": keys.sum(1).tolist(),
        "keys": hashlib.blake2b(np.packbits(keys).tobytes(), digest_size=16).hexdigest(),
    }
