"""Virtual packing: which pieces of which documents make up each sequence. No token is moved.

A *piece* (document, offset, length L) is inputs ``d[offset : offset+L]`` and labels
``d[offset+1 : offset+L+1]``, so a document of n tokens has n - 1 targets to share out and every
input has a label. All here is a pure function of the document lengths.

Legend of shapes: N sequences, P pieces.
"""

import bisect
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Packing = Literal["chunk", "pack"]
Tails = Literal["drop", "keep"]

FORMAT_VERSION = 1
"""Part of the key of cached indices: raise it whenever ``build_index`` gives another answer."""


class Piece(NamedTuple):
    """A contiguous run of one document inside a sequence; ``length`` counts its inputs."""

    document: int
    offset: int
    length: int


@dataclass(frozen=True)
class SequenceIndex:
    """Sequence s holds the pieces from sequence_start[s] to before sequence_start[s+1]."""

    piece_document: np.ndarray
    """int64 [P]"""
    piece_offset: np.ndarray
    """int64 [P], in tokens from the start of the document"""
    piece_length: np.ndarray
    """int32 [P], in inputs (= targets)"""
    sequence_start: np.ndarray
    """int64 [N+1]"""

    def __len__(self) -> int:
        return len(self.sequence_start) - 1

    def pieces(self, sequence: int) -> list[Piece]:
        """The pieces of one sequence, in the order in which they lie in it."""
        part = slice(int(self.sequence_start[sequence]), int(self.sequence_start[sequence + 1]))
        columns = (self.piece_document, self.piece_offset, self.piece_length)
        return [Piece(*row) for row in zip(*(c[part].tolist() for c in columns), strict=True)]


@dataclass(frozen=True)
class PackingCost:
    """What a way of packing costs, in documents, targets and input positions."""

    documents: int
    short_documents: int
    """Documents of fewer than two tokens: they have no target and are left out."""
    targets: int
    """Targets of all documents."""
    dropped_targets: int
    """Targets in no sequence."""
    sequences: int
    pieces: int
    padding: int
    """Input positions without a token."""
    tail_targets: int
    """Targets in the shorter last chunks of documents: what tails=drop loses in chunk mode."""
    tail_padding: int
    """Padding these tails need in chunk mode, one a sequence: what tails=keep costs."""

    def line(self, packing: Packing, tails: Tails, sequence_length: int) -> str:
        """One line for the log, naming the price of this choice and of the other one."""
        kept = self.targets - self.dropped_targets
        text = (
            f"{self.documents:,} documents -> {self.sequences:,} sequences of {sequence_length:,} "
            f"({packing}), {kept:,} targets, {self.padding:,} padding"
            f"{_percent(self.padding, self.sequences * sequence_length)}; "
        )
        rows = kept + self.dropped_targets + self.tail_padding
        keep_price = f"{self.tail_padding:,} padding{_percent(self.tail_padding, rows)}"
        drop_price = f"{self.tail_targets:,} targets{_percent(self.tail_targets, self.targets)}"
        if packing == "pack":
            text += f"chunk would cost {keep_price} with tails=keep, {drop_price} with tails=drop"
        elif tails == "drop":
            text += f"tails=drop loses {drop_price}, tails=keep would cost {keep_price}"
        else:
            text += f"tails=keep costs {keep_price}, tails=drop would lose {drop_price}"
        if self.short_documents:
            text += f"; {self.short_documents:,} documents of fewer than 2 tokens left out"
        return text


