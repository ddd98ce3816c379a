"""A micro batch size that the recipe leaves out: as large as divides and fits, equal on all ranks,
and without a trace in the losses."""

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lctw_megatron.config.load import load_run
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.errors import InputError
from lctw_megatron.model.checkpoint import CheckpointManifest
from lctw_megatron.platform import rank_memory
from lctw_megatron.training.estimate import GIB, estimate
from lctw_megatron.training.micro_batch import (
    choose_micro_batch,
    describe_micro_batch,
    with_micro_batch,
)
from tests.distributed import run_distributed
from tests.training.layouts import make_data, make_run
from tests.training.runs import logged
from tests.training.test_estimate import run_config

PLENTY = 10**15


def left_out(layout: dict[str, Any], batch: int = 64, length: int = 8192) -> RunConfig:
    run = run_config("llama3_8b", layout, length, batch=batch)
    training = run.training.model_copy(update={"micro_batch_size": None})
    return run.model_copy(update={"training": training})


def test_one_recipe_runs_on_1_4_and_64_ranks():
    run = left_out({})
    assert [choose_micro_batch(run, ranks, PLENTY) for ranks in (1, 4, 64)] == [64, 16, 1]
    with pytest.raises(InputError, match="global_batch_size .64. .* the 128 data-parallel"):
        choose_micro_batch(run, 128, PLENTY)


def test_the_largest_divisor_that_fits_the_estimate_is_taken():
    run = left_out({"tensor": 8, "sequence": True}, batch=48)
    sizes = {size: estimate(with_micro_batch(run, size), 8).largest.total for size in (1, 2, 3, 4)}
    for size, total in sizes.items():
        assert choose_micro_batch(run, 8, total) == size
        assert choose_micro_batch(run, 8, total - 1) == max(1, size - 1)
    assert "which are too few for any" in describe_micro_batch(with_micro_batch(run, 1), 8, GIB)
    assert choose_micro_batch(left_out({}, batch=7), 1, sizes[4]) == 1  # 7 has no other divisor


def test_one_that_is_named_stays():
    assert choose_micro_batch(with_micro_batch(left_out({}), 2), 1, PLENTY) == 2


def test_a_pipeline_is_left_enough_micro_batches():
    assert choose_micro_batch(left_out({"pipeline": 4}), 4, PLENTY) == 4  # 16 for 4 stages
    assert choose_micro_batch(left_out({"pipeline": 4}, batch=4), 4, PLENTY) == 1
    interleaved = {"pipeline": 2, "virtual_pipeline": 2}
    assert choose_micro_batch(left_out(interleaved, batch=18), 2, PLENTY) == 1  # 9 is odd
    assert choose_micro_batch(left_out(interleaved, batch=20), 2, PLENTY) == 2


def test_a_resume_keeps_the_size_while_ranks_and_layout_are_the_same():
    run = left_out({}, batch=16)
    small = choose_micro_batch(run, 2, estimate(with_micro_batch(run, 2), 2).largest.total)
    assert small == 2
    saved = CheckpointManifest(
        step=1, model=run.model, dtype="bf16", run=with_micro_batch(run, small), ranks=2
    )
    assert choose_micro_batch(run, 2, PLENTY, saved) == 2  # on a machine with more memory
    assert choose_micro_batch(run, 4, PLENTY, saved) == 4
    assert choose_micro_batch(left_out({"tensor": 2}, batch=16), 2, PLENTY, saved) == 16
    unlike = saved.model_copy(update={"run": with_micro_batch(run, 3)})
    assert choose_micro_batch(run, 2, PLENTY, unlike) == 8


def usable() -> int:
    import torch.distributed as dist

    with mock.patch.object(rank_memory, "host_memory", lambda: (8 - dist.get_rank()) * GIB):
        return rank_memory.least_usable_memory(torch.device("cpu"))


def test_all_ranks_reckon_with_the_same_memory_and_share_a_host():
    first, second = run_distributed(usable, 2)
    assert first == second == int(7 * GIB * 0.5) // 2


def test_a_control_group_limits_the_memory_of_the_host(tmp_path: Path):
    group = tmp_path / "system.slice/job"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (tmp_path / "system.slice/memory.max").write_text("1048576\n")
    read_text = Path.read_text

    def read(path: Path) -> str:
        return "0::/system.slice/job\n" if str(path) == "/proc/self/cgroup" else read_text(path)

    with (
        mock.patch.object(rank_memory, "CGROUPS", tmp_path),
        mock.patch.object(Path, "read_text", read),
    ):
        assert rank_memory.host_memory() == 1 << 20


def test_a_training_chooses_keeps_and_saves_it_and_its_losses_are_those_of_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lctw_megatron.training import loop

    prefix = make_data(tmp_path)

    def train(folder: str, steps: int, size: int | None) -> list[dict[str, float]]:
        training = {"steps": steps, "micro_batch_size": size, "eval_interval": 2}
        run = make_run(
            prefix, str(tmp_path / folder), {}, "pack", "dense", "frozen", training=training
        )
        assert loop.train(run) == 0
        return logged(tmp_path / folder)

    of_four = estimate(
        make_run(prefix, "unused", {}, "pack", "dense", "frozen", training={"micro_batch_size": 4}),
        1,
    ).largest.total
    monkeypatch.setattr(loop, "least_usable_memory", lambda device: of_four)
    train("chosen", 2, None)
    assert "2 micro batches of 4 x 64 tokens" in capsys.readouterr().out
    monkeypatch.setattr(loop, "least_usable_memory", lambda device: PLENTY)
    found = train("chosen", 3, None)  # resumed
    assert "2 micro batches of 4 x 64 tokens" in capsys.readouterr().out
    assert load_run(tmp_path / "chosen/run.yaml").training.micro_batch_size == 4
    train("whole", 1, None)
    said = capsys.readouterr().out
    assert "1 micro batches of 8 x 64 tokens" in said
    parts = "import", "process groups", "data index", "weights", "optimizer", "logs", "first step"
    assert re.search(rf"\nfirst step after \S+ s: {' [0-9.]+, '.join(parts)} [0-9.]+\n", said)
    first = json.loads((tmp_path / "whole/metrics.jsonl").read_text().splitlines()[0])
    for part in parts:
        assert first[f"speed/start_{part.replace(' ', '_')}_seconds"] >= 0
    for ours, theirs in zip(found, train("ones", 3, 1), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
