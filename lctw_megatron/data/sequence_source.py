"""One corpus of a blend, opened: its tokens, its sequences and, if wanted, its short losses."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lctw_megatron.config.schema import Corpus, DataConfig
from lctw_megatron.data.batch import PieceData, Sample, assemble
from lctw_megatron.data.sequence_cache import cached_index
from lctw_megatron.data.sequences import Piece
from lctw_megatron.data.sidecar import Sidecar
from lctw_megatron.data.token_dataset import TokenDataset, bos_words
from lctw_megatron.errors import InputError, few

_FEW_SCORED = 0.2
"""Share of targets with a short loss below which one of them outweighs five others."""


def _advice(data: DataConfig) -> str:
    """Against data without sequences: only settings that are not set already."""
    if data.packing == "chunk" and data.tails == "drop":
        return "shorten the sequences, or set data.tails=keep or data.packing=pack"
    return "preprocess documents of two tokens or more"


class SequenceSource:
    """Sequences of one token dataset, by number.

    ``scores`` is the name of the sidecar to read, None for none; ``window`` and ``stride`` are what
    it must have been made with, None for anything. Without a sidecar ``window`` is that of a run
    which scores itself. ``vocab_size`` is the model's, which must know every token; None takes the
    tokenizer's. ``cache_setting`` is what the user calls ``data.index_cache``, None where it cannot
    be set.
    """

    def __init__(
        self,
        prefix: str,
        data: DataConfig,
        *,
        scores: str | None = None,
        window: int | None = None,
        stride: int | None = None,
        vocab_size: int | None = None,
        cache_setting: str | None = "data.index_cache",
    ) -> None:
        self.prefix = prefix
        self.dataset = TokenDataset(prefix)
        self.tokenizer = self.dataset.manifest.tokenizer
        self.sidecar = Sidecar(self.dataset, scores) if scores is not None else None
        if self.sidecar is not None:
            self.sidecar.check(window, stride, data.sequence_length, data.packing)
            if self.sidecar.manifest.window >= data.sequence_length:
                raise InputError(
                    f"{self.sidecar.prefix}: scored with window {self.sidecar.manifest.window}, "
                    f"but data.sequence_length is {data.sequence_length}: the short context must "
                    "be shorter; score with a smaller window or train longer sequences"
                )
        self._sequence_length = data.sequence_length
        self._own_window = window if scores is None else None
        self._vocab_size = vocab_size or self.tokenizer.vocab_size
        self.dataset.check_fits(self._vocab_size, "the model")
        self._bos_id = self.tokenizer.first_id
        self.index, self.packing_cost = cached_index(
            self.dataset,
            data.sequence_length,
            data.packing,
            data.tails,
            data.index_cache,
            cache_setting,
        )
        if not len(self.index):
            longest = int(self.dataset.lengths.max()) if len(self.dataset.lengths) else 0
            raise InputError(
                f"{prefix}: no sequence of data.sequence_length={data.sequence_length} "
                f"(data.packing={data.packing}, data.tails={data.tails}): the longest document has "
                f"{longest} tokens; {_advice(data)}"
            )

    def __len__(self) -> int:
        return len(self.index)

    def scores_line(self) -> str:
        """How many targets have a short loss, and what follows if they are few; without a sidecar
        only that none will have one, else empty."""
        if self.sidecar is None:
            longest = int(self.dataset.lengths.max())
            if self._own_window is None or longest > self._own_window + 1:
                return ""
            return (
                f"{self.prefix}: no document is longer than a window and its last target "
                f"({self._own_window + 1} tokens, the longest has {longest}): it trains as "
                "uniform; take a smaller weighting.window, or longer documents"
            )
        manifest = self.sidecar.manifest
        share = manifest.scored / max(self.dataset.num_tokens - len(self.dataset), 1)
        share = min(share, self.sidecar.usable_share(self.index))
        line = f"{self.prefix}: {100 * share:.3g} % of the targets have a short loss"
        if not manifest.scored:
            return (
                f"{line}, as no document is longer than a window and its last target "
                f"({manifest.window + 1} tokens): it "
                "trains as uniform; score with a smaller window, or take longer documents"
            )
        if share < _FEW_SCORED:
            line += (
                f": normalised weights gather on them (mean weight about {1 / share:.3g} each); "
                "set weighting.unscored=one or weighting.interpolation, or score with a smaller "
                "window"
            )
        return line

    def read(self, sequence: int) -> Sample:
        """One sequence, assembled. Raises InputError for a damaged sidecar or a token id beyond
        the vocabulary."""
        pieces = [self._read(piece) for piece in self.index.pieces(sequence)]
        return assemble(pieces, self._sequence_length, self._bos_id)

    def _read(self, piece: Piece) -> PieceData:
        document, offset, length = piece
        tokens = self.dataset.get(document, offset, length + 1)
        if tokens.max() >= self._vocab_size or tokens.min() < 0:
            wrong = int(np.argmax((tokens >= self._vocab_size) | (tokens < 0)))
            raise InputError(
                f"{self.prefix}: token {offset + wrong} of document {document} has the id "
                f"{tokens[wrong]}, the vocabulary has {self._vocab_size} (0 to "
                f"{self._vocab_size - 1}); train with the model whose tokenizer made this dataset, "
                "or preprocess it again"
            )
        if self.sidecar is None:
            return PieceData(document, offset, tokens)
        return PieceData(document, offset, tokens, self.sidecar.usable(document, offset, length))


def open_sources(
    corpora: Sequence[Corpus], data: DataConfig, **options: Any
) -> list[SequenceSource]:
    """Open the corpora of a blend, with the ``options`` of SequenceSource.

    Raises InputError unless all share one tokenizer.
    """
    sources = [SequenceSource(corpus.prefix, data, **options) for corpus in corpora]
    check_one_tokenizer(sources)
    return sources


def unlike_scores_line(sources: Sequence[SequenceSource]) -> str:
    """Which short losses of a blend were made in other windows or by another scorer than others:
    their differences do not mean the same. Empty if all were made alike."""
    ways: dict[tuple[Any, ...], str] = {}
    for sidecar in (source.sidecar for source in sources if source.sidecar is not None):
        made = sidecar.manifest
        windowing = made.window, made.stride, made.sequence_length, made.score_first_window
        scorer = made.scorer.get("checkpoint")
        ways.setdefault(
            (*windowing, made.scorer.get("digest")),
            f"{sidecar.prefix} window {made.window}, stride {made.stride}, --sequence-length "
            f"{made.sequence_length}, first windows {made.score_first_window}, scorer {scorer}",
        )
    if len(ways) < 2:
        return ""
    return (
        f"the short losses of the blend were not made alike: {few(list(ways.values()), '; ')}; "
        "score again what was not meant so"
    )


def check_one_tokenizer(sources: Sequence[SequenceSource]) -> None:
    """InputError that names both if two of them were made with different ones, or with and without
    BOS, which the digest of a SentencePiece model leaves out."""
    for source in sources[1:]:
        if source.tokenizer.digest != sources[0].tokenizer.digest:
            raise InputError(
                f"{source.prefix} was tokenised with {source.tokenizer.path} (digest "
                f"{source.tokenizer.digest}), but {sources[0].prefix} with "
                f"{sources[0].tokenizer.path} (digest {sources[0].tokenizer.digest}); "
                "preprocess both with one tokenizer"
            )
        both = [one.dataset.manifest for one in (source, sources[0])]
        begins = [manifest.tokenizer.add_bos for manifest in both]
        # What other tools made is as it is: its documents may have no BOS whatever the tokenizer.
        if begins[0] != begins[1] and not any(manifest.made_elsewhere for manifest in both):
            raise InputError(
                f"the documents of {source.prefix} begin {bos_words(begins[0])} (tokenizer "
                f"{source.tokenizer.path}), but those of {sources[0].prefix} "
                f"{bos_words(begins[1])} (tokenizer {sources[0].tokenizer.path}); preprocess both "
                "with one tokenizer"
            )
