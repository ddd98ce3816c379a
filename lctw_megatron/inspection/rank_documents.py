"""Documents ranked by how much a long context helps to predict them: a data filter.

The gain of a document is the mean of short_loss - long_loss over its scored targets, in nats. Texts
with long-range structure rank high; collections of short, unrelated parts rank low, and training
long contexts on them teaches little.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lctw_megatron.atomic import atomic_file
from lctw_megatron.data.indexed_array import BLOCK_BYTES
from lctw_megatron.data.sidecar import Sidecar
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import InputError
from lctw_megatron.progress import Progress
from lctw_megatron.report.table import to_text


@dataclass(frozen=True)
class RankedDocument:
    """One line of the ranking."""

    document: int
    tokens: int
    scored: int
    """Targets that have both losses."""
    gain: float
    """Mean of short_loss - long_loss, nats a target."""
    magnitude: float
    """Mean of |short_loss - long_loss|."""
    long_loss: float
    """Mean over the scored targets."""


@dataclass(frozen=True)
class DocumentSums:
    """Sums over the scored targets of each document: float64 and int64 [documents]."""

    scored: np.ndarray
    gain: np.ndarray
    magnitude: np.ndarray
    long_loss: np.ndarray


class Ranking:
    """Documents that have scored targets, best first; a row is made when it is asked for."""

    def __init__(self, dataset: TokenDataset, sums: DocumentSums) -> None:
        self.dataset = dataset
        self.sums = sums
        known = np.flatnonzero(sums.scored)
        self.order = known[np.argsort(-sums.gain[known] / sums.scored[known], kind="stable")]

    def __len__(self) -> int:
        return len(self.order)

    @property
    def left_out(self) -> int:
        """Documents none of whose targets has both losses."""
        return len(self.dataset) - len(self)

    def __getitem__(self, place: int) -> RankedDocument:
        document = int(self.order[place])
        scored = int(self.sums.scored[document])
        means = (
            float(sums[document]) / scored
            for sums in (self.sums.gain, self.sums.magnitude, self.sums.long_loss)
        )
        return RankedDocument(document, int(self.dataset.lengths[document]), scored, *means)


def rank_documents(
    dataset: TokenDataset, long: Sidecar, short: Sidecar, output: str | Path
) -> Ranking:
    """Write all documents with scored targets to ``output``, one JSON line each, best first.

    Memory: about 60 bytes a document. Raises InputError if no document has any such target.
    """
    ranking = Ranking(dataset, document_sums(dataset, long, short))
    if not len(ranking):
        raise InputError(
            f"{dataset.prefix}: no target has both losses, in {long.prefix} and {short.prefix}; "
            f"score with a smaller window than the documents' lengths"
        )
    with atomic_file(output, "w") as file:
        for place in range(len(ranking)):
            file.write(json.dumps(asdict(ranking[place])) + "\n")
    return ranking


def document_sums(dataset: TokenDataset, long: Sidecar, short: Sidecar) -> DocumentSums:
    """Reads both sidecars once, a bounded number of values at a time."""
    count = len(dataset)
    totals = np.zeros((4, count))
    step = BLOCK_BYTES // 4
    starts = dataset.pointers // dataset.dtype.itemsize
    with Progress("rank documents", dataset.num_tokens, "tokens") as progress:
        for begin in range(0, dataset.num_tokens, step):
            long_loss = long.values[begin : begin + step].astype(np.float64)
            difference = short.values[begin : begin + step] - long_loss
            scored = ~np.isnan(difference)
            streams = np.stack(
                [
                    scored.astype(np.float64),
                    np.where(scored, difference, 0),
                    np.where(scored, np.abs(difference), 0),
                    np.where(scored, long_loss, 0),
                ]
            )
            # Documents first ... last lie in this block, the first and the last maybe in part.
            first = int(np.searchsorted(starts, begin, side="right")) - 1
            last = int(np.searchsorted(starts, begin + len(scored), side="left"))
            cuts = np.maximum(starts[first:last] - begin, 0)
            ends = np.append(cuts[1:], len(scored))
            summed = np.concatenate([np.zeros((4, 1)), np.cumsum(streams, axis=1)], axis=1)
            totals[:, first:last] += summed[:, ends] - summed[:, cuts]
            progress.update(len(scored))
    return DocumentSums(totals[0].astype(np.int64), totals[1], totals[2], totals[3])


def describe_ranking(ranking: Ranking) -> str:
    """The first 20 and the last 5 documents of a ranking, and how many there are."""
    heading = ["place", "document", "tokens", "scored", "gain", "|difference|", "long loss"]
    places = list(range(min(20, len(ranking))))
    places += list(range(max(len(ranking) - 5, len(places)), len(ranking)))
    table = [heading]
    for place in places:
        row = ranking[place]
        means = (f"{value:.4f}" for value in (row.gain, row.magnitude, row.long_loss))
        counts = (f"{value:,}" for value in (place + 1, row.document, row.tokens, row.scored))
        table.append([*counts, *means])
    end = f"{ranking.left_out:,} documents have no scored target and are left out"
    return f"{to_text(table)}\n{len(ranking):,} documents; {end}"
