"""Stages run one after the other, once, and stop where something fails."""

import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from lctw_megatron.errors import InputError
from lctw_megatron.launch import local
from lctw_megatron.launch.stage_graph import StageGraph
from lctw_megatron.model.checkpoint_folder import MANIFEST, step_name
from lctw_megatron.ownership import owned
from lctw_megatron.training import trackers
from tests.launch.conftest import RECIPE

SINGLE = RECIPE.replace("layout: {tensor: 2, sequence: true}", "layout: single")


@pytest.fixture
def fake_tools(tmp_path, monkeypatch):
    """A project whose tools write down their arguments and create a stage's output."""
    tools = tmp_path / "project" / "tools"
    tools.mkdir(parents=True)
    for name in ("preprocess", "train", "score", "convert", "evaluate_model", "report"):
        (tools / f"{name}.py").write_text(
            "import os, pathlib, sys\n"
            f"print('{name}', *sys.argv[1:], file=open('said', 'a'))\n"
            "for name in ('data/books.json', 'data/books.short_loss.json', 'out/report',\n"
            "             *(f'out/{r}/{o}' for r in ('base', 'uniform', 'dense')\n"
            "               for o in ('checkpoints', 'hf', 'evaluation.json'))):\n"
            "    pathlib.Path(name).mkdir(parents=True, exist_ok=True)\n"
            f"sys.exit(int(os.environ.get('{name.upper()}_STATUS', 0)))\n"
        )
    monkeypatch.setattr(local, "PROJECT", tools.parent)
    return lambda: Path("said").read_text().splitlines() if Path("said").exists() else []


def test_stages_run_in_order_and_only_once(plan, fake_tools, capfd):
    made = plan(SINGLE)
    assert local.run_stages(made, made.stages) == 0
    assert [line.split()[0] for line in fake_tools()] == [
        "preprocess", "train", "score", "train", "train",
        "convert", "convert", "evaluate_model", "evaluate_model", "report",
    ]  # fmt: skip
    assert "[3/10] score: python tools/score.py --data data/books" in capfd.readouterr().out
    assert local.run_stages(made, made.stages) == 0
    assert len(fake_tools()) == 10
    assert "[10/10] report: done before" in capfd.readouterr().out


def test_what_comes_after_a_stage_that_runs_again_runs_again(plan, fake_tools, monkeypatch, capfd):
    made = plan(SINGLE)
    assert local.run_stages(made, made.stages) == 0
    Path("out/uniform/checkpoints").rename("elsewhere")
    lines = local.command_lines(made, made.stages)
    again = [line[2:].split(":")[0] for line in lines if "done before" not in line]
    assert again == [
        "train-uniform", "export-uniform", "evaluate-uniform", "evaluate-dense", "report",
    ]  # fmt: skip
    states = local.stage_states(made, made.stages)
    assert [state.name for state in states if not state.done] == again
    reasons = (
        "done, but its output is not there any more",
        "done, but what it needs is to run again",
    )
    assert tuple(state.text for state in states if not state.done)[:2] == reasons
    assert f"# export-uniform: {reasons[1]}\npython" in "\n".join(lines)
    # Also if it is interrupted, or was chosen alone.
    monkeypatch.setenv("TRAIN_STATUS", "7")
    assert local.run_stages(made, made.select(["train-uniform"])) == 7
    monkeypatch.delenv("TRAIN_STATUS")
    assert local.run_stages(made, made.select(["train-uniform"])) == 0
    capfd.readouterr()
    assert local.run_stages(made, made.stages) == 0
    said = capfd.readouterr().out.splitlines()
    done = [line.split()[1].rstrip(":") for line in said if "done before" in line]
    assert [s.name for s in made.stages if s.name not in done] == again[1:]


