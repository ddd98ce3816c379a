"""Recipe files: reading, composing, overriding, resolving.

A recipe file is YAML with the fields of ``schema.RecipeFile``. Short forms:

- ``model``, ``layout``, ``weighting`` and ``cluster`` may name a fragment: ``model: llama3_8b`` is
  configs/models/llama3_8b.yaml; a name that ends in .yaml is a file. ``{base: llama3_8b,
  rope_theta: 15.3e6}`` is a fragment with changes; any other mapping is the section itself.
- ``data.train: PREFIX`` is one token dataset of weight 1; a list of prefixes is a blend.
- ``runs`` maps run names to changes of the shared sections. A mapping changes the fields it names;
  a fragment (a name, or a mapping with ``base``) takes the place of the shared section, null too.
- ``seeds: [1, 2, 3]`` makes the run NAME three times, as NAME-seed1 and so on. ``--set
  runs.NAME.section.field=value`` reaches all of them.
- ``base: RECIPE``, at the top, is another recipe file, or a shipped one's name: its sections with
  this file's changes, as in a run. Name and output folder are never its, runs only where this file
  has none.
- ``start`` names another run, whose newest checkpoint is taken when this one begins, or a
  checkpoint folder.

Paths in a recipe are relative to the current directory, so that commands are run from one place
(the project root for the shipped recipes) and say so by failing elsewhere.
"""

import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lctw_megatron.config.rope import is_read
from lctw_megatron.config.rules import (
    check_evaluation,
    check_run,
    check_scores_fit,
    check_scoring,
    check_source,
    check_start,
    starts_from_a_checkpoint,
)
from lctw_megatron.config.schema import (
    ClusterConfig,
    LayoutConfig,
    ModelConfig,
    Recipe,
    RecipeFile,
    RunConfig,
    RunSections,
    WeightingConfig,
    check_text,
)
from lctw_megatron.config.schemes import needs_short_loss
from lctw_megatron.config.seeds import one_a_seed, replace_seeds
from lctw_megatron.config.shipped import CONFIGS, find_recipe
from lctw_megatron.config.validation_errors import build, check_values, nearest
from lctw_megatron.config.yaml_text import parse_yaml, parse_yaml_mapping, to_yaml
from lctw_megatron.errors import InputError, few

# Section of a recipe -> folder of its fragments in configs/, and what they hold.
FRAGMENTS: dict[str, tuple[str, type[BaseModel]]] = {
    "model": ("models", ModelConfig),
    "layout": ("layouts", LayoutConfig),
    "weighting": ("weightings", WeightingConfig),
    "cluster": ("clusters", ClusterConfig),
}

