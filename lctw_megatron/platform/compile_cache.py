"""Where torch keeps the kernels it compiles.

Its own choice is a folder of the node's /tmp, which is gone when a requeued job starts elsewhere.
A site that has a faster place names both in `cluster.environment`, for example
`TORCHINDUCTOR_CACHE_DIR: $SCRATCH/inductor` and `TRITON_CACHE_DIR: $SCRATCH/triton`.
"""

from pathlib import Path

from lctw_megatron.platform.run_environment import point

_FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def keep_compiled(run_dir: Path) -> None:
    """Let torch keep them in RUN_DIR/compile_cache, for the next start of the run, unless the
    environment names a place. On every rank, before anything is compiled. Ranks may share the
    folder: files are written beside it and renamed."""
    for name, folder in _FOLDERS.items():
        point(name, str(run_dir.absolute() / "compile_cache" / folder))
