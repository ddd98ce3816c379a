"""What every command makes of an error, alone and as one of several ranks."""

import errno
import os
from pathlib import Path

import pytest

from lctw_megatron import cli
from lctw_megatron.errors import InputError
from tests.tools.command import call


def _too_many_files(folder: Path) -> None:
    raise OSError(errno.EMFILE, "too many")


def _link_to_nowhere(folder: Path) -> None:
    (folder / "run").symlink_to(folder / "nowhere")
    (folder / "run" / "main").mkdir(parents=True, exist_ok=True)


def _circle(folder: Path) -> None:
    (folder / "run").symlink_to(folder / "run")
    (folder / "run" / "main").mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize(
    ("action", "line"),
    [
        (_too_many_files, "more files are open than allowed (ulimit -n)"),
        (_link_to_nowhere, "run: something else has this name"),
        (_circle, "links that lead in a circle"),
        (lambda folder: (folder / ("x" * 300)).mkdir(), "the name is too long"),
    ],
    ids=["many files", "link to nowhere", "circle", "long name"],
)
def test_what_the_system_refuses_and_a_user_can_mend_is_one_line(tmp_path, capsys, action, line):
    assert line in call(lambda arguments: action(tmp_path), capsys).error_line()


def test_an_error_of_all_ranks_is_printed_by_the_first_and_one_of_any_rank_by_that(
    capsys, monkeypatch
):
    """A launcher ends the ranks that wait, once the first has ended."""
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)

    def refuse(arguments: list[str]) -> None:
        raise InputError("no such field")

    for rank, local in ((0, 0), (8, 0), (9, 1)):
        monkeypatch.setitem(os.environ, "RANK", str(rank))
        monkeypatch.setitem(os.environ, "LOCAL_RANK", str(local))
        assert call(refuse, capsys).error_line() == "no such field"
    first, node, other = waited
    assert first == 0 < node < other