# Folders that the stages put beside the runs' folders in OUTPUT_DIR.
_TAKEN_RUN_NAMES = {"report", "launch"}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and check every run of it. ``overrides`` are ``--set`` texts, applied in order.

    ``path`` may also be the name of a shipped recipe (``shipped.find_recipe``).
    An override of a shared section reaches every run, ``runs.NAME.section.field=value`` one run.
    Raises InputError naming the file (or the override), the field and what would be right.
    """
    path = find_recipe(path)
    where = str(path)
    _check_one_line(where, "the recipe's file name")
    shared, runs, where_runs = _read(path)
    shared_run = {key: shared.pop(key) for key in list(shared) if key in RunSections.model_fields}
    complete = {}
    for name, changes in runs.items():
        if not isinstance(changes or {}, dict):
            raise InputError(f"{where_runs}: runs.{name} is {changes!r}, expected its sections")
        own, whole = _expand(changes or {}, where_runs)
        check_values(RunSections, own, where_runs, f"runs.{name}")
        base = {key: value for key, value in shared_run.items() if key not in whole}
        replace_seeds(base, own, f"{where_runs}: runs.{name}")
        complete[name] = _merge(base, own)
    for text in overrides:
        _override(shared, complete, text)
    recipe = build(Recipe, {**shared, "runs": one_a_seed(complete, where)}, where)
    _check_recipe(recipe, where)
    return recipe


def run_dir(recipe: Recipe, name: str) -> str:
    """The folder of a run: checkpoints/, metrics and the resolved config."""
    return f"{recipe.output_dir}/{name}"


def checkpoints_of(recipe: Recipe, source: str) -> str:
    """The checkpoint folder that ``source`` stands for: a run of the recipe or a folder itself."""
    return f"{run_dir(recipe, source)}/checkpoints" if source in recipe.runs else source


def resolve_run(
    recipe: Recipe,
    run_name: str | None = None,
    checkpoint_model: Callable[..., ModelConfig] | None = None,
) -> RunConfig:
    """One run with every value in place; ``run_name`` may be None when there is only one.

    A run whose model section lacks required fields takes the rest from what it starts from: from
    the run of that name, or from ``checkpoint_model(folder, ...)``, whose further folders are those
    of the runs that begin there, this one's last: they have the model if the start is gone, and
    need no start to go on. Raises InputError.
    """
    if run_name is None:
        if len(recipe.runs) > 1:
            raise InputError(f"which run? Choose one with --run: {few(list(recipe.runs), most=12)}")
        run_name = next(iter(recipe.runs))
    if run_name not in recipe.runs:
        raise InputError(f"no run {run_name} in this recipe; {nearest(run_name, recipe.runs)}")
    values = dict(recipe.runs[run_name])
    values["model"] = _model_values(recipe, run_name, checkpoint_model)
    if values.get("start"):
        values["start"] = checkpoints_of(recipe, values["start"])
    values |= {"name": run_name, "run_dir": run_dir(recipe, run_name)}
    where = f"run {run_name}"
    run = build(RunConfig, values, where)
    try:
        check_run(run)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return run


def load_run(path: str | Path) -> RunConfig:
    """The run config saved in the file ``path`` by ``dump_yaml``."""
    return build(RunConfig, parse_yaml_mapping(path), str(path))


def dump_yaml(section: BaseModel) -> str:
    """A section as YAML that ``load_run`` (for a RunConfig) reads back equal."""
    return to_yaml(section.model_dump(mode="json"))


def parse_override(text: str) -> tuple[list[str], Any]:
    """``a.b=c`` as (["a", "b"], value of c in YAML). Raises InputError."""
    path, equals, value = text.partition("=")
    parts = path.strip().split(".")
    _check_one_line(text, "--set")
    if not equals or not all(parts):
        raise InputError(f"--set {text}: expected section.field=value")
    return parts, parse_yaml(value, f"--set {text}")


def load_fragment(section: str, name: str, where: str) -> dict[str, Any]:
    """The values of fragment ``name`` of ``section``; ``where`` asked for it."""
    folder, kind = FRAGMENTS[section]
    path = Path(name) if name.endswith(".yaml") else CONFIGS / folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in (CONFIGS / folder).glob("*.yaml"))
        raise InputError(
            f"{where}: {section}: no fragment {name} in configs/{folder}; {nearest(name, known)}"
            if path.parent == CONFIGS / folder
            else f"{where}: {section}: no such file: {name}"
        )
    values = parse_yaml_mapping(path)
    check_values(kind, values, str(path))
    return values


def _read(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The sections of a recipe file over those of its base, fragments read in; its runs, which may
    be its base's, and the file they stand in. ``above``: the files that this one is the base of."""
    where = str(path)
    values = parse_yaml_mapping(path)
    base, has_runs = values.pop("base", None), "runs" in values
    runs = values.pop("runs", None) or {"main": {}}
    if not isinstance(runs, dict):
        raise InputError(f"{where}: runs is {runs!r}, expected run names with their sections")
    for name in runs:
        _check_run_name(name, where)
    own, whole = _expand(values, where)
    check_values(RecipeFile, own, where)
    if base is None:
        replace_seeds({}, own, where)
        return own, runs, where
    above = (*above, path.resolve())
    try:
        found = find_recipe(str(base))
    except InputError as error:
        raise InputError(f"{where}: base: {error}") from None
    if found.resolve() in above:
        raise InputError(f"{where}: base is {base}, which is based on this recipe; leave one out")
    below, runs_below, where_below = _read(found, above)
    replaced = whole | {"name", "output_dir"}
    shared = {key: value for key, value in below.items() if key not in replaced}
    replace_seeds(shared, own, where)
    return _merge(shared, own), *((runs, where) if has_runs else (runs_below, where_below))


def _expand(values: dict[str, Any], where: str) -> tuple[dict[str, Any], set[str]]:
    """``values`` with fragments read in, and the sections that were fragments, or null."""
    expanded, whole = dict(values), set()
    for section in FRAGMENTS.keys() & values.keys():
        value = values[section]
        if isinstance(value, str):
            value = {"base": value}
        if value is None:
            expanded[section] = {}
            whole.add(section)
        elif isinstance(value, dict) and "base" in value:
            changes = {key: inner for key, inner in value.items() if key != "base"}
            expanded[section] = _merge(load_fragment(section, str(value["base"]), where), changes)
            whole.add(section)
    _check_truncate(expanded.get("model"), where)
    return expanded, whole


