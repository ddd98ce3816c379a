"""What a late stage would refuse, asked before the first: runs to compare with, and sizes of
evaluation and recall that do not suit the held-out text or the tokenizer, where these are there."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from lctw_megatron.config.schema import EvaluationConfig, Recipe, RunConfig
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.data.tokenizer_files import has_tokenizer
from lctw_megatron.data.tokenizers import Tokenizer, load_tokenizer
from lctw_megatron.errors import InputError
from lctw_megatron.launch.inputs import is_there, of_datasets
from lctw_megatron.launch.stages import Stage, final_runs
from lctw_megatron.model.checkpoint_folder import newest_complete

_MEASURED = ("metrics.jsonl", "evaluation.json", "recall.json", "harness.json")
"""Of these a run's folder has one at least, or there is nothing to report."""


def check_ahead(
    recipe: Recipe, runs: Sequence[RunConfig], stages: Iterable[Stage], prepared: bool
) -> None:
    """InputError for what one of ``stages``, which are not done, would refuse. prepared: what the
    recipe's prepare section makes is there, and stays."""
    names, evaluation = {stage.name for stage in stages}, recipe.evaluation
    if evaluation and "report" in names:
        _check_compared(recipe, evaluation, final_runs(recipe, runs))
    at_hand = _AtHand(recipe, prepared)
    for run in runs:
        if evaluation and f"evaluate-{run.name}" in names:
            at_hand.check_held_out(evaluation, run)
    for run in runs:
        if f"train-{run.name}" in names:
            at_hand.check_training_recall(run)
        if evaluation and f"recall-{run.name}" in names:
            at_hand.check_recall(evaluation, run)


def _check_compared(recipe: Recipe, evaluation: EvaluationConfig, final: list[RunConfig]) -> None:
    own = {os.path.realpath(f"{recipe.output_dir}/{name}") for name in recipe.runs}
    named = {os.path.realpath(run.run_dir) for run in final}
    for folder in evaluation.compare_with:
        field, place = f"evaluation.compare_with: {folder}", os.path.realpath(folder)
        if place in named:
            raise InputError(f"{field} is in the report already; name each run once")
        named.add(place)
        if place in own:  # which the chain trains before
            continue
        if not os.path.isdir(place):
            raise InputError(f"{field}: no such run folder; train the run first, or leave it out")
        if not any(os.path.isfile(os.path.join(place, name)) for name in _MEASURED):
            raise InputError(
                f"{field}: holds neither steps in metrics.jsonl nor evaluation.json, recall.json "
                "or harness.json; is this a run folder?"
            )


class _AtHand:
    """The datasets and tokenizers of a recipe that are there before its stages run."""

    def __init__(self, recipe: Recipe, prepared: bool) -> None:
        self._recipe, self._prepared = recipe, prepared
        self._tokenizers: dict[str, Tokenizer] = {}
        self._seen: set[tuple[object, ...]] = set()

    def check_held_out(self, evaluation: EvaluationConfig, run: RunConfig) -> None:
        """Refuse ``evaluation.data`` without a document that is long enough."""
        if not self._is_there(evaluation.data):
            return
        from lctw_megatron.evaluation.held_out import check_long_enough

        length = evaluation.sequence_length or run.data.sequence_length
        try:
            check_long_enough(TokenDataset(evaluation.data), length)
        except InputError as error:
            raise InputError(f"evaluation.data of run {run.name}: {error}") from None

    def check_training_recall(self, run: RunConfig) -> None:
        if asked := run.training.recall:
            self._check("training.recall", run, asked.tasks, asked.lengths, asked.samples)

    def check_recall(self, evaluation: EvaluationConfig, run: RunConfig) -> None:
        from lctw_megatron.evaluation.recall_samples import WINDOW

        asked = evaluation.recall
        assert asked
        window = asked.window or run.weighting.window or WINDOW
        haystack = asked.haystack if asked.haystack and self._is_there(asked.haystack) else None
        where, more = "evaluation.recall", (haystack, window)
        self._check(where, run, asked.tasks, asked.lengths, asked.samples, *more)

    def _check(
        self,
        where: str,
        run: RunConfig,
        tasks: Sequence[str],
        lengths: Sequence[int],
        samples: int,
        haystack: str | None = None,
        window: int | None = None,
    ) -> None:
        """Refuse samples that cannot be made, once for all runs that are asked the same."""
        tokenizer = self._tokenizer(run)
        if tokenizer is None:
            return
        identity = tokenizer.identity
        vocab_size = run.model.vocab_size or identity.vocab_size
        asked = (identity.path, vocab_size, *tasks, *lengths, samples, haystack, window)
        if asked in self._seen:
            return
        self._seen.add(asked)
        from lctw_megatron.evaluation.recall_samples import SampleMaker

        try:
            maker = SampleMaker(tokenizer, haystack, 0, vocab_size)
            for length in lengths:
                short = window if window and window < length else None
                for task in tasks:
                    maker.check(task, length, samples, short)
        except InputError as error:
            raise InputError(f"{where} of run {run.name}: {error}") from None

    def _tokenizer(self, run: RunConfig) -> Tokenizer | None:
        """The tokenizer of the run's data, or the start's if its files are gone; None if it is made
        by a stage that is still to run."""
        prepare = self._recipe.prepare
        places: list[str | Path] = []
        for prefix in [corpus.prefix for corpus in run.data.train[:1]]:
            if self._is_there(prefix):
                places.append(TokenDataset(prefix).manifest.tokenizer.path)
            elif prepare and prepare.tokenizer and of_datasets(self._recipe, prefix)[0]:
                places.append(prepare.tokenizer)
        start = newest_complete(Path(run.start)) if run.start else None
        if start is not None and has_tokenizer(start / "tokenizer"):
            places.append(start / "tokenizer")
        place = next((os.path.abspath(place) for place in places if Path(place).exists()), None)
        if place is None:
            return None
        if place not in self._tokenizers:
            self._tokenizers[place] = load_tokenizer(place)
        return self._tokenizers[place]

    def _is_there(self, prefix: str) -> bool:
        """Whether a dataset or text is there that no stage makes anew."""
        made, _ = of_datasets(self._recipe, prefix)
        return (self._prepared or not made) and is_there(prefix)
