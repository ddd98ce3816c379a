from pathlib import Path

from lctw_megatron.platform.cudnn import load_torch_s_cudnn


def test_the_parts_beside_the_loaded_front_are_taken_and_no_others(tmp_path: Path) -> None:
    for folder in ("torch", "system"):
        (tmp_path / folder).mkdir()
        for name in ("libcudnn.so.9", "libcudnn_cnn.so.9", "libcudnn_graph.so.9", "libother.so.9"):
            (tmp_path / folder / name).write_bytes(b"no library")
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 fe:00 12                 /usr/lib/libc.so.6\n"
        "7f02-7f03 rw-p 00000000 00:00 0\n"
        f"7f04-7f05 r-xp 00000000 fe:00 13                 {tmp_path}/torch/libcudnn.so.9\n"
    )
    parts = load_torch_s_cudnn(maps)
    assert parts == [tmp_path / "torch" / f"libcudnn_{part}.so.9" for part in ("cnn", "graph")]


def test_without_cudnn_or_linux_nothing_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "maps").write_text("7f00-7f01 r-xp 00000000 fe:00 12    /usr/lib/libc.so.6\n")
    assert load_torch_s_cudnn(tmp_path / "maps") == load_torch_s_cudnn(tmp_path / "none") == []
