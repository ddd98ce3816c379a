"""The best documents of a ranking as a token dataset of their own, with their sidecars.

After LongFilter (Deng et al., "Beyond Length: Quantifying Long-Range Information for Long-Context
LLM Pretraining Data", ICLR 2026, arXiv:2510.25804): train long contexts on the texts that gain from
them. There the gain of a token is the divergence of two distributions; here, the difference of two
losses of the token that comes. The new dataset is like any other: a recipe's `data.train` names it,
alone or blended with others. Documents keep their order, values and tokens are copied bit for bit,
and the manifest says what was chosen, from what and how. Nothing is scored again.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lctw_megatron.data.indexed_array import data_path
from lctw_megatron.data.sidecar import Sidecar, SidecarWriter
from lctw_megatron.data.token_dataset import TokenDataset, TokenWriter
from lctw_megatron.inspection.describe_data import sidecar_names
from lctw_megatron.inspection.earlier_choice import Wanted, check_free, how_made, is_there
from lctw_megatron.inspection.rank_documents import Ranking
from lctw_megatron.ownership import sole_writer
from lctw_megatron.progress import Progress
from lctw_megatron.scoring.windows import Windowing, window_statistics
from lctw_megatron.weighting.selection import number_to_keep


@dataclass(frozen=True)
class Choice:
    """Of which dataset the best are taken, by which losses, and how many."""

    fingerprint: str
    """Of the dataset."""
    long: str
    """Fingerprint of the sidecar of long losses."""
    short: str
    keep: float
    """The share of the ranked documents."""


def choose_documents(
    ranking: Ranking, long: Sidecar, short: Sidecar, keep: float, prefix: str
) -> str:
    """Write the best ⌊``keep`` · n⌋ (at least one) of the n ranked documents, and the sidecars that
    lie beside their dataset, as ``prefix``; a line that says what is there.

    Does nothing if that is there already. Raises InputError where it would replace anything but an
    earlier choice and its copies, and for a sidecar that does not fit.
    """
    dataset = ranking.dataset
    sidecars = [Sidecar(dataset, name) for name in sidecar_names(dataset)]
    choice = Choice(
        dataset.fingerprint, long.manifest.fingerprint, short.manifest.fingerprint, keep
    )
    count = int(number_to_keep(torch.tensor(len(ranking)), keep))
    documents = np.sort(ranking.order[:count])
    tokens = int(dataset.lengths[documents].sum(dtype=np.int64))
    names = ", ".join(sidecar.name for sidecar in sidecars)
    line = (
        f"{prefix}: {count:,} of {len(dataset):,} documents, {tokens:,} of {dataset.num_tokens:,} "
        f"tokens, gain at least {ranking[count - 1].gain:.4f}; sidecars {names}"
    )
    check_free(prefix, dataset)
    wanted = Wanted(asdict(choice), {each.name: how_made(each.manifest) for each in sidecars})
    with sole_writer(Path(data_path(prefix)), print):
        if is_there(prefix, wanted):
            return f"{line} (already there)"
        source = {
            "chosen_from": dataset.prefix,
            "choice": wanted.choice,
            "sidecars": wanted.sidecars,
            "least_gain": ranking[count - 1].gain,
            "original": dataset.manifest.source,
        }
        _write(prefix, dataset, sidecars, documents, source)
    return line


def _write(
    prefix: str,
    dataset: TokenDataset,
    sidecars: list[Sidecar],
    documents: np.ndarray,
    source: dict[str, Any],
) -> None:
    total = len(documents) * (1 + len(sidecars))
    with Progress("choose documents", total, "documents") as progress:
        with TokenWriter(prefix, dataset.manifest.tokenizer, source) as tokens:
            for document in documents.tolist():
                tokens.add(dataset[document])
                progress.update(1)
        chosen = TokenDataset(prefix)
        for sidecar in sidecars:
            with SidecarWriter(chosen, sidecar.name, **_details(sidecar, chosen)) as values:
                for document in documents.tolist():
                    values.add(sidecar[document])
                    progress.update(1)


def _details(sidecar: Sidecar, chosen: TokenDataset) -> dict[str, Any]:
    """How the values were made, which is as it was; only the contexts are those of fewer texts."""
    made = sidecar.manifest
    windowing = Windowing(made.window, made.stride, made.sequence_length, made.score_first_window)
    statistics = window_statistics(chosen.lengths, *windowing)
    return {
        **windowing._asdict(),
        "windows_version": made.windows_version,
        "min_context": statistics.min_context if statistics.scored else None,
        "mean_context": statistics.mean_context if statistics.scored else None,
        "scorer": made.scorer,
    }
