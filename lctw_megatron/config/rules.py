"""Settings that contradict each other, apart from the parallel sizes (``layout_rules.py``)."""

import os
from collections.abc import Sequence
from pathlib import Path

from lctw_megatron.config.layout_rules import check_layout, check_sequence
from lctw_megatron.config.schema import Corpus, EvaluationConfig, Recipe, RunConfig, ScoringConfig
from lctw_megatron.config.schemes import needs_short_loss
from lctw_megatron.config.sidecar_name import NAME_RULE, is_sidecar_name
from lctw_megatron.config.validation_errors import nearest
from lctw_megatron.errors import InputError


def check_run(run: RunConfig) -> None:
    """Refuse a run whose settings contradict each other, whatever the number of ranks.

    Raises InputError naming the rule and the numbers.
    """
    weighting, sequence_length = run.weighting, run.data.sequence_length
    if weighting.mode == "self" and needs_short_loss(weighting.scheme):
        for field in ("window", "stride"):
            if getattr(weighting, field) is None:
                raise InputError(
                    f"weighting.{field} is missing; weighting.mode: self scores its own windows "
                    "and needs weighting.window and weighting.stride"
                )
        if run.layout.sequence and weighting.window and weighting.window % run.layout.tensor:
            raise InputError(
                f"weighting.window ({weighting.window}) must be divisible by layout.tensor "
                f"({run.layout.tensor}; layout.sequence is on, and the windows are split too)"
            )
    _check_windows("weighting", weighting.window, weighting.stride, sequence_length)
    training = run.training
    if not run.data.train:
        raise InputError("data.train is empty; name the prefix of at least one token dataset")
    _check_named_once(
        "data.train", _prefixes(run.data.train), "to read it more often, raise its weight"
    )
    _check_named_once("data.validation", _prefixes(run.data.validation), "name it once")
    _check_named_once("training.trackers", training.trackers, "name it once")
    if training.min_lr > training.lr:
        raise InputError(f"training.min_lr {training.min_lr} is above training.lr {training.lr}")
    if training.eval_interval and not run.data.validation:
        raise InputError(
            f"training.eval_interval is {training.eval_interval}, but data.validation names no "
            "dataset; give one or leave eval_interval out"
        )
    for corpus in run.data.validation:
        if corpus.weight != 1:
            raise InputError(
                f"data.validation gives {corpus.prefix} the weight {corpus.weight:g}, but "
                "validation takes the sequences of all its datasets alike; leave weight out"
            )
    if training.min_lr and training.schedule == "constant":
        raise InputError(
            f"training.min_lr is {training.min_lr}, but training.schedule is constant and never "
            "falls to it; set schedule: cosine or leave min_lr out"
        )
    if training.keep_every and not training.save_interval:
        raise InputError(
            f"training.keep_every is {training.keep_every}, but without training.save_interval "
            "only the end is saved; give one or leave keep_every out"
        )
    if (
        training.keep_every
        and training.save_interval
        and training.keep_every % training.save_interval
    ):
        raise InputError(
            f"training.keep_every ({training.keep_every}) must be divisible by "
            f"training.save_interval ({training.save_interval}), or the checkpoints that it shall "
            "keep are never written"
        )
    if run.megatron.model == "hybrid" and run.model.parallel_block:
        raise InputError(
            "megatron.model is hybrid, which runs attention and MLP one after the other, but "
            f"model.architecture {run.model.architecture} runs them side by side; set gpt"
        )
    positions, scaling = run.model.max_position_embeddings, run.model.rope_scaling
    if scaling and scaling.rope_type == "dynamic":
        if positions not in (None, scaling.original_max_position_embeddings):
            raise InputError(
                f"model.max_position_embeddings is {positions}, but transformers takes the "
                "original maximum of rope_type dynamic from it, "
                f"{scaling.original_max_position_embeddings}; leave it out"
            )
    elif positions and positions < sequence_length:
        raise InputError(
            f"model.max_position_embeddings {positions} is smaller than data.sequence_length "
            f"{sequence_length}; leave it out, and the sequence length is written on export"
        )
    check_layout(run, None)


def check_scoring(scoring: ScoringConfig) -> None:
    """Refuse windows that do not fit together, and a name that no sidecar has. InputError."""
    if not is_sidecar_name(scoring.name):
        raise InputError(f"scoring.name is {scoring.name!r}, expected {NAME_RULE}")
    _check_windows("scoring", scoring.window, scoring.stride, scoring.sequence_length)


