"""Compiled kernels lie in the run folder, where the next start finds them, or where a site says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lctw_megatron.platform.compile_cache import keep_compiled

NAMES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def test_each_run_has_its_own_unless_the_environment_names_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*NAMES, *(f"LCTW_{name}" for name in NAMES)):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for run in ("one", "two"):
        keep_compiled(tmp_path / run)
        for name, folder in zip(NAMES, ("inductor", "triton"), strict=True):
            assert os.environ[name] == str(tmp_path / run / "compile_cache" / folder)
    # A process that this one starts knows whose they are.
    code = (
        "import os, sys; from pathlib import Path; "
        "from lctw_megatron.platform.compile_cache import keep_compiled; "
        "keep_compiled(Path(sys.argv[1])); print(os.environ['TRITON_CACHE_DIR'])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "child")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.strip() == str(tmp_path / "child/compile_cache/triton")
    monkeypatch.setenv(NAMES[0], "/fast/disk")
    keep_compiled(tmp_path / "three")
    assert os.environ[NAMES[0]] == "/fast/disk"
    assert os.environ[NAMES[1]] == str(tmp_path / "three/compile_cache/triton")


COMPILE = """
import sys, time
from pathlib import Path
from lctw_megatron.platform.compile_cache import keep_compiled
keep_compiled(Path(sys.argv[1]))
import torch
from torch._dynamo.utils import counters
from lctw_megatron.model.cross_entropy import _fused_gradient
from lctw_megatron.platform.gpu import compiled
logits, rows = torch.randn(64, 1000), torch.arange(64)
begin = time.perf_counter()
found = compiled(_fused_gradient)(
    logits, logits.logsumexp(1), rows, rows > 3, torch.ones(64, 1), torch.float32
)
print(time.perf_counter() - begin, counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.long
def test_a_second_start_compiles_nothing_again(tmp_path: Path) -> None:
    """On a CPU the trainer compiles nothing, but inductor works there where a C++ compiler is."""

    def start() -> tuple[float, int]:
        environment = {name: value for name, value in os.environ.items() if name not in NAMES}
        answer = subprocess.run(
            [sys.executable, "-c", COMPILE, str(tmp_path)],
            capture_output=True, text=True, timeout=500, env=environment,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr
        seconds, hits = answer.stdout.split()[-2:]
        return float(seconds), int(hits)

    cold, none = start()
    made = {path for path in tmp_path.rglob("*.so")}
    warm, hits = start()
    assert made and {path for path in tmp_path.rglob("*.so")} == made
    assert (none, hits) == (0, 1)
    print(f"cold {cold:.2f} s, warm {warm:.2f} s")
