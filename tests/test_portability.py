"""Weights, data and conversion need no more of the system than macOS and Windows have.

In a process of its own that is made poor first; the processes it starts read the same lines.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

POOR = """
import os, signal, sys
import psutil  # before, for its part for Linux imports resource; its others do not

for name in ("fcntl", "resource"):
    sys.modules[name] = None
for module, name in (
    (os, "posix_fadvise"), (os, "preadv"), (os, "pread"), (os, "O_NOFOLLOW"), (os, "O_DIRECTORY"),
    (signal, "pthread_sigmask"),
):
    if hasattr(module, name):
        delattr(module, name)
"""

WEIGHTS = """
import torch
from lctw_megatron.weighting import compute_weights, parse_weighting

long, short = torch.rand(2, 16), torch.rand(2, 16)
weights = compute_weights(parse_weighting({"scheme": "dense"}), long, short)
assert torch.allclose(weights.mean(1), torch.ones(2)), weights
"""

DATA = """
import importlib, pkgutil
import lctw_megatron.data

for module in pkgutil.walk_packages(lctw_megatron.data.__path__, "lctw_megatron.data."):
    importlib.import_module(module.name)

if __name__ == "__main__":
    from pathlib import Path
    from lctw_megatron.commands.preprocess import main
    from lctw_megatron.data import TokenDataset
    from lctw_megatron.data.sequence_cache import cached_index

    for number in range(8):
        Path(f"{number}.txt").write_text(f"document {number} of eight. " * 400)
    options = ["--train-sentencepiece", "300", "--workers", "2"]
    assert main(["--input", ".", "--output-prefix", "data/eight", *options]) in (None, 0)
    dataset = TokenDataset("data/eight")
    assert len(dataset) == 8
    dataset.verify()
    index, _ = cached_index(dataset, 64, "chunk", "drop")
    again, _ = cached_index(dataset, 64, "chunk", "drop")
    assert len(index) == len(again) > 0
    assert not Path("data/eight.shards").exists()
"""

CONVERSION = """
import importlib, pkgutil
import lctw_megatron.conversion

for module in pkgutil.walk_packages(lctw_megatron.conversion.__path__, "lctw_megatron.conversion."):
    importlib.import_module(module.name)

if __name__ == "__main__":
    from lctw_megatron.commands.convert import main

    assert main(["import", "--hf", sys.argv[1], "--output", "checkpoint"]) == 0
    assert main(["export", "--checkpoint", "checkpoint", "--output", "hf"]) == 0
    assert main(["verify", "--checkpoint", "checkpoint", "--hf", sys.argv[1], "--no-logits"]) == 0
"""

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "tiny_llama" / "model"


@pytest.mark.parametrize("part", ["weights", "data", "conversion"])
def test_a_part_works_without_what_only_some_systems_have(part, tmp_path):
    code = {"weights": WEIGHTS, "data": DATA, "conversion": CONVERSION}[part]
    script = tmp_path / "poor.py"
    script.write_text(POOR + code)
    folder = tmp_path / "here"
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, str(script), str(GOLDEN)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
