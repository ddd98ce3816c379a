"""What a checkpoint holds and a changed model has no place for is not left out without a word."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.errors import InputError
from lctw_megatron.model.checkpoint import find_checkpoint, load_weights, read_manifest
from lctw_megatron.training.checkpoint import resume
from lctw_megatron.training.loop import Trainer, train
from tests.distributed import run_distributed
from tests.training.layouts import make_data, make_run

NO_PLACE = "for which the model has no place"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("data"))


def small_run(
    data: str, folder: Path | str, steps: int, model: Any = (), layout: Any = ()
) -> RunConfig:
    changes = {"training": {"steps": steps, "save_interval": None}, "model": dict(model)}
    return make_run(data, str(folder), dict(layout), "chunk", "uniform", "frozen", **changes)


@pytest.fixture(scope="module")
def trained(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert train(small_run(data, folder, 1)) == 0
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (
            {"tie_word_embeddings": True},
            "output_layer.weight, optimizer.state.exp_avg.output_layer.weight, "
            "optimizer.state.exp_avg_sq.output_layer.weight, "
            "optimizer.state.param.output_layer.weight",
        ),
        (
            {"qkv_bias": False},
            "decoder.layers.self_attention.linear_qkv.bias, "
            "optimizer.state.exp_avg.0.decoder.layers.self_attention.linear_qkv.bias, ",
        ),
        (
            {"qk_norm": False},
            "decoder.layers.self_attention.k_layernorm.weight, "
            "decoder.layers.self_attention.q_layernorm.weight, optimizer.",
        ),
    ],
)
def test_what_a_changed_model_has_no_place_for_is_named(
    data: str, copy: Path, model: dict[str, Any], names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(data, copy, 2, model)
    checkpoint = find_checkpoint(copy)
    assert train(run, allow_changes=True) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if NO_PLACE in line]
    assert line.startswith(f"{checkpoint}: holds {names}") and len(line) < 1500
    assert train(small_run(data, copy, 3, model)) == 0  # the next checkpoint holds them no more
    assert NO_PLACE not in capsys.readouterr().out


def test_a_changed_vocabulary_is_refused(data: str, copy: Path) -> None:
    with pytest.raises(InputError, match=r"model.vocab_size is 300, but .* was trained with 150"):
        train(small_run(data, copy, 2, {"vocab_size": 300}), allow_changes=True)


@pytest.mark.parametrize("model", [{"num_layers": 2}, {"ffn_hidden_size": 32}])
def test_another_size_is_refused(data: str, copy: Path, model: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="it is damaged or holds another model"):
        train(small_run(data, copy, 2, model), allow_changes=True)


def test_a_checkpoint_of_more_than_its_manifest_says_is_refused(
    data: str, trained: Path, tmp_path: Path
) -> None:
    """Where no change was allowed, and where only weights are read."""
    checkpoint = find_checkpoint(trained)
    trainer = Trainer(small_run(data, tmp_path, 2, {"tie_word_embeddings": True}))
    try:
        with pytest.raises(InputError, match=f"holds output_layer.weight, {NO_PLACE}; it is dam"):
            load_weights(trainer.chunks, checkpoint)
        with pytest.raises(InputError, match=f"holds output_layer.weight, .*{NO_PLACE}; restore"):
            resume(checkpoint, read_manifest(checkpoint), trainer.chunks, trainer.optimizer)
    finally:
        trainer.close()


def go_on_under_a_layout(data: str, folder: str) -> None:
    run = small_run(data, folder, 2, {"tie_word_embeddings": True}, {"pipeline": 2})
    assert train(run, allow_changes=True) == 0


def test_what_another_rank_asks_for_is_taken(
    data: str, copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_distributed(go_on_under_a_layout, 2, data, str(copy))
    (line,) = [line for line in capfd.readouterr().out.splitlines() if NO_PLACE in line]
    assert "holds output_layer.weight, " in line and "decoder" not in line
