"""metrics.jsonl holds every step once, and nothing that goes wrong with it ends one rank alone."""

import errno
import resource
import signal
from pathlib import Path

import pytest

from lctw_megatron.training.metrics import MetricsLog
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


def test_no_line_is_lost_to_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    """A limit of the file's size stands for the disk: it too takes half a line, then none."""
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.RLIMIT_FSIZE
    soft, hard = resource.getrlimit(limits)
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    try:
        resource.setrlimit(limits, (1000, hard))
        for step in range(50):
            log.write(step, {f"loss/{number}": number / 3 for number in range(40)})
        with pytest.raises(OSError, match="File too large"):
            log.sync()
    finally:
        resource.setrlimit(limits, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    log.sync()
    log.close()
    assert [line["step"] for line in logged(tmp_path)] == list(range(50))
