"""Where torch keeps the kernels it compiles.

Its own choice is a folder of the node's /tmp, which is gone when a requeued job starts elsewhere.
A site that has a faster place names it in `cluster.environment`, for example
`TORCHINDUCTOR_CACHE_DIR: $SCRATCH/inductor`.
"""

import os
from pathlib import Path

_FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
_ours: dict[str, str] = {}
"""What was put there for an earlier run of this process."""


def keep_compiled(run_dir: Path) -> None:
    """Let torch keep them in RUN_DIR/compile_cache, for the next start of the run, unless the
    environment names a place. On every rank, before anything is compiled. Ranks may share the
    folder: files are written beside it and renamed."""
    for name, folder in _FOLDERS.items():
        if os.environ.get(name) in (None, _ours.get(name)):
            _ours[name] = os.environ[name] = str(run_dir.absolute() / "compile_cache" / folder)