def evenly_spaced(available: int, most: int) -> list[int]:
    """At most ``most`` numbers below ``available``, so that few sequences still come from many
    documents."""
    count = min(most, available)
    return [i * available // count for i in range(count)]


def _percent(part: int, whole: int) -> str:
    return f" ({100 * part / whole:.2f} %)" if whole else ""


def build_index(
    lengths: np.ndarray, sequence_length: int, packing: Packing, tails: Tails
) -> SequenceIndex:
    """Share out the targets of documents of ``lengths`` tokens [documents] over sequences.

    chunk: chunk j of a document is the piece at offset j·S; each sequence is one chunk. The last,
    shorter chunk is kept or dropped as ``tails`` says. Sequences are in the order of the documents.

    pack: the same full chunks, then the shorter last chunks (whole documents, if shorter than S)
    packed best-fit-decreasing into further sequences, none of them cut (Ding et al. 2024, "Fewer
    Truncations Improve Language Modeling"). ``tails`` has no meaning here: no target is lost.
    Takes O(documents + S log S) steps besides one sort.
    """
    targets = np.maximum(np.asarray(lengths, dtype=np.int64) - 1, 0)
    full, rest = np.divmod(targets, sequence_length)
    chunks = full + (rest > 0) if packing == "chunk" and tails == "keep" else full
    document = np.repeat(np.arange(len(targets)), chunks)
    offset = np.arange(len(document)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    offset *= sequence_length
    length = np.minimum(sequence_length, targets[document] - offset).astype(np.int32)
    start = np.arange(len(document) + 1)
    if packing == "pack":
        tail = np.flatnonzero(rest)
        # Longest first; equal lengths in the order of the documents. 16-bit keys sort in O(n).
        narrow = np.uint16 if sequence_length <= 65535 else np.int32
        tail = tail[np.argsort((sequence_length - rest[tail]).astype(narrow), kind="stable")]
        bins = _best_fit(rest[tail], sequence_length)
        tail = tail[np.argsort(bins, kind="stable")]
        document = np.concatenate([document, tail])
        offset = np.concatenate([offset, full[tail] * sequence_length])
        length = np.concatenate([length, rest[tail].astype(np.int32)])
        start = np.concatenate([start, start[-1] + np.cumsum(np.bincount(bins))])
    return SequenceIndex(document, offset, length, start)


def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit-decreasing: the bin [items] of each item of the non-increasing ``lengths`` [items].

    Bins with the same room are handled together, and so are items of the same length: an item goes
    to the bin with the least room that takes it, and the next equal items follow it there until
    none fits. A bin that takes what fits is left with less than half its room, hence
    O(distinct lengths · log capacity) steps.
    """
    bin_of_item = np.empty(len(lengths), dtype=np.int64)
    open_bins: dict[int, list[np.ndarray]] = {}  # room left -> bins
    rooms: list[int] = []  # the keys of open_bins, ascending
    opened = placed = 0

    def keep_open(room: int, bins: np.ndarray) -> None:
        if room and len(bins):
            if room not in open_bins:
                open_bins[room] = []
                bisect.insort(rooms, room)
            open_bins[room].append(bins)

    counts = np.bincount(lengths) if len(lengths) else np.zeros(0, dtype=np.int64)
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            tightest = bisect.bisect_left(rooms, length)
            if tightest < len(rooms):
                room = rooms[tightest]
                bins = open_bins[room].pop()
                if not open_bins[room]:
                    del open_bins[room]
                    del rooms[tightest]
            else:
                room = capacity
                bins = np.arange(opened, opened + -(-left // (capacity // length)))
                opened += len(bins)
            fit = room // length
            filled = min(len(bins), left // fit)
            bin_of_item[placed : placed + filled * fit] = np.repeat(bins[:filled], fit)
            keep_open(room - fit * length, bins[:filled])
            placed, left, bins = placed + filled * fit, left - filled * fit, bins[filled:]
            if left and len(bins):  # fewer than one bin takes: the last items of this length
                bin_of_item[placed : placed + left] = bins[0]
                keep_open(room - left * length, bins[:1])
                placed, left, bins = placed + left, 0, bins[1:]
            keep_open(room, bins)
    return bin_of_item


def packing_cost(lengths: np.ndarray, sequence_length: int, index: SequenceIndex) -> PackingCost:
    """What ``index``, built from ``lengths`` and ``sequence_length``, costs."""
    targets = np.maximum(np.asarray(lengths, dtype=np.int64) - 1, 0)
    rest = targets % sequence_length
    total, live = int(targets.sum()), int(index.piece_length.sum(dtype=np.int64))
    tail_targets = int(rest.sum())
    return PackingCost(
        documents=len(targets),
        short_documents=int((targets == 0).sum()),
        targets=total,
        dropped_targets=total - live,
        sequences=len(index),
        pieces=len(index.piece_length),
        padding=len(index) * sequence_length - live,
        tail_targets=tail_targets,
        tail_padding=int((rest > 0).sum()) * sequence_length - tail_targets,
    )
