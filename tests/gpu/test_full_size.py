"""Llama-3-8B's shape on all GPUs of a host: a rank is killed, and the run goes on bit for bit. It
needs 112 GB of disk and, with two saves' worth of time, about six minutes."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from lctw_megatron.platform.capabilities import capabilities
from tests.data.small_data import write_tokens
from tests.gpu.runs import logged
from tests.gpu.tool import Tool

SAVED, SEEN = 3, 5
"""The step after which everything is saved, and how many are to be seen before and after."""


def make_recipe(folder: Path, model: str, vocabulary: int, length: int, **layout: Any) -> Path:
    """Random weights on random tokens, a document a sequence; saved once, at step SAVED."""
    random = np.random.default_rng(1)
    documents = [random.integers(vocabulary, size=length + 1) for _ in range(8)]
    write_tokens(str(folder / "tokens"), documents, vocab_size=vocabulary)
    values = {
        "name": "full_size",
        "output_dir": str(folder),
        "data": {"train": str(folder / "tokens"), "sequence_length": length},
        "model": {"base": model},
        "layout": layout,
        "training": {
            "steps": 1000, "global_batch_size": 2, "lr": 1e-5, "warmup_steps": 0,
            "precision": "bf16", "save_interval": SAVED, "tensorboard": False,
            "deterministic": True,
        },
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def metrics_of(folder: Path, steps: int, tool: Tool, timeout: float) -> list[dict[str, Any]]:
    """The first ``steps`` lines, once they are there."""
    deadline = time.monotonic() + timeout
    run = folder / "main"
    while not (run / "metrics.jsonl").exists() or len(logged(run)) < steps:
        assert tool.process.poll() is None, tool.end().output[-4000:]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.2)
    return logged(run)[:steps]


def killed_and_resumed(recipe: Path, ranks: int, timeout: float) -> None:
    folder = recipe.parent
    first = Tool("train", recipe, ranks=ranks)
    before = metrics_of(folder, SEEN, first, timeout)
    first.ranks()[-1].kill()
    assert first.end(120).status != 0
    checkpoints = [path.name for path in (folder / "main" / "checkpoints").glob("step_*")]
    assert len(checkpoints) == 1 and int(checkpoints[0].removeprefix("step_")) == SAVED
    second = Tool("train", recipe, ranks=ranks)
    try:
        deadline = time.monotonic() + timeout
        while len(logged(folder / "main")) >= SEEN:  # until it has gone back to what was saved
            assert second.process.poll() is None, second.end().output[-4000:]
            assert time.monotonic() < deadline, "nothing was resumed"
            time.sleep(0.05)
        after = metrics_of(folder, SEEN, second, timeout)
    finally:  # before the next save
        for process in psutil.Process(second.process.pid).children(recursive=True):
            process.kill()
        second.end(120)
    assert [line["step"] for line in after] == list(range(SEEN))
    assert after == before


@pytest.mark.timeout(1200)
@pytest.mark.gpus(4)
def test_a_killed_8b_goes_on_bit_for_bit(tmp_path: Path) -> None:
    gpus = 8 if capabilities().gpus >= 8 else 4
    layout = {"tensor": gpus // 2, "sequence": True, "context": 2, "recompute": "mlp"}
    killed_and_resumed(make_recipe(tmp_path, "llama3_8b", 128256, 32768, **layout), gpus, 500.0)
