"""tools/train.py in processes of its own: killed, asked to stop, and started by torchrun."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from lctw_megatron.data.token_dataset import TokenDataset, TokenWriter
from tests.tools.command import TOOLS, call
from tests.training.layouts import make_data, make_run
from tests.training.runs import checkpoints, logged, write_recipe
from tools import train as tool

STEPS = 40
TIMEOUT = 240.0  # seconds; a start alone takes 10 where others use the cores
MODEL = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As in the processes that are started here: sums of threads round in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Process:
    """tools/train.py with a recipe, in a process group of its own."""

    def __init__(self, recipe: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> None:
        self.run_dir = recipe.parent / "main"
        self.log = recipe.with_suffix(".log")
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, str(TOOLS / "train.py"), str(recipe), *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def wait_for_steps(self, count: int) -> None:
        deadline = time.monotonic() + TIMEOUT
        path = self.run_dir / "metrics.jsonl"
        while not path.exists() or path.read_text().count("\n") < count:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def wait(self) -> int:
        try:
            return self.process.wait(TIMEOUT)
        finally:
            self.end()

    def end(self) -> None:
        """Nothing of it is left over: not the process, not its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def frozen_recipe(data: str, folder: Path, **changes: Any) -> Path:
    training = {"steps": STEPS, "save_interval": 5, "schedule": "cosine", "clip_grad": 1.0}
    run = make_run(
        data, "unused", {}, "pack", "dense", "frozen", training=training | changes, model=MODEL
    )  # fmt: skip
    folder.mkdir()
    return write_recipe(folder / "recipe.yaml", run)