def test_a_stage_that_is_started_again_loses_its_own_mark(plan, fake_tools, monkeypatch, capfd):
    made = plan(SINGLE)
    assert local.run_stages(made, made.stages) == 0
    monkeypatch.setenv("REPORT_STATUS", "7")
    changed = plan(SINGLE, "evaluation.note=another")
    assert local.run_stages(changed, changed.stages) == 7
    assert "report: done with other settings" in capfd.readouterr().out
    # What is there now may be half of the other settings'.
    assert [s.name for s in made.stages if not made.is_done(s)] == ["report"]


def test_a_failure_stops_the_chain_and_the_next_start_goes_on(plan, fake_tools, monkeypatch):
    made = plan(SINGLE)
    monkeypatch.setenv("SCORE_STATUS", "7")
    assert local.run_stages(made, made.stages) == 7
    assert [line.split()[0] for line in fake_tools()] == ["preprocess", "train", "score"]
    monkeypatch.delenv("SCORE_STATUS")
    assert local.run_stages(made, made.stages) == 0
    assert [line.split()[0] for line in fake_tools()[3:5]] == ["score", "train"]


def test_a_stage_without_what_it_needs_is_refused(plan, fake_tools):
    made = plan(SINGLE)
    with pytest.raises(InputError, match="train-base needs prepare, which is not done"):
        local.run_stages(made, made.select(["train"]))
    assert fake_tools() == []
    assert local.run_stages(made, made.select(["prepare"])) == 0
    assert local.run_stages(made, made.select(["train-base"])) == 0


def test_a_missing_tracker_is_said_before_the_first_stage(plan, fake_tools, monkeypatch):
    monkeypatch.setattr(trackers, "_is_installed", lambda name: False)
    made = plan(SINGLE, "runs.dense.training.trackers=[wandb]")
    with pytest.raises(InputError, match="training.trackers: wandb is not installed here"):
        local.run_stages(made, made.stages)
    assert fake_tools() == []
    assert local.run_stages(made, made.select(["prepare"])) == 0


def test_ranks_that_a_later_stage_cannot_take_are_said_before_the_first(plan, fake_tools):
    made = plan(SINGLE)
    with pytest.raises(InputError, match="train-base on 3 ranks"):
        local.run_stages(made, made.stages, ranks=3)
    assert fake_tools() == []
    assert local.run_stages(made, made.select(["prepare"]), ranks=3) == 0
    assert local.run_stages(made, made.select(["train-base"])) == 0
    # What is done already need not suit them.
    assert local.run_stages(made, made.select(["train-base"]), ranks=3) == 0


@pytest.mark.parametrize(
    "change, stage, file",
    [
        ("evaluation.recall.haystack=runs/a.txt", "recall-uniform", "runs/a.txt"),
        ("evaluation.data=runs/a", "evaluate-uniform", "runs/a.idx"),
        ("data.validation=[runs/a]", "train-base", "runs/a.idx"),
        ("data.scores=theirs", "train-dense", "data/books.theirs.idx"),
        ("runs.uniform.start=runs/a", "train-uniform", f"runs/a/{MANIFEST}"),
        ("scoring.scorer=runs/a", "score", f"runs/a/checkpoints/{step_name(2)}/{MANIFEST}"),
        (
            "evaluation.key_checkpoint=runs/a",
            "evaluate-uniform",
            f"runs/a/{step_name(2)}/{MANIFEST}",
        ),
    ],
)
def test_what_a_later_stage_reads_must_be_there_before_the_first(
    plan, fake_tools, monkeypatch, change, stage, file
):
    monkeypatch.setattr(local, "check_ahead", lambda *arguments: None)  # it would look inside
    asked = change, "evaluation.recall.lengths=[4096]"
    made = plan(SINGLE, *asked)
    with pytest.raises(InputError, match=f"{stage} reads .*, which is neither"):
        local.run_stages(made, made.stages)
    assert fake_tools() == []
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("")
    assert local.run_stages(made, made.select(["prepare"])) == 0
    local.check_needs(made, made.stages)


