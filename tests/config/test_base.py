"""A recipe that is based on another says only what is different."""

from pathlib import Path

import pytest

from lctw_megatron.config.load import load_recipe, resolve_run
from lctw_megatron.config.shipped import RECIPES, find_recipe
from lctw_megatron.errors import InputError

BELOW = """\
name: below
output_dir: out/below
model: tiny_llama
layout: cpu2_cp2
data: {train: corpus/text, sequence_length: 512}
training: {steps: 100, lr: 1e-3}
scoring: {scorer: ./models/base, window: 256, stride: 192}
evaluation: {data: corpus/held_out}
seeds: [1, 2]
runs:
  plain: {}
  dense: {weighting: dense}
"""
ABOVE = "base: below.yaml\nname: above\noutput_dir: out/above\n"


@pytest.fixture
def above(tmp_path, monkeypatch):
    """Loads a recipe of this text and overrides, with another text as its base."""
    monkeypatch.chdir(tmp_path)

    def write_and_load(text: str = "", *overrides: str, below: str = BELOW):
        Path("below.yaml").write_text(below)
        Path("above.yaml").write_text(ABOVE + text)
        return load_recipe("above.yaml", overrides)

    return write_and_load


def test_what_is_not_named_is_the_bases_but_for_name_and_output_folder(above):
    recipe, below = above(), load_recipe("below.yaml")
    assert recipe == below.model_copy(update={"name": "above", "output_dir": "out/above"})
    Path("above.yaml").write_text("base: below.yaml\nname: above\n")
    with pytest.raises(InputError, match="above.yaml: output_dir is missing"):
        load_recipe("above.yaml")


def test_a_mapping_changes_a_section_and_a_fragment_or_null_takes_its_place(above):
    recipe = above("data: {sequence_length: 1024}\nscoring: {stride: 64}\nlayout: single\n")
    run = resolve_run(recipe, "dense-seed1")
    assert (run.data.train[0].prefix, run.data.sequence_length) == ("corpus/text", 1024)
    assert (recipe.scoring.window, recipe.scoring.stride) == (256, 64)
    assert run.layout.context == 1
    assert above("scoring: null\n").scoring is None
    assert resolve_run(above("layout: null\n"), "plain-seed1").layout.context == 1
    with pytest.raises(InputError, match="run plain-seed1: model.num_layers is missing"):
        above("model: null\n")


def test_own_runs_take_the_place_of_the_bases(above):
    recipe = above("runs: {sparse: {weighting: sparse}}\n", "training.steps=7")
    assert list(recipe.runs) == ["sparse-seed1", "sparse-seed2"]
    assert resolve_run(recipe, "sparse-seed2").training.steps == 7


def test_one_seed_takes_the_place_of_several_and_several_of_one(above):
    assert list(above("seed: 5\n").runs) == ["plain", "dense"]
    one = BELOW.replace("seeds: [1, 2]", "seed: 9")
    assert list(above("seeds: [3]\n", below=one).runs) == ["plain-seed3", "dense-seed3"]


@pytest.mark.parametrize(
    ("text", "below", "message"),
    [
        ("trainin: {steps: 3}\n", BELOW, "above.yaml: trainin: no such field; did you mean tr"),
        ("", BELOW.replace("lr:", "lrr:"), "below.yaml: training.lrr: no such field; did you"),
        ("", BELOW.replace("dense}", "dens}"), "below.yaml: weighting: no fragment dens in"),
        ("", f"base: above.yaml\n{BELOW}", "below.yaml: base is above.yaml, which is based on th"),
        ("", f"base: nowhere.yaml\n{BELOW}", "below.yaml: base: nowhere.yaml: no such file"),
        ("", f"base: [a]\n{BELOW}", "below.yaml: base: "),
    ],
)
def test_a_mistake_is_refused_with_the_file_that_it_stands_in(above, text, below, message):
    with pytest.raises(InputError) as error:
        above(text, below=below)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_shipped_recipe_beside_another_is_found_by_folder_and_name():
    folder = RECIPES / "study_135m_32k"
    assert find_recipe("study_135m_32k") == folder / "recipe.yaml"
    assert find_recipe("study_135m_32k/scorer") == folder / "scorer.yaml"
    with pytest.raises(InputError, match="did you mean study_135m_32k/scorer?"):
        find_recipe("study_135m_32k/score")
