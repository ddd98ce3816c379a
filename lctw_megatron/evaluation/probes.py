"""Held-out loss, taken apart: by a target's context, and by how far back its token last stood.

A model that uses long context loses less on targets deep inside a sequence, and on those whose
token last occurred far back. The mean over all targets hides both: most tokens follow from the few
before them. Pure arithmetic; ``evaluate.py`` runs the model.

Legend of shapes: S tokens of a sequence, N sequences, B bins.
"""

from typing import Any

import numpy as np

from lctw_megatron.data.batch import IGNORE, Sample
from lctw_megatron.evaluation.buckets import LEFT_OUT, SequenceSums, bucket_of, bucket_starts
from lctw_megatron.weighting.occurrence import CLASSES, batch_occurrence_distance

SHORT_LENGTH = 2048


def short_length(sequence_length: int) -> int:
    """The length whose loss is the price of a longer context: SHORT_LENGTH or a quarter of a
    sequence, rounded down to where a bucket begins. The loss of the first targets of a sequence is
    that of a sequence which ends there, since they see nothing of what follows."""
    starts = bucket_starts(sequence_length)
    return int(starts[starts <= max(1, min(SHORT_LENGTH, sequence_length // 4))][-1])


class Probes:
    """Held-out losses in three groups of bins, filled sequence by sequence.

    classes: near (at most ``near`` tokens back), far, first_seen. position: log buckets of the
    context. distance: log buckets of the distance, and first_seen last.
    """

    def __init__(self, sequences: int, sequence_length: int, near: int) -> None:
        self.near, self.short = near, short_length(sequence_length)
        self.starts = bucket_starts(sequence_length)
        buckets = len(self.starts)
        widths = {"classes": len(CLASSES), "position": buckets, "distance": buckets + 1}
        self.loss = {name: SequenceSums(sequences, width) for name, width in widths.items()}
        self.gain = {name: SequenceSums(sequences, width) for name, width in widths.items()}

    def add(
        self,
        sequence: int,
        long_loss: np.ndarray,
        short_loss: np.ndarray | None,
        context: np.ndarray,
        distance: np.ndarray,
    ) -> None:
        """One sequence: losses [S] in nats, NaN where there is none; context int [S], the tokens a
        target follows (0: not a target); distance int [S], -1 for first-seen targets."""
        bins = {
            "classes": class_of(distance, self.near),
            "position": bucket_of(context, self.starts),
            "distance": np.where(distance < 0, len(self.starts), bucket_of(distance, self.starts)),
        }
        live = context > 0
        for name, where in bins.items():
            where = np.where(live, where, LEFT_OUT)
            self.loss[name].add(sequence, long_loss, where)
            if short_loss is not None:
                self.gain[name].add(sequence, short_loss - long_loss, where)

    def summary(self, with_gain: bool) -> dict[str, Any]:
        """Each group as plain lists: see ``result_file.FORMAT``."""
        buckets: list[Any] = self.starts.tolist()
        names = {
            "classes": list(CLASSES),
            "position": buckets,
            "distance": [*buckets, CLASSES[2]],
        }
        groups: dict[str, Any] = {}
        for name, bins in names.items():
            groups[name] = {"bins": bins, **self.loss[name].summary()}
            if with_gain:
                groups[name]["gain"] = self.gain[name].means()
        position = self.loss["position"]
        at = self.starts < self.short
        targets = int(position.targets[:, at].sum())
        loss = float(position.loss[:, at].sum() / targets) if targets else None
        groups["short"] = {"length": self.short, "loss": loss, "targets": targets}
        return groups


def class_of(distance: np.ndarray, near: int) -> np.ndarray:
    """Number of each target's class in ``CLASSES``: near up to ``near`` tokens back, far beyond,
    first seen where ``distance`` is -1."""
    return np.where(distance < 0, 2, np.where(distance <= near, 0, 1))


def context_of(sample: Sample) -> np.ndarray:
    """int64 [S]: input tokens of its own piece that each target follows, >= 1; 0 for no target."""
    position = np.arange(len(sample.labels))
    piece = np.searchsorted(sample.boundaries, position, side="right") - 1
    context = position - sample.boundaries[piece] + 1
    return np.where(sample.labels == IGNORE, 0, context)


def distance_of(sample: Sample) -> np.ndarray:
    """int64 [S]: how far back each target's token last stood in its piece; -1: nowhere."""
    import torch

    rows = [torch.from_numpy(x)[None] for x in (sample.tokens, sample.labels, sample.boundaries)]
    return batch_occurrence_distance(*rows)[0].numpy()
