"""From the pieces of a sequence to a sample, and from samples to a batch. Pure numpy.

Legend of shapes: b sequences of a batch, S input tokens of a sequence, L inputs of a piece,
P pieces of the fullest sequence of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lctw_megatron.data import zigzag

IGNORE = -100
"""The label of a position that is not a target (as in torch and Hugging Face)."""

PADDING = 0
"""The input token where there is none; no live position sees it."""

PER_TOKEN = ("tokens", "labels", "loss_mask", "short_loss", "position_ids")
"""The streams of a batch that are cut over context-parallel ranks."""


@dataclass(frozen=True)
class PieceData:
    """A piece with what was read for it."""

    document: int
    offset: int
    tokens: np.ndarray
    """Integers [L+1]: the inputs and, one further, the labels."""
    short_loss: np.ndarray | None = None
    """float32 [L], nats, of the targets; NaN = not scored."""


@dataclass(frozen=True)
class Sample:
    """One sequence, whole."""

    tokens: np.ndarray
    """int64 [S]; PADDING after the last piece."""
    labels: np.ndarray
    """int64 [S]; IGNORE after the last piece."""
    short_loss: np.ndarray | None
    """float32 [S]; NaN = not scored, padding included."""
    boundaries: np.ndarray
    """int32 [pieces+1]: piece p covers boundaries[p]:boundaries[p+1]; padding is a last piece."""
    documents: np.ndarray
    """int64 [pieces]; -1 for the padding."""


def assemble(pieces: Sequence[PieceData], sequence_length: int, bos_id: int | None) -> Sample:
    """Lay pieces of together at most ``sequence_length`` inputs side by side; the rest is padding.

    ``bos_id`` (None: the tokenizer has none) replaces the first input of a piece that begins in the
    middle of its document, since models with a BOS expect every context to begin with it; a
    document's own beginning has its BOS stored. No pieces at all make a sequence of padding.
    """
    tokens = np.full(sequence_length, PADDING, dtype=np.int64)
    labels = np.full(sequence_length, IGNORE, dtype=np.int64)
    scored = any(piece.short_loss is not None for piece in pieces)
    short_loss = np.full(sequence_length, np.nan, dtype=np.float32) if scored else None
    boundaries, documents = [0], []
    for piece in pieces:
        start, end = boundaries[-1], boundaries[-1] + len(piece.tokens) - 1
        tokens[start:end] = piece.tokens[:-1]
        labels[start:end] = piece.tokens[1:]
        if piece.offset > 0 and bos_id is not None:
            tokens[start] = bos_id
        if short_loss is not None:
            assert piece.short_loss is not None
            short_loss[start:end] = piece.short_loss
        boundaries.append(end)
        documents.append(piece.document)
    if boundaries[-1] < sequence_length:
        boundaries.append(sequence_length)
        documents.append(-1)
    return Sample(
        tokens,
        labels,
        short_loss,
        np.array(boundaries, dtype=np.int32),
        np.array(documents, dtype=np.int64),
    )


def usable_scores(short_loss: np.ndarray, window: int, keep_first_window: bool) -> np.ndarray:
    """A copy of the sidecar's ``short_loss`` [L] of a piece without the scores that say nothing.

    Position i predicts the token i + 1 after the beginning of the piece. As long as that is less
    than ``window`` the long context is not longer than the short one: such targets count as not
    scored (NaN), unless ``keep_first_window``.
    """
    usable = np.array(short_loss, dtype=np.float32)
    if not keep_first_window:
        usable[: window - 1] = np.nan
    return usable


def collate(samples: Sequence[Sample], with_boundaries: bool) -> dict[str, np.ndarray]:
    """Stack samples to a batch.

    tokens, labels, position_ids int64 [b, S]; loss_mask float32 [b, S], 1 at targets, else 0;
    short_loss float32 [b, S], if any sample has it; and ``with_boundaries``: boundaries int32
    [b, P+1], padded with S.
    """
    labels = np.stack([sample.labels for sample in samples])
    rows, length = labels.shape
    batch = {
        "tokens": np.stack([sample.tokens for sample in samples]),
        "labels": labels,
        "loss_mask": (labels != IGNORE).astype(np.float32),
        "position_ids": np.tile(np.arange(length, dtype=np.int64), (rows, 1)),
    }
    if any(sample.short_loss is not None for sample in samples):
        unscored = np.full(length, np.nan, dtype=np.float32)
        batch["short_loss"] = np.stack(
            [unscored if sample.short_loss is None else sample.short_loss for sample in samples]
        )
    if with_boundaries:
        batch["boundaries"] = stack_boundaries(samples)
    return batch


def stack_boundaries(samples: Sequence[Sample]) -> np.ndarray:
    """int32 [b, P+1], padded with S."""
    most = max(len(sample.boundaries) for sample in samples)
    stacked = np.full((len(samples), most), len(samples[0].tokens), dtype=np.int32)
    for row, sample in zip(stacked, samples, strict=True):
        row[: len(sample.boundaries)] = sample.boundaries
    return stacked


def cut_batch(batch: dict[str, np.ndarray], cp_rank: int, cp_size: int) -> dict[str, np.ndarray]:
    """The batch of one context-parallel rank; what describes whole sequences stays whole."""
    return {
        name: zigzag.cut(array, cp_rank, cp_size, dim=1) if name in PER_TOKEN else array
        for name, array in batch.items()
    }
