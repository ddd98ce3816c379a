"""The jobs of a recipe's stages on SLURM: what was submitted, where it stands, and what is missing.

OUTPUT_DIR/launch/jobs.json holds the id of the last job submitted for each script. What has
finished is known from the marks (``stage_graph.py``), what waits or runs from squeue; accounting is
not needed.
"""

import re
import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lctw_megatron.atomic import atomic_file, write_json
from lctw_megatron.config.schema import ClusterConfig
from lctw_megatron.data.json_object import read_json_object
from lctw_megatron.errors import InputError, few
from lctw_megatron.launch.local import check_needs
from lctw_megatron.launch.slurm import Job, stage_jobs
from lctw_megatron.launch.stage_graph import NOT_DONE, StageGraph
from lctw_megatron.launch.stages import Stage, StageState
from lctw_megatron.launch.submission import Submission
from lctw_megatron.ownership import sole_writer
from lctw_megatron.squeue import ask_squeue


class NoQueue(InputError):
    """It cannot be told what is in the queue."""


class NoAnswer(NoQueue):
    """squeue does not say, which may pass."""


def script_path(graph: StageGraph, job: Job) -> Path:
    return graph.folder / f"{job.name}.sbatch"


def plan_jobs(graph: StageGraph, stages: Sequence[Stage], cluster: ClusterConfig) -> list[Job]:
    """The jobs of ``stages``, in order."""
    return [job for stage in stages for job in stage_jobs(graph, stage, cluster)]


def submission(
    graph: StageGraph, jobs: Sequence[Job], queued: Mapping[str, str] | None = None
) -> Submission:
    """The script that submits those of ``jobs`` that are neither done nor ``queued`` (name to id;
    None: asked here). Each waits for the jobs it needs; if one of them fails, SLURM removes those
    that wait for it."""
    queued = _queued(graph, jobs) if queued is None else queued
    outdated = _outdated(graph, jobs, queued)
    made = Submission(graph.recipe_path, graph.folder / "submit.sh", [job.script for job in jobs])
    for name, id in queued.items():
        made.queued(name, id)
    ahead = set(queued)
    for job in jobs:
        if _is_done(graph, job, outdated):
            made.done(job.name)
        elif job.name not in queued:
            after = [name for name in job.needs if name in ahead]
            missing = _missing_parts(graph, job, outdated)
            made.submit(job.name, script_path(graph, job), after, missing)
            ahead.add(job.name)
    return made


def submit(graph: StageGraph, stages: Sequence[Stage], cluster: ClusterConfig) -> None:
    """Write the scripts of ``stages`` and submit.sh, and run that. InputError if another process
    is at it: both would submit what the other has, and keep only their own ids."""
    with sole_writer(_ids_path(graph), print):
        _submit(graph, plan_jobs(graph, stages, cluster), stages)


def _submit(graph: StageGraph, jobs: Sequence[Job], stages: Sequence[Stage]) -> None:
    ids = _read_ids(graph)
    tasks = _queue(list(ids.values()), jobs)
    queued = {name: id for name, id in ids.items() if id in tasks}
    check_needs(graph, stages, frozenset(queued))
    outdated = _outdated(graph, jobs, queued)
    undone = [job for job in jobs if not _is_done(graph, job, outdated)]
    _check_queued(graph, undone, queued, tasks)
    for job in jobs:
        path = script_path(graph, job)
        if job.name in queued:  # and that is what its script stays
            print(f"{job.name}: job {queued[job.name]} is in the queue{_otherwise(path, job)}")
            continue
        with atomic_file(path, "w") as file:
            file.write(job.script)
        why = graph.why_not_done(job.stage, outdated)
        if _is_done(graph, job, outdated):
            print(f"{job.name}: done before")
        elif why != NOT_DONE:
            print(f"{job.name}: {why}")
        # Whoever launches again has mended what failed: the retries are counted anew.
        for part in range(job.parts) if job.parts else [None]:
            graph.mark(job.stage, part).with_suffix(".failures").unlink(missing_ok=True)
    script = submission(graph, jobs, queued)
    with atomic_file(script.path, "w") as file:
        file.write(script.text)
    _find("sbatch")
    graph.forget_undone(job.stage for job in jobs if job.name not in queued)
    needs = {job.name: job.needs for job in jobs}
    waiting_for = dict(queued)
    for name, id in _run(script.path):
        waiting_for[name] = ids[name] = id
        write_json(_ids_path(graph), ids)
        after = [waiting_for[other] for other in needs[name] if other in waiting_for]
        said = f" after {' '.join(after)}" if after else ""
        print(f"{name}: submitted as job {id}{said}", flush=True)


