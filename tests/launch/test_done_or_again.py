"""What status calls done is what a launch would leave out; what is submitted again is not done."""

from pathlib import Path

from lctw_megatron.launch import queue
from tests.launch.conftest import RECIPE
from tests.launch.test_queue import CPU, finish


def test_status_calls_done_what_a_launch_would_leave_out(plan, slurm):
    made = plan()
    queue.submit(made, made.stages, CPU)
    finish(made, *(s.name for s in made.stages))
    Path("out/base/checkpoints").rmdir()
    jobs = queue.plan_jobs(made, made.stages, CPU)
    shown = queue.submission(made, jobs).text
    for ask in (True, False):
        states = {state.name: state for state in queue.stage_states(made, jobs, ask)}
        left_out = [name for name, state in states.items() if state.done]
        assert left_out == ["prepare"] and "# prepare: done before" in shown
        again = "done, but its output is not there any more, job 2"
        assert states["train-base"].text == again
        assert states["train-dense"].text == "done, but what it needs is to run again, job 6"
        assert states["score-parts"].text == (
            "done, but what it needs is to run again, job 3, 0 of 4 parts done"
        )
    # What is in the queue has taken its marks when it was submitted.
    queue.submit(made, made.select(["train-base"]), CPU)
    finish(made, "train-uniform")
    slurm.waiting("12 RUNNING\n")
    states = {state.name: state.text for state in queue.stage_states(made, jobs)}
    assert states["train-base"] == "running, job 12" and states["train-uniform"] == "done"


def test_a_stage_that_is_submitted_again_loses_its_own_mark(plan, slurm):
    made = plan()
    queue.submit(made, made.stages, CPU)
    finish(made, "prepare", "train-base")
    changed = plan(RECIPE, "training.steps=50")
    jobs = queue.plan_jobs(changed, changed.stages, CPU)
    states = {state.name: state.text for state in queue.stage_states(changed, jobs)}
    assert states["train-base"] == "done with other settings, its own or of what it needs, job 2"
    queue.submit(changed, changed.stages, CPU)
    states = {state.name: state.text for state in queue.stage_states(changed, jobs)}
    assert states["train-base"].startswith("failed or cancelled, job ")
    # It has written over what the first settings made.
    assert [s.name for s in made.stages if made.is_done(s)] == ["prepare"]
