"""Running stages here, one after the other."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lctw_megatron.config.shipped import PROJECT
from lctw_megatron.data.indexed_array import index_path
from lctw_megatron.errors import InputError
from lctw_megatron.launch.ahead import check_ahead
from lctw_megatron.launch.inputs import is_there
from lctw_megatron.launch.stage_graph import NOT_DONE, StageGraph
from lctw_megatron.launch.stages import Stage, StageState, runnable
from lctw_megatron.ownership import holder, owned
from lctw_megatron.training.trackers import check_trackers


def run_stages(graph: StageGraph, stages: Sequence[Stage], ranks: int | None = None) -> int:
    """Run ``stages`` in order, leaving out those that are done. Returns an exit status.

    ranks: of stages that can use several; None: this machine's GPUs, on a CPU as few as the layout
    allows. Stops at the first stage that fails, with its status; start again to go on.
    """
    check_needs(graph, stages)
    outdated = graph.outdated(stages)
    why = {s.name: graph.why_not_done(s, outdated) for s in stages}
    for stage in graph.stages:
        # It would be taken for one that was made of what is made anew.
        if stage.name in outdated and (who := _runner(graph, stage)):
            raise InputError(
                f"{stage.name}: is run by {who}, and what it needs is to run again; wait for "
                "it to end, or end it, and start again"
            )
    # Not after hours of scoring: trackers that are missing, ranks that do not fit.
    for run in graph.runs:
        if why.get(f"train-{run.name}"):
            check_trackers(run.training.trackers)
    for stage in stages:
        if why[stage.name]:
            local_command(graph, stage, ranks)
    graph.folder.mkdir(parents=True, exist_ok=True)
    graph.forget_undone(stages)
    for number, stage in enumerate(stages, 1):
        title = f"[{number}/{len(stages)}] {stage.name}"
        if graph.is_done(stage):
            print(f"{title}: done before", flush=True)
            continue
        if why[stage.name] not in (None, NOT_DONE):
            print(f"{title}: {why[stage.name]}", flush=True)
        command = local_command(graph, stage, ranks)
        print(f"{title}: {shlex.join(_shortened(command))}", flush=True)
        started = time.monotonic()
        with owned(running_mark(graph, stage), stage.name):
            status = _run(command)
        if status:
            print(f"{stage.name} ended with status {status}; start again to go on", file=sys.stderr)
            return status
        graph.set_done(stage)
        if stage.kind == "prepare":  # now the tokenizer and the held-out text are there
            check_needs(graph, stages)
        print(f"{title}: done in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def running_mark(graph: StageGraph, stage: Stage) -> Path:
    """The lock file that is there while ``stage`` runs here."""
    return graph.folder / f".{stage.name}.lock"


def _runner(graph: StageGraph, stage: Stage) -> str | None:
    """Who runs ``stage`` here now."""
    found = holder(running_mark(graph, stage))
    return found[0] if found and not found[1] else None


def stage_states(graph: StageGraph, stages: Sequence[Stage]) -> list[StageState]:
    """Where each of ``stages`` stands that was started here: done is what the next start of all of
    them would leave out."""
    states, outdated = [], graph.outdated(stages)
    for stage in stages:
        who = _runner(graph, stage)  # first, for it may be done by the next line
        why = graph.why_not_done(stage, outdated)
        text = f"running, {who}" if why and who else why or "done"
        states.append(StageState(stage.name, text, not why, bool(why and who)))
    return states


def command_lines(
    graph: StageGraph, stages: Sequence[Stage], ranks: int | None = None
) -> list[str]:
    """What ``run_stages`` would run, as one would type it (in the checkout, if there is one)."""
    lines, outdated = [], graph.outdated(stages)
    for stage in stages:
        command = shlex.join(_shortened(local_command(graph, stage, ranks)))
        why = graph.why_not_done(stage, outdated)
        lines.append(f"# {stage.name}: {why or 'done before'}\n{command}")
    return lines


def check_needs(
    graph: StageGraph, stages: Sequence[Stage], ahead: frozenset[str] = frozenset()
) -> None:
    """Refuse stages that need others which are neither done nor among them nor in ``ahead``, or
    that read what is not there or could not be made of what is (``ahead.py``), which the last of
    them would otherwise say after all training."""
    known = {stage.name: stage for stage in graph.stages}
    names = {stage.name for stage in stages} | ahead
    outdated = graph.outdated(stage for stage in stages if stage.name not in ahead)
    for stage in stages:
        if graph.why_not_done(stage, outdated) is None:
            continue
        for need in stage.needs:
            why = graph.why_not_done(known[need], outdated)
            if why and need not in names:
                raise InputError(
                    f"--stages: {stage.name} needs {need}, which is {why}; add it to --stages"
                )
        for path in stage.reads if stage.name not in ahead else ():
            if not is_there(path):
                raise InputError(
                    f"{stage.name} reads {path}, which is neither the prefix of a token dataset or "
                    f"sidecar ({index_path(path)}) nor a file or checkpoint; make it, or change "
                    "the recipe"
                )
    begun = {s.name for s in stages if s.name not in ahead and graph.why_not_done(s, outdated)}
    prepare = known.get("prepare")
    prepared = prepare is None or graph.why_not_done(prepare, outdated) is None
    check_ahead(graph.recipe, graph.runs, begun, prepared)


def local_command(graph: StageGraph, stage: Stage, ranks: int | None = None) -> list[str]:
    """The command that runs ``stage`` on this machine, under torchrun if on several ranks."""
    options, program = runnable(stage.arguments, PROJECT)
    world = stage.model_ranks
    if stage.scales:
        world = ranks or _most_ranks(graph, stage, max(_gpus(), stage.model_ranks))
        graph.check_ranks(stage, world)
    if world == 1:
        return [sys.executable, *options, *program]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # Without the -- it takes options of ours for its own: --run for an abbreviation of --run-path.
    return [*torchrun, f"--nproc-per-node={world}", *options, "--", *program]


def _most_ranks(graph: StageGraph, stage: Stage, available: int) -> int:
    """The most of ``available`` ranks that suit the stage; at least those of one model."""
    for world in range(available, stage.model_ranks, -1):
        try:
            graph.check_ranks(stage, world)
        except InputError:
            continue
        return world
    return stage.model_ranks


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _shortened(command: list[str]) -> list[str]:
    """The command as one would type it (in the checkout, if there is one)."""
    names = {sys.executable: "python"}
    short = [names.get(part, part) for part in command]
    return [part.removeprefix(f"{PROJECT}{os.sep}") for part in short] if PROJECT else short


def _run(command: list[str]) -> int:
    """Run ``command``; SIGTERM is handed on, so that training can save. Returns its status."""
    process = subprocess.Popen(command)

    def hand_on(number: int, frame: object) -> None:
        process.send_signal(number)

    previous = signal.signal(signal.SIGTERM, hand_on)
    try:
        while True:
            try:
                status = process.wait()
                return 128 - status if status < 0 else status
            except KeyboardInterrupt:  # the terminal has interrupted the command as well
                continue
    finally:
        signal.signal(signal.SIGTERM, previous)
