"""What a stretched rope says of itself, and what of it does not fit together."""

import re

import pytest

from lctw_megatron.config.load import (
    CONFIGS,
    _merge,
    dump_yaml,
    load_recipe,
    load_run,
    resolve_run,
)
from lctw_megatron.config.rope import check_rope, exported_maximum, longest_context, rope_line
from lctw_megatron.config.rules import check_run
from lctw_megatron.config.schema import ModelConfig
from lctw_megatron.config.yaml_text import parse_yaml, to_yaml
from lctw_megatron.errors import InputError
from tests.config.test_layout_rules import run_config

ORIGINAL = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "factor": 4, ORIGINAL: 8192}


def model(scaling, **changes):
    values = dict(num_layers=1, hidden_size=64, ffn_hidden_size=8, num_attention_heads=4)
    return ModelConfig(**values | {"rope_scaling": scaling} | changes)


@pytest.mark.parametrize(
    ("scaling", "changes", "named"),
    [
        ({"rope_type": "yarn", "factor": 4}, {}, f"{ORIGINAL} is missing; rope_type yarn"),
        ({"rope_type": "dynamic", "factor": 4}, {}, f"{ORIGINAL} is missing; rope_type dynamic"),
        ({"factor": 4}, {}, f"{ORIGINAL} is missing; rope_type llama3"),
        ({"rope_type": "linear", "factor": 4, "beta_fast": 8}, {}, "linear has no beta_fast"),
        ({"rope_type": "linear", "factor": 4, ORIGINAL: 8}, {}, f"linear has no {ORIGINAL}"),
        ({"factor": 4, ORIGINAL: 8, "truncate": False}, {}, "llama3 has no truncate"),
        ({"factor": 4, ORIGINAL: 8, "low_freq_factor": 4}, {}, "high_freq_factor is 4, expected"),
        (YARN | {"low_freq_factor": 2}, {}, "yarn has no low_freq_factor"),
        (YARN | {"beta_fast": 0.5}, {}, "beta_fast is 0.5, expected at least beta_slow 1"),
        (YARN, {"rope_theta": 1}, "rope_theta is 1, expected more than 1 for yarn"),
        (YARN | {"rope_type": "dynamic"}, {"kv_channels": 2}, "heads wider than 2"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused_in_one_line(scaling, changes, named):
    with pytest.raises(InputError, match=re.escape(named)) as error:
        check_rope(model(scaling, **changes), "config.json: ")
    assert str(error.value).startswith("config.json: ") and "\n" not in str(error.value)


RECIPE = """
name: one
output_dir: runs
data: {train: none}
training: {steps: 1}
model: {base: llama32_1b, rope_scaling: %s}
"""


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ("{rope_type: longrope, factor: 4}", "rope_scaling.rope_type is 'longrope', expected"),
        ("{rope_type: linear, factor: 0.5}", "rope_scaling.factor is 0.5, expected greater than"),
        (
            f"{{rope_type: yarn, factor: 4, {ORIGINAL}: null}}",
            f"rope_scaling.{ORIGINAL} is missing",
        ),
        ("{rope_type: yarn, factor: 4, beta: 1}", "beta: no such field; did you mean"),
    ],
)
def test_a_recipe_is_refused_for_its_rope(tmp_path, scaling, named):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE % scaling)
    with pytest.raises(InputError, match=re.escape(named)) as error:
        resolve_run(load_recipe(path))
    assert "\n" not in str(error.value)


def test_a_null_that_transformers_reads_as_false_is_refused_and_never_written(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE % "{rope_type: yarn, factor: 2}")
    run = resolve_run(load_recipe(path))
    assert "truncate" not in dump_yaml(run)
    with pytest.raises(InputError, match="rope_scaling.truncate is null, expected true or false"):
        load_recipe(path, ["model.rope_scaling.truncate=null"])
    path.write_text(RECIPE % "{rope_type: yarn, factor: 2, truncate: null}")
    with pytest.raises(InputError, match="rope_scaling.truncate is null"):
        load_recipe(path)
    before = dump_yaml(run).replace("rope_type: yarn", "rope_type: yarn\n    truncate: null")
    (tmp_path / "run.yaml").write_text(before)
    assert load_run(tmp_path / "run.yaml") == run


def test_another_type_takes_no_field_of_the_one_it_replaces():
    llama3 = {"factor": 32, "low_freq_factor": 2, ORIGINAL: 8192}
    assert _merge({"rope_scaling": llama3}, {"rope_scaling": YARN}) == {"rope_scaling": YARN}
    more = {"rope_scaling": {"factor": 16}}
    assert _merge({"rope_scaling": YARN}, more)["rope_scaling"] == YARN | {"factor": 16}


