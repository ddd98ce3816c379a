"""A run that has a checkpoint of its own goes on without its start, and only such a run."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lctw_megatron.config.load import load_recipe, resolve_run
from lctw_megatron.errors import InputError
from lctw_megatron.model.checkpoint import checkpoint_model, find_checkpoint, read_manifest
from lctw_megatron.training.loop import train
from tests.training.layouts import make_data, make_run
from tests.training.runs import logged, sigterm_after

GENERATION = '{"eos_token_id": [2, 3]}'
NEXT = """\
name: test
output_dir: {folder}
start: {folder}/base
data: {{train: {data}, sequence_length: 64}}
model: {{rope_theta: 500000.0}}
training: {{steps: 3, global_batch_size: 8, micro_batch_size: 2, lr: 1e-3, tensorboard: false}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, on longer sequences than the runs that begin with it."""
    folder = tmp_path_factory.mktemp("base")
    longer = {"train": [{"prefix": data}], "sequence_length": 128, "packing": "pack"}
    training = {"steps": 1, "save_interval": None}
    run = make_run(
        data, str(folder), {}, "pack", "uniform", "frozen", training=training, data=longer
    )
    assert train(run) == 0
    tokenizer = find_checkpoint(folder) / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "generation_config.json").write_text(GENERATION)
    return folder


@pytest.fixture
def recipe(data: str, base: Path, tmp_path: Path) -> Path:
    """A run that takes its model from what it starts from."""
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "recipe.yaml"
    path.write_text(NEXT.format(folder=tmp_path, data=data))
    return path


def start(recipe: Path, *overrides: str) -> int:
    return train(resolve_run(load_recipe(recipe, overrides), None, checkpoint_model))


def refusal(recipe: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        start(recipe, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_goes_on_bit_for_bit_without_its_start(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    assert start(recipe, f"output_dir={whole}") == 0
    with sigterm_after(2):
        assert start(recipe) == 75
    began = read_manifest(find_checkpoint(tmp_path / "main"))
    shutil.rmtree(tmp_path / "base")
    capsys.readouterr()
    assert start(recipe) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not needed" in line]
    assert str(tmp_path / "base") in line and "step_00000002" in line
    assert logged(tmp_path / "main") == logged(whole / "main")
    ours, theirs = (find_checkpoint(folder / "main") for folder in (tmp_path, whole))
    ended, expected = read_manifest(ours), read_manifest(theirs)
    assert ended.start == began.start == expected.start is not None
    assert ended.model == expected.model and ended.model.max_position_embeddings == 128
    assert (ours / "tokenizer" / "generation_config.json").read_text() == GENERATION


def test_a_run_that_begins_needs_its_start(recipe: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "base")
    assert f"{tmp_path / 'base'}: no complete checkpoint found" in refusal(recipe)
    assert not (tmp_path / "main" / "checkpoints").exists()


def test_a_start_that_never_was_the_run_s_is_no_start_that_is_gone(
    recipe: Path, tmp_path: Path
) -> None:
    with sigterm_after(1):
        assert start(recipe) == 75
    message = refusal(recipe, f"start={tmp_path}/other")
    assert f"{tmp_path}/other: no complete checkpoint" in message
    assert f"began with {tmp_path}/base" in message


def test_a_start_that_is_another_now_is_refused(recipe: Path, base: Path, tmp_path: Path) -> None:
    with sigterm_after(1):
        assert start(recipe) == 75
    path = find_checkpoint(tmp_path / "base") / "checkpoint.json"
    path.write_text(path.read_text().replace('"step": 1,', '"step": 9,'))
    assert "start is step 9, " in refusal(recipe)


def test_a_run_goes_on_without_any_of_the_runs_before_it(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run b starts from run a, and a from a folder named without a slash."""
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = yaml.safe_load(recipe.read_text())
    values["runs"] = {"a": {"start": "base"}, "b": {"start": "a"}}
    del values["start"]
    recipe.write_text(yaml.safe_dump(values))

    def go_on(name: str) -> int:
        return train(resolve_run(load_recipe(recipe), name, checkpoint_model))

    assert go_on("a") == 0
    with sigterm_after(1):
        assert go_on("b") == 75
    shutil.rmtree("base")
    shutil.rmtree("a/checkpoints/" + find_checkpoint("a").name)
    assert go_on("b") == 0
    with pytest.raises(InputError, match="base: no complete checkpoint found"):
        go_on("a")
