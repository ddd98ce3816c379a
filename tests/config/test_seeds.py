"""A run with seeds is made once with each."""

import pytest

from lctw_megatron.config.load import load_recipe, resolve_run
from lctw_megatron.errors import InputError

RECIPE = """\
name: demo
output_dir: out
model: tiny_llama
data: {train: corpus/text}
training: {steps: 100}
seeds: [1, 2]
runs:
  base: {seed: 9}
  dense: {start: base, weighting: dense, seeds: [5, 7]}
  uniform: {start: base}
"""


@pytest.fixture
def recipe(tmp_path):
    def write_and_load(*overrides: str, text: str = RECIPE):
        (tmp_path / "recipe.yaml").write_text(text)
        return load_recipe(tmp_path / "recipe.yaml", overrides)

    return write_and_load


def test_a_run_with_seeds_is_made_once_with_each(recipe):
    loaded = recipe("runs.dense.training.steps=7")
    made = [resolve_run(loaded, name) for name in loaded.runs]
    assert [(run.name, run.seed, run.training.steps) for run in made] == [
        ("base", 9, 100),
        ("dense-seed5", 5, 7),
        ("dense-seed7", 7, 7),
        ("uniform-seed1", 1, 100),
        ("uniform-seed2", 2, 100),
    ]
    assert made[1].run_dir == "out/dense-seed5"
    assert made[1].start == "out/base/checkpoints"


@pytest.mark.parametrize(
    ("override", "runs"),
    [
        ("runs.dense.seed=3", ["base", "dense", "uniform-seed1", "uniform-seed2"]),
        ("runs.dense.seeds=[3]", ["base", "dense-seed3", "uniform-seed1", "uniform-seed2"]),
        ("seed=3", ["base", "dense", "uniform"]),
    ],
)
def test_what_is_set_later_takes_the_place(recipe, override, runs):
    assert list(recipe(override).runs) == runs


@pytest.mark.parametrize(
    ("written", "instead", "message"),
    [
        ("{seed: 9}", "{}", "start is base, neither a run"),  # there are two
        ("[5, 7]", "[5, 5]", "runs.dense: seeds 5, 5 name one twice"),
        ("[5, 7]", "[]", "runs.dense.seeds is []"),
        ("{seed: 9}", "{seed: 9, seeds: [1]}", "runs.base: seed and seeds are both given"),
        ("seeds: [1, 2]", "seed: 9\nseeds: [1, 2]", "seed and seeds are both given"),
        ("[5, 7]", "[-1]", "runs.dense.seeds"),
        ("  uniform:", "  dense-seed7:", "two runs are named dense-seed7"),
    ],
)
def test_seeds_that_make_no_runs_of_their_own_are_refused(recipe, written, instead, message):
    text = RECIPE.replace(written, instead)
    if message.startswith("two"):
        text = text.replace("{start: base}", "{start: base, seed: 1}")
    with pytest.raises(InputError) as error:
        recipe(text=text)
    assert message in str(error.value) and "\n" not in str(error.value)