def test_the_maximum_is_never_less_than_trained_on_and_what_transformers_computes_with():
    assert exported_maximum(model(None), 1024) == 1024
    assert exported_maximum(model({"rope_type": "linear", "factor": 2}), 1024) == 1024
    assert exported_maximum(model(YARN), 1024) == 4 * 8192
    assert exported_maximum(model(YARN), 10**6) == 10**6
    dynamic = model({"rope_type": "dynamic", "factor": 4, ORIGINAL: 2048})
    assert exported_maximum(dynamic, 8192) == 2048 and longest_context(dynamic) == 8192


def test_dynamic_trains_beyond_the_maximum_that_it_is_exported_with():
    scaling = {"rope_type": "dynamic", "factor": 4, ORIGINAL: 512}  # sequences of 1,024
    check_run(run_config(model__rope_scaling=scaling))
    check_run(run_config(model__rope_scaling=scaling, model__max_position_embeddings=512))
    with pytest.raises(InputError, match="max_position_embeddings is 1024, but .* 512; leave it"):
        check_run(run_config(model__rope_scaling=scaling, model__max_position_embeddings=1024))


@pytest.mark.parametrize(
    ("scaling", "line"),
    [
        (None, "default, maximum 32,768, theta 500,000"),
        (
            {"rope_type": "linear", "factor": 4},
            "linear, factor 4, maximum 32,768, theta 500,000",
        ),
        (
            YARN,
            "yarn, factor 4, original maximum 8,192, maximum 32,768, theta 500,000, "
            "attention factor 1.13863",
        ),
        (
            YARN | {"factor": 2},
            "yarn, factor 2, original maximum 8,192, maximum 32,768, theta 500,000, "
            "attention factor 1.06931, which transformers 4.51 to 4.55 reads as factor 4, the "
            "ratio of the maxima",
        ),
        (
            YARN | {"rope_type": "dynamic"},
            "dynamic, factor 4, original maximum 8,192, maximum 32,768, theta 500,000 to the "
            "original maximum, 9,376,659 at 32,768",
        ),
    ],
)
def test_one_line_says_type_factor_maxima_and_theta(scaling, line):
    given = model(scaling, rope_theta=5e5, max_position_embeddings=32768)
    assert rope_line(given) == line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Named or not, the type is the same, and the rest stays.
        ({"rope_type": "llama3", "factor": 16}, {ORIGINAL: 8192, "factor": 16}),
        ({"rope_type": "yarn"}, {ORIGINAL: 8192, "factor": 8.0, "rope_type": "yarn"}),
        ({"rope_type": "linear"}, {"factor": 8.0, "rope_type": "linear", ORIGINAL: None}),
    ],
)
def test_of_another_type_only_what_it_has_not_goes(tmp_path, changes, expected):
    values = {"name": "a", "output_dir": "out", "data": {"train": "x"}, "training": {"steps": 1}}
    values["model"] = {"base": "llama31_8b", "rope_scaling": changes}
    (tmp_path / "recipe.yaml").write_text(to_yaml(values))
    scaling = resolve_run(load_recipe(tmp_path / "recipe.yaml")).model.rope_scaling
    assert {name: getattr(scaling, name) for name in expected} == expected


def test_the_order_of_set_drops_nothing(tmp_path):
    values = {"name": "a", "output_dir": "out", "data": {"train": "x"}, "training": {"steps": 1}}
    (tmp_path / "recipe.yaml").write_text(to_yaml(values | {"model": "llama3_8b"}))
    field = "model.rope_scaling"
    settings = [f"{field}.factor=4", f"{field}.attention_factor=1.2", f"{field}.rope_type=yarn"]
    found = load_recipe(tmp_path / "recipe.yaml", [*settings, f"{field}.{ORIGINAL}=8192"])
    scaling = resolve_run(found).model.rope_scaling
    assert (scaling.factor, scaling.attention_factor) == (4, 1.2)


def test_a_scorer_under_yarn_is_made_for_what_its_factor_stretches_to():
    given = model(YARN, max_position_embeddings=8192)
    assert longest_context(given) == 32768
    assert "maximum 8,192" in rope_line(given) and "factor 1, the ratio" in rope_line(given)


def test_the_commented_lines_of_a_fragment_are_ropes_that_fit():
    lines = (CONFIGS / "models" / "llama3_8b.yaml").read_text().splitlines()
    types = []
    for line in lines:
        if line.startswith("# rope_scaling: "):
            given = model(parse_yaml(line[2:], "a comment")["rope_scaling"])
            check_rope(given)
            types.append(given.rope_scaling.rope_type)
    assert types == ["linear", "dynamic", "yarn", "llama3"]
