"""What a stage reads: made by another stage, which it then needs, or there already."""

import os
from pathlib import Path

from lctw_megatron.config.rules import run_of
from lctw_megatron.config.schema import Recipe
from lctw_megatron.data.indexed_array import index_path
from lctw_megatron.model.checkpoint_folder import newest_complete

Inputs = tuple[list[str], tuple[str, ...]]
"""Names of the stages that make some of what is read, and the rest."""


def of_datasets(recipe: Recipe, *prefixes: str) -> Inputs:
    """Token datasets, of which `prepare` may make some."""
    made = set()
    if recipe.prepare:
        prefix = os.path.abspath(recipe.prepare.output_prefix)
        made = {prefix, f"{prefix}-validation"} if recipe.prepare.validation_documents else {prefix}
    given = tuple(prefix for prefix in prefixes if os.path.abspath(prefix) not in made)
    return (["prepare"] if len(given) < len(prefixes) else []), given


def of_checkpoint(recipe: Recipe, source: str | None) -> Inputs:
    """A run of the recipe or a checkpoint folder, which may be such a run's."""
    if name := run_of(recipe, source):
        return [f"train-{name}"], ()
    return [], (source,) if source else ()


def is_there(path: str) -> bool:
    """Whether a token dataset, a sidecar, a text or a checkpoint has this name."""
    found = Path(path).is_file() or Path(index_path(path)).is_file()
    return found or newest_complete(Path(path)) is not None
