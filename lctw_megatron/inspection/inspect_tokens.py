"""Looking at tokens: text coloured by weight, the top targets in their contexts, statistics.

What ``tools/inspect_data.py`` shows; each view is plain text for the terminal, and a section of one
self-contained HTML file.
"""

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lctw_megatron.atomic import atomic_file
from lctw_megatron.data.sequences import Piece
from lctw_megatron.data.token_text import TokenTexts
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.sequence_weights import HISTOGRAM_STARTS
from lctw_megatron.inspection.scored_tokens import ScoredTargets, ScoredTokens
from lctw_megatron.inspection.token_statistics import (
    DIFFERENCE_EDGES,
    TokenStatistics,
    TopTarget,
    TopTargets,
)
from lctw_megatron.progress import Progress
from lctw_megatron.report.coloured_text import (
    heavy_from,
    legend_html,
    scale_for,
    to_html,
    to_plain,
    to_terminal,
    visible,
)
from lctw_megatron.report.page import Section, render_page
from lctw_megatron.report.plot_style import write_png
from lctw_megatron.report.table import Rows, to_text
from lctw_megatron.report.weight_plots import text_page
from lctw_megatron.weighting.occurrence import CLASSES

_SIGNED = ("score", "difference")
_LEFT, _RIGHT = 24, 8
"""Tokens shown before and after a top target."""
_TYPES = 15


@dataclass(frozen=True)
class View:
    """What to show."""

    document: int | None = None
    sequence: int | None = None
    """One of the two, or neither for the whole dataset (which is not shown as text)."""
    by: str = "weight"
    """What text is coloured, and targets are ranked, by: `--by` of the command has the choices."""
    offset: int = 0
    """Targets of the selection that are not shown before the first that is."""
    tokens: int = 2000
    """Targets shown as text at most."""
    png: str | None = None
    """Where to draw the first page of the text."""
    top: int = 0
    """How many of the largest targets to list."""
    statistics: bool = False
    sample: int | None = None
    """Of the whole dataset, so many sequences, evenly spaced; None: all."""
    near: int | None = None
    """For the statistics: largest distance called near; None: a quarter of the sequence."""


@dataclass(frozen=True)
class _Chosen:
    """Sequences that are looked at."""

    sequences: list[list[Piece]]
    skipped: int
    """Targets of the document before them."""
    total: int
    """Targets of the whole document or sequence."""


