"""Recall: can a model say at the end of a long text what stands somewhere in it?

By teacher forcing: the sample holds its answer, and the model's losses of the answer's tokens are
looked at in one forward pass. No generation, so it is cheap enough for training and runs under
every layout; "right" means that every token of the answer was the likeliest, which is what greedy
decoding would have given.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

from lctw_megatron.data.batch import Sample
from lctw_megatron.evaluation.recall_samples import RecallSample
from lctw_megatron.evaluation.sequence_losses import SequenceLosses


@dataclass
class Cell:
    """What was measured at one task, length and depth: a value of each sample."""

    nats: list[float] = field(default_factory=list)
    """Σ loss of the answers' tokens."""
    tokens: list[int] = field(default_factory=list)
    right: list[float] = field(default_factory=list)
    """Share of the sample's answers that are right to the last token."""
    short_nats: list[float] = field(default_factory=list)
    """Likewise with the last tokens of the context only; empty if not measured."""
    short_right: list[float] = field(default_factory=list)

    def add(self, measured: "Measured") -> None:
        """One sample more."""
        sample, found, short = measured
        nats, right = _score(sample, found)
        self.nats.append(nats)
        self.right.append(right)
        self.tokens.append(sum(map(len, sample.answers)))
        if short is not None:
            nats, right = _score(sample, short)
            self.short_nats.append(nats)
            self.short_right.append(right)


def _score(sample: RecallSample, found: np.ndarray) -> tuple[float, float]:
    """Σ nats, share right."""
    # The last id is the last input's target, and short contexts end where long ones do.
    places = [answer - len(sample.ids) for answer in sample.answers]
    nats = float(found[0, np.concatenate(places)].sum(dtype=np.float64))
    return nats, float(np.mean([found[1, place].all() for place in places]))


class Measured(NamedTuple):
    """A sample and what the model makes of it: float32 [2, S], the loss of every target and whether
    it is the likeliest token."""

    sample: RecallSample
    found: np.ndarray
    short: np.ndarray | None
    """Of ``RecallSample.short``, if asked for."""


def measure(
    model: SequenceLosses,
    samples: Iterator[RecallSample],
    length: int,
    window: int | None = None,
    bos_id: int | None = None,
) -> Iterator[Measured]:
    """``samples`` of one ``length`` with what the model makes of them, and with ``window`` also of
    a context of only so many tokens. A collective call."""
    for some in _ahead(samples, model.sequences_at_once(length)):
        found = model.losses_and_likeliest([sample.whole() for sample in some])
        short = None
        if window is not None:
            short = _in_turns(model, [sample.short(window, bos_id) for sample in some])
        for row, sample in enumerate(some):
            yield Measured(sample, found[:, row], None if short is None else short[:, row])


def _ahead(samples: Iterator[RecallSample], at_once: int) -> Iterator[list[RecallSample]]:
    """``samples`` in lists; while the model works on one the next is made."""

    def make() -> list[RecallSample]:
        return list(islice(samples, at_once))

    with ThreadPoolExecutor(1) as maker:
        coming = maker.submit(make)
        while some := coming.result():
            coming = maker.submit(make)
            yield some


def _in_turns(model: SequenceLosses, samples: Sequence[Sample]) -> np.ndarray:
    at_once = model.sequences_at_once(len(samples[0].tokens))
    parts = [
        model.losses_and_likeliest(samples[begin : begin + at_once])
        for begin in range(0, len(samples), at_once)
    ]
    return np.concatenate(parts, axis=1)
