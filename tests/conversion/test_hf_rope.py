"""The rope of a config.json is read as transformers reads it; what contradicts itself, or what we
cannot compute, is refused by name."""

import json
from typing import Any

import pytest

from lctw_megatron.config.schema import RopeScaling
from lctw_megatron.conversion.hf_config import read_config
from tests.conversion.test_hf_config import assert_refused, minimal, rope_of_transformers, write

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    ],
)
def test_rope_is_read_in_every_spelling(rope, tmp_path):
    write(tmp_path, minimal("llama", max_position_embeddings=131072, **rope))
    model = read_config(tmp_path).model
    assert model.rope_theta == 5e5
    scaled = "factor" in json.dumps(rope)
    assert (model.rope_scaling is not None) == scaled
    if scaled:
        assert model.rope_scaling.original_max_position_embeddings == 8192
    theirs = rope_of_transformers(tmp_path)
    assert theirs["rope_theta"] == 5e5
    assert theirs["rope_type"] == ("llama3" if scaled else "default")


def test_llama3_scaling_without_its_original_length_takes_the_maximum_like_transformers(tmp_path):
    scaling = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
    write(tmp_path, minimal("llama", max_position_embeddings=4096, rope_scaling=scaling))
    ours = read_config(tmp_path).model.rope_scaling
    assert ours is not None and ours.original_max_position_embeddings == 4096


def test_what_transformers_takes_for_a_missing_original_maximum_or_factor(tmp_path):
    def read(**scaling: Any) -> RopeScaling:
        sizes = {"head_dim": 16, "max_position_embeddings": 4096}
        write(tmp_path, minimal("llama", **sizes, rope_scaling=scaling))
        found = read_config(tmp_path).model.rope_scaling
        assert found is not None
        return found

    assert read(type="yarn", factor=4.0).original_max_position_embeddings == 4096
    assert read(type="yarn", factor=4.0, truncate=None).truncate is False  # a null is not a default
    assert read(type="dynamic", factor=4.0).original_max_position_embeddings == 4096
    assert read(type="linear", factor=4.0).original_max_position_embeddings is None
    assert read(type="yarn", factor=None, original_max_position_embeddings=512).factor == 8


def test_fields_that_a_type_of_rope_has_not_are_left_out_with_a_word(tmp_path):
    given = {"type": "linear", "factor": 2, "finetuned": True, "beta_fast": 8}
    write(tmp_path, minimal("llama", rope_scaling=given))
    found = read_config(tmp_path)
    assert found.model.rope_scaling == RopeScaling(rope_type="linear", factor=2)
    (note,) = found.notes
    assert "rope_scaling: left out, as rope_type linear has no beta_fast, finetuned" in note
    given = {"rope_scaling": {"type": "dynamic", "factor": 2}}
    write(tmp_path, minimal("llama", head_dim=16, original_max_position_embeddings=512, **given))
    (note,) = read_config(tmp_path).notes
    assert "original_max_position_embeddings: left out, as rope_type dynamic" in note


REFUSED = {
    "rope longrope": (
        "llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
        "rope_parameters.rope_type 'longrope'",
    ),
    "rope su": ("llama", {"rope_scaling": {"type": "su"}}, "rope_scaling.rope_type 'su'"),
    "rope type of no type": ("llama", {"rope_scaling": {"type": ["linear"]}}, "['linear']"),
    "linear without factor": (
        "llama", {"rope_scaling": {"type": "linear"}}, "rope_type linear without factor",
    ),
    "dynamic below 1": (
        "llama", {"rope_scaling": {"type": "dynamic", "factor": 0.5}},
        "rope_scaling.factor of rope_type dynamic is 0.5",
    ),
    "yarn of no number": (
        "llama", {"rope_scaling": {"type": "yarn", "factor": "4x"}},
        "rope_scaling.factor of rope_type yarn is '4x'",
    ),
    "yarn with its bounds reversed": (
        "llama", {"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 32}},
        "rope_scaling.beta_fast is 1, expected at least beta_slow 32",
    ),
    "yarn of a false original": (
        "llama", {"rope_scaling": {"type": "yarn", "factor": None,
                                   "original_max_position_embeddings": "8k"}},
        "original_max_position_embeddings is '8k'",
    ),
    "rope per layer type": (
        "qwen3",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "full_attention",
    ),
    "a type in both spellings": (
        "llama", {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2}},
        "rope_scaling.type is 'linear', but rope_scaling.rope_type is 'dynamic'",
    ),
    "no rope type": ("llama", {"rope_scaling": {"factor": 2}}, "has factor, but no rope_type"),
    "two objects of two types": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2},
         "rope_parameters": {"rope_type": "default", "factor": 2}},
        "rope_type is 'linear' with rope_scaling, but 'default' with rope_parameters",
    ),
    "a theta that transformers passes over": (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 2},
         "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e6}},
        "rope_theta is None with rope_scaling, but 1000000.0 with rope_parameters",
    ),
    "two original maxima": (
        "llama", {"original_max_position_embeddings": 512, "rope_scaling": LLAMA3},
        "original_max_position_embeddings is 512, but 8192 in rope_scaling",
    ),
    "an original maximum where nobody looks": (
        "llama",
        {"original_max_position_embeddings": 512, "max_position_embeddings": 4096,
         "rope_scaling": {"type": "yarn", "factor": 4}},
        "original_max_position_embeddings is 512, but 4096 in rope_scaling (where none is given",
    ),
    "an original maximum of nothing": (
        "llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 0}},
        "rope_scaling.original_max_position_embeddings is 0",
    ),
    "yarn truncated by a word": (  # "no" is true for transformers
        "llama", {"rope_scaling": {"type": "yarn", "factor": 4, "truncate": "no"}},
        "rope_scaling.truncate of rope_type yarn is 'no'",
    ),
    "factor true": ("llama", {"rope_scaling": {"type": "linear", "factor": True}}, "is True"),
    "partial rotation": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "two thetas": (
        "llama",
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
        "keep one",
    ),
    "llama3 without factor": ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "factor"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_cannot_be_computed_or_contradicts_itself_is_refused_by_name(case, tmp_path):
    assert_refused(tmp_path, *REFUSED[case])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", True, 0, -0.5, 2, [1], {}])
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_a_share_of_a_head_that_is_none_is_refused_by_name(kind, value, tmp_path):
    named = f"partial_rotary_factor is {value!r}, expected a number above 0 and up to 1"
    assert_refused(tmp_path, kind, {"partial_rotary_factor": value}, named)
    if value != {}:
        rope = {"rope_type": "default", "partial_rotary_factor": value}
        assert_refused(tmp_path, kind, {"rope_parameters": rope}, named)
