"""What is Phi's own in config.json: the turned part of a head, dropout, query and key norms."""

from pathlib import Path
from typing import Any

import pytest

from lctw_megatron.conversion.hf_config import config_values, read_config
from lctw_megatron.errors import InputError
from tests.conversion.test_hf_config import minimal, write

UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "Phi's norms on queries and keys": ({"qk_layernorm": True}, "qk_layernorm True"),
    "an odd part of a head": (
        {"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25: positions would",
    ),
    "two parts of a head": (
        {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 1.0}},
        "partial_rotary_factor is 0.5, but 1.0 among the rope's; keep one",
    ),
    "yarn on a part of a head": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        "rope_scaling: yarn's attention factor 1.13863 is for heads that are turned whole, not to",
    ),
    "the exact GELU": ({"hidden_act": "gelu"}, "hidden_act 'gelu' (supported: gelu_new)"),
    "no dropout": ({"resid_pdrop": 1.5}, "resid_pdrop is 1.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(UNSUPPORTED))
def test_what_we_cannot_compute_is_refused_by_name(case: str, tmp_path: Path) -> None:
    changes, named = UNSUPPORTED[case]
    write(tmp_path, minimal("phi", **changes))
    with pytest.raises(InputError, match=r"config\.json") as caught:
        read_config(tmp_path)
    assert named in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("given", "share"),
    [
        ({}, 0.5),
        ({"partial_rotary_factor": 1.0}, 1.0),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}, 1.0),
    ],
)
def test_the_turned_part_of_a_head_is_read_in_every_spelling_and_written(
    given: dict[str, Any], share: float, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    model = read_config(write(tmp_path, minimal("phi", **given))).model
    assert model.partial_rotary_factor == share
    theirs = AutoConfig.from_pretrained(tmp_path)
    if hasattr(theirs, "rope_parameters"):  # transformers 5
        assert theirs.rope_parameters["partial_rotary_factor"] == share
    assert config_values(model, "fp32", {})["partial_rotary_factor"] == share


def test_dropout_is_taken_over_and_said_and_leaves_as_it_came(tmp_path: Path) -> None:
    dropouts = {"resid_pdrop": 0.1, "embd_pdrop": 0.0, "attention_dropout": 0.05}
    config = read_config(write(tmp_path, minimal("phi", **dropouts)))
    model = config.model
    assert (model.hidden_dropout, model.embedding_dropout, model.attention_dropout) == (
        0.1,
        0,
        0.05,
    )
    (note,) = config.notes
    assert "resid_pdrop 0.1" in note and "--set model.hidden_dropout=0" in note
    assert "embd_pdrop" not in note
    assert dropouts.items() <= config_values(model, "fp32", {}).items()
    # A recipe that says nothing of the embeddings drops out there as in the layers.
    whole = model.model_copy(update={"embedding_dropout": None})
    assert config_values(whole, "fp32", {})["embd_pdrop"] == 0.1
