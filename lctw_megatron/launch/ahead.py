"""What a late stage would refuse, asked before the first: runs to compare with, starts and scorers
that are another model or read other tokens, held-out text of another tokenizer, and sizes of
evaluation and recall that do not suit the text or the tokenizer, where these are there."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lctw_megatron.config.layout_rules import check_model
from lctw_megatron.config.rope import exported_maximum, longest_context
from lctw_megatron.config.rules import run_of
from lctw_megatron.config.schema import (
    EvaluationConfig,
    LayoutConfig,
    ModelConfig,
    Recipe,
    RunConfig,
    ScoringConfig,
)
from lctw_megatron.data.manifest import TokenizerIdentity
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.data.tokenizer_files import has_tokenizer
from lctw_megatron.data.tokenizers import Tokenizer, load_tokenizer
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.held_out import check_long_enough, check_tokens
from lctw_megatron.launch.inputs import is_there, of_datasets
from lctw_megatron.launch.scored_datasets import scored_prefixes
from lctw_megatron.launch.stages import final_runs
from lctw_megatron.model.checkpoint_folder import newest_complete

_MEASURED = ("metrics.jsonl", "evaluation.json", "recall.json", "harness.json")
"""Of these a run's folder has one at least, or there is nothing to report."""


def check_ahead(
    recipe: Recipe, runs: Sequence[RunConfig], names: Collection[str], prepared: bool
) -> None:
    """InputError for what one of the stages ``names``, which are not done, would refuse. prepared:
    what the recipe's prepare section makes is there, and stays."""
    evaluation = recipe.evaluation
    if evaluation and "report" in names:
        _check_compared(recipe, evaluation, final_runs(recipe, runs))
    at_hand = _AtHand(recipe, runs, prepared)
    for prefix, name in scored_prefixes(recipe, runs).items():
        if recipe.scoring and name in names:
            at_hand.check_scorer(recipe.scoring, prefix)
    for run in runs:
        if f"train-{run.name}" in names:
            at_hand.check_start(run)
    for run in runs:
        if evaluation and f"evaluate-{run.name}" in names:
            at_hand.check_held_out(evaluation, run)
    for run in runs:
        if f"train-{run.name}" in names:
            at_hand.check_training_recall(run)
        if evaluation and f"recall-{run.name}" in names:
            at_hand.check_recall(evaluation, run)


def check_after_training(recipe: Recipe, run: RunConfig) -> None:
    """InputError for what the stages after the training of ``run`` would refuse. Training asks: it
    is the first that sees what `prepare` has made in a queue."""
    if recipe.evaluation and final_runs(recipe, [run]):
        kinds = ["evaluate", "recall"] if recipe.evaluation.recall else ["evaluate"]
        try:
            check_ahead(recipe, [run], [f"{kind}-{run.name}" for kind in kinds], prepared=True)
        except InputError as error:
            raise InputError(f"{error}, or --set evaluation=null to train only") from None


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


@dataclass(frozen=True)
class _Model:
    """A checkpoint, or what will be one."""

    name: str
    """As the user calls it."""
    tokenizer: Mapping[str, Any]
    """Its identity; empty if nobody knows."""
    config: ModelConfig
    """Without `vocab_size` where the tokenizer decides that and nobody knows it."""

    def check(self, prefix: str) -> None:
        """InputError unless it reads the dataset ``prefix``."""
        if self.config.vocab_size:
            dataset = TokenDataset(prefix)
            check_tokens(dataset, self.tokenizer, self.config.vocab_size, self.name)


