"""The jobs of a recipe's stages on SLURM: what was submitted, where it stands, and what is missing.

OUTPUT_DIR/launch/jobs.json holds the id of the last job submitted for each script. What has
finished is known from the marks (``stage_graph.py``), what waits or runs from squeue; accounting is
not needed.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lctw_megatron.atomic import atomic_file, write_json
from lctw_megatron.config.schema import ClusterConfig
from lctw_megatron.data.json_object import read_json_object
from lctw_megatron.errors import InputError
from lctw_megatron.launch.local import check_needs
from lctw_megatron.launch.slurm import Job, stage_jobs
from lctw_megatron.launch.stage_graph import StageGraph
from lctw_megatron.launch.stages import Stage


def script_path(graph: StageGraph, job: Job) -> Path:
    return graph.folder / f"{job.name}.sbatch"


def plan_jobs(graph: StageGraph, stages: Sequence[Stage], cluster: ClusterConfig) -> list[Job]:
    """The jobs of ``stages``, in order."""
    return [job for stage in stages for job in stage_jobs(graph, stage, cluster)]


def submit(graph: StageGraph, stages: Sequence[Stage], cluster: ClusterConfig) -> None:
    """Write the scripts of ``stages`` and submit those that are neither done nor queued.

    Each waits for the jobs it needs; if one of them fails, SLURM removes those that wait for it.
    """
    jobs = plan_jobs(graph, stages, cluster)
    ids = _read_ids(graph)
    in_queue = _queue(list(ids.values()))
    queued = {name: id for name, id in ids.items() if id in in_queue}
    check_needs(graph, stages, frozenset(queued))
    for job in jobs:
        with atomic_file(script_path(graph, job), "w") as file:
            file.write(job.script)
    waiting_for = dict(queued)
    for job in jobs:
        if _is_done(graph, job):
            print(f"{job.name}: done before")
        elif job.name in queued:
            print(f"{job.name}: job {queued[job.name]} is in the queue")
        else:
            needed = [waiting_for[name] for name in job.needs if name in waiting_for]
            waiting_for[job.name] = ids[job.name] = _sbatch(graph, job, needed)
            write_json(graph.folder / "jobs.json", ids)
            after = f" after {' '.join(needed)}" if needed else ""
            print(f"{job.name}: submitted as job {ids[job.name]}{after}", flush=True)


def status_lines(graph: StageGraph, jobs: Sequence[Job]) -> list[str]:
    """A line for each job: its name, where it stands, its log."""
    ids = _read_ids(graph)
    states = _queue(list(ids.values()))
    lines = []
    for job in jobs:
        id = ids.get(job.name)
        missing = _missing_parts(graph, job)
        if _is_done(graph, job):
            state = "done"
        elif id in states:
            state = f"{' and '.join(states[id])}, job {id}"
        elif id:
            state = f"failed or cancelled, job {id}"
        else:
            state = "not submitted"
        if job.parts and not _is_done(graph, job):
            state += f", {job.parts - len(missing)} of {job.parts} parts done"
        log = graph.folder / f"{job.name}{'-*' if job.parts else ''}.log"
        lines.append(f"{job.name:24} {state:40} {log if id else ''}".rstrip())
    return lines


def _is_done(graph: StageGraph, job: Job) -> bool:
    if graph.is_done(job.stage):
        return True
    return bool(job.parts) and not _missing_parts(graph, job)


def _missing_parts(graph: StageGraph, job: Job) -> list[int]:
    return [part for part in range(job.parts or 0) if not graph.is_done(job.stage, part)]


def _read_ids(graph: StageGraph) -> dict[str, str]:
    path = graph.folder / "jobs.json"
    ids = read_json_object(path) if path.is_file() else {}
    if not all(isinstance(id, str) for id in ids.values()):
        raise InputError(f"{path}: a job's id for every script was expected; remove it")
    return ids


def _sbatch(graph: StageGraph, job: Job, needed: Sequence[str]) -> str:
    """Submit a script; returns the job's id."""
    command = ["sbatch", "--parsable"]
    if needed:
        command += [f"--dependency=afterok:{':'.join(needed)}", "--kill-on-invalid-dep=yes"]
    if job.parts:
        command.append(f"--array={','.join(map(str, _missing_parts(graph, job)))}")
    answer = _ask([*command, str(script_path(graph, job))])
    # The site's sbatch may say more: the id is a line of its own, ID or ID;CLUSTER.
    found = re.findall(r"^(\d+)(?:;\S*)?\s*$", answer, re.MULTILINE)
    if not found:
        said = " ".join(answer.split())[:200]
        raise InputError(f"{' '.join(command)}: no line with a job's id in what it said: {said!r}")
    return found[-1]


def _queue(ids: Sequence[str]) -> dict[str, list[str]]:
    """Those of the jobs ``ids`` that wait or run -> their states (an array may have several)."""
    if not ids:
        return {}
    found: dict[str, list[str]] = {}
    for line in _ask(["squeue", "--noheader", "--array", "--format=%F %T"]).splitlines():
        id, _, state = line.strip().partition(" ")
        if not re.fullmatch(r"[A-Z_]+", state):  # a site's wrapper may say more
            continue
        if id in ids and state.lower() not in found.setdefault(id, []):
            found[id].append(state.lower())
    return found


def _ask(command: list[str]) -> str:
    """What a SLURM command prints. InputError if it is missing or refuses."""
    if shutil.which(command[0]) is None:
        raise InputError(
            f"{command[0]}: not found; submit on a machine of the cluster, or look at the scripts "
            "with --dry-run"
        )
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        raise InputError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout
