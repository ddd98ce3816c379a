"""A recipe's stages in the order in which they run, and the marks of those that are done.

A mark is a file OUTPUT_DIR/launch/STAGE.done that holds the stage's fingerprint: a digest of its
command, its configuration and the fingerprints of the stages it needs. A stage whose recipe has
changed since, or that comes after such a one, is therefore not done, nor is one whose output was
removed, nor `prepare` after its corpus has changed. A stage that is started once more loses its
mark, and so does what comes after it. (The commands then find by themselves what is left to do.)
"""

import glob
import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lctw_megatron.atomic import atomic_file
from lctw_megatron.config.layout_rules import check_layout
from lctw_megatron.config.load import load_recipe, resolve_run
from lctw_megatron.config.schema import ModelConfig, Recipe, RunConfig
from lctw_megatron.config.validation_errors import nearest
from lctw_megatron.data.manifest import TokenManifest, manifest_path, read_manifest
from lctw_megatron.errors import InputError
from lctw_megatron.launch.stages import KINDS, Stage, all_stages
from lctw_megatron.model.checkpoint_folder import complete_checkpoints, step_of
from lctw_megatron.model.megatron_fields import check_megatron_fields
from lctw_megatron.scoring.sidecar_shard import shard_path

NOT_DONE = "not done"
_CLOCKS_APART = 60.0
"""Seconds by which the clocks of two file systems may differ."""


@dataclass(frozen=True)
class StageGraph:
    """What is to be run for a recipe."""

    recipe_path: str
    overrides: tuple[str, ...]
    recipe: Recipe
    runs: tuple[RunConfig, ...]
    stages: tuple[Stage, ...]
    """In an order in which they can run."""
    fingerprints: dict[str, str]
    """Stage name to fingerprint."""

    @property
    def folder(self) -> Path:
        """Where marks, scripts and logs of the stages lie."""
        return Path(self.recipe.output_dir) / "launch"

    def mark(self, stage: Stage, part: int | None = None) -> Path:
        """The file that says that ``stage`` (or one part of its array) is done. The marks of the
        parts last until the parts are merged."""
        array = "" if part is None else f".{part}-of-{stage.shards}"
        return self.folder / f"{stage.name}{array}.done"

    def is_done(self, stage: Stage, part: int | None = None) -> bool:
        if part is not None:  # what it has scored waits for the merge, and may have been removed
            folder = Path(stage.output.removesuffix(".json") + ".shards")
            shard = shard_path(folder, part, stage.shards)
            return bool(self._marked(stage, part)) and shard.is_file()
        return self.why_not_done(stage) is None

    def why_not_done(self, stage: Stage, outdated: Collection[str] = ()) -> str | None:
        """None if ``stage`` is done and not ``outdated``; NOT_DONE, or what came after it was."""
        marked = self._marked(stage)
        if marked is None:
            return NOT_DONE
        if not marked:
            return "done with other settings, its own or of what it needs"
        if not _is_there(stage):
            return "done, but its output is not there any more"
        if stage.kind == "prepare" and self._of_another_corpus(self.mark(stage)):
            return "done, but its corpus, tokenizer or dataset has changed"
        if stage.name in outdated:
            return "done, but what it needs is to run again"
        return None

    def _marked(self, stage: Stage, part: int | None = None) -> bool | None:
        """Whether the mark is of these settings; None if there is none."""
        try:
            found = self.mark(stage, part).read_text(errors="replace").strip()
        except FileNotFoundError:
            return None
        return found == self.fingerprints[stage.name]

    def _of_another_corpus(self, mark: Path) -> bool:
        """Whether the prepared dataset was made of other files than are there now, or was made
        again, by hand or for another recipe, after it got its ``mark``."""
        assert self.recipe.prepare is not None
        wanted, prefix = self._request, self.recipe.prepare.output_prefix
        if wanted is None:
            return False
        try:
            made = Path(manifest_path(prefix)).stat().st_mtime
            found = read_manifest(prefix, TokenManifest).source.get("request")
            return found != wanted or made > mark.stat().st_mtime + _CLOCKS_APART
        except (InputError, OSError):  # damaged, or removed at this moment
            return True

    @cached_property
    def _request(self) -> str | None:
        """See ``request_now``. Kept, since a corpus may be many files."""
        from lctw_megatron.data.preprocessing.preprocess import request_now  # tokenizers' libraries

        assert self.recipe.prepare is not None
        try:
            return request_now(self.recipe.prepare)
        except InputError as error:  # which the stage will say
            return str(error)

    def set_done(self, stage: Stage) -> None:
        with atomic_file(self.mark(stage), "w") as file:
            file.write(self.fingerprints[stage.name] + "\n")

    def outdated(self, stages: Iterable[Stage]) -> set[str]:
        """Names of all stages that need, directly or not, one of ``stages`` that is not done: what
        they have made, they have made of what is now made anew."""
        anew = {stage.name for stage in stages if not self.is_done(stage)}
        found: set[str] = set()
        for stage in self.stages:
            if not (anew | found).isdisjoint(stage.needs):
                found.add(stage.name)
        return found

    def forget_undone(self, stages: Iterable[Stage]) -> None:
        """Remove the marks that do not count any more once those of ``stages`` are started that are
        not done: their own, of other settings, since they write over what these made, and of all
        that is ``outdated``, parts too."""
        anew = [stage for stage in stages if not self.is_done(stage)]
        outdated = self.outdated(anew)
        for stage in anew:
            self.mark(stage).unlink(missing_ok=True)
        for name in outdated:
            (self.folder / f"{name}.done").unlink(missing_ok=True)
            for part in self.folder.glob(f"{glob.escape(name)}.*-of-*.done"):
                part.unlink(missing_ok=True)

    def check_ranks(self, stage: Stage, world: int) -> None:
        """Refuse a number of ranks that does not suit the stage's layout or batch. InputError."""
        run = next((run for run in self.runs if stage.name == f"train-{run.name}"), None)
        try:
            if run is not None:
                check_layout(run, world)
            elif world % stage.model_ranks:
                raise InputError(f"{world} ranks, expected a multiple of {stage.model_ranks}")
        except InputError as error:
            raise InputError(f"{stage.name} on {world} ranks: {error}") from None

    def select(self, wanted: Iterable[str]) -> list[Stage]:
        """The stages that ``wanted`` names, by name or kind, in order; all if it is empty."""
        wanted = list(wanted)
        names = [stage.name for stage in self.stages]
        for name in wanted:
            if name not in (*names, *KINDS):
                raise InputError(f"--stages: no stage {name}; {nearest(name, (*names, *KINDS))}")
        return [s for s in self.stages if not wanted or s.name in wanted or s.kind in wanted]


