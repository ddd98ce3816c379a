"""evaluation.json: what is in it, and reading it."""

from collections.abc import Sized
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from lctw_megatron.evaluation.saved_result import Count, Shape, read_result
from lctw_megatron.weighting.occurrence import CLASSES

FORMAT = "lctw-megatron evaluation 1"
"""Of evaluation.json. Losses are nats a target. Its keys:

settings    what was asked for, with the identities of weights and data: the same settings give the
            same file
sequences   [document, offset] of each sequence
loss, targets   mean and number of all targets
classes, position, distance   three groups (see ``probes.Probes``), each with `bins` (names, or the
            first values of log buckets; the last bin of `distance` is first_seen), `loss` and
            `targets` of each bin, and for every sequence `sequence_loss` (sums) and
            `sequence_targets`; with a window also `gain`, the mean of short - long loss over the
            targets that have a short loss
short       what a longer context costs: `loss` and `targets` of the targets with fewer than
            `length` tokens before them
longppl     with a window: see ``longppl.summary``, and `evaluator`, the model that picked the key
            tokens
weights     see ``weight_sample``; null for a run with uniform weights; or why there are none
"""


class _Settings(Shape):
    checkpoint: str = ""
    tokens_fingerprint: str
    sequence_length: int
    near: int
    window: int | None
    data: str


class _Group(Shape):
    bins: list[int | str]
    loss: list[float | None]
    targets: list[Count]
    sequence_loss: list[list[float]]
    sequence_targets: list[list[Count]]
    gain: list[float | None] = []

    @model_validator(mode="after")
    def _has_a_value_of_every_bin(self) -> "_Group":
        rows: list[Sized] = [*self.sequence_loss, *self.sequence_targets]
        rows += [self.loss, self.targets]
        rows += [self.gain] if "gain" in self.model_fields_set else []
        if any(len(row) != len(self.bins) for row in rows):
            raise ValueError("not a value of every bin")
        return self


class _WeightClasses(Shape):
    bins: list[str]
    targets: list[Count]
    weight: list[float]

    @model_validator(mode="after")
    def _has_a_value_of_every_bin(self) -> "_WeightClasses":
        self.check_lengths(len(self.bins), "targets", "weight")
        return self


class _Histogram(Shape):
    starts: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2)]
    targets: list[Count]
    weight: list[float]

    @model_validator(mode="after")
    def _has_a_value_of_every_bucket(self) -> "_Histogram":
        if not all(before < after for before, after in pairwise(self.starts)):
            raise ValueError("starts do not rise")
        self.check_lengths(len(self.starts), "targets", "weight")
        return self


class _Page(Shape):
    data: str
    document: int
    first_target: int
    text: list[str]
    weight: list[float]
    long_loss: list[float | None]
    short_loss: list[float | None]

    @model_validator(mode="after")
    def _has_a_value_of_every_target(self) -> "_Page":
        self.check_lengths(len(self.text), "weight", "long_loss", "short_loss")
        return self


class _Weighting(Shape):
    scheme: str


class _Weights(Shape):
    weighting: _Weighting
    sequences: int
    histogram: _Histogram
    classes: _WeightClasses
    page: _Page | None


class _LongPPL(Shape):
    longppl: float | None = None
    perplexity: float | None = None
    key_tokens: Count
    evaluator: str
    keys: str = ""
    sequence_loss: list[float] = []
    sequence_targets: list[Count] = []

    @model_validator(mode="after")
    def _has_sums_of_its_keys(self) -> "_LongPPL":
        # Files of before have neither.
        if "keys" in self.model_fields_set and not self.sequence_loss:
            raise ValueError("keys without sequence_loss")
        return self


class _Evaluation(Shape):
    """What other modules rely on; older files lack some of it."""

    settings: _Settings
    sequences: Annotated[
        list[Annotated[list[int], Field(min_length=2, max_length=2)]], Field(min_length=1)
    ]
    loss: float
    targets: Count
    classes: _Group
    position: _Group
    distance: _Group
    longppl: _LongPPL | None = None
    weights: _Weights | str | None = None

    @model_validator(mode="after")
    def _has_a_row_of_every_sequence(self) -> "_Evaluation":
        groups = (self.classes, self.position, self.distance)
        rows = [part for g in groups for part in (g.sequence_loss, g.sequence_targets)]
        if any(len(row) != len(self.sequences) for row in rows):
            raise ValueError("not a row of every sequence")
        found = self.longppl
        sums: list[Sized] = [found.sequence_loss, found.sequence_targets] if found else []
        if any(sums) and any(len(row) != len(self.sequences) for row in sums):
            raise ValueError("longppl has not a value of every sequence")
        if tuple(self.classes.bins) != CLASSES:
            raise ValueError(f"classes are not {', '.join(CLASSES)}")
        return self


def read_evaluation(path: str | Path) -> dict[str, Any] | None:
    """The contents of an evaluation.json; None if there is none. InputError if it is no such."""
    return read_result(path, FORMAT, "evaluate again", _Evaluation)
