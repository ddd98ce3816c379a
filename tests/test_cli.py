"""What every command line shares."""

import io
import sys
from pathlib import Path

import pytest

from lctw_megatron.atomic import atomic_file
from lctw_megatron.cli import run_command


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
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/file: is there already, and")


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
