"""metrics.jsonl holds every step once, and nothing that goes wrong with it ends one rank alone."""

import errno
from pathlib import Path

import pytest

from lctw_megatron.training.metrics import MetricsLog, set_aside
from tests.training.layouts import make_run
from tests.training.runs import logged


def test_lines_of_steps_that_are_done_again_are_cut_off(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    for step in range(4):
        log.write(step, {"loss/plain": step / 3})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss')  # torn by a kill
    log = MetricsLog(tmp_path, 3, tensorboard=False)
    log.write(3, {"loss/plain": 0.1})
    log.close()
    assert [line["step"] for line in logged(tmp_path)] == [0, 1, 2, 3]
    assert logged(tmp_path)[2]["loss/plain"] == 2 / 3


def test_metrics_of_removed_checkpoints_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run("tokens", str(tmp_path), {}, "chunk", "uniform", "frozen")  # of 3 steps
    often = run.training.model_copy(update={"save_interval": 1})
    saved = run.model_copy(update={"training": often})
    path = tmp_path / "metrics.jsonl"
    set_aside(run, 0)
    path.write_text('{"step": 0}\n')
    set_aside(saved, 0)  # killed in its first save
    path.write_text('{"step": 0}\n{"step": 1}\n')
    set_aside(run, 0)  # and before it
    set_aside(saved, 1)
    half = tmp_path / "checkpoints" / ".step_00000001.0a1b2c3d.tmp"
    half.mkdir(parents=True)
    set_aside(saved, 0)  # in its first save, beside which it trained on
    half.rmdir()
    assert set(tmp_path.iterdir()) == {path, half.parent} and not capsys.readouterr().out
    half.with_name(
        ".step_00000002.0a1b2c3d.tmp"
    ).mkdir()  # what a later save has left saves nothing
    set_aside(saved, 0)
    (aside,) = tmp_path.glob("metrics.*")
    assert aside != path and len(aside.read_text().splitlines()) == 2
    assert f"begins anew; is now {aside}" in capsys.readouterr().out


def test_a_board_that_cannot_be_written_is_given_up(tmp_path: Path) -> None:
    class FullBoard:
        calls = 0

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.calls += 1
            raise OSError(errno.ENOSPC, "No space left on device")

        close = add_scalar

    log = MetricsLog(tmp_path, 0, tensorboard=False)
    log._board = board = FullBoard()
    log.write(0, {"loss/plain": 1.0})
    log.write(1, {"loss/plain": 2.0})
    log.close()
    assert board.calls == 1 and len(logged(tmp_path)) == 2