def build_stage_graph(
    recipe_path: str,
    overrides: Iterable[str] = (),
    checkpoint_model: Callable[..., ModelConfig] | None = None,
) -> StageGraph:
    """The stages of the recipe in ``recipe_path``; ``checkpoint_model`` as in ``resolve_run``.

    Raises InputError for a wrong recipe, also for runs and scoring that wait for each other.
    """
    overrides = tuple(overrides)
    recipe = load_recipe(recipe_path, overrides)
    runs = [resolve_run(recipe, name, checkpoint_model) for name in recipe.runs]
    for run in runs:
        check_megatron_fields(run)
    try:
        stages = _in_order(all_stages(recipe, runs, recipe_path, overrides))
    except InputError as error:
        raise InputError(f"{recipe_path}: {error}") from None
    return StageGraph(
        recipe_path, overrides, recipe, tuple(runs), tuple(stages), _fingerprints(stages)
    )


def _is_there(stage: Stage) -> bool:
    """Whether the output of ``stage`` is there; of a run that has begun also its last checkpoint,
    which somebody may have removed."""
    output = Path(stage.output)
    if stage.steps is None or not (output.parent / "run.yaml").is_file():
        return output.exists()
    saved = complete_checkpoints(output)
    return bool(saved) and step_of(saved[-1]) >= stage.steps


def _in_order(stages: list[Stage]) -> list[Stage]:
    """``stages`` with each after all it needs, otherwise in the order given."""
    placed: list[Stage] = []
    waiting = list(stages)
    while waiting:
        done = {stage.name for stage in placed}
        ready = next((stage for stage in waiting if done.issuperset(stage.needs)), None)
        if ready is None:
            circle = ", ".join(f"{s.name} needs {' and '.join(s.needs)}" for s in waiting)
            raise InputError(f"stages wait for each other: {circle}")
        placed.append(ready)
        waiting.remove(ready)
    return placed


def _fingerprints(stages: list[Stage]) -> dict[str, str]:
    result: dict[str, str] = {}
    for stage in stages:
        parts = [stage.configuration or stage.arguments, *(result[name] for name in stage.needs)]
        digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8)
        result[stage.name] = digest.hexdigest()
    return result