class _AtHand:
    """The datasets, tokenizers and models of a recipe that are there before its stages run."""

    def __init__(self, recipe: Recipe, runs: Sequence[RunConfig], prepared: bool) -> None:
        self._recipe, self._prepared = recipe, prepared
        self._runs = {run.name: run for run in runs}
        self._tokenizers: dict[str, Tokenizer] = {}
        self._seen: set[tuple[object, ...]] = set()

    def check_scorer(self, scoring: ScoringConfig, prefix: str) -> None:
        """Refuse a scorer that cannot be split as asked, is made for shorter windows or does not
        read ``prefix``: scoring.job's rules, before it is trained."""
        scorer = self._model(scoring.scorer)
        if scorer is None:
            return
        layout = LayoutConfig(tensor=scoring.tensor, pipeline=scoring.pipeline)
        longest = longest_context(scorer.config)
        try:
            check_model(scorer.config, layout)
            if longest is not None and scoring.window > longest:
                raise InputError(
                    f"scoring.window is {scoring.window}, but it is made for at most {longest} "
                    "tokens; choose a smaller window"
                )
            if self._is_there(prefix):
                scorer.check(prefix)
        except InputError as error:
            raise InputError(f"scoring.scorer {scorer.name}: {error}") from None

    def check_start(self, run: RunConfig) -> None:
        """Refuse a run that begins with another model or another tokenizer than its own: the rules
        of training.compatibility. One that has begun needs its start no more."""
        start = self._model(self._recipe.runs[run.name].get("start"))
        own = Path(run.run_dir, "checkpoints")
        if start is None or newest_complete(own) is not None:
            return
        from lctw_megatron.training.compatibility import fitted_model

        model, theirs = self._config(run), start.config
        if not (model.vocab_size and theirs.vocab_size):
            model, theirs = (m.model_copy(update={"vocab_size": None}) for m in (model, theirs))
        try:
            fitted_model(model, theirs, start.name)
            for corpus in run.data.train:
                if self._is_there(corpus.prefix):
                    start.check(corpus.prefix)
        except InputError as error:
            raise InputError(f"run {run.name}: {error}") from None

    def check_held_out(self, evaluation: EvaluationConfig, run: RunConfig) -> None:
        """Refuse ``evaluation.data`` without a document that is long enough, or of tokens that are
        not the run's or those of the model that picks key tokens."""
        prefix = evaluation.data
        if not self._is_there(prefix):
            return
        length = evaluation.sequence_length or run.data.sequence_length
        try:
            check_long_enough(TokenDataset(prefix), length)
            for model in (self._model(run.name), self._model(evaluation.key_checkpoint)):
                if model is not None:
                    model.check(prefix)
        except InputError as error:
            raise InputError(f"evaluation.data of run {run.name}: {error}") from None

    def _model(self, source: str | None) -> _Model | None:
        """The model of a run or a checkpoint; None if there is none yet."""
        if name := run_of(self._recipe, source):
            run = self._runs.get(name)
            if run is None:
                return None
            identity = self._identity(run)
            known = identity.model_dump() if identity else {}
            return _Model(f"run {name}", known, self._config(run))
        place = newest_complete(Path(source)) if source else None
        if place is None:
            return None
        from lctw_megatron.model.checkpoint import read_manifest

        manifest = read_manifest(place)
        return _Model(str(place), manifest.tokenizer or {}, manifest.model)

    def _config(self, run: RunConfig) -> ModelConfig:
        """The model of ``run`` with what its data and its start decide, as far as it is known."""
        model, positions = run.model, run.data.sequence_length
        if start := self._model(self._recipe.runs[run.name].get("start")):
            positions = max(positions, start.config.max_position_embeddings or 0)
        identity = None if model.vocab_size else self._identity(run)
        return model.model_copy(
            update={
                "vocab_size": identity.vocab_size if identity else model.vocab_size,
                "max_position_embeddings": model.max_position_embeddings
                or exported_maximum(model, positions),
            }
        )

    def _identity(self, run: RunConfig) -> TokenizerIdentity | None:
        """Of the tokenizer of the run's data."""
        prefix = run.data.train[0].prefix
        if self._is_there(prefix):
            return TokenDataset(prefix).manifest.tokenizer
        tokenizer = self._tokenizer(run)
        return tokenizer.identity if tokenizer else None

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
