"""recall.json: what is in it, reading it, and its means with their standard errors.

Every sample's values are kept, so that two models measured on the same samples are compared in
pairs: a question is easier or harder for both.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from lctw_megatron.evaluation.buckets import Estimate, Pair, paired_difference
from lctw_megatron.evaluation.saved_result import Count, Shape, read_result

FORMAT = "lctw-megatron recall 1"
"""Of recall.json. Its keys:

settings    what was asked for, with the identities of weights, tokenizer and haystack: the same
            settings give the same file
seconds     length: seconds of wall time
cells       one of each task, length and depth (null: the task has none): `samples_digest`, equal
            for equal samples; of each sample its own in `digests` (files of before lack them),
            `nats` (Σ loss of the answers' tokens), `tokens`, `right` (share of its answers right to
            the last token), `short_nats` and `short_right` with the last `settings.window` tokens
            of context only (null where the sample is not longer); and `mean`: of `nats` an answer
            token, `right` and both short ones, [mean, standard error over samples]
"""

VALUES = ("nats", "right", "short_nats", "short_right")


@dataclass(frozen=True)
class Sums:
    """One kind of value over the samples: its mean is Σ values / Σ units."""

    values: np.ndarray
    """float64 [samples]"""
    units: np.ndarray
    """int64 [samples]: answer tokens of nats, 1 of shares."""

    def mean(self) -> Estimate:
        """With its standard error."""
        found = paired_difference(Pair(self.values, np.zeros_like(self.values), self.units))
        assert found is not None
        return found


def sums(cells: Sequence[dict[str, Any]], kind: str) -> Sums | None:
    """``kind`` (one of VALUES) of cells that differ in depth only, a sample's depths taken
    together, since they are the same story; None if it was not measured in all."""
    if not cells or any(cell[kind] is None for cell in cells):
        return None
    values = np.array([cell[kind] for cell in cells], dtype=np.float64)
    if kind.endswith("nats"):
        units = np.array([cell["tokens"] for cell in cells], dtype=np.int64)
    else:
        units = np.ones(values.shape, dtype=np.int64)
    return Sums(values.sum(0), units.sum(0))


def with_means(cell: dict[str, Any]) -> dict[str, Any]:
    """The cell with its `mean`."""
    means: dict[str, Any] = {}
    for kind in VALUES:
        found = sums([cell], kind)
        mean = found.mean() if found else None
        means[kind] = [mean.mean, mean.error] if mean else None
    return {**cell, "mean": means}


def digest_of(digests: Sequence[str]) -> str:
    """`samples_digest` of samples with these `digests`."""
    return hashlib.blake2b(bytes.fromhex("".join(digests)), digest_size=16).hexdigest()


def first_samples(cell: dict[str, Any], number: int) -> dict[str, Any]:
    """The cell as it would be with only the first ``number`` samples."""
    lists = {name: cell[name][:number] for name in (*VALUES, "tokens", "digests") if cell[name]}
    return with_means({**cell, **lists, "samples_digest": digest_of(lists["digests"])})


def select(
    result: dict[str, Any], task: str, length: int | None = None, depth: Any = ...
) -> list[dict[str, Any]]:
    """The cells of a task, of one length and of one depth if these are given."""
    return [
        cell
        for cell in result["cells"]
        if cell["task"] == task
        and length in (None, cell["length"])
        and (depth is ... or depth == cell["depth"])
    ]


class _Settings(Shape):
    checkpoint: str = ""
    tasks: list[str]
    lengths: list[int]
    depths: list[float]
    samples: int
    haystack: str
    window: int


class _Cell(Shape):
    task: str
    length: int
    depth: float | None
    samples_digest: str
    digests: list[Annotated[str, Field(pattern="^[0-9a-f]{16}$")]] | None = None
    nats: Annotated[list[float], Field(min_length=1)]
    tokens: list[Count]
    right: list[float]
    short_nats: list[float] | None
    short_right: list[float] | None

    @model_validator(mode="after")
    def _has_tokens(self) -> "_Cell":
        if not any(self.tokens):
            raise ValueError("answers without a token")
        return self


class _Recall(Shape):
    """What other modules rely on."""

    settings: _Settings
    cells: list[_Cell]

    @model_validator(mode="after")
    def _has_a_value_of_every_sample(self) -> "_Recall":
        kinds = ("nats", "tokens", "right", "short_nats", "short_right", "digests")
        values = [getattr(cell, kind) for cell in self.cells for kind in kinds]
        if len({len(found) for found in values if found is not None}) > 1:
            raise ValueError("not a value of every sample")
        asked, depths = self.settings, {None, *self.settings.depths}
        places = set()
        for at in self.cells:
            if (
                at.task not in asked.tasks
                or at.length not in asked.lengths
                or at.depth not in depths
            ):
                raise ValueError(f"{at.task} at {at.length}, {at.depth} is not in its settings")
            if (place := (at.task, at.length, at.depth)) in places:
                raise ValueError(f"{at.task} at {at.length}, {at.depth} is there twice")
            places.add(place)
        return self


def read_recall(path: str | Path) -> dict[str, Any] | None:
    """The contents of a recall.json; None if there is none. InputError if it is no such."""
    return read_result(path, FORMAT, "measure recall again", _Recall)


def to_rows(result: dict[str, Any]) -> list[list[str]]:
    """A table, a line of each task and length: heading first."""
    settings = result["settings"]
    depths = settings["depths"]
    heading = ["task", "length", "right", "nats a token", f"right in {settings['window']}"]
    heading += [f"nats in {settings['window']}", *(f"at {depth:g}" for depth in depths)]
    rows = [heading]
    for task in settings["tasks"]:
        for length in settings["lengths"]:
            cells = select(result, task, length)
            row = [task, f"{length:,}"]
            for kind in ("right", "nats", "short_right", "short_nats"):
                found = sums(cells, kind)
                row.append(show(found.mean()) if found else "-")
            for depth in depths:
                at = sums(select(result, task, length, depth), "right")
                row.append(f"{at.mean().mean:.2f}" if at else "-")
            rows.append(row)
    return rows


def show(value: Estimate, sign: str = "", digits: int = 3) -> str:
    """0.950 ±0.012; with ``sign`` "+" always a sign."""
    error = "" if value.error is None else f" ±{value.error:.{digits}f}"
    return f"{value.mean:{sign}.{digits}f}{error}"
