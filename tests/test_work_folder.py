"""Only what we made is removed, and nothing that links lead to."""

from pathlib import Path

import pytest

from lctw_megatron.atomic import atomic_directory
from lctw_megatron.errors import InputError
from lctw_megatron.work_folder import (
    leftovers,
    make_work_folder,
    remove,
    remove_leftovers,
    remove_work_folder,
    temporary_name,
)


def test_leftovers_go_with_a_line_and_what_only_looks_like_them_stays(tmp_path: Path) -> None:
    output = tmp_path / "out[1]"
    folder, empty, file = (temporary_name(output) for _ in range(3))
    make_work_folder(folder)
    (folder / "weights").write_text("half")
    empty.mkdir()
    file.write_text("half")
    theirs = temporary_name(output)
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("x")
    link = temporary_name(output)
    link.symlink_to(folder)
    others = [tmp_path / ".out[1].tmp", tmp_path / ".out1.0123abcd.tmp", tmp_path / "out[1].tmp"]
    for path in others:
        path.write_text("x")
    said: list[str] = []
    remove_leftovers(output, said.append)
    assert len(said) == 3 and not leftovers(output)
    assert set(tmp_path.iterdir()) == {theirs, link, *others}


def test_a_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "out"
    for content in ("old", "new"):
        with atomic_directory(output) as folder:
            (folder / "file").write_text(content)
    with pytest.raises(RuntimeError), atomic_directory(output) as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert (output / "file").read_text() == "new" and list(tmp_path.iterdir()) == [output]


def test_a_folder_without_our_mark_is_neither_used_nor_removed(tmp_path: Path) -> None:
    theirs = tmp_path / "corpus.shards"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="was not made by this command"):
        make_work_folder(theirs)
    remove_work_folder(theirs)
    link = tmp_path / "link"
    link.symlink_to(theirs)
    with pytest.raises(InputError):
        make_work_folder(link)
    remove_work_folder(link)
    remove(link)
    assert (theirs / "thesis.tex").exists() and not link.is_symlink()


def test_a_work_folder_goes_without_what_its_links_lead_to(tmp_path: Path) -> None:
    theirs, work = tmp_path / "theirs", tmp_path / "work"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("x")
    make_work_folder(work)
    (work / "link").symlink_to(theirs)
    (work / "shard").mkdir()
    remove_work_folder(work)
    assert not work.exists() and (theirs / "thesis.tex").exists()
