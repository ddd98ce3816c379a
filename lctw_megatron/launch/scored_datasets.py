"""Which token datasets a recipe scores, the names of the stages that do it, and their windows."""

import os
import re
from collections.abc import Iterable, Sequence
from itertools import permutations
from pathlib import Path

from lctw_megatron.config.schema import Recipe, RunConfig
from lctw_megatron.config.schemes import needs_short_loss


def reads_scores(run: RunConfig) -> bool:
    """Whether the run reads sidecars."""
    return needs_short_loss(run.weighting.scheme) and run.weighting.mode == "frozen"


def makes_scores(recipe: Recipe, run: RunConfig) -> bool:
    """Whether the recipe's scoring section makes the sidecars that the run reads."""
    scoring = recipe.scoring
    return reads_scores(run) and scoring is not None and run.data.scores == scoring.name


def scored_prefixes(recipe: Recipe, runs: Iterable[RunConfig]) -> dict[str, str]:
    """Prefix of each token dataset that is to be scored -> name of its stage."""
    corpora = [corpus for run in runs if makes_scores(recipe, run) for corpus in run.data.train]
    prefixes = list(dict.fromkeys(os.path.normpath(corpus.prefix) for corpus in corpora))
    if len(prefixes) == 1:
        return {prefixes[0]: "score"}
    names = [Path(prefix).name for prefix in prefixes]
    if _clash(names):
        names = [str(number) for number in range(len(prefixes))]
    return {prefix: f"score-{name}" for prefix, name in zip(prefixes, names, strict=True)}


def smallest_window(recipe: Recipe, runs: Iterable[RunConfig]) -> int | None:
    """Of all that the recipe compares a long context with."""
    weightings = [run.weighting for run in runs if needs_short_loss(run.weighting.scheme)]
    windows = [weighting.window for weighting in weightings if weighting.window]
    return min(windows + ([recipe.scoring.window] if recipe.scoring else []), default=None)


def _clash(names: Sequence[str]) -> bool:
    """Whether two datasets have one name, or one has a name that the parts of another take for
    their job (NAME-parts), their logs (NAME-parts-0) or their marks (NAME.0-of-4, which a glob
    finds)."""
    return len(set(names)) < len(names) or any(
        re.fullmatch(rf"{re.escape(one)}(-parts(-\d+)?|\..*-of-.*)", other)
        for one, other in permutations(names, 2)
    )