def _check_queued(
    graph: StageGraph,
    undone: Sequence[Job],
    queued: Mapping[str, str],
    tasks: Mapping[str, Sequence["_Task"]],
) -> None:
    """InputError for jobs in the queue, as these ``tasks``, that do not do what is missing: they
    are ending, parts of them or what they were submitted after have failed, or that is to be made
    anew under their eyes."""
    anew = {job.name for job in undone if job.name not in queued}
    for job in undone:
        if (id := queued.get(job.name)) is None:
            continue
        if {task.state for task in tasks[id]} == {"completing"}:
            raise InputError(f"{job.name}: job {id} is just ending; launch again in a minute")
        if failed := _failed_parts(graph, job, tasks[id]):
            raise InputError(
                f"{job.name}: {_parts(failed)} of job {id} failed ({graph.folder / job.name}-*.log "
                "say why) while others wait or run; when these have ended SLURM removes all that "
                f"waits for the job. Launch again then, or now after scancel {id} (parts that are "
                "done stay done)"
            )
        if needs := [need for need in job.needs if need in anew]:
            raise InputError(
                f"{job.name}: job {id} is in the queue, but {few(needs)}, which it needs, is to "
                f"run again; if SLURM does not remove it in a minute, cancel it (scancel {id}), "
                "and launch again"
            )


def _failed_parts(graph: StageGraph, job: Job, tasks: Sequence["_Task"]) -> int:
    """How many parts of ``job``, an array of which ``tasks`` wait or run, have ended undone. Asked
    of the marks after squeue, as a part leaves its mark before it leaves the queue."""
    return max(0, len(_missing_parts(graph, job, ())) - len(tasks)) if tasks else 0


def _parts(number: int) -> str:
    return f"{number} part{'s' if number > 1 else ''}"


def _otherwise(path: Path, job: Job) -> str:
    """What to do if ``job``, which is in the queue, would be submitted with another script now."""
    if not path.is_file() or path.read_bytes() == job.script.encode():
        return ""
    return (
        f", submitted as {path} says; recipe or cluster have changed since: cancel it (scancel) "
        "and launch again"
    )


