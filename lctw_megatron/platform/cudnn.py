"""One cuDNN in a process: the one that torch brings."""

import ctypes
from contextlib import suppress
from pathlib import Path


def load_torch_s_cudnn(maps: str | Path = "/proc/self/maps") -> list[Path]:
    """Load all parts of the cuDNN whose front torch has loaded; returns them. Before the import of
    TransformerEngine.

    TransformerEngine asks the system for the parts and may get those of another version. torch,
    which loads its own only at the first use, then works with them, and where they are older than
    it trusts its attention runs on FlashAttention-2's kernels: a step of 1.24 B at 32k on an H200
    took 1.36 seconds instead of 1.07. A part that is loaded already is not looked for again.
    """
    if not Path(maps).exists():  # no Linux
        return []
    mapped = {line.split(maxsplit=5)[-1] for line in Path(maps).read_text().splitlines()}
    folders = {Path(path).parent for path in mapped if "/libcudnn.so" in path}
    parts = [part for folder in sorted(folders) for part in sorted(folder.glob("libcudnn_*.so.*"))]
    for part in parts:
        with suppress(OSError):  # then it is as it would have been
            ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)
    return parts
