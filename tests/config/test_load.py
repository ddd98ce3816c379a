"""Recipes are composed, overridden and refused as the docstring of load.py says."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lctw_megatron.config import load
from lctw_megatron.config.load import (
    checkpoints_of,
    dump_yaml,
    load_recipe,
    load_run,
    parse_override,
    resolve_run,
)
from lctw_megatron.config.schema import ModelConfig, WeightingConfig
from lctw_megatron.config.yaml_text import parse_yaml, to_yaml
from lctw_megatron.errors import InputError

MODEL = """\
num_layers: 4
hidden_size: 64
ffn_hidden_size: 128
num_attention_heads: 4
"""

RECIPE = """\
name: demo
output_dir: out
model: small
data:
  train: corpus/text
  sequence_length: 256
training:
  steps: 100
  lr: 1e-3
runs:
  base: {}
  dense:
    start: base
    model: {rope_theta: 15.3e6}
    data: {sequence_length: 1024}
    weighting: dense
    training: {steps: 20}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a recipe into a project of its own fragments and loads it."""
    fragments = {
        "models/small": MODEL,
        "models/big": MODEL.replace("num_layers: 4", "num_layers: 8"),
        "layouts/tp2": "tensor: 2\nsequence: true\n",
        "weightings/dense": "scheme: dense\ninterpolation: 0.75\n",
        "weightings/sparse": "scheme: sparse\nkeep_fraction: 0.1\n",
        "clusters/site": "partition: long\nenvironment: {OMP_NUM_THREADS: 1}\n",
    }
    for name, text in fragments.items():
        path = tmp_path / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(load, "CONFIGS", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)

    def write_and_load(text: str = RECIPE, *overrides: str):
        (tmp_path / "recipe.yaml").write_text(text)
        return load_recipe("recipe.yaml", overrides)

    return write_and_load


def refusal(recipe, text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        recipe(text, *overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_runs_change_only_what_they_name(recipe):
    loaded = recipe()
    assert list(loaded.runs) == ["base", "dense"]
    base, dense = resolve_run(loaded, "base"), resolve_run(loaded, "dense")
    assert (base.data.sequence_length, dense.data.sequence_length) == (256, 1024)
    assert (base.training.steps, dense.training.steps) == (100, 20)
    assert base.training.lr == dense.training.lr == 1e-3
    assert (base.model.rope_theta, dense.model.rope_theta) == (10000.0, 15.3e6)
    assert base.model.num_layers == dense.model.num_layers == 4
    assert (base.weighting.scheme, dense.weighting.scheme) == ("uniform", "dense")
    assert dense.weighting.interpolation == 0.75
    assert (base.run_dir, dense.run_dir) == ("out/base", "out/dense")
    assert (base.start, dense.start) == (None, "out/base/checkpoints")
    assert checkpoints_of(loaded, "some/folder") == "some/folder"


def test_without_runs_there_is_one_called_main(recipe):
    loaded = recipe(RECIPE.split("runs:")[0])
    assert list(loaded.runs) == ["main"]
    assert resolve_run(loaded) == resolve_run(loaded, "main")


SCORED = (
    RECIPE.replace("weighting: dense", "weighting: {base: dense, window: 64}")
    + "scoring: {scorer: base, window: 64, stride: 48}\n"
)


def test_scores_that_no_run_could_read_are_refused_before_they_are_made(recipe):
    recipe(SCORED)
    for change, message in {
        "scoring.window=128": "weighting.window is 64, but scoring.window is 128",
        "scoring.sequence_length=512": "scoring.sequence_length is 512, but data.sequence_length",
        "runs.dense.data.sequence_length=64": "window 64 is not shorter than",
    }.items():
        assert message in refusal(recipe, SCORED, change)
    packed = ("scoring.sequence_length=1024", "data.packing=pack")
    assert "fits data.packing chunk, not pack" in refusal(recipe, SCORED, *packed)
    recipe(SCORED, "scoring.sequence_length=1024")
    recipe(SCORED, "scoring.window=128", "data.scores=made_elsewhere")


def test_a_run_that_starts_from_another_is_checked_too(recipe):
    text = RECIPE.replace("model: small\n", "").replace("base: {}", "base: {model: small}")
    recipe(text)
    assert "min_lr 1.0 is above" in refusal(recipe, text, "runs.dense.training.min_lr=1.0")


def test_a_run_must_be_chosen_when_there_are_several(recipe):
    loaded = recipe()
    with pytest.raises(InputError, match="--run: base, dense"):
        resolve_run(loaded)
    with pytest.raises(InputError, match="no run dens in this recipe; did you mean dense"):
        resolve_run(loaded, "dens")


def test_a_fragment_replaces_the_shared_section_and_a_mapping_changes_it(recipe):
    text = RECIPE.split("runs:")[0] + (
        "weighting: {base: sparse, window: 64, stride: 32}\n"
        "runs:\n"
        "  changed: {weighting: {keep_fraction: 0.2}}\n"
        "  replaced: {weighting: dense}\n"
        "  without: {weighting: null}\n"
    )
    loaded = recipe(text)
    changed, replaced = (resolve_run(loaded, name).weighting for name in ("changed", "replaced"))
    assert (changed.scheme, changed.keep_fraction, changed.window) == ("sparse", 0.2, 64)
    assert (replaced.scheme, replaced.keep_fraction, replaced.window) == ("dense", None, None)
    assert resolve_run(loaded, "without").weighting == WeightingConfig()
    for override in ("weighting=null", "runs.changed.weighting="):
        assert resolve_run(recipe(text, override), "changed").weighting == WeightingConfig()


def test_base_takes_a_fragment_with_changes_and_yaml_names_are_files(recipe, tmp_path):
    (tmp_path / "mine.yaml").write_text(MODEL + "qk_norm: true\n")
    loaded = recipe(RECIPE.replace("model: small", "model: {base: big, rope_theta: 5e5}"))
    assert resolve_run(loaded, "base").model.num_layers == 8
    assert resolve_run(loaded, "base").model.rope_theta == 5e5
    loaded = recipe(RECIPE.replace("model: small", "model: mine.yaml"))
    assert resolve_run(loaded, "base").model.qk_norm


def test_data_may_be_a_prefix_or_a_list_of_prefixes(recipe):
    assert [c.prefix for c in resolve_run(recipe(), "base").data.train] == ["corpus/text"]
    loaded = recipe(RECIPE.replace("corpus/text", "[a, {prefix: b, weight: 2}]"))
    assert [(c.prefix, c.weight) for c in resolve_run(loaded, "base").data.train] == [
        ("a", 1.0),
        ("b", 2.0),
    ]


def test_set_reaches_every_run_or_the_one_it_names(recipe):
    loaded = recipe(RECIPE, "training.steps=7", "runs.dense.training.lr=2e-5", "layout=tp2")
    base, dense = resolve_run(loaded, "base"), resolve_run(loaded, "dense")
    assert (base.training.steps, dense.training.steps) == (7, 7)
    assert (base.training.lr, dense.training.lr) == (1e-3, 2e-5)
    assert base.layout.tensor == dense.layout.tensor == 2


def test_set_of_a_fragment_replaces_the_section(recipe):
    loaded = recipe(RECIPE, "runs.dense.weighting=sparse", "weighting.unscored=one")
    dense = resolve_run(loaded, "dense").weighting
    assert (dense.scheme, dense.interpolation, dense.keep_fraction) == ("sparse", 0.0, 0.1)
    assert dense.unscored == "one"


def test_set_reaches_recipe_wide_sections(recipe):
    loaded = recipe(RECIPE, "cluster=site", "cluster.nodes=4", "cluster.environment.A=x=y")
    assert loaded.cluster is not None
    assert (loaded.cluster.partition, loaded.cluster.nodes) == ("long", 4)
    assert loaded.cluster.environment == {"OMP_NUM_THREADS": "1", "A": "x=y"}
    for name in ("A-B", "1A", "Ä", "A B"):
        with pytest.raises(InputError, match=f"cluster.environment is .*'{name}' is none"):
            recipe(RECIPE, "cluster=site", f"cluster.environment.{name}=x")
    for option in ("exclusive", "#SBATCH --exclusive", '""'):  # sbatch would say nothing
        with pytest.raises(InputError, match="cluster.sbatch is .*each beginning with - "):
            recipe(RECIPE, "cluster=site", f"cluster.sbatch=['{option}']")
    assert recipe(RECIPE, "output_dir=elsewhere").output_dir == "elsewhere"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=3", (["a", "b"], 3)),
        ("a=1e-5", (["a"], 1e-5)),
        ("a=[1, 2]", (["a"], [1, 2])),
        ("a=true", (["a"], True)),
        ("a=", (["a"], None)),
        ("a=24:00:00", (["a"], "24:00:00")),
    ],
)
def test_override_values_are_yaml(text, expected):
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["a.b", "=3", "a..b=1"])
def test_override_without_a_field_is_refused(text):
    with pytest.raises(InputError, match="expected section.field=value"):
        parse_override(text)


# What the user wrote (replacement in RECIPE), and what the one line must say.
REFUSED = [
    ("  steps: 100", "  stepz: 100", "recipe.yaml: training.stepz: no such field; did you mean st"),
    ("name: demo", "nome: demo", "recipe.yaml: nome: no such field; did you mean name?"),
    ("name: demo", "name: demo\nlr: 1", "lr: no such field; did you mean training.lr?"),
    ("{steps: 20}", "{stps: 20}", "runs.dense.training.stps: no such field; did you mean steps?"),
    ("steps: 20", "steps: ten", "runs.dense.training.steps is 'ten', expected a integer"),
    ("  steps: 100", "  steps: -1", "training.steps is -1, expected greater than 0"),
    ("  steps: 100\n", "  seed: 1\n", "training.seed: no such field"),
    ("  steps: 100\n", "", "run base: training.steps is missing"),
    ("model: small", "model: smal", "no fragment smal in configs/models; did you mean small?"),
    ("model: small", "model: zzz", "there are: big, small"),
    ("weighting: dense", "weighting: x/y.yaml", "weighting: no such file: x/y.yaml"),
    ("model: small", "model: [1]", "model is [1], expected fields"),
    ("{rope_theta: 15.3e6}", "{base: big, rope: 1}", "runs.dense.model.rope: no such field"),
    ("start: base", "start: bse", "run dense: start is bse, neither a run nor a checkpoint folder"),
    ("start: base", "start: dense", "runs start from each other: dense <- dense"),
    ("  base: {}", "  report: {}", "runs.report: a run is named with letters"),
    ("  lr: 1e-3", "  lr: 1e-3\n  lr: 2", "recipe.yaml: line 10: lr was already given on line 9"),
    ("name: demo", "name: [demo", "recipe.yaml: line 2: not valid YAML"),
    ("name: demo", "name: 5.5", "name is 5.5, expected a string"),
]


@pytest.mark.parametrize(("written", "instead", "message"), REFUSED)
def test_a_mistake_is_refused_with_the_field_and_what_is_right(recipe, written, instead, message):
    assert written in RECIPE
    assert message in refusal(recipe, RECIPE.replace(written, instead, 1))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=1", "--set training.stepz=1: training.stepz: no such field"),
        ("runs.dens.training.steps=1", "no run dens; did you mean dense?"),
        ("runs.dense=1", "expected runs.NAME.section.field=value"),
        ("training.steps=x", "training.steps is 'x', expected a integer"),
        ("model=nope", "there are: big, small"),
        ("training=3", "training is 3, expected fields"),
        ("layout.sequence=true", "layout.tensor > 1"),
    ],
)
def test_a_wrong_override_is_refused(recipe, override, message):
    assert message in refusal(recipe, RECIPE, override)


def test_a_broken_fragment_is_named(recipe, tmp_path):
    recipe()
    path = tmp_path / "configs" / "weightings" / "dense.yaml"
    path.write_text("scheme: dense\ninterpolaton: 0.5\n")
    message = refusal(recipe, RECIPE)
    assert str(path) in message and "did you mean interpolation?" in message


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere.yaml: no such file"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_a_run_without_a_model_takes_the_checkpoints_and_changes_it(recipe):
    text = RECIPE.replace("model: small\n", "").replace("  base: {}", "  base: {start: im/ported}")
    loaded = recipe(text)
    asked = []

    def checkpoint_model(*places: str) -> ModelConfig:
        asked.append(places)
        sizes = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
        return ModelConfig(**sizes, rope_theta=3, max_position_embeddings=16)

    base = resolve_run(loaded, "base", checkpoint_model)
    dense = resolve_run(loaded, "dense", checkpoint_model)
    # Also where the model is if the start is gone.
    own = [f"{loaded.output_dir}/{name}" for name in ("base", "dense")]
    assert asked == [("im/ported", own[0]), ("im/ported", *own)]
    assert (base.model.num_layers, base.model.rope_theta) == (2, 3.0)
    assert base.model.max_position_embeddings is None
    assert (dense.model.num_layers, dense.model.rope_theta) == (2, 15.3e6)
    with pytest.raises(InputError, match="run base: model.num_layers is missing"):
        resolve_run(loaded, "base")
    assert "model.num_layers is missing" in refusal(recipe, RECIPE.replace("model: small\n", ""))


def test_a_dumped_run_reads_back_equal(recipe, tmp_path):
    run = resolve_run(recipe(), "dense")
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    assert load_run(tmp_path / "run.yaml") == run


# PyYAML folds the line breaks that only Unicode knows (NEL and its kin) into spaces.
TEXT = st.text(st.characters(exclude_characters="\x85\u2028\u2029"))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=20
)


@given(st.dictionaries(TEXT, VALUES))
def test_yaml_reads_back_what_it_wrote(values):
    assert parse_yaml(to_yaml(values), "text") == values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("15.3e6", 15.3e6),
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        (".5", 0.5),
        ("007", 7),
        ("-3", -3),
        ("24:00:00", "24:00:00"),
        ("no", "no"),
        ("2026-01-01", "2026-01-01"),
        ("1_000", "1_000"),
        ("e5", "e5"),
        ("~", None),
    ],
)
def test_yaml_numbers_are_read_as_people_write_them(text, value):
    read = parse_yaml(f"a: {text}", "text")["a"]
    assert read == value and type(read) is type(value)


def test_yaml_is_loaded_safely():
    with pytest.raises(InputError, match="not valid YAML"):
        parse_yaml("a: !!python/object/apply:os.getcwd []", "text")
