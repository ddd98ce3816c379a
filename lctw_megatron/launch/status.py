"""`tools/launch.py status` and `watch`: where everything that was launched stands."""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lctw_megatron.config.load import load_recipe, load_run
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.config.shipped import find_recipe
from lctw_megatron.errors import InputError
from lctw_megatron.launch import local, queue
from lctw_megatron.launch.launch_request import (
    LaunchRequest,
    cluster_of,
    order_path,
    read_request,
    stage_graph,
)
from lctw_megatron.launch.run_status import last_error, run_status
from lctw_megatron.launch.stages import StageState

WATCH_SECONDS = 15.0
_CLEAR = "\x1b[H\x1b[2J"


@dataclass(frozen=True)
class Look:
    """Everything at one moment."""

    lines: list[str]
    under_way: bool
    """Whether something runs or waits in a queue."""
    done: bool


def status(where: str) -> int:
    """Print where the stages and runs of ``where`` stand: a recipe, its output folder or a run's
    folder. Of a queue that cannot be asked comes the InputError, after what the folder knows."""
    try:
        print("\n".join(look(where).lines))
    except queue.NoQueue:
        print("\n".join(look(where, ask=False).lines), flush=True)
        raise
    return 0


def watch(where: str) -> int:
    """``status`` again and again until everything is done (0) or nothing is under way (1). A queue
    that gives no answer is asked again."""
    idle = 0
    while True:
        try:
            seen = look(where)
        except queue.NoAnswer as error:
            print(f"{time.strftime('%F %T')} {error}", flush=True)
            time.sleep(WATCH_SECONDS)
            continue
        head = _CLEAR if sys.stdout.isatty() else ""
        print(f"{head}{time.strftime('%F %T')}", *seen.lines, sep="\n", flush=True)
        idle = 0 if seen.under_way else idle + 1
        if seen.done:
            return 0
        if idle == 2:  # once may be the moment between two stages
            print("nothing of it runs or waits any more; `resume` goes on")
            return 1
        time.sleep(WATCH_SECONDS)


def look(where: str, ask: bool = True) -> Look:
    """``ask``: SLURM, for what is in its queue."""
    if (Path(where) / "run.yaml").is_file():
        return _look_at_run(load_run(Path(where) / "run.yaml"), Path(where))
    request = _request(where)
    graph = stage_graph(request, where if Path(where).is_dir() else None)
    stages = graph.select(request.stages)
    if request.cluster is None:
        states = local.stage_states(graph, stages)
    else:
        jobs = queue.plan_jobs(graph, stages, cluster_of(graph, request.cluster))
        states = queue.stage_states(graph, jobs, ask)
    runs = {f"train-{run.name}": run for run in graph.runs}
    lines, alive = [], False
    for state in states:
        lines.append(_stage_line(state))
        if state.name in runs:
            found = run_status(runs[state.name])
            alive = alive or found.alive
            if not state.done:
                lines.append(f"  {found.text}")
        if not state.done and (error := last_error(state.logs)):
            lines.append(f"  last error in the log: {error}")
    under_way = alive or any(state.under_way for state in states)
    return Look(lines, under_way, all(state.done for state in states))


def _look_at_run(run: RunConfig, folder: Path) -> Look:
    # By where it is now: it may have been moved, or be named from elsewhere.
    found = run_status(run.model_copy(update={"run_dir": str(folder)}))
    lines = [f"{run.name}: {found.text}"]
    error = last_error([folder.parent / "launch" / f"train-{run.name}.log"])
    if error and not found.finished:
        lines.append(f"  last error in the log: {error}")
    return Look(lines, found.alive, found.finished)


def _stage_line(state: StageState) -> str:
    logs = _log_names(state.logs)
    return f"{state.name:24} {state.text:40} {logs}".rstrip()


def _log_names(logs: Sequence[Path]) -> str:
    if len(logs) < 2:
        return "".join(map(str, logs))
    return f"{logs[0]} and {len(logs) - 1} more"


def _request(where: str) -> LaunchRequest:
    """What was last launched into ``where``; of a recipe that was not launched, all of it, here."""
    if Path(where).is_dir():
        return read_request(where)
    recipe = load_recipe(where)
    try:
        request = read_request(recipe.output_dir)
    except InputError:
        if order_path(recipe.output_dir).exists():
            raise
        return LaunchRequest(where)
    # Another recipe may share the folder, and what it was launched with is not this one's.
    with suppress(InputError):  # the other one may be gone
        if find_recipe(request.recipe).samefile(find_recipe(where)):
            return request
    return LaunchRequest(where)