def _check_truncate(model: Any, where: str) -> None:
    """Refuse a null that transformers reads as false, and whoever left the field to its default,
    true, would not expect."""
    scaling = model.get("rope_scaling") if isinstance(model, dict) else None
    if isinstance(scaling, dict) and scaling.get("truncate", True) is None:
        raise InputError(
            f"{where}: model.rope_scaling.truncate is null, expected true or false; leave it out "
            "for the default, true"
        )


def _merge(base: Any, changes: Any) -> Any:
    """``changes`` over ``base``: mappings field by field, anything else replaced. Of a rope_scaling
    goes what another type has not. Copies."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return deepcopy(changes)
    merged = deepcopy(base)
    if "rope_type" in changes:
        merged = {name: merged[name] for name in merged if is_read(changes["rope_type"], name)}
    for key, value in changes.items():
        merged[key] = _merge(merged.get(key), value)
    return merged


def _override(shared: dict[str, Any], runs: dict[str, dict[str, Any]], text: str) -> None:
    """Apply one ``--set`` text to the recipe's values in place."""
    where = f"--set {text}"
    path, value = parse_override(text)
    targets = [shared]
    own_path = path
    if path[0] == "runs":
        if len(path) < 3:
            raise InputError(f"{where}: expected runs.NAME.section.field=value")
        if path[1] not in runs:
            raise InputError(f"{where}: no run {path[1]}; {nearest(path[1], runs)}")
        targets, own_path = [runs[path[1]]], path[2:]
    elif path[0] in RunSections.model_fields:
        targets = list(runs.values())
    nested: Any = value
    for part in reversed(own_path):
        nested = {part: nested}
    nested, whole = _expand(nested, where)
    check_values(RecipeFile if targets[0] is shared else RunSections, nested, where)
    for target in targets:
        for section in whole:
            target.pop(section, None)
        replace_seeds(target, nested, where)
        target.update(_merge(target, nested))


def _check_one_line(text: str, what: str) -> None:
    """It becomes a line of a batch script."""
    try:
        check_text(text)
    except ValueError as error:
        raise InputError(f"{what} is {text!r}, expected {error}") from None


def _check_run_name(name: str, where: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in _TAKEN_RUN_NAMES:
        taken = ", ".join(sorted(_TAKEN_RUN_NAMES))
        raise InputError(
            f"{where}: runs.{name}: a run is named with letters, digits, _ and -, not {taken}"
        )


def _check_recipe(recipe: Recipe, where: str) -> None:
    """Check what runs say about each other, then every run whose model is known by now."""
    try:
        for name in recipe.runs:
            check_start(recipe, name)
        if recipe.scoring:
            check_source(recipe, recipe.scoring.scorer, "scoring.scorer")
            check_scoring(recipe.scoring)
        if recipe.evaluation:
            if recipe.evaluation.key_checkpoint:
                key = recipe.evaluation.key_checkpoint
                check_source(recipe, key, "evaluation.key_checkpoint")
            check_evaluation(recipe.evaluation)
            if recipe.evaluation.verify_exports and not recipe.export:
                raise InputError("evaluation.verify_exports is on, but export is off; choose one")
        for name in recipe.runs:
            try:
                _model_values(recipe, name, None)
            except InputError:
                if starts_from_a_checkpoint(recipe, name):
                    continue  # resolve_run checks it once the checkpoint's model is at hand
                raise
            _check_scores(recipe, resolve_run(recipe, name))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _check_scores(recipe: Recipe, run: RunConfig) -> None:
    """Refuse scores that do not fit a run that reads them."""
    scoring, weighting = recipe.scoring, run.weighting
    compares = weighting.mode == "frozen" and needs_short_loss(weighting.scheme)
    if scoring and compares and run.data.scores == scoring.name:
        check_scores_fit(run, scoring)


def _model_values(
    recipe: Recipe,
    name: str,
    checkpoint_model: Callable[..., ModelConfig] | None,
    after: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The run's model section, completed from what the run starts from. after: the folders of the
    runs that start from it."""
    values = recipe.runs[name].get("model") or {}
    fields = ModelConfig.model_fields.items()
    missing = [key for key, field in fields if field.is_required() and key not in values]
    start = recipe.runs[name].get("start")
    if not missing:
        return values
    own = (run_dir(recipe, name), *after)
    if start in recipe.runs:
        return _merge(_model_values(recipe, start, checkpoint_model, own), values)
    if start and checkpoint_model:
        # The positions are the checkpoint's own affair; this run's default is its sequence length.
        inherited = checkpoint_model(start, *own).model_dump(exclude={"max_position_embeddings"})
        return _merge(inherited, values)
    raise InputError(
        f"run {name}: model.{missing[0]} is missing; name a model (`model: llama3_8b`), give its "
        "fields, or start from a checkpoint"
    )