def test_a_run_that_has_begun_goes_on_without_its_start(plan):
    step = Path("out/uniform/checkpoints", step_name(2))
    step.mkdir(parents=True)
    (step / MANIFEST).write_text("")
    made = plan(SINGLE, "runs.uniform.start=runs/gone")
    local.check_needs(made, made.stages)


def test_several_ranks_run_under_torchrun(plan, monkeypatch):
    made = plan()
    train, score = made.select(["train-dense", "score"])[::-1]
    assert (train.name, score.name) == ("train-dense", "score")
    command = local.local_command(made, train)
    assert command[:4] == [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    assert command[4] == "--nproc-per-node=2"  # as few as the layout allows
    assert local.local_command(made, score)[1].endswith("tools/score.py")
    assert "--nproc-per-node=4" in local.local_command(made, train, ranks=4)
    with pytest.raises(InputError, match="train-dense on 3 ranks"):
        local.local_command(made, train, ranks=3)
    monkeypatch.setattr(local, "_gpus", lambda: 7)
    assert "--nproc-per-node=4" in local.local_command(made, train)  # 6 does not divide the batch
    assert "--nproc-per-node=7" in local.local_command(made, score)
    (evaluate,) = made.select(["evaluate-dense"])
    assert "--nproc-per-node=6" in local.local_command(made, evaluate)  # of two ranks each
    (report,) = made.select(["report"])
    assert local.local_command(made, report, ranks=4)[0:2] == [
        sys.executable,
        str(local.PROJECT / "tools/report.py"),
    ]


@pytest.mark.parametrize("project", [Path("project"), None])
def test_torchrun_takes_no_option_of_ours_for_its_own(plan, monkeypatch, project):
    monkeypatch.setattr(local, "PROJECT", project)
    made = plan()
    (train,) = made.select(["train-dense"])
    answer = parse_args(local.local_command(made, train)[3:])
    assert answer.module == (project is None)
    tool = "project/tools/train.py" if project else "lctw_megatron.commands.train"
    assert answer.training_script == tool
    assert answer.training_script_args == ["recipe.yaml", "--run", "dense"]


def test_sigterm_is_handed_on_so_that_training_can_save(plan, fake_tools, tmp_path):
    import signal
    import subprocess

    (tmp_path / "project/tools/preprocess.py").write_text(
        "import signal, sys, time\n"
        "def leave(*_):\n"
        "    print('saved', file=open('said', 'a', buffering=1))\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "print('ready', file=open('said', 'a', buffering=1))\n"
        "time.sleep(60)\n"
    )
    plan(SINGLE)
    code = (
        "import pathlib, sys\n"
        "from lctw_megatron.launch import local, stage_graph\n"
        f"local.PROJECT = pathlib.Path({str(tmp_path / 'project')!r})\n"
        "made = stage_graph.build_stage_graph('recipe.yaml')\n"
        "sys.exit(local.run_stages(made, made.select(['prepare'])))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    for _ in range(600):
        if fake_tools() == ["ready"]:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert fake_tools() == ["ready", "saved"]


def test_dry_run_shows_the_commands(plan):
    made: StageGraph = plan()
    lines = local.command_lines(made, made.select(["train-dense"]))
    assert lines == [
        "# train-dense: not done\npython -m torch.distributed.run --standalone --nproc-per-node=2 "
        "-- tools/train.py recipe.yaml --run dense"
    ]


def test_what_a_running_stage_needs_is_not_made_anew_under_it(plan, fake_tools):
    """Another launcher's training would read the old data, and be marked after the new are made."""
    made = plan(SINGLE)
    assert local.run_stages(made, made.select(["prepare"])) == 0
    training = made.select(["train-base"])[0]
    made.set_done(training)
    with owned(local.running_mark(made, training), training.name):
        Path("data/books.json").rmdir()
        with pytest.raises(InputError, match="train-base: is run by process .* is to run again"):
            local.run_stages(made, made.stages)
        assert len(fake_tools()) == 1 and made.mark(training).exists()
    assert local.run_stages(made, made.stages) == 0
