"""What was asked for with tools/launch.py, carried out now or once more later.

OUTPUT_DIR/launch/order.json holds it, so that `status` and `resume` need the folder only. Of
launches that differ in their stages alone, side by side or one after the other, it holds all.
"""

import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from lctw_megatron.atomic import locked, write_json
from lctw_megatron.config.load import load_fragment, load_recipe, parse_override
from lctw_megatron.config.schema import ClusterConfig
from lctw_megatron.config.shipped import PROJECT
from lctw_megatron.data.json_object import read_json_object
from lctw_megatron.errors import InputError, few
from lctw_megatron.launch import local, queue
from lctw_megatron.launch.stage_graph import StageGraph, build_stage_graph


@dataclass(frozen=True)
class LaunchRequest:
    """A recipe, what of it is to be run, and where."""

    recipe: str
    overrides: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    """Names or kinds; empty: all."""
    cluster: str | None = None
    """None: here. `slurm`: the recipe's cluster section. Else a fragment or a .yaml file."""
    ranks: int | None = None
    """Here: ranks of training and scoring; not with a cluster."""


def run_request(
    request: LaunchRequest, dry_run: bool = False, output_dir: str | None = None
) -> int:
    """Run or submit what ``request`` asks for and is not done; with ``dry_run`` only print it.
    output_dir: where the request was kept, if it was."""
    from lctw_megatron.weighting.parse import parse_weighting  # torch, which `status` does without

    graph = stage_graph(request, output_dir)
    for run in graph.runs:
        parse_weighting(run.weighting)
    stages = graph.select(request.stages)
    if request.cluster is None:
        if dry_run:
            print("\n".join(local.command_lines(graph, stages, request.ranks)))
            return 0
        _keep(request, graph)
        return local.run_stages(graph, stages, request.ranks)
    if request.ranks is not None:
        raise InputError(
            f"--ranks {request.ranks}: is for stages that run here; --cluster {request.cluster} "
            "has its ranks from nodes and gpus_per_node or tasks_per_node; leave it out"
        )
    cluster = cluster_of(graph, request.cluster)
    if dry_run:
        jobs = queue.plan_jobs(graph, stages, cluster)
        for job in jobs:
            print(f"##### {queue.script_path(graph, job)}\n\n{job.script}")
        # Away from the cluster nobody knows what is in the queue.
        queued: dict[str, str] | None = None if shutil.which("squeue") else {}
        script = queue.submission(graph, jobs, queued)
        print(f"##### {script.path}\n\n{script.text}")
        return 0
    if PROJECT and not Path("tools/launch.py").is_file():
        raise InputError(
            f"{Path.cwd()}: the jobs' scripts name tools/..., which is not here; start "
            "tools/launch.py in the project's folder"
        )
    _keep(request, graph)
    queue.submit(graph, stages, cluster)
    return 0


def _keep(request: LaunchRequest, graph: StageGraph) -> None:
    """Write order.json."""
    path = order_path(graph.recipe.output_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent / ".order.lock"):
        before = None
        with suppress(InputError):  # there was none, or it is damaged
            before = read_request(graph.recipe.output_dir)
        if before is not None:
            ours, theirs = asdict(request), asdict(before)
            changed = [name for name in ours if name != "stages" and ours[name] != theirs[name]]
            if changed:
                print(f"{path}: was of another {few(changed)}; status and resume go by this launch")
            elif request.stages:
                both = dict.fromkeys((*before.stages, *request.stages)) if before.stages else ()
                request = replace(request, stages=tuple(both))
        write_json(path, asdict(request))


def order_path(output_dir: str) -> Path:
    return Path(output_dir) / "launch" / "order.json"


def read_request(output_dir: str) -> LaunchRequest:
    """The last request of ``output_dir``. InputError if there was none."""
    path = order_path(output_dir)
    if not path.is_file():
        raise InputError(
            f"{path}: no such file, so nothing was launched into {output_dir}; give the output "
            "folder of a recipe, or the recipe itself"
        )
    values = read_json_object(path)
    known = {field.name for field in fields(LaunchRequest)}
    if unknown := sorted(values.keys() - known):
        raise InputError(
            f"{path}: damaged (another version's {few(unknown)}); launch the recipe again"
        )
    try:
        return TypeAdapter(LaunchRequest).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path}: damaged ({where}: {first['msg']}); launch the recipe again"
        ) from None


def stage_graph(request: LaunchRequest, output_dir: str | None = None) -> StageGraph:
    """The stages that ``request`` chooses among. InputError for a wrong recipe, and if it does not
    write to ``output_dir``, where the request was kept: that is a copy, or was moved."""

    def checkpoint_model(*places: str):  # type: ignore[no-untyped-def]
        # Only a run whose model comes from a checkpoint pays for importing torch's checkpoints.
        from lctw_megatron.model.checkpoint import checkpoint_model

        return checkpoint_model(*places)

    graph = build_stage_graph(request.recipe, request.overrides, checkpoint_model)
    theirs = graph.recipe.output_dir
    if output_dir is not None and os.path.realpath(theirs) != os.path.realpath(output_dir):
        raise InputError(
            f"{order_path(output_dir)}: was launched from {request.recipe}, which writes to "
            f"{theirs}; give that folder or, to go on in this one, launch the recipe with --set "
            f"output_dir={output_dir}"
        )
    return graph


def cluster_of(graph: StageGraph, name: str) -> ClusterConfig:
    """The cluster of ``--cluster name``, with what ``--set`` says of it. InputError."""
    changes = [text for text in graph.overrides if parse_override(text)[0][0] == "cluster"]
    others = [text for text in graph.overrides if text not in changes]
    if name == "slurm":
        recipe = load_recipe(graph.recipe_path, others) if changes else graph.recipe
        if recipe.cluster or any(parse_override(text)[0] == ["cluster"] for text in changes):
            assert graph.recipe.cluster is not None
            return graph.recipe.cluster
        name = "slurm_generic"
    fragment = load_fragment("cluster", name, f"--cluster {name}")
    for text in changes:
        if parse_override(text)[0] == ["cluster"]:
            raise InputError(f"--set {text}: --cluster {name} is another; give one of them")
    if changes:
        overrides = [*others, f"cluster={name}", *changes]
        cluster = load_recipe(graph.recipe_path, overrides).cluster
        assert cluster is not None
        return cluster
    return ClusterConfig.model_validate(fragment)