def check_scores_fit(run: RunConfig, scoring: ScoringConfig) -> None:
    """Refuse a run that could not read the scores that ``scoring`` makes for it. InputError.

    The rules are those of data.Sidecar.check, here before hours of scoring.
    """
    for field in ("window", "stride"):
        ours, theirs = getattr(run.weighting, field), getattr(scoring, field)
        if ours is not None and ours != theirs:
            raise InputError(
                f"weighting.{field} is {ours}, but scoring.{field} is {theirs}; make them equal"
            )
    length = run.data.sequence_length
    if scoring.window >= length:
        raise InputError(
            f"scoring.window {scoring.window} is not shorter than data.sequence_length {length}: "
            "no target would have a score"
        )
    if scoring.sequence_length is not None:
        if scoring.sequence_length != length:
            raise InputError(
                f"scoring.sequence_length is {scoring.sequence_length}, but data.sequence_length "
                f"is {length}; make them equal, or leave it out of scoring"
            )
        if run.data.packing != "chunk":
            raise InputError(
                f"scoring.sequence_length {length} fits data.packing chunk, not "
                f"{run.data.packing}; leave it out of scoring"
            )


def check_evaluation(evaluation: EvaluationConfig) -> None:
    """Refuse windows that do not fit together. Raises InputError."""
    _check_windows("evaluation", evaluation.window, evaluation.stride, evaluation.sequence_length)
    for field in ("stride", "key_checkpoint"):
        if getattr(evaluation, field) is not None and evaluation.window is None:
            raise InputError(f"evaluation.{field} does nothing without evaluation.window")


def check_probes(evaluation: EvaluationConfig, run: RunConfig) -> None:
    """Refuse probes that ``run`` could not be measured by once it is trained. InputError.

    The rules are those of evaluation.evaluate and evaluate_recall, here before hours of training.
    """
    recall = evaluation.recall
    layout = run.layout.model_copy(update={"sequence": False})  # which evaluation goes without
    try:
        if evaluation.sequence_length is None:
            length = run.data.sequence_length
            _check_windows("evaluation", evaluation.window, evaluation.stride, length)
        if recall is None:
            return
        for length in recall.lengths:
            check_sequence(length, f"{length} of evaluation.recall.lengths", layout)
        if recall.window and recall.window < max(recall.lengths):
            check_sequence(recall.window, "evaluation.recall.window", layout)
    except InputError as error:
        raise InputError(f"run {run.name}: {error}") from None


def check_start(recipe: Recipe, name: str) -> None:
    """Refuse runs that start from each other and, of a run that has not begun, a start that is
    neither a run nor a path."""
    chain = [name]
    while start := recipe.runs[chain[-1]].get("start"):
        if start not in recipe.runs:
            # A run that has begun may have been begun with a folder that is gone.
            if not Path(recipe.output_dir, chain[-1], "checkpoints").is_dir():
                check_source(recipe, start, f"run {chain[-1]}: start")
            return
        if start in chain:
            raise InputError(f"runs start from each other: {' <- '.join([*chain, start])}")
        chain.append(start)


def check_source(recipe: Recipe, source: str, field: str) -> None:
    if source not in recipe.runs and "/" not in source and not Path(source).exists():
        hint = nearest(source, recipe.runs)
        raise InputError(f"{field} is {source}, neither a run nor a checkpoint folder; {hint}")


def run_of(recipe: Recipe, source: str | None) -> str | None:
    """The run whose name ``source`` is, or in whose folder it lies; None: it is of elsewhere."""
    if source is None or source in recipe.runs:
        return source
    place = Path(os.path.abspath(source))
    for name in recipe.runs:
        if place.is_relative_to(os.path.abspath(f"{recipe.output_dir}/{name}")):
            return name
    return None


def starts_from_a_checkpoint(recipe: Recipe, name: str) -> bool:
    """Whether the run starts, itself or through other runs, from what is no run of the recipe."""
    while (start := recipe.runs[name].get("start")) in recipe.runs:
        name = start
    return start is not None


def _prefixes(corpora: Sequence[Corpus]) -> list[str]:
    return [os.path.normpath(corpus.prefix) for corpus in corpora]


def _check_named_once(field: str, names: Sequence[str], advice: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{field} names {name} {names.count(name)} times; {advice}")


def _check_windows(
    section: str, window: int | None, stride: int | None, sequence_length: int | None
) -> None:
    if window and stride and stride > window:
        raise InputError(
            f"{section}.stride {stride} is larger than {section}.window {window}: the tokens "
            "between two windows would never be scored; choose a stride of at most the window"
        )
    if window and sequence_length and window >= sequence_length:
        raise InputError(
            f"{section}.window {window} is not shorter than the sequence length {sequence_length}: "
            "both contexts would be the same; choose a smaller window"
        )
