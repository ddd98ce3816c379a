"""Batch scripts for SLURM (job.sbatch.j2): for sbatch, and for plain bash on one node.

One script a stage, two for a stage in parts: an array of jobs for the parts, and their merge.
Ranks are started by srun, one task each, not by torchrun: a signal then reaches every rank directly
(torchrun would kill ranks that take more than 30 s to save), and a rank's exit status comes back
(torchrun makes a 1 of all of them), so that the script knows when to requeue itself.
"""

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from lctw_megatron.config.schema import ClusterConfig
from lctw_megatron.config.shipped import PROJECT
from lctw_megatron.errors import InputError
from lctw_megatron.launch.stage_graph import StageGraph
from lctw_megatron.launch.stages import Stage, runnable
from lctw_megatron.training.exit_status import REQUEUE_STATUS

MOST_FAILURES = 5
"""Failures in a row after which a job that goes on where it stopped is not requeued any more."""

_TEMPLATE = jinja2.Environment(
    loader=jinja2.PackageLoader("lctw_megatron", "launch"),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
).get_template("job.sbatch.j2")

GPU_KINDS = {"train", "score", "evaluate", "recall"}


@dataclass(frozen=True)
class Job:
    """One script to submit."""

    name: str
    stage: Stage
    script: str
    needs: tuple[str, ...]
    """Names of jobs that must have succeeded before."""
    parts: int | None = None
    """Size of the array; None: a single job."""


@dataclass(frozen=True)
class _Size:
    nodes: int
    tasks: int
    """Tasks, which are ranks, on each node."""


def stage_jobs(graph: StageGraph, stage: Stage, cluster: ClusterConfig) -> list[Job]:
    """The scripts of ``stage``, in the order in which they run. Raises InputError."""
    size = _size(graph, stage, cluster)
    if stage.shards == 1:
        text = _script(graph, stage, stage.name, cluster, size, stage.arguments, None)
        return [Job(stage.name, stage, text, stage.needs)]
    parts, whole = f"{stage.name}-parts", (*stage.arguments, "--merge")
    array = _script(graph, stage, parts, cluster, size, stage.arguments, stage.shards)
    merge = _script(graph, stage, stage.name, cluster, _Size(1, 1), whole, None)
    return [
        Job(parts, stage, array, stage.needs, stage.shards),
        Job(stage.name, stage, merge, (parts,)),
    ]


