"""What `launch.py status` and `watch` say of runs and their logs, from the files these leave."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lctw_megatron.atomic import write_json
from lctw_megatron.commands.launch import main
from lctw_megatron.config.load import dump_yaml
from lctw_megatron.errors import InputError
from lctw_megatron.launch import local, status
from lctw_megatron.launch.launch_request import LaunchRequest, run_request
from lctw_megatron.launch.run_status import last_error, run_status
from lctw_megatron.launch.stage_graph import StageGraph
from lctw_megatron.model.checkpoint_folder import MANIFEST, step_name
from lctw_megatron.ownership import FORMAT, holder, owned
from lctw_megatron.training import heartbeat
from lctw_megatron.training.heartbeat import Heartbeat, path_in, read_beat

Plan = Callable[..., StageGraph]


def write_run(run_dir: Path, steps: int, saved: int | None, stage: str, age: float = 0.0) -> None:
    """What a run leaves that has done ``steps`` steps of a second each."""
    Heartbeat(run_dir).beat(stage, steps)
    beat = json.loads(path_in(run_dir).read_text())
    write_json(path_in(run_dir), beat | {"time": beat["time"] - age})
    lines = [{"step": step, "speed/seconds": 1.0} for step in range(steps)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if saved is not None:
        write_json(run_dir / "checkpoints" / step_name(saved) / MANIFEST, {})


def test_beats_are_few_but_every_stage_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    heart, now, wall = Heartbeat(tmp_path), [1000.0], [5000.0]
    clocks = SimpleNamespace(monotonic=lambda: now[0], time=lambda: wall[0])
    monkeypatch.setattr(heartbeat, "time", clocks)
    heart.beat("training", 1)
    for step in range(2, 9):
        now[0] += 1
        heart.beat("training", step)
    assert read_beat(tmp_path) and read_beat(tmp_path).step == 1
    heart.beat("saving", 9)
    assert (read_beat(tmp_path).stage, read_beat(tmp_path).step) == ("saving", 9)
    now[0] += 10
    wall[0] -= 3600  # somebody sets the clock of the machine
    heart.beat("saving", 11)
    assert (read_beat(tmp_path).step, read_beat(tmp_path).time) == (11, 1400)
    # 17 s for ten steps, with the save.
    assert read_beat(tmp_path).seconds_per_step == pytest.approx(1.7)
    for damaged in (
        '{"stage": "saving", "step"',
        '{"stage": "saving", "step": 1, "time": NaN}',
        '{"stage": "saving", "step": 1e999, "time": 1}',
        '{"stage": "saving", "step": 1, "time": 1, "seconds_per_step": Infinity}',
    ):
        path_in(tmp_path).write_text(damaged)
        assert read_beat(tmp_path) is None
    (tmp_path / "file").touch()
    Heartbeat(tmp_path / "file").beat("starting", 0)  # no folder: nothing is raised


def test_a_run_is_alive_stale_dead_or_finished(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    run = next(run for run in plan().runs if run.name == "base")  # 100 steps of 8 x 256 tokens
    folder = Path(run.run_dir)
    assert run_status(run).text == "step 0/100 (0 %), no checkpoint, not started"
    write_run(folder, 40, None, "training")
    path_in(folder).unlink()
    assert run_status(run).text == "step 40/100 (40 %), no checkpoint, not running"
    (folder / "metrics.jsonl").unlink()
    with owned(folder / ".lock", "the run"):
        assert "no checkpoint, starting (process " in run_status(run).text
        write_run(folder, 40, 30, "training", age=-7200)
        ahead = "training, alive, by a clock 2:00:00 ahead of this machine's (process "
        assert ahead in run_status(run).text
        write_run(folder, 40, 30, "training", age=5)
        found = run_status(run)
        assert found.alive and not found.finished
        assert found.text.startswith(
            "step 40/100 (40 %), 2.05k tokens/s, 0:01:00 left, checkpoint of step 30, training, "
            "alive 5 s ago (process "
        )
        write_run(folder, 40, 30, "training", age=100)
        assert "stale: no sign of life for 0:01:40 while training" in run_status(run).text
        # Time left is that of whole steps, with what lies between them.
        beat = json.loads(path_in(folder).read_text())
        write_json(path_in(folder), beat | {"seconds_per_step": 2.0})
        assert "2.05k tokens/s, 0:02:00 left" in run_status(run).text
        write_run(folder, 40, 30, "saving", age=100)  # which may take minutes
        assert "saving, alive 100 s ago" in run_status(run).text
        # Looking on takes nothing from the owner.
        assert holder(folder / ".lock") is not None
    assert run_status(run).text.endswith("checkpoint of step 30, not running")
    dead = {"format": FORMAT, "host": socket.gethostname(), "process": 2**22 + 1, "started": 0.0}
    write_json(folder / ".lock", dead)
    assert "died without a word: process 4194305" in run_status(run).text
    (folder / ".lock").unlink()
    write_run(folder, 100, 100, "saving")
    found = run_status(run)
    assert found.finished and found.text == "step 100/100 (100 %), checkpoint of step 100, finished"


def test_a_torn_line_of_metrics_that_are_being_written_is_no_matter(plan: Plan, capsys) -> None:
    run = plan().runs[0]
    write_run(Path(run.run_dir), 39, None, "training")
    with open(Path(run.run_dir) / "metrics.jsonl", "a") as file:
        file.write('{"step": 39, "speed/seconds": NaN}\n{"step": 40, "speed/se')
    assert run_status(run).text.startswith("step 40/100")
    assert capsys.readouterr().out == ""


START = "lctw-megatron 0.1.0, megatron-core 0.16.1, torch 2.8, CPU\n"


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (START + "main: 10/100 steps (10 %)\nthe loss is 3.0, error rates are low\n", None),
        ("error: recipe.yaml: no such file\n", "error: recipe.yaml: no such file"),
        (
            START + "Traceback (most recent call last):\n  File x\nValueError: bad\n"
            "srun: error: n1: task 0: Exited with exit code 1\n",
            "ValueError: bad",
        ),
        (
            START + "[rank3]: torch.OutOfMemoryError: CUDA\n",
            "[rank3]: torch.OutOfMemoryError: CUDA",
        ),
        (
            "ValueError: old\n" + START + "slurmstepd: error: *** JOB 5 ON n1 CANCELLED ***\n",
            "slurmstepd: error: *** JOB 5 ON n1 CANCELLED ***",
        ),
        ("ValueError: old\n" + START + "on it goes\n", "ValueError: old (before the last start)"),
    ],
)
def test_the_last_error_of_a_log_is_its_cause(tmp_path: Path, log: str, expected: Any) -> None:
    (tmp_path / "a.log").write_bytes(b"\xff\n" + log.encode())
    assert last_error([tmp_path / "a.log", tmp_path / "missing.log"]) == expected


def test_status_takes_a_recipe_its_folder_or_a_run(plan: Plan, monkeypatch: Any, capsys) -> None:
    made = plan()
    write_run(Path("out/base"), 40, 30, "training")
    Path("out/base/run.yaml").write_text(dump_yaml(made.runs[0]))
    expected = "  step 40/100 (40 %), checkpoint of step 30, not running"
    assert status.status("recipe.yaml") == 0  # trained without tools/launch.py
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "prepare                  not done",
        "train-base               not done",
        expected,
    ]
    monkeypatch.setattr(local, "run_stages", lambda *arguments: 0)
    run_request(LaunchRequest("recipe.yaml", stages=("train",)))
    with owned(local.running_mark(made, made.select(["train-base"])[0]), "train-base"):
        for where in ("recipe.yaml", "out"):
            status.status(where)
            said = capsys.readouterr().out.splitlines()
            assert len(said) == 6 and said[0].startswith(
                "train-base               running, process "
            )
            assert said[1] == expected
    made.folder.joinpath("train-base.log").write_text("error: no GPU\n")
    status.status("out/base")
    assert capsys.readouterr().out.splitlines() == [
        f"base: {expected.strip()}", "  last error in the log: error: no GPU"
    ]  # fmt: skip


def test_a_copied_output_folder_is_not_taken_for_the_one_that_the_recipe_writes_to(
    plan: Plan, monkeypatch: Any, capsys
) -> None:
    plan()
    monkeypatch.setattr(local, "run_stages", lambda *arguments: 0)
    run_request(LaunchRequest("recipe.yaml"))
    shutil.copytree("out", "copy")
    Path("link").symlink_to("out")
    for verb in ("status", "watch", "resume"):
        with pytest.raises(InputError, match="copy/launch/order.json: .* writes to out; .* --set"):
            main([verb, "copy"])
    assert main(["resume", "link"]) == main(["status", "link"]) == 0
    run_request(LaunchRequest("recipe.yaml", ("output_dir=copy",)))
    assert main(["resume", "copy"]) == main(["status", "copy"]) == 0


def test_watch_ends_with_what_it_watches(monkeypatch: Any, capsys) -> None:
    moments = iter(["running", "between two stages", "running", "failed"])
    now = ["running"]

    def sleep(seconds: float) -> None:
        now[0] = next(moments, "failed")

    monkeypatch.setattr(status.time, "sleep", sleep)

    def look(where: str) -> status.Look:
        return status.Look([now[0]], now[0] == "running", now[0] == "done")

    monkeypatch.setattr(status, "look", look)
    assert status.watch("out") == 1
    said = [line for line in capsys.readouterr().out.splitlines() if line[:2] != "20"]
    assert said[:-1] == ["running", "running", "between two stages", "running", "failed", "failed"]
    assert "resume" in said[-1]
    now[0] = "done"
    assert status.watch("out") == 0


def test_status_starts_without_torch() -> None:
    asked = "import sys; import lctw_megatron.launch.status; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    assert answer.stdout == "False\n", answer.stderr
