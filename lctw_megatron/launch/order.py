"""What was asked for with tools/launch.py, carried out now or once more later.

OUTPUT_DIR/launch/order.json holds it, so that `status` and `resume` need the folder only.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lctw_megatron.atomic import write_json
from lctw_megatron.config.load import load_fragment
from lctw_megatron.config.schema import ClusterConfig
from lctw_megatron.errors import InputError
from lctw_megatron.launch import local, queue
from lctw_megatron.launch.plan import Plan, make_plan


@dataclass(frozen=True)
class Order:
    """A recipe, what of it is to be run, and where."""

    recipe: str
    overrides: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    """Names or kinds; empty: all."""
    cluster: str | None = None
    """None: here. `slurm`: the recipe's cluster section. Else a fragment or a .yaml file."""
    ranks: int | None = None
    """Here: ranks of training and scoring."""


def carry_out(order: Order, dry_run: bool = False) -> int:
    """Run or submit what ``order`` asks for and is not done; with ``dry_run`` only print it."""
    plan = _plan(order)
    stages = plan.select(order.stages)
    if order.cluster is None:
        if dry_run:
            print("\n".join(local.command_lines(plan, stages, order.ranks)))
            return 0
        write_json(plan.folder / "order.json", asdict(order))
        return local.run_stages(plan, stages, order.ranks)
    cluster = _cluster(plan, order.cluster)
    if dry_run:
        for job in queue.plan_jobs(plan, stages, cluster):
            print(f"##### {queue.script_path(plan, job)}\n\n{job.script}")
        return 0
    if not Path("tools/launch.py").is_file():
        raise InputError(
            f"{Path.cwd()}: the jobs' scripts name tools/..., which is not here; start "
            "tools/launch.py in the project's folder"
        )
    write_json(plan.folder / "order.json", asdict(order))
    queue.submit(plan, stages, cluster)
    return 0


def status(output_dir: str) -> int:
    """Print where every stage of the last order of ``output_dir`` stands."""
    order = read_order(output_dir)
    plan = _plan(order)
    stages = plan.select(order.stages)
    if order.cluster is None:
        for stage in stages:
            print(f"{stage.name:24} {'done' if plan.is_done(stage) else 'not done'}")
        return 0
    jobs = queue.plan_jobs(plan, stages, _cluster(plan, order.cluster))
    print("\n".join(queue.status_lines(plan, jobs)))
    return 0


def read_order(output_dir: str) -> Order:
    """The last order of ``output_dir``. InputError if there was none."""
    path = Path(output_dir) / "launch" / "order.json"
    if not path.is_file():
        raise InputError(
            f"{path}: no such file, so nothing was launched into {output_dir}; give the output "
            "folder of a recipe, or the recipe itself"
        )
    values = json.loads(path.read_text())
    values |= {"overrides": tuple(values["overrides"]), "stages": tuple(values["stages"])}
    return Order(**values)


def _plan(order: Order) -> Plan:
    def checkpoint_model(path: str):  # type: ignore[no-untyped-def]
        # Only a run whose model comes from a checkpoint pays for importing torch's checkpoints.
        from lctw_megatron.model.checkpoint import checkpoint_model

        return checkpoint_model(path)

    return make_plan(order.recipe, order.overrides, checkpoint_model)


def _cluster(plan: Plan, name: str) -> ClusterConfig:
    if name == "slurm":
        name = "slurm_generic"
        if plan.recipe.cluster:
            return plan.recipe.cluster
    return ClusterConfig.model_validate(load_fragment("cluster", name, f"--cluster {name}"))