def _size(graph: StageGraph, stage: Stage, cluster: ClusterConfig) -> _Size:
    """Nodes and tasks: all there are for a stage that scales, else as many as share one model."""
    per_node = cluster.tasks_per_node or cluster.gpus_per_node or 1
    if stage.scales and stage.shards == 1:
        graph.check_ranks(stage, cluster.nodes * per_node)
        return _Size(cluster.nodes, per_node)
    ranks = stage.model_ranks
    for nodes in range(math.ceil(ranks / per_node), cluster.nodes + 1):
        if ranks % nodes == 0:  # as many tasks on each
            return _Size(nodes, ranks // nodes)
    raise InputError(
        f"{stage.name} needs {ranks} ranks, as many on each node; the cluster section has "
        f"{cluster.nodes} nodes with {per_node} ranks each"
    )


def _script(
    graph: StageGraph,
    stage: Stage,
    name: str,
    cluster: ClusterConfig,
    size: _Size,
    arguments: Sequence[str],
    parts: int | None,
) -> str:
    # Jobs start in the checkout (see launch_request.py), where there is one.
    options, program = runnable(arguments, Path() if PROJECT else None)
    ranks = size.nodes * size.tasks
    merges = name == stage.name and stage.shards > 1
    # Signals before the time limit reach what srun started, not the script's shell.
    in_steps = ranks > 1 or (stage.restarts and not merges)
    title = f"{name} of {graph.recipe_path}"
    title += f" on {ranks} ranks" if ranks > 1 else ""
    title += f" in {parts} parts" if parts else ""
    container = f"{cluster.container} " if cluster.container else ""
    here = _ranks_of_one_node(graph, stage, size)
    python = " ".join([f"{container}python", *options])
    # With a -- as in local.py.
    torchrun = [f"{container}torchrun --standalone --nproc-per-node={here}", *options, "--"]
    environment = [f"export {key}={_expanded(value)}" for key, value in cluster.environment.items()]
    return _TEMPLATE.render(
        sbatch=_sbatch_lines(graph, stage, name, cluster, size, parts, in_steps, merges),
        title=title,
        in_steps=in_steps,
        folder=shlex.quote(str(graph.folder)),
        modules=bool(cluster.modules),
        setup=[*(f"module load {name}" for name in cluster.modules), *environment, *cluster.setup],
        command=_lines(python, program),
        arguments=_grouped(program),
        here=python if here == 1 else " ".join(torchrun),
        srun="".join(f" {option}" for option in _srun_options(cluster)),
        python=python,
        parts=parts,
        restarts=stage.restarts,
        mark=shlex.quote(str(graph.folder / stage.name)),
        fingerprint=graph.fingerprints[stage.name],
        merges=merges,
        left_status=REQUEUE_STATUS,
        most_failures=MOST_FAILURES,
    )


def _sbatch_lines(
    graph: StageGraph,
    stage: Stage,
    name: str,
    cluster: ClusterConfig,
    size: _Size,
    parts: int | None,
    in_steps: bool,
    merges: bool,
) -> list[str]:
    needs_gpus = stage.kind in GPU_KINDS and not merges
    gpus = min(size.tasks, cluster.gpus_per_node) if needs_gpus else 0
    elsewhere = cluster.cpu_partition if not gpus else None
    settings = {
        "job-name": f"{graph.recipe.name}-{name}",
        "output": f"{_literal(graph.folder / name)}{'-%a' if parts else ''}.log",
        "open-mode": "append",
        "array": f"0-{parts - 1}" if parts else None,
        "nodes": size.nodes,
        "ntasks-per-node": size.tasks,
        "gpus-per-node": gpus or None,
        "cpus-per-task": stage.cpus or cluster.cpus_per_task,
        "time": cluster.time_limit,
        # A part has nothing to save: what it scores is one file at its end.
        "signal": f"TERM@{cluster.signal_seconds}" if in_steps and not parts else None,
        "partition": elsewhere or cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": None if elsewhere else cluster.constraint,
    }
    lines = [
        f"--{key}={shlex.quote(str(value))}" for key, value in settings.items() if value is not None
    ]
    return [*lines, "--requeue", *cluster.sbatch]


def _literal(path: Path) -> str:
    """``path`` in a pattern of SLURM's for file names. InputError for what has no way to say it."""
    if "\\" in str(path):
        raise InputError(
            f"output_dir: {path} has a backslash, which SLURM takes out of the names of logs; "
            "choose another"
        )
    return str(path).replace("%", "%%")


def _expanded(value: str) -> str:
    """``value`` for the shell: $NAME, ${NAME} and, where a path begins, ~ are expanded there, all
    else is literal."""
    value = re.sub(r"(^|:)~(?=[/:]|$)", r"\1${HOME}", value)
    parts = re.split(r"(\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\}))", value)
    if len(parts) == 1:
        return shlex.quote(value)
    parts[::2] = [re.sub(r'([\\"`$])', r"\\\1", literal) for literal in parts[::2]]
    return f'"{"".join(parts)}"'


def _srun_options(cluster: ClusterConfig) -> list[str]:
    # Since SLURM 22.05 srun does not take it over from sbatch, and gives every task one core.
    cpus = [f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else []
    return [*cpus, *cluster.srun]


def _lines(program: str, arguments: Sequence[str]) -> list[str]:
    """A command on one line or, if that is long, with an option and its values on each."""
    groups = _grouped(arguments)
    line = " ".join([program, *groups])
    return [line] if len(line) <= 95 else [f"{program} {groups[0]}", *groups[1:]]


def _grouped(arguments: Sequence[str]) -> list[str]:
    """Each option with its values as one quoted text; before them the tool and its own."""
    groups: list[str] = []
    for argument in arguments:
        quoted = shlex.quote(argument)
        if argument.startswith("--") or not groups:
            groups.append(quoted)
        else:
            groups[-1] += f" {quoted}"
    return groups


def _ranks_of_one_node(graph: StageGraph, stage: Stage, size: _Size) -> int:
    """Ranks to start without SLURM: those of one node, if they suit the layout and the batch."""
    try:
        graph.check_ranks(stage, size.tasks)
    except InputError:
        return size.nodes * size.tasks
    return size.tasks
