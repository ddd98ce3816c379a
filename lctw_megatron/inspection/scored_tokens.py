"""A token dataset with a long and a short loss for its targets, and the weights that follow.

The losses come from two sidecars (``tools/score.py``), so that weights are computed without any
model; or, for a look at a few sequences, from a checkpoint.

Legend of shapes: n targets, S tokens of a sequence.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lctw_megatron.config.load import load_fragment, parse_override
from lctw_megatron.data.batch import PieceData, Sample, assemble
from lctw_megatron.data.indexed_array import index_path
from lctw_megatron.data.sequence_cache import cached_index
from lctw_megatron.data.sequences import Packing, Piece, SequenceIndex, Tails, build_index
from lctw_megatron.data.sidecar import Sidecar, sidecar_prefix
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.probes import distance_of
from lctw_megatron.evaluation.sequence_weights import scores, sequence_weights
from lctw_megatron.weighting.parse import Weighting, parse_weighting

if TYPE_CHECKING:
    from lctw_megatron.evaluation.model_losses import ModelLosses

BATCH_TOKENS = 1 << 16
"""Sequences are weighed together up to this many tokens."""
LONG, SHORT = "long_loss", "short_loss"
"""The usual names of the two sidecars."""


@dataclass(frozen=True)
class SequenceSettings:
    """How documents are made into sequences, as training does it."""

    sequence_length: int | None
    """None: every document is one sequence."""
    packing: Packing = "chunk"
    tails: Tails = "keep"
    index_cache: str | None = None


@dataclass(frozen=True)
class ScoredTargets:
    """The live targets of one sequence in order, [n] each."""

    document: np.ndarray
    """int64: which document it is in"""
    token: np.ndarray
    """int64: which token of the document it is"""
    id: np.ndarray
    """int64: token id"""
    long_loss: np.ndarray
    """float32, nats; NaN where not known"""
    short_loss: np.ndarray
    """Likewise; NaN where not scored"""
    weight: np.ndarray
    """float32"""
    score: np.ndarray
    """float32; NaN where not scored"""
    distance: np.ndarray
    """int64: how far back its token last stood; -1 for first seen"""

    @property
    def difference(self) -> np.ndarray:
        """short_loss - long_loss, float32: positive where long context helps."""
        return self.short_loss - self.long_loss

    def values(self, by: str) -> np.ndarray:
        """weight, score, difference, long_loss or short_loss."""
        return getattr(self, by)

    def __len__(self) -> int:
        return len(self.token)


def read_weighting(name: str, overrides: Sequence[str] = ()) -> Weighting:
    """A fragment of configs/weightings (or a .yaml file), with FIELD=VALUE changes. InputError."""
    values = load_fragment("weighting", name, "--weighting")
    for text in overrides:
        path, value = parse_override(text)
        values[".".join(path)] = value
    return parse_weighting(values)


class ScoredTokens:
    """Sequences of a dataset with the losses and weights of their targets."""

    def __init__(
        self,
        dataset: TokenDataset,
        weighting: Weighting,
        settings: SequenceSettings,
        long_name: str = LONG,
        short_name: str = SHORT,
        model: "ModelLosses | None" = None,
        windows: tuple[int, int] | None = None,
        by: str = "weight",
    ) -> None:
        """model: gives the long losses instead of the sidecar ``long_name``; and with ``windows``,
        (window, stride), the short ones instead of ``short_name``. by: what is looked at. A sidecar
        of the usual name that neither it nor the scheme needs may be missing. Raises InputError for
        one that is needed, or does not fit.
        """
        self.dataset = dataset
        self.weighting = weighting
        self.settings = settings
        self.model = model
        self.windows = windows
        scheme = weighting.scheme
        long = scheme.needs_long_loss or long_name != LONG or by in (LONG, "difference")
        short = scheme.needs_short_loss or short_name != SHORT or by in (SHORT, "difference")
        self.long = None if model else self._open(long_name, long)
        self.short = None if windows else self._open(short_name, short)
        for sidecar in (self.long, self.short):
            if sidecar is not None:
                sidecar.check(sequence_length=settings.sequence_length, packing=settings.packing)
        self._bos_id = dataset.manifest.tokenizer.first_id
        self._index: SequenceIndex | None = None

    @property
    def index(self) -> SequenceIndex:
        """All sequences, from the same cache as training's; not for documents as sequences."""
        if self._index is None:
            settings = self.settings
            assert settings.sequence_length
            self._index, _ = cached_index(
                self.dataset,
                settings.sequence_length,
                settings.packing,
                settings.tails,
                settings.index_cache,
                "--index-cache",
            )
        return self._index

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.index if self.settings.sequence_length else self.dataset)

    def sequence(self, number: int) -> list[Piece]:
        """The pieces of a sequence. InputError if there is none of this number."""
        if not 0 <= number < len(self):
            there = f"only 0 to {len(self) - 1}" if len(self) else "nor any other"
            raise InputError(f"{self.dataset.prefix}: there is no sequence {number}, {there}")
        if self.settings.sequence_length:
            return self.index.pieces(number)
        return [Piece(number, 0, int(self.dataset.lengths[number]) - 1)]

    def document(self, number: int) -> list[list[Piece]]:
        """The sequences of one document: one, or chunks of S tokens. InputError likewise."""
        if not 0 <= number < len(self.dataset):
            raise InputError(
                f"{self.dataset.prefix}: there is no document {number}, only 0 to "
                f"{len(self.dataset) - 1}"
            )
        length = int(self.dataset.lengths[number])
        if length < 2:
            raise InputError(
                f"{self.dataset.prefix}: document {number} has {length} tokens and so no target"
            )
        if not self.settings.sequence_length:
            return [[Piece(number, 0, length - 1)]]
        if self.settings.packing == "pack":
            raise InputError(
                "--document with --packing pack: the weights of its last part depend on what it is "
                "packed with; look at it with --sequence N"
            )
        lengths = np.array([length])
        index = build_index(lengths, self.settings.sequence_length, "chunk", self.settings.tails)
        return [
            [Piece(number, piece.offset, piece.length) for piece in index.pieces(sequence)]
            for sequence in range(len(index))
        ]

    def all_sequences(self, most: int | None = None) -> Iterator[list[Piece]]:
        """Those that hold a target, in order; of more than ``most`` so many, evenly spaced."""
        available = len(self)
        count = available if most is None else min(most, available)
        for place in range(count):
            pieces = self.sequence(place * available // count)
            if pieces[0].length > 0:
                yield pieces

    def read(self, sequences: Iterator[list[Piece]]) -> Iterator[ScoredTargets]:
        """The targets of each sequence. Weighs a bounded number of sequences at a time."""
        batch: list[list[Piece]] = []
        for pieces in sequences:
            if batch and (self._length(batch[0]) != self._length(pieces) or self._full(batch)):
                yield from self._score_batch(batch)
                batch = []
            batch.append(pieces)
        if batch:
            yield from self._score_batch(batch)

    def _full(self, batch: list[list[Piece]]) -> bool:
        return (len(batch) + 1) * self._length(batch[0]) > BATCH_TOKENS

    def _length(self, pieces: list[Piece]) -> int:
        return self.settings.sequence_length or pieces[0].length

    def _score_batch(self, batch: list[list[Piece]]) -> Iterator[ScoredTargets]:
        samples = [self._sample(pieces) for pieces in batch]
        if self.model is not None:
            long_loss = self.model.losses(samples)
        else:
            long_loss = np.stack([self._stream(self.long, pieces) for pieces in batch])
        if self.windows is not None and self.model is not None:
            short_loss = self.model.short_losses(samples, *self.windows, self._bos_id)
        else:
            short_loss = np.stack([self._stream(self.short, pieces) for pieces in batch])
        weights, live = sequence_weights(self.weighting, samples, long_loss, short_loss)
        found = scores(self.weighting, samples, long_loss, short_loss)
        for row, (sample, pieces) in enumerate(zip(samples, batch, strict=True)):
            keep = live[row]
            document, token = _places(sample, pieces)
            yield ScoredTargets(
                document[keep],
                token[keep],
                sample.labels[keep],
                long_loss[row, keep],
                short_loss[row, keep],
                weights[row, keep],
                found[row, keep],
                distance_of(sample)[keep],
            )

    def _sample(self, pieces: list[Piece]) -> Sample:
        parts = [
            PieceData(d, offset, self.dataset.get(d, offset, length + 1).astype(np.int64))
            for d, offset, length in pieces
        ]
        return assemble(parts, self._length(pieces), self._bos_id)

    def _stream(self, sidecar: Sidecar | None, pieces: list[Piece]) -> np.ndarray:
        """float32 [S]: a sidecar's values of a sequence's targets, NaN where there are none."""
        values = np.full(self._length(pieces), np.nan, dtype=np.float32)
        if sidecar is None:
            return values
        at = 0
        for document, offset, length in pieces:
            if sidecar is self.short:  # as training reads it
                values[at : at + length] = sidecar.usable(document, offset, length)
            else:
                values[at : at + length] = sidecar.get(document, offset + 1, length)
            at += length
        return values

    def _open(self, name: str, needed: bool) -> Sidecar | None:
        exists = os.path.exists(index_path(sidecar_prefix(self.dataset.prefix, name)))
        return Sidecar(self.dataset, name) if needed or exists else None


def _places(sample: Sample, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """Document and token of the target at each position of a sequence: int64 [S] both."""
    document = np.full(len(sample.labels), -1, dtype=np.int64)
    token = document.copy()
    at = 0
    for number, offset, length in pieces:
        document[at : at + length] = number
        token[at : at + length] = offset + 1 + np.arange(length)
        at += length
    return document, token


def open_with_model(
    dataset: TokenDataset,
    weighting: Weighting,
    settings: SequenceSettings,
    checkpoint: str,
    windows: tuple[int, int | None] | None,
    short_name: str,
    by: str,
) -> ScoredTokens:
    """Losses of a checkpoint, for a look at a few sequences: long ones, and with ``windows``,
    (window, stride or None), short ones. The sequence length defaults to its training's.
    """
    from lctw_megatron.config.schema import LayoutConfig
    from lctw_megatron.evaluation.evaluate import EvaluationSettings, complete
    from lctw_megatron.evaluation.model_losses import ModelLosses, check_data
    from lctw_megatron.model.checkpoint import agreed_checkpoint

    window, stride = windows or (None, None)
    wanted = EvaluationSettings(settings.sequence_length, 1, window, stride)
    place, manifest = agreed_checkpoint(checkpoint)
    completed = complete(wanted, place, manifest)
    length = completed.sequence_length
    assert length
    check_data(place, manifest, dataset)
    model = ModelLosses(place, LayoutConfig(), length)
    return ScoredTokens(
        dataset,
        weighting,
        replace(settings, sequence_length=length),
        short_name=short_name,
        model=model,
        windows=(completed.window, completed.stride)
        if completed.window and completed.stride
        else None,
        by=by,
    )
