"""One cuDNN in a process: the one that torch brings."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path


def share_torch_s_cudnn(maps: str | Path = "/proc/self/maps") -> list[Path]:
    """Make TransformerEngine take the cuDNN that torch has loaded; returns the parts loaded for it.
    Before the import of TransformerEngine.

    TransformerEngine prefers the system's cuDNN: its front, and the parts that either front then
    asks for. Where that is older than torch's (9.14 beside 9.19, on an H200), torch trusts it no
    longer with attention and runs FlashAttention-2's kernels: a step of 1.24 B at 32k took 1.36
    seconds instead of 1.07. One front with the other's parts does worse: TransformerEngine falls to
    the attention that stores all probabilities.

    So it is told where torch's front lies, and the parts beside that are loaded, as a part that is
    there is not looked for again. Each keeps its symbols to itself: with RTLD_GLOBAL fronts and
    parts of two versions found each other's, and gradients were NaN or, silently, wrong by 2 %.
    Nothing is done where the user has named a cuDNN (CUDNN_HOME or CUDNN_PATH).
    """
    named = "CUDNN_HOME" in os.environ or "CUDNN_PATH" in os.environ
    if named or not Path(maps).exists():  # no Linux
        return []
    mapped = {line.split(maxsplit=5)[-1] for line in Path(maps).read_text().splitlines()}
    folders = sorted({Path(path).parent for path in mapped if "/libcudnn.so" in path})
    if len(folders) != 1:  # no cuDNN, or two already
        return []
    os.environ["CUDNN_HOME"] = str(folders[0])
    parts = sorted(folders[0].glob("libcudnn_*.so.*"))
    for part in parts:
        with suppress(OSError):  # then it is as it would have been
            ctypes.CDLL(str(part))
    return parts
