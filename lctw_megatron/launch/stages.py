"""The stages of a recipe: the command line of each, and which others it needs.

prepare                    the corpus to a token dataset
train-RUN                  after the run it starts from, and after score if it needs the sidecar
score                      after the run that is the scorer (score-PREFIX for several datasets,
                           score-NUMBER where their names clash)
export-RUN evaluate-RUN    after train-RUN
recall-RUN                 after train-RUN, with evaluation.recall
verify-RUN                 after export-RUN, with evaluation.verify_exports
report                     after every evaluation; without an evaluation section after training

Exported, evaluated and reported on are the final runs: those that no other run starts from or is
scored by.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lctw_megatron.config.load import checkpoints_of
from lctw_megatron.config.rules import check_probes, run_of
from lctw_megatron.config.schema import (
    MOST_DOCUMENT_BYTES,
    EvaluationConfig,
    LayoutConfig,
    PrepareConfig,
    RecallProbes,
    Recipe,
    RunConfig,
    ScoringConfig,
)
from lctw_megatron.conversion.architectures import architecture
from lctw_megatron.data.sidecar import sidecar_prefix
from lctw_megatron.errors import InputError
from lctw_megatron.launch.inputs import of_checkpoint, of_datasets
from lctw_megatron.launch.scored_datasets import (
    makes_scores,
    reads_scores,
    scored_prefixes,
    smallest_window,
)
from lctw_megatron.model.checkpoint_folder import complete_checkpoints

KINDS = ("prepare", "score", "train", "export", "verify", "evaluate", "recall", "report")

_CHANGES_NO_RESULT = {
    "data": {"index_cache"},
    "training": {
        "save_interval", "async_save", "keep_last", "keep_every", "tensorboard", "trackers",
        "distributed_timeout_minutes", "hang_minutes",
    },
}  # fmt: skip
"""Of a run: what its training, and all that comes after it, need not run again for."""


@dataclass(frozen=True)
class Stage:
    """One step of a recipe: a command of tools/ and what must be done before it."""

    name: str
    kind: str
    """One of KINDS."""
    arguments: tuple[str, ...]
    """The tool, as `tools/train.py`, and its arguments."""
    output: str
    """What it leaves behind: a file or folder that is there when it is done."""
    needs: tuple[str, ...] = ()
    """Names of the stages that must be done before."""
    reads: tuple[str, ...] = ()
    """Token datasets, sidecars, texts and checkpoints that no stage makes, so that they must be
    there already."""
    model_ranks: int = 1
    """Ranks that share one model; a multiple of it is started."""
    scales: bool = False
    """Whether more ranks make it faster."""
    cpus: int | None = None
    """CPU cores it can use, if it knows."""
    shards: int = 1
    """Independent parts, `--shard I/N` each and then `--merge`, where an array of jobs can run."""
    restarts: bool = False
    """Whether it goes on where it stopped when it is started again after a failure."""
    configuration: str | tuple[str, ...] = field(default="", repr=False)
    """What decides the result, if it is not the arguments."""
    steps: int | None = None
    """Of training: of these steps, or more, there is a checkpoint when it is done."""


@dataclass(frozen=True)
class StageState:
    """Where a stage, or one of its jobs, stands."""

    name: str
    text: str
    done: bool
    under_way: bool
    """Whether it runs or waits in a queue."""
    logs: tuple[Path, ...] = ()


def runnable(arguments: Sequence[str], project: Path | None) -> tuple[list[str], list[str]]:
    """How Python (or torchrun) runs a stage's ``arguments``: its own options and what follows them.

    That is the tool in the checkout ``project`` or, without a checkout, the module it runs.
    """
    tool, *options = arguments
    if project is None:
        return ["-m"], [f"lctw_megatron.commands.{Path(tool).stem}", *options]
    return [], [str(project / tool), *options]


def all_stages(
    recipe: Recipe, runs: list[RunConfig], recipe_path: str, overrides: Iterable[str]
) -> list[Stage]:
    """The stages of ``recipe``, whose runs are resolved in ``runs``, kind by kind."""
    scored = scored_prefixes(recipe, runs)
    stages = (
        [_prepare_stage(recipe.prepare, smallest_window(recipe, runs))] if recipe.prepare else []
    )
    if recipe.scoring:
        for prefix, name in scored.items():
            stages.append(_score_stage(recipe, recipe.scoring, prefix, name))
    for run in runs:
        stages.append(_train_stage(recipe, run, scored, recipe_path, tuple(overrides)))
    final = final_runs(recipe, runs)
    if recipe.export:
        stages += [_export_stage(run) for run in final]
    if recipe.evaluation and recipe.evaluation.verify_exports:
        stages += [_verify_stage(run) for run in final]
    if recipe.evaluation:
        for run in final:
            check_probes(recipe.evaluation, run)
        stages += [_evaluate_stage(recipe, recipe.evaluation, run) for run in final]
        if recipe.evaluation.recall:
            stages += [_recall_stage(recipe, recipe.evaluation.recall, run) for run in final]
    return [*stages, _report_stage(recipe, final)]


def final_runs(recipe: Recipe, runs: Iterable[RunConfig]) -> list[RunConfig]:
    """The runs that no other run starts from or is scored by."""
    used = {run_of(recipe, values.get("start")) for values in recipe.runs.values()}
    if recipe.scoring:
        used.add(run_of(recipe, recipe.scoring.scorer))
    names = recipe.runs.keys() - used or recipe.runs.keys()
    return [run for run in runs if run.name in names]


def _prepare_stage(prepare: PrepareConfig, window: int | None) -> Stage:
    arguments = ["tools/preprocess.py", "--input", *prepare.inputs]
    arguments += ["--output-prefix", prepare.output_prefix]
    if prepare.tokenizer:
        arguments += ["--tokenizer", prepare.tokenizer]
    if prepare.train_sentencepiece:
        arguments += ["--train-sentencepiece", str(prepare.train_sentencepiece)]
    if prepare.text_field != "text":
        arguments += [f"--text-field={prepare.text_field}"]  # it may begin with -
    if prepare.skip_bad:
        arguments += ["--skip-bad"]
    if prepare.max_bytes:
        arguments += ["--max-bytes", str(prepare.max_bytes)]
    if prepare.max_document_bytes != MOST_DOCUMENT_BYTES:
        arguments += ["--max-document-bytes", str(prepare.max_document_bytes)]
    if prepare.validation_documents:
        arguments += ["--validation-documents", str(prepare.validation_documents)]
    decides = tuple(arguments)
    arguments += ["--workers", str(prepare.workers)]
    if window:  # for a line in the log; another window makes no other dataset
        arguments += ["--window", str(window)]
    return Stage(
        "prepare",
        "prepare",
        tuple(arguments),
        f"{prepare.output_prefix}.json",
        cpus=prepare.workers,
        configuration=decides,
    )


def _score_stage(recipe: Recipe, scoring: ScoringConfig, prefix: str, name: str) -> Stage:
    arguments = ["tools/score.py", "--data", prefix]
    arguments += ["--checkpoint", checkpoints_of(recipe, scoring.scorer)]
    arguments += ["--window", str(scoring.window), "--stride", str(scoring.stride)]
    if scoring.sequence_length:
        arguments += ["--sequence-length", str(scoring.sequence_length)]
    if scoring.name != "short_loss":
        arguments += ["--name", scoring.name]
    if scoring.score_first_window:
        arguments += ["--score-first-window"]
    if scoring.precision:
        arguments += ["--precision", scoring.precision]
    for option, ranks in (("--tensor", scoring.tensor), ("--pipeline", scoring.pipeline)):
        if ranks > 1:
            arguments += [option, str(ranks)]
    decides = tuple(arguments)
    if scoring.tokens_per_forward is not None:
        arguments += ["--tokens-per-forward", str(scoring.tokens_per_forward)]
    needs, reads = of_datasets(recipe, prefix)
    scorer, given = of_checkpoint(recipe, scoring.scorer)
    return Stage(
        name,
        "score",
        tuple(arguments),
        f"{prefix}.{scoring.name}.json",
        needs=(*needs, *scorer),
        reads=(*reads, *given),
        model_ranks=scoring.tensor * scoring.pipeline,
        scales=True,
        shards=scoring.shards,
        restarts=True,
        configuration=decides,
    )


def _train_stage(
    recipe: Recipe,
    run: RunConfig,
    scored: dict[str, str],
    recipe_path: str,
    overrides: tuple[str, ...],
) -> Stage:
    arguments = ["tools/train.py", recipe_path, "--run", run.name]
    for override in overrides:
        arguments += ["--set", override]
    corpora = [*run.data.train, *run.data.validation]
    needs, reads = of_datasets(recipe, *(corpus.prefix for corpus in corpora))
    if makes_scores(recipe, run):
        needs += [scored[os.path.normpath(corpus.prefix)] for corpus in run.data.train]
    elif reads_scores(run):
        reads += tuple(sidecar_prefix(c.prefix, run.data.scores) for c in run.data.train)
    start, given = of_checkpoint(recipe, recipe.runs[run.name].get("start"))
    if not complete_checkpoints(Path(run.run_dir, "checkpoints")):  # or it goes on without
        reads += given
    return Stage(
        f"train-{run.name}",
        "train",
        tuple(arguments),
        f"{run.run_dir}/checkpoints",
        needs=tuple(dict.fromkeys([*needs, *start])),
        reads=reads,
        model_ranks=run.layout.fewest_ranks,
        scales=True,
        restarts=True,
        # Without defaults, so that a field that is new in the schema changes nothing.
        configuration=run.model_dump_json(exclude_defaults=True, exclude=_CHANGES_NO_RESULT),
        steps=run.training.steps,
    )


def _export_stage(run: RunConfig) -> Stage:
    try:  # now, not when it is trained
        architecture(run.model)
    except InputError as error:
        raise InputError(f"run {run.name}: {error}, or set export: false") from None
    arguments = ["tools/convert.py", "export", "--checkpoint", f"{run.run_dir}/checkpoints"]
    output = f"{run.run_dir}/hf"
    arguments += ["--output", output]
    return Stage(f"export-{run.name}", "export", tuple(arguments), output, (f"train-{run.name}",))


def _verify_stage(run: RunConfig) -> Stage:
    folder = f"{run.run_dir}/hf"
    checkpoint = f"{run.run_dir}/checkpoints"
    arguments = ("tools/convert.py", "verify", "--hf", folder, "--checkpoint", checkpoint)
    return Stage(f"verify-{run.name}", "verify", arguments, folder, (f"export-{run.name}",))


def _layout_options(layout: LayoutConfig) -> list[tuple[str, int]]:
    """Of tools/evaluate_model.py, those that are not its defaults."""
    sizes = [
        ("--tensor", layout.tensor),
        ("--pipeline", layout.pipeline),
        ("--context", layout.context),
    ]
    return [(option, size) for option, size in sizes if size > 1]


def _evaluate_stage(recipe: Recipe, evaluation: EvaluationConfig, run: RunConfig) -> Stage:
    arguments = ["tools/evaluate_model.py", "losses"]
    arguments += ["--checkpoint", f"{run.run_dir}/checkpoints"]
    output = f"{run.run_dir}/evaluation.json"
    arguments += ["--data", evaluation.data, "--output", output]
    needs, reads = of_datasets(recipe, evaluation.data)
    needs.append(f"train-{run.name}")
    for option, value in [
        ("--sequence-length", evaluation.sequence_length),
        ("--max-sequences", evaluation.max_sequences),
        ("--window", evaluation.window),
        ("--stride", evaluation.stride),
        ("--near", evaluation.near),
        *_layout_options(run.layout),
    ]:
        if value is not None:
            arguments += [option, str(value)]
    if key := evaluation.key_checkpoint:
        arguments += ["--key-checkpoint", checkpoints_of(recipe, key)]
        picker, given = of_checkpoint(recipe, key)
        needs, reads = [*needs, *picker], (*reads, *given)
    return Stage(
        f"evaluate-{run.name}",
        "evaluate",
        tuple(arguments),
        output,
        needs=tuple(dict.fromkeys(needs)),
        reads=reads,
        model_ranks=run.layout.model_ranks,
        scales=True,
    )


def _recall_stage(recipe: Recipe, recall: RecallProbes, run: RunConfig) -> Stage:
    arguments = ["tools/evaluate_model.py", "recall"]
    arguments += ["--checkpoint", f"{run.run_dir}/checkpoints"]
    output = f"{run.run_dir}/recall.json"
    arguments += ["--output", output, "--lengths", *map(str, recall.lengths)]
    arguments += ["--tasks", *recall.tasks]
    arguments += ["--depths", str(recall.depths), "--samples", str(recall.samples)]
    for option, value in [
        ("--haystack", recall.haystack),
        ("--window", recall.window),
        *_layout_options(run.layout),
    ]:
        if value is not None:
            arguments += [option, str(value)]
    needs, reads = of_datasets(recipe, *([recall.haystack] if recall.haystack else []))
    return Stage(
        f"recall-{run.name}",
        "recall",
        tuple(arguments),
        output,
        needs=(*needs, f"train-{run.name}"),
        reads=reads,
        model_ranks=run.layout.model_ranks,
        scales=True,
    )


def _report_stage(recipe: Recipe, runs: list[RunConfig]) -> Stage:
    others = recipe.evaluation.compare_with if recipe.evaluation else []
    arguments = ["tools/report.py", *(run.run_dir for run in runs), *others]
    if others:
        arguments += ["--baseline", others[0]]
    output = f"{recipe.output_dir}/report"
    arguments += ["--output", output]
    if recipe.evaluation and recipe.evaluation.note:
        arguments += [f"--note={recipe.evaluation.note}"]
    last = ["train"]
    if recipe.evaluation:
        last = ["evaluate", "recall"] if recipe.evaluation.recall else ["evaluate"]
    needs = tuple(f"{kind}-{run.name}" for kind in last for run in runs)
    return Stage("report", "report", tuple(arguments), output, needs)