def _run(script: Path) -> Iterator[tuple[str, str]]:
    """Name and id of each job as ``script`` submits it. InputError if it ends with an error."""
    process = subprocess.Popen(
        ["bash", str(script)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        encoding="utf-8", errors="replace",
    )  # fmt: skip
    with process:
        assert process.stdout and process.stderr
        for line in process.stdout:
            name, _, id = line.strip().rpartition(" ")
            yield name, id
        said = " ".join(process.stderr.read().split())[:500]
    if process.returncode:
        raise InputError(said or f"{script}: ended with status {process.returncode}")


def _queued(graph: StageGraph, jobs: Sequence[Job]) -> dict[str, str]:
    """Those of the jobs submitted before that wait or run: name to id."""
    ids = _read_ids(graph)
    in_queue = _queue(list(ids.values()), jobs)
    return {name: id for name, id in ids.items() if id in in_queue}


def stage_states(graph: StageGraph, jobs: Sequence[Job], ask: bool = True) -> list[StageState]:
    """Where each job stands: done is what submitting all of them would leave out. NoQueue if SLURM
    is not there or does not answer; not ``ask``: without it."""
    ids = _read_ids(graph)
    queue = _queue(list(ids.values()), jobs) if ask else {}
    outdated = _outdated(graph, jobs, {name for name, id in ids.items() if id in queue})
    found = []
    lost: dict[str, str] = {}  # what SLURM will remove -> the array with a failed part behind it
    for job in jobs:
        id = ids.get(job.name)
        tasks = queue.get(id or "", [])
        done = _is_done(graph, job, outdated)
        missing = _missing_parts(graph, job, () if tasks else outdated)
        why = graph.why_not_done(job.stage, outdated)
        if done:
            state = "done"
        elif tasks:
            state = f"{' and '.join(dict.fromkeys(task.state for task in tasks))}, job {id}"
        elif why and why != NOT_DONE:
            state = f"{why}, job {id}" if id else why
        elif id:
            state = f"{'failed or cancelled' if ask else 'submitted'}, job {id}"
        else:
            state = "not submitted"
        if job.parts and not done:
            state += f", {job.parts - len(missing)} of {job.parts} parts done"
        if not done and (failed := _failed_parts(graph, job, tasks)):
            state += f", {failed} failed"
            lost[job.name] = job.name
        waits = [task.waits_for for task in tasks if task.waits_for]
        if behind := [lost[need] for need in job.needs if need in lost and tasks]:
            lost[job.name] = behind[0]
            waits = [f"SLURM will remove it, as parts of {behind[0]} failed"]
        if waits and not done:
            state += f" ({waits[0]})"
        parts = [f"-{part}" for part in range(job.parts)] if job.parts else [""]
        logs = [graph.folder / f"{job.name}{part}.log" for part in parts]
        found.append(
            StageState(job.name, state, done, bool(tasks) and not done, tuple(logs if id else ()))
        )
    return found


def _outdated(graph: StageGraph, jobs: Sequence[Job], queued: Collection[str]) -> set[str]:
    """The stages whose marks do not count any more once those ``jobs`` are submitted that are to
    be; what waits or runs has taken them when it was."""
    return graph.outdated(job.stage for job in jobs if job.name not in queued)


def _is_done(graph: StageGraph, job: Job, outdated: Collection[str]) -> bool:
    if graph.why_not_done(job.stage, outdated) is None:
        return True
    return bool(job.parts) and not _missing_parts(graph, job, outdated)


def _missing_parts(graph: StageGraph, job: Job, outdated: Collection[str]) -> list[int]:
    parts = range(job.parts or 0)
    if job.stage.name in outdated:
        return list(parts)
    return [part for part in parts if not graph.is_done(job.stage, part)]


def _ids_path(graph: StageGraph) -> Path:
    return graph.folder / "jobs.json"


def _read_ids(graph: StageGraph) -> dict[str, str]:
    path = _ids_path(graph)
    ids = read_json_object(path) if path.is_file() else {}
    if not all(isinstance(id, str) and re.fullmatch(r"\d{1,18}", id) for id in ids.values()):
        raise InputError(f"{path}: a job's id for every script was expected; remove it")
    return ids


class _Task(NamedTuple):
    """A job, or a part of an array, that waits or runs."""

    state: str
    waits_for: str


def _queue(ids: Sequence[str], jobs: Sequence[Job]) -> dict[str, list[_Task]]:
    """Those of ``ids``, submitted for ``jobs``, that wait or run, each with what of it does."""
    if not ids:
        return {}
    found: dict[str, list[_Task]] = {}
    _find("squeue")
    for id, state, reason in _listed(_elsewhere(ids, jobs)):
        if id in ids:
            found.setdefault(id, []).append(_Task(state, reason))
    return found


_FEDERATED = 1 << 26
"""The smallest id of a federation's jobs: the bits above name a cluster."""


def _elsewhere(ids: Sequence[str], jobs: Sequence[Job]) -> list[str]:
    """The options with which squeue lists jobs that were sent to other clusters than this one."""
    scripts = "".join(job.script for job in jobs)
    said = re.findall(r"^#SBATCH (?:--clusters|-M)[= ]*(.+)$", scripts, re.MULTILINE)
    if said:
        return [f"--clusters={said[-1].strip()}"]
    return ["--federation"] if any(int(id) >= _FEDERATED for id in ids) else []


def _listed(options: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Id, state and what it waits for, or nothing, of each job that waits or runs. NoAnswer if
    squeue does not say."""
    try:
        answer = ask_squeue("--array", "--format=%F %T %r", *options)
    except subprocess.TimeoutExpired:
        raise NoAnswer("squeue: no answer after a minute; try again later") from None
    text = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", answer.stdout)  # no colours
    # A site's wrapper may say more, and lose a status: no job at all is no small thing to believe.
    jobs = re.findall(r"^\s*(\d+)\s+([A-Z_]+)(?:[^\S\n]+(.*))?$", text, re.MULTILINE)
    lost = not jobs and re.search(r"^slurm_load_jobs|\berror:", answer.stderr, re.MULTILINE)
    if answer.returncode or lost:
        raise NoAnswer(f"squeue: {' '.join(answer.stderr.split())[:500]}")
    for id, state, reason in jobs:
        if state not in _ENDED:
            waits = state == "PENDING" and reason.strip() != "None"
            yield id, state.lower(), reason.strip() if waits else ""


_ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "REVOKED", "TIMEOUT",
}  # fmt: skip
"""States of jobs that are over, which squeue lists for some minutes with --states=all."""


def _find(command: str) -> None:
    if shutil.which(command) is None:
        raise NoQueue(
            f"{command}: not found; submit on a machine of the cluster, or look at the scripts "
            "with --dry-run"
        )