def test_killed_and_asked_to_stop_a_run_ends_as_if_nothing_had_happened(
    data: str, tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = frozen_recipe(data, tmp_path / "stopped")
    run_dir = recipe.parent / "main"
    process = Process(recipe)
    process.wait_for_steps(8)
    process.end()  # kill -9, in the middle of whatever it did
    assert process.process.returncode == -signal.SIGKILL
    killed_after = len(logged(run_dir))
    assert 8 <= killed_after < STEPS

    process = Process(recipe)
    process.wait_for_steps(killed_after + 2)
    process.process.terminate()
    assert process.wait() == 75
    assert "asked to stop: saved after step" in process.log.read_text()
    stopped_after = len(logged(run_dir))
    assert checkpoints(run_dir)[-1] == stopped_after < STEPS

    assert Process(recipe).wait() == 0
    untouched = frozen_recipe(data, tmp_path / "untouched")
    assert call(tool.main, capsys, untouched).status == 0
    assert logged(run_dir) == logged(untouched.parent / "main")


def test_a_dry_run_knows_the_schemes(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = frozen_recipe(data, tmp_path / "dry")
    answer = call(tool.main, capsys, recipe, "--dry-run", "--set", "weighting.scheme=densse")
    assert answer.status == 2 and "densse" in answer.error_line()
    left_out = ("--dry-run", "--set", "training.micro_batch_size=null", "--memory")
    answer = call(tool.main, capsys, recipe, *left_out, "80", "--ranks", "2")
    assert "  micro_batch_size: 4\n" in answer.out
    assert "training.micro_batch_size: 4, chosen for the 72.0 GiB" in answer.out
    assert call(tool.main, capsys, recipe, *left_out, "0").status == 2


@pytest.mark.parametrize(
    "option", [("--ranks", "2"), ("--memory", "80"), ("--write-speed", "5")], ids=lambda o: o[0]
)
def test_what_a_dry_run_is_told_is_refused_by_a_training(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
) -> None:
    """It would train on one rank, where eight were asked for, without a word."""
    recipe = frozen_recipe(data, tmp_path / "run")
    answer = call(tool.main, capsys, recipe, *option)
    assert answer.status == 2 and f"{option[0]} is for --dry-run" in answer.error_line()
    assert not (tmp_path / "run" / "main").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the plan is for the GPU that is there")
def test_without_a_gpu_a_plan_is_for_the_cpu_or_in_bf16_for_one_of_80_gb(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = frozen_recipe(data, tmp_path / "dry")
    choose = ("--dry-run", "--set", "training.micro_batch_size=null")
    answer = call(tool.main, capsys, recipe, *choose)
    assert "memory of a CPU rank" in answer.out
    answer = call(tool.main, capsys, recipe, *choose, "--set", "training.precision=bf16")
    assert "memory of a GPU rank" in answer.out and "for the 72.0 GiB that a rank" in answer.out


def test_what_lies_beyond_the_last_step_is_said(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = frozen_recipe(data, tmp_path / "dry")
    answer = call(tool.main, capsys, recipe, "--dry-run", "--set", "training.warmup_steps=120")
    assert "warmup_steps 120: more than training.steps 40, so the rate ends at" in answer.out
    answer = call(tool.main, capsys, recipe, "--dry-run", "--set", "training.warmup_steps=40")
    assert "more than training.steps" not in answer.out
    answer = call(tool.main, capsys, recipe, "--dry-run", "--set", "training.save_interval=41")
    assert "training.save_interval 41: more than training.steps 40\n" in answer.out
    keep = "training.save_interval=20", "training.keep_every=60"
    recall = "training.recall={lengths: [64], every: 41}"
    changes = [word for change in (*keep, recall) for word in ("--set", change)]
    answer = call(tool.main, capsys, recipe, "--dry-run", *changes)
    assert "training.keep_every 60: more than training.steps 40\n" in answer.out
    assert "training.recall.every 41: more than training.steps 40\n" in answer.out


def test_what_comes_after_training_is_refused_before_it(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a queue `prepare` has made the data only then."""
    recipe, made = frozen_recipe(data, tmp_path / "late"), TokenDataset(data)
    other = made.manifest.tokenizer.model_copy(update={"digest": "f" * 32})
    with TokenWriter(tmp_path / "held", other) as writer:
        writer.add(made.get(0))
    probes = f"evaluation={{data: {tmp_path / 'held'}, sequence_length: 4}}"
    for more in ((), ("--dry-run",)):
        line = call(tool.main, capsys, recipe, "--set", probes, *more).error_line()
        assert f"{tmp_path / 'held'} was tokenised with" in line
        assert line.endswith(", or --set evaluation=null to train only")
    assert not (recipe.parent / "main" / "checkpoints").exists()
    last = "--set", "evaluation=null", "--dry-run"
    assert call(tool.main, capsys, recipe, "--set", probes, *last).status == 0


def test_a_run_without_data_is_no_plan(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = frozen_recipe(data, tmp_path / "dry")
    answer = call(tool.main, capsys, recipe, "--dry-run", "--set", "data.train=[]")
    assert answer.status == 2 and "data.train is empty; name the prefix" in answer.err


def plain_recipe(data: str, folder: Path) -> Path:
    run = make_run(data, "unused", {}, "chunk", "sparse", "self", training={"steps": 5})
    folder.mkdir()
    return write_recipe(folder / "recipe.yaml", run)


@pytest.mark.parametrize("arguments", [("--set", "layout.tensor=2"), ()], ids=["TP2", "DP2"])
def test_two_ranks_of_torchrun_give_the_losses_and_norms_of_one_process(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    alone = plain_recipe(data, tmp_path / "alone")
    assert call(tool.main, capsys, alone).status == 0
    recipe = plain_recipe(data, tmp_path / "ranks")
    # --standalone: a free port for the meeting.
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = Process(recipe, *arguments, launcher=torchrun)
    assert process.wait() == 0, process.log.read_text()
    assert "2 ranks" in process.log.read_text()
    assert process.log.read_text().count("5/5 steps (100 %)") == 1
    lines = logged(recipe.parent / "main")
    assert len(lines) == 5
    for found, expected in zip(lines, logged(alone.parent / "main"), strict=True):
        assert found.keys() == expected.keys()
        for name in ("loss/weighted", "loss/plain", "loss/first_seen", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_mistakes_are_one_line_and_leave_nothing(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = plain_recipe(data, tmp_path / "wrong")
    answer = call(tool.main, capsys, recipe, "--set", "layout.tensor=2")
    assert "tensor 2" in answer.error_line() and "1 were started" in answer.error_line()
    answer = call(tool.main, capsys, recipe, "--set", "training.stesp=4")
    assert "did you mean steps?" in answer.error_line()
    answer = call(tool.main, capsys, tmp_path / "nothing.yaml")
    assert "nothing.yaml: no such file" in answer.error_line()
    assert [path.name for path in recipe.parent.iterdir()] == ["recipe.yaml"]
