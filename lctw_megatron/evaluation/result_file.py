"""evaluation.json: what is in it, and reading it."""

from pathlib import Path
from typing import Any

from lctw_megatron.evaluation.saved_result import read_result

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


def read_evaluation(path: str | Path) -> dict[str, Any] | None:
    """The contents of an evaluation.json; None if there is none. InputError if it is no such."""
    return read_result(path, FORMAT, "evaluate again")
