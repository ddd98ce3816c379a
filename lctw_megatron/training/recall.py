"""`training.recall`: recall of facts hidden in long texts, measured between the steps.

The samples come from a seed of their own and the model runs without dropout and gradients, so that
a run's losses are the same, bit for bit, with it and without.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.data.manifest import TokenizerIdentity
from lctw_megatron.data.tokenizers import Tokenizer, load_tokenizer
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.recall import Cell, measure
from lctw_megatron.evaluation.recall_samples import RecallSample, SampleMaker, depths_of
from lctw_megatron.evaluation.sequence_losses import SequenceLosses
from lctw_megatron.model.checkpoint import TOKENIZER
from lctw_megatron.platform.world import World, first_rank_decides

SEED = 0
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
TOKENS_PER_FORWARD = 16384


class TrainingRecall:
    """What a run measures, in repeated sentences."""

    def __init__(self, run: RunConfig, tokenizer: TokenizerIdentity, start: Path | None) -> None:
        """run: complete, with `training.recall`. tokenizer: the data's; where its files are gone,
        those of ``start`` are read, the checkpoint that the run began with. Raises InputError for
        what could not be measured later.
        """
        assert run.training.recall and run.model.vocab_size
        self.config = config = run.training.recall
        self.layout = run.layout
        # What is named twice is measured once.
        self.lengths, self.tasks = [*dict.fromkeys(config.lengths)], [*dict.fromkeys(config.tasks)]
        try:
            known = first_rank_decides(lambda: _load(Path(tokenizer.path), start))
            self.maker = SampleMaker(known, None, SEED, run.model.vocab_size)
            for length in self.lengths:
                for task in self.tasks:
                    self.maker.check(task, length, config.samples)
        except InputError as error:
            raise InputError(f"training.recall: {error}") from None

    def __call__(self, chunks: list[Any], world: World) -> dict[str, float]:
        """Metrics of the model whose part ``chunks`` is: nats an answer token and the share right
        of every task and length; a loss that is not finite is left out. A collective call."""
        model = SequenceLosses(chunks, self.layout, world, TOKENS_PER_FORWARD)
        metrics = {}
        for length in self.lengths:
            cells: dict[str, Cell] = {task: Cell() for task in self.tasks}
            for measured in measure(model, self._samples(length), length):
                cells[measured.sample.task].add(measured)
            for task, cell in cells.items():
                nats = sum(cell.nats) / sum(cell.tokens)
                if np.isfinite(nats):
                    metrics[f"recall/{task}/{length}/nats"] = nats
                    metrics[f"recall/{task}/{length}/right"] = float(np.mean(cell.right))
        return metrics

    def _samples(self, length: int) -> Iterator[RecallSample]:
        for task in self.tasks:
            for number in range(self.config.samples):
                depths = depths_of(task, DEPTHS)
                yield self.maker(task, length, depths[number % len(depths)], number)


def _load(place: Path, start: Path | None) -> Tokenizer:
    return load_tokenizer(start / TOKENIZER if start and not place.exists() else place)
