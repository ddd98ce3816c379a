"""A frozen checkpoint that gives the losses of windows."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lctw_megatron.config.rope import narrowest_forward
from lctw_megatron.config.schema import LayoutConfig
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import InputError
from lctw_megatron.model import spec
from lctw_megatron.model.checkpoint import load_weights, read_manifest
from lctw_megatron.model.cross_entropy import IGNORE
from lctw_megatron.model.gpt import build_model
from lctw_megatron.platform.world import first_rank_decides
from lctw_megatron.scoring.forward import window_losses
from lctw_megatron.scoring.window_plan import forwards
from lctw_megatron.scoring.windows import Table

_Parts = list[tuple[NDArray[np.int64], torch.Tensor | None]]
_Running = tuple[Table, _Parts]

CPU_FORWARD_TOKENS = 2048
"""On a CPU larger forwards leave the caches: 16,384 tokens at a time are 5 to 20 % slower."""


class Scorer:
    """The model of a checkpoint of ours under a layout, for windows of up to ``window`` tokens.

    The process groups must exist (platform.world.initialize). The ranks of one tensor and pipeline
    group make it, and call it, together and with the same windows. precision: of weights and
    products; losses are float32 whatever it is.
    """

    def __init__(
        self,
        checkpoint: Path,
        layout: LayoutConfig,
        window: int,
        tokens_per_forward: int,
        precision: str,
        device: torch.device,
    ) -> None:
        self.checkpoint = checkpoint
        self.window = window
        if device.type == "cpu":
            tokens_per_forward = min(tokens_per_forward, CPU_FORWARD_TOKENS)
        self.tokens_per_forward = tokens_per_forward
        self.model = first_rank_decides(lambda: read_manifest(checkpoint)).model
        assert self.model.vocab_size is not None  # a checkpoint's is filled in
        self.vocab_size = self.model.vocab_size
        self.narrowest = narrowest_forward(self.model, window)
        self.chunks = build_model(
            self.model,
            layout,
            max_sequence_length=window,
            dtype=spec.DTYPES[precision],
            device=device,
            seed=None,
            packed=False,
        )
        load_weights(self.chunks, checkpoint)
        for chunk in self.chunks:
            chunk.eval()

    def losses(
        self, dataset: TokenDataset, tables: Iterable[Table], bos_id: int | None
    ) -> Iterator[tuple[Table, NDArray[np.float32] | None]]:
        """Each block of windows (int64 [windows, 5], see WindowPlan.tables) with the losses of the
        targets that they score, in its order: float32 [targets], on the last pipeline stage; None
        on the others.

        bos_id: what windows that begin in the middle of a document read as their first token; None
        leaves the token there. InputError for a token beyond the scorer's vocabulary or a loss that
        is not finite.
        """
        before: _Running | None = None
        for table in tables:
            # The GPU has the next block to work on before the host waits for the last one.
            running = table, self._start(dataset, table, bos_id)
            if before is not None:
                yield before[0], self._finish(dataset, *before)
            before = running
        if before is not None:
            yield before[0], self._finish(dataset, *before)

    def _start(self, dataset: TokenDataset, table: Table, bos_id: int | None) -> _Parts:
        """Which rows of the table were run together, and their losses [windows, width]; on a GPU
        without waiting for them."""
        parts = []
        for width, per_forward, rows in self._calls(table):
            tokens, labels = self._cut(dataset, table[rows], width, bos_id)
            result = window_losses(
                self.chunks,
                torch.from_numpy(tokens),
                torch.from_numpy(labels),
                width * per_forward,
            )
            parts.append((rows, result))
        return parts

    def _finish(
        self, dataset: TokenDataset, table: Table, parts: _Parts
    ) -> NDArray[np.float32] | None:
        count = table[:, 4] - table[:, 3]
        ends = np.cumsum(count)
        losses = np.empty(int(count.sum()), dtype=np.float32)
        for rows, result in parts:
            if result is None:
                return None
            for row, values in zip(rows, result.cpu().numpy(), strict=True):
                start, _, score_start, score_end = table[row, 1:]
                losses[ends[row] - count[row] : ends[row]] = values[
                    score_start - 1 - start : score_end - 1 - start
                ]
        if not np.isfinite(losses).all():
            at = int(np.isfinite(losses).argmin())
            row = int(np.searchsorted(ends, at, side="right"))
            token = table[row, 4] - (ends[row] - at)
            raise InputError(
                f"{self.checkpoint}: loss {losses[at]} at token {token} of document "
                f"{table[row, 0]} of {dataset.prefix}; are the scorer's weights finite? "
                f"does it need --precision fp32?"
            )
        return losses

    def _calls(self, table: Table) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """(width, windows of one forward, rows of the table): forwards of one shape go through the
        pipeline together."""
        for (width, number), same in groupby(
            forwards(table, self.tokens_per_forward, self.window, self.narrowest),
            lambda batch: (batch[1], len(batch[0])),
        ):
            yield width, number, np.concatenate([rows for rows, _ in same])

    def _cut(
        self, dataset: TokenDataset, table: Table, width: int, bos_id: int | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens (padded with 0) and labels of windows: int64 [windows, width] both."""
        # One wider: the last token of a text may only be predicted.
        text = np.zeros((len(table), width + 1), dtype=np.int64)
        labels = np.full((len(table), width), IGNORE, dtype=np.int64)
        for row, (document, start, end, score_start, score_end) in enumerate(table.tolist()):
            length = max(end, score_end) - start
            text[row, :length] = dataset.get(document, start, length)
            labels[row, score_start - 1 - start : score_end - 1 - start] = text[
                row, score_start - start : score_end - start
            ]
        if (beyond := (text >= self.vocab_size) | (text < 0)).any():
            row, column = np.argwhere(beyond)[0]
            document, start = table[row, :2]
            raise InputError(
                f"{dataset.prefix}.bin: token id {text[row, column]} at token {start + column} "
                f"of document {document} is beyond the vocabulary of {self.checkpoint} "
                f"({self.vocab_size} tokens); check the data with: python tools/inspect_data.py "
                f"{dataset.prefix} --verify"
            )
        tokens = text[:, :-1]
        if bos_id is not None:
            tokens[table[:, 1] > 0, 0] = bos_id
        return tokens, labels
