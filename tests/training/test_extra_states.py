"""Checkpoints cross between layers that have extra states, as TransformerEngine's norms do, and
layers that have none, as ours: resume, start, weights alone; with norms on queries and keys.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from lctw_megatron.errors import InputError
from lctw_megatron.model import spec
from lctw_megatron.model.checkpoint import check_files, load_weights
from lctw_megatron.model.norms import RMSNorm
from lctw_megatron.training.loop import Trainer
from tests.training.layouts import make_data, make_run


class EngineNorm(RMSNorm):
    """Has the extra state of a TransformerEngine module that uses no FP8."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None or state.numel() == 0


NORMS = {"ours": RMSNorm, "engine": EngineNorm}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("extra_states"))


def steps(run: Any, numbers: range, save: bool = False) -> tuple[int, list[dict[str, float]], Path]:
    trainer = Trainer(run)
    try:
        metrics = [trainer.stepper.step(n, list(trainer.loader.step(n))) for n in numbers]
        if save:
            trainer.save(numbers.stop)
        return trainer.first_step, metrics, Path(run.run_dir) / "checkpoints"
    finally:
        trainer.close()


@pytest.mark.parametrize(("wrote", "reads"), [("ours", "engine"), ("engine", "ours")])
def test_what_layers_of_one_kind_saved_the_other_kind_goes_on_with(
    wrote: str, reads: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spec, "RMSNorm", NORMS[wrote])
    run = make_run(data, str(tmp_path / "run"), {}, "pack", "dense", "frozen")
    _, _, folder = steps(run, range(2), save=True)
    checkpoint = folder / "step_00000002"
    states = {key for key in check_files(checkpoint).state_dict_metadata if "norm" in key}
    assert any("_extra_state" in key for key in states) == (wrote == "engine")
    start = make_run(data, str(tmp_path / wrote), {}, "pack", "dense", "frozen",
                     start=str(checkpoint))  # fmt: skip
    expected = steps(start, range(1))[1], steps(run, range(2, 3))[1]

    monkeypatch.setattr(spec, "RMSNorm", NORMS[reads])
    start = start.model_copy(update={"run_dir": str(tmp_path / reads)})
    assert steps(start, range(1))[1] == expected[0]
    first, metrics, _ = steps(run, range(2, 3))
    assert first == 2 and metrics == expected[1]


def test_scales_of_fp8_are_not_dropped_without_a_word(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spec, "RMSNorm", EngineNorm)
    scales = torch.ones(3, dtype=torch.uint8)
    monkeypatch.setattr(EngineNorm, "get_extra_state", lambda self: scales)
    run = make_run(data, str(tmp_path / "run"), {}, "chunk", "uniform", "frozen")
    _, _, folder = steps(run, range(1), save=True)
    for norm in NORMS.values():
        monkeypatch.setattr(spec, "RMSNorm", norm)
        with pytest.raises(InputError, match="step_00000001: .*_extra_state.* not empty.* FP8"):
            check_files(folder / "step_00000001")


def test_a_weight_that_lacks_is_an_error_that_names_it(data: str, tmp_path: Path) -> None:
    run = make_run(data, str(tmp_path / "run"), {}, "chunk", "uniform", "frozen",
                   model={"qk_norm": False})  # fmt: skip
    _, _, folder = steps(run, range(1), save=True)
    trainer = Trainer(make_run(data, str(tmp_path / "other"), {}, "chunk", "uniform", "frozen"))
    try:
        with pytest.raises(
            InputError, match=r"step_00000001: cannot be loaded .*layernorm"
        ) as error:
            load_weights(trainer.chunks, folder / "step_00000001")
        assert "\n" not in str(error.value)
    finally:
        trainer.close()
