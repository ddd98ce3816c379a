import ctypes
import os
from pathlib import Path
from typing import Any

import pytest

from lctw_megatron.platform.cudnn import share_torch_s_cudnn

NAMES = ("CUDNN_HOME", "CUDNN_PATH")


def named() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES if name in os.environ}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which libraries are loaded, and how, in place of loading them."""
    calls: list[tuple[str, int]] = []

    def record(path: str, mode: int = ctypes.DEFAULT_MODE, **_: Any) -> None:
        calls.append((path, mode))

    monkeypatch.setattr(ctypes, "CDLL", record)
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        del os.environ[name]
    return calls


def write_maps(folder: Path, *fronts: str) -> Path:
    """A process's memory map with libc and the fronts ``fronts``; the parts lie beside each."""
    lines = [
        "7f00-7f01 r-xp 00000000 fe:00 12                 /usr/lib/libc.so.6",
        "7f02-7f03 rw-p 00000000 00:00 0",
    ]
    for front in ("torch", "system"):
        (folder / front).mkdir()
        for name in ("libcudnn.so.9", "libcudnn_cnn.so.9", "libcudnn_graph.so.9", "libother.so.9"):
            (folder / front / name).touch()
    for front in fronts:
        path = folder / front / "libcudnn.so.9"
        lines += [f"7f04-7f05 {p} 00000000 fe:00 13              {path}" for p in ("r-xp", "rw-p")]
    (folder / "maps").write_text("\n".join(lines) + "\n")
    return folder / "maps"


def test_the_engine_gets_the_front_that_torch_has_loaded_and_its_parts(
    tmp_path: Path, loaded: list[tuple[str, int]]
) -> None:
    parts = share_torch_s_cudnn(write_maps(tmp_path, "torch"))
    assert parts == [tmp_path / "torch" / f"libcudnn_{part}.so.9" for part in ("cnn", "graph")]
    # With RTLD_GLOBAL gradients were wrong.
    assert loaded == [(str(part), ctypes.RTLD_LOCAL) for part in parts]
    assert named() == {"CUDNN_HOME": str(tmp_path / "torch")}


@pytest.mark.parametrize("name", NAMES)
def test_a_cudnn_that_the_user_names_is_left_alone(
    name: str, tmp_path: Path, loaded: list[tuple[str, int]]
) -> None:
    os.environ[name] = "/opt/cudnn"
    assert share_torch_s_cudnn(write_maps(tmp_path, "torch")) == loaded == []
    assert named() == {name: "/opt/cudnn"}


@pytest.mark.parametrize("fronts", [(), ("torch", "system")])
def test_without_one_cudnn_nothing_is_loaded(
    fronts: tuple[str, ...], tmp_path: Path, loaded: list[tuple[str, int]]
) -> None:
    assert share_torch_s_cudnn(write_maps(tmp_path, *fronts)) == loaded == []
    assert named() == {}


def test_without_linux_nothing_is_loaded(tmp_path: Path, loaded: list[tuple[str, int]]) -> None:
    assert share_torch_s_cudnn(tmp_path / "none") == loaded == []