class Inspection:
    """The views of one dataset under one weighting."""

    def __init__(self, scored: ScoredTokens, tokenizer_path: str | None = None) -> None:
        """tokenizer_path: None takes the one the dataset was made with. Raises InputError."""
        self.scored = scored
        identity = scored.dataset.manifest.tokenizer
        tokenizer = load_tokenizer(tokenizer_path or identity.path)
        if tokenizer.identity.digest != identity.digest:
            raise InputError(
                f"{tokenizer.identity.path}: digest {tokenizer.identity.digest}, but "
                f"{scored.dataset.prefix} was made with {identity.digest} ({identity.path})"
            )
        self.texts = TokenTexts(tokenizer)

    def show(self, view: View, terminal: bool) -> tuple[str, list[Section]]:
        """The view as text, coloured for a terminal or plain, and as sections of a page."""
        chosen = self._chosen(view)
        selected = None if chosen is None else list(self.scored.read(iter(chosen.sequences)))
        top = TopTargets(view.top, view.by) if view.top else None
        near = view.near or max(1, (self.scored.settings.sequence_length or 4096) // 4)
        vocabulary = self.scored.dataset.manifest.tokenizer.vocab_size
        statistics = TokenStatistics(near, vocabulary) if view.statistics else None
        for targets in self._all(view) if selected is None else selected:
            if top is not None:
                top.add(targets)
            if statistics is not None:
                statistics.add(targets)
        if statistics is not None and not statistics.targets:
            raise InputError(f"{self.scored.dataset.prefix}: no targets to count")
        parts: list[str] = []
        sections: list[Section] = []
        if chosen is not None and selected is not None:
            self._text(view, chosen, selected, terminal, parts, sections)
        if top is not None:
            heading = f"The {view.top} largest by {view.by.replace('_', ' ')}"
            rows = self._top_rows(top.sorted(), view.by)
            parts += [heading, to_text(rows, left=len(rows[0]) - 1), ""]
            sections.append(Section(heading, tables=[rows]))
        if statistics is not None:
            tables = self._statistics(statistics)
            parts += [to_text(rows, left=len(rows[0]) - 1) + "\n" for _, rows in tables]
            sections += [Section(title, tables=[rows]) for title, rows in tables]
        return "\n".join(parts), sections

    def _chosen(self, view: View) -> _Chosen | None:
        """The sequences to look at; of a document that is only shown as text, those it needs."""
        if view.document is not None:
            sequences = self.scored.document(view.document)
        elif view.sequence is not None:
            sequences = [self.scored.sequence(view.sequence)]
        else:
            return None
        if not sequences:
            raise InputError(
                f"document {view.document}: shorter than --sequence-length, and --tails drop "
                "leaves such documents out"
            )
        lengths = [sum(piece.length for piece in pieces) for pieces in sequences]
        ends = list(itertools.accumulate(lengths))
        total = ends[-1]
        if total < 1:  # of a document as sequence
            raise InputError(
                f"{self.scored.dataset.prefix}: document {sequences[0][0].document} has "
                f"{total + 1} tokens and so no target"
            )
        if view.offset >= total:
            raise InputError(f"--offset {view.offset}: there are {total} targets")
        if view.top or view.statistics:
            return _Chosen(sequences, 0, total)
        first = bisect.bisect_right(ends, view.offset)
        last = bisect.bisect_left(ends, view.offset + view.tokens)
        return _Chosen(sequences[first : last + 1], ends[first] - lengths[first], total)

    def _all(self, view: View) -> Iterator[ScoredTargets]:
        number = min(len(self.scored), view.sample or len(self.scored))
        with Progress("inspect", number, "sequences") as progress:
            for targets in self.scored.read(self.scored.all_sequences(view.sample)):
                yield targets
                progress.update(1, tokens=len(targets))

    def _text(
        self,
        view: View,
        chosen: _Chosen,
        selected: list[ScoredTargets],
        terminal: bool,
        parts: list[str],
        sections: list[Section],
    ) -> None:
        """Add the selection as coloured text."""
        values = np.concatenate([targets.values(view.by) for targets in selected])
        scale = scale_for(values, signed=view.by in _SIGNED)
        ids = np.concatenate([targets.id for targets in selected])
        begin = view.offset - chosen.skipped
        shown = slice(begin, begin + view.tokens)
        texts = self.texts(ids[shown])
        name = view.by.replace("_", " ")
        what = f"document {view.document}" if view.document is not None else (
            f"sequence {view.sequence}"
        )  # fmt: skip
        heading = f"{self.scored.dataset.prefix}, {what}, by {name}"
        tokens = np.concatenate([targets.token for targets in selected])
        documents = np.concatenate([targets.document for targets in selected])
        lines = [
            f"targets {view.offset} to {view.offset + len(texts)} of {chosen.total}, beginning "
            f"with token {tokens[begin]} of document {documents[begin]}; "
            f"weighting {self.scored.weighting.config.model_dump(exclude_defaults=True)}"
        ]
        titles = [title for targets in selected for title in _titles(targets)][shown]
        if view.png is not None:
            write_png(view.png, text_page(texts, values[shown], scale, heading))
        body = to_html(texts, values[shown], scale, titles)
        sections.append(
            Section(
                heading,
                lines=lines,
                body=f'{legend_html(scale, name)}\n<div class="tokens">{body}</div>',
            )
        )
        if terminal:
            text, ground = to_terminal(texts, values[shown], scale), "darkest"
            bound = scale.limit
        else:
            bound = heavy_from(values)
            text, ground = to_plain(texts, values[shown], bound), "in \u27e6brackets\u27e7"
        meaning = f"{ground}: at least {bound:.3g}"
        if bound == np.inf:
            what = "the same" if np.isfinite(values).any() else "no known"
            meaning = f"nothing {ground}: all targets have {what} {name}"
        parts += [heading, *lines, meaning, "", text, ""]

    def _top_rows(self, top: list[TopTarget], by: str) -> Rows:
        rows = [[by.replace("_", " "), "document:token", "long", "short", "weight", "last", "text"]]
        for target in top:
            rows.append(
                [
                    f"{target.value:.3f}",
                    f"{target.document}:{target.token}",
                    _nats(target.long_loss),
                    _nats(target.short_loss),
                    f"{target.weight:.2f}",
                    "new" if target.distance < 0 else f"-{target.distance}",
                    self._context(target.document, target.token),
                ]
            )
        return rows

    def _context(self, document: int, token: int) -> str:
        """The tokens around a target, on one line, the target in brackets."""
        dataset = self.scored.dataset
        begin = max(0, token - _LEFT)
        end = min(int(dataset.lengths[document]), token + 1 + _RIGHT)
        texts = self.texts(dataset.get(document, begin, end - begin))
        texts[token - begin] = f"\u27e6{texts[token - begin]}\u27e7"
        return visible("".join(texts)).replace("\n", "\u21b5").replace("\t", " ")

    def _statistics(self, found: TokenStatistics) -> list[tuple[str, Rows]]:
        weights = found.weights.summary() if found.weights else {}
        scored = max(found.scored, 1)
        summary = [
            ["statistic", "value"],
            ["targets", f"{found.targets:,}"],
            ["with both losses", f"{found.scored:,}"],
            ["mean difference, nats", f"{found.difference_sum / scored:.4f}"],
            ["mean |difference|, nats", f"{found.magnitude_sum / scored:.4f}"],
            *([f"weights: {name}", f"{value:.4f}"] for name, value in weights.items()),
        ]
        shares = [["last occurrence", "targets", "weight", "mean weight"]]
        total, weight = max(found.targets, 1), max(float(found.class_weights.sum()), 1e-30)
        for name, count, part in zip(
            CLASSES, found.class_targets.tolist(), found.class_weights.tolist(), strict=True
        ):
            label = {"near": f"near (up to {found.near})", "far": "far"}.get(name, "first seen")
            mean = f"{part / count:.3f}" if count else "-"
            shares.append([label, _percent(count / total), _percent(part / weight), mean])
        tables = [("Statistics", summary), ("Where the weight goes", shares)]
        tables.append(("Weights", self._weight_rows(found)))
        if found.scored:
            tables.append(("Differences short loss - long loss", _difference_rows(found)))
        tables.append(("Heaviest and lightest token types", self._type_rows(found)))
        return tables

    def _weight_rows(self, found: TokenStatistics) -> Rows:
        """Octaves of weight; those with nothing are left out."""
        rows = [["weight from", "targets", "weight", ""]]
        counts, sums = found.weight_targets, found.weight_sums
        merged = [(0, [0])] + [(at, [at, at + 1]) for at in range(1, len(counts) - 1, 2)]
        merged.append((len(counts) - 1, [len(counts) - 1]))
        for at, bins in merged:
            count, part = float(counts[bins].sum()), float(sums[bins].sum())
            if count:
                share = count / max(found.targets, 1)
                rows.append(
                    [
                        f"{HISTOGRAM_STARTS[at]:.4g}",
                        _percent(share),
                        _percent(part / max(float(sums.sum()), 1e-30)),
                        _bar(share),
                    ]
                )
        return rows

    def _type_rows(self, found: TokenStatistics) -> Rows:
        """Of token ids with at least a hundred-thousandth of the targets, and 5."""
        heavy, light = found.types(_TYPES, max(5, found.targets // 100_000))
        rows = [["heaviest", "mean weight", "targets", "lightest", "mean weight", "targets"]]
        for left, right in zip(heavy, light, strict=True):
            cells = []
            for kind in (left, right):
                text = (
                    visible(self.texts([kind.id])[0])
                    .replace("\n", "\u21b5")
                    .replace("\t", "\u21e5")
                )
                cells += [repr(text), f"{kind.mean:.3f}", f"{kind.targets:,}"]
            rows.append(cells)
        return rows


def write_page(path: str | Path, title: str, sections: list[Section]) -> None:
    """One self-contained HTML file, atomically."""
    with atomic_file(path, "w") as file:
        file.write(render_page(title, sections))


def _titles(targets: ScoredTargets) -> list[str]:
    """What is told about each target on hovering."""
    columns = zip(
        targets.document.tolist(),
        targets.token.tolist(),
        targets.weight.tolist(),
        targets.long_loss.tolist(),
        targets.short_loss.tolist(),
        targets.distance.tolist(),
        strict=True,
    )
    return [
        f"token {token} of document {document}: weight {weight:.3f}, long loss {_nats(long)}, "
        f"short loss {_nats(short)}, "
        + ("first seen" if distance < 0 else f"last {distance} tokens back")
        for document, token, weight, long, short, distance in columns
    ]


def _difference_rows(found: TokenStatistics) -> Rows:
    rows = [["nats from", "to", "targets", ""]]
    edges = ["", *(f"{edge:g}" for edge in DIFFERENCE_EDGES), ""]
    for at, count in enumerate(found.differences.tolist()):
        if count:
            share = count / found.scored
            rows.append([edges[at], edges[at + 1], _percent(share), _bar(share)])
    return rows


def _bar(share: float) -> str:
    return "\u2588" * round(40 * share)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _nats(value: float) -> str:
    return "none" if np.isnan(value) else f"{value:.3f}"
