"""What every command line shares, and what it makes of an error, alone and as one of many ranks."""

import errno
import io
import os
import sys
from pathlib import Path

import pytest

from lctw_megatron import cli
from lctw_megatron.atomic import atomic_file
from lctw_megatron.cli import run_command
from lctw_megatron.errors import InputError
from tests.tools.command import call


def test_a_terminal_that_lacks_a_sign_gets_its_number(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["tool"])
    with pytest.raises(SystemExit) as end:
        run_command(lambda _: print("0.5 ±0.1 \u2713, not\udcfftext"))
    assert not end.value.code
    assert shown.getvalue() == b"0.5 \\xb10.1 \\u2713, not\\udcfftext\n"


def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path, monkeypatch, capsys):
    def main(_: list[str]) -> None:
        with atomic_file(tmp_path / "file" / "out"):
            pass

    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["tool"])
    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(
        f"error: {tmp_path}/file: something else has this name"
    )


def test_the_error_of_a_rename_names_what_the_user_named(tmp_path, monkeypatch, capsys):
    def main(_: list[str]) -> None:
        with atomic_file(tmp_path / "out") as file:
            file.write(b"x")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(sys, "argv", ["tool"])
    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path}/out: this is a folder, a file was expected\n"
    assert list(Path(tmp_path).iterdir()) == [tmp_path / "out"]


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
