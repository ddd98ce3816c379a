"""The CPU patches: each one is needed, none reaches farther than it must."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lctw_megatron.platform import cpu

if torch.cuda.is_available():
    pytest.skip("the patches are for machines without a GPU", allow_module_level=True)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    command = [sys.executable, "-m", "tests.platform.cpu_workout"]
    answer = subprocess.run(
        [*command, str(tmp_path_factory.mktemp("workout"))],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


def test_training_works_with_all_patches_and_fails_without_any_one_of_them(
    outcomes: dict[str, str | None],
) -> None:
    assert outcomes.pop("nothing") is None
    assert len(outcomes) > 10
    needless = [name for name, error in outcomes.items() if error is None]
    assert not needless, "megatron-core does without these now: remove the patches"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A new module of megatron-core that says `torch`."""
    module = ModuleType("megatron.core.just_loaded")
    module.torch = torch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_only_modules_of_megatron_core_see_the_view(module: Any) -> None:
    from megatron.core.optimizer import optimizer as theirs

    from lctw_megatron.model import gpt as ours

    cpu.patch_megatron()
    assert theirs.torch is module.torch is cpu._VIEW
    assert ours.torch is sys.modules["torch"] is torch
    assert theirs.torch.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()
    # The rest of the view is torch itself.
    assert theirs.torch.nn is torch.nn and theirs.torch.float32 is torch.float32
    assert theirs.torch.cuda.is_available is torch.cuda.is_available


def test_patching_again_changes_nothing(module: Any) -> None:
    cpu.patch_megatron()
    view, zeros = module.torch, module.torch.zeros
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    filters = list(logger.filters)
    assert filters
    cpu.patch_megatron()
    assert module.torch is view and view.zeros is zeros
    assert not hasattr(zeros.__wrapped__, "__wrapped__")
    assert logger.filters == filters


def test_a_machine_with_cuda_is_left_alone(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu = dataclasses.replace(cpu.capabilities(), gpu=True)
    monkeypatch.setattr(cpu, "capabilities", lambda: with_gpu)
    monkeypatch.delattr(torch.Tensor, "cuda")  # what earlier tests left there
    cpu.patch_megatron()
    assert module.torch is torch
    assert "cuda" not in vars(torch.Tensor)
    real = torch.Tensor.type
    with cpu.optimizer_construction():
        assert torch.Tensor.type is real


def test_tensor_types_are_disguised_only_while_the_optimizer_is_built() -> None:
    tensor = torch.zeros(1)
    with cpu.optimizer_construction():
        assert tensor.type() == "torch.cuda.FloatTensor"
        assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert tensor.type(torch.float64).dtype == torch.float64
    assert tensor.type() == "torch.FloatTensor"
    with pytest.raises(KeyError), cpu.optimizer_construction():
        raise KeyError
    assert tensor.type() == "torch.FloatTensor"
