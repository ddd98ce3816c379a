"""Locks: one process of all, let go by a crash, and no harm to a file that is somebody else's."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import lock_descriptor

from lctw_megatron import atomic
from lctw_megatron.errors import InputError

ROOT = Path(__file__).parents[1]
HOLDER = """
import sys, time
from pathlib import Path
from lctw_megatron.atomic import locked
with locked(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that is in, and the path of its lock."""
    path = tmp_path / "lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "in\n"
    yield process, path
    process.kill()
    process.communicate()


def is_free(path: Path) -> bool:
    with open(path, "r+") as file:
        return lock_descriptor(file.fileno(), blocking=False)


def test_only_one_process_is_in_until_it_is_killed(holder):
    process, path = holder
    assert not is_free(path)
    process.kill()
    with atomic.locked(path):  # waits until it is gone
        pass


def test_a_lock_is_let_go_at_the_end_and_after_an_error(tmp_path):
    path = tmp_path / "lock"
    with pytest.raises(RuntimeError), atomic.locked(path):
        raise RuntimeError
    assert is_free(path)
    with atomic.locked(path) as alone:
        assert alone and not is_free(path)
    assert is_free(path)


def test_what_is_in_the_file_stays_there(tmp_path):
    path = tmp_path / "lock"
    path.write_text("mine")
    with atomic.locked(path):
        pass
    assert path.read_text() == "mine"


def test_a_link_is_refused_and_not_followed(tmp_path):
    for target in (tmp_path / "diary", tmp_path / "nothing yet"):
        link = tmp_path / f"{target.name}.lock"
        link.symlink_to(target)
        refusal = f"{link}: a link, .*remove it"
        with pytest.raises(InputError, match=refusal), atomic.locked(link):
            pytest.fail("in through a link")
        assert not target.exists()


@pytest.mark.skipif(not hasattr(atomic.os, "O_NOFOLLOW"), reason="this system has no O_NOFOLLOW")
def test_a_link_that_appears_at_the_last_moment_is_not_followed_either(tmp_path, monkeypatch):
    (tmp_path / "lock").symlink_to(tmp_path / "diary")
    monkeypatch.setattr(Path, "is_symlink", lambda _: False)
    with pytest.raises(InputError, match="a link"), atomic.locked(tmp_path / "lock"):
        pytest.fail("in through a link")
    assert not (tmp_path / "diary").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_lets_all_in(tmp_path, monkeypatch, number):
    def refuse(descriptor: int) -> bool:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(atomic, "lock_descriptor", refuse)
    if number == errno.EIO:  # something else is wrong
        with pytest.raises(OSError, match="no locks here"), atomic.locked(tmp_path / "lock"):
            pytest.fail("in")
        return
    lock = tmp_path / "lock"
    with atomic.locked(lock) as alone, atomic.locked(lock) as second:
        assert not alone and not second  # and they know it


def test_an_error_names_no_file_that_was_only_made_on_the_way(tmp_path, monkeypatch):
    """Whichever call meets it first: the open, a write, the copy of a file, the rename."""

    def full(*names: object, **_: object) -> None:
        one, other = ([str(name) for name in names if isinstance(name, str | Path)] + [None])[:2]
        raise OSError(errno.ENOSPC, "No space left on device", one, None, other)

    path, source = tmp_path / "out", str(tmp_path / "source")
    with pytest.raises(OSError, match=f"'{path}'$"), atomic.atomic_directory(path) as folder:
        full(folder / "part")
    with pytest.raises(OSError, match=f"'{path}'$"), atomic.atomic_directory(path) as folder:
        full(source, folder / "copy")
    with pytest.raises(OSError, match=f"'{source}'$"), atomic.atomic_directory(path):
        full(source)
    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(OSError, match=f"'{path}'$"), atomic.atomic_directory(path):
        pass
    with pytest.raises(OSError, match=f"'{path}'$"), atomic.atomic_file(path):
        pass
    monkeypatch.setattr(atomic, "make_work_folder", full)
    with pytest.raises(OSError, match=f"'{path}'$"), atomic.atomic_directory(path):
        pass
    assert not path.exists()


def test_a_full_disk_names_the_file_that_was_to_be_written(tmp_path):
    path = tmp_path / "result.json"
    with pytest.raises(OSError, match=r"No space left .*/result.json") as full:  # noqa: SIM117
        with atomic.atomic_file(path), open("/dev/full", "wb", buffering=0) as disk:
            disk.write(b"x")
    assert full.value.filename == str(path)
    with pytest.raises(FileNotFoundError, match="its own name"):  # noqa: SIM117
        with atomic.writing(path):
            raise FileNotFoundError(errno.ENOENT, "none", "its own name")
