"""The `weighting` section: what is accepted, and one clear line for what is not."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lctw_megatron.config.schema import WeightingConfig
from lctw_megatron.errors import InputError
from lctw_megatron.weighting import parse_weighting
from lctw_megatron.weighting.schemes import SCHEMES, Sparse

FRAGMENTS = sorted((Path(__file__).parents[2] / "configs" / "weightings").glob("*.yaml"))


def test_a_dict_and_the_config_give_the_same_weighting() -> None:
    values = {"scheme": "sparse", "keep_fraction": 0.2, "mode": "self", "window": 8, "stride": 4}
    weighting = parse_weighting(values)
    assert weighting == parse_weighting(WeightingConfig(**values))
    assert weighting.scheme == Sparse(keep_fraction=0.2)
    assert (weighting.config.mode, weighting.config.window, weighting.config.stride) == (
        "self",
        8,
        4,
    )
    assert weighting.config.interpolation == 0


@pytest.mark.parametrize(
    "values, message",
    [
        ("dense", "weighting is 'dense', expected its fields, as {'scheme': 'dense'}"),
        ({"scheme": "densse"}, "weighting.scheme 'densse': no such scheme; did you mean dense?"),
        ({"scheme": "x"}, "there are: custom, dense, eslm, longce, longppl, npmi, position"),
        ({"scheme": "sparse", "keep_fracton": 0.1}, "keep_fracton: .*did you mean keep_fraction?"),
        ({"scheme": "sparse"}, "weighting.keep_fraction is missing; scheme sparse needs it"),
        ({"scheme": "longce"}, "weighting.max_weight is missing; scheme longce needs it"),
        ({"scheme": "npmi", "keep_fraction": 0.1}, "weighting.shift is missing"),
        ({"scheme": "custom"}, "weighting.function is missing"),
        (
            {"scheme": "dense", "keep_fraction": 0.1},
            "weighting.keep_fraction: scheme dense does not take it "
            r"\(only sparse, ppmi, npmi, rho, eslm\); remove it",
        ),
        ({"scheme": "eslm"}, "weighting.keep_fraction is missing; scheme eslm needs it"),
        (
            {"scheme": "dense", "normalise": "none"},
            r"weighting.normalise: scheme dense does not take it \(only longce, custom\); remove",
        ),
        ({"scheme": "longce", "max_weight": 5, "normalise": "batch"}, "'none' or 'sequence'"),
        ({"scheme": "sparse", "min_difference": 2}, r"does not take it \(only longppl\)"),
        ({"scheme": "longppl", "min_log_probability": 0}, "is 0, expected less than 0"),
        (
            {"scheme": "longce", "max_weight": 0.5},
            "max_weight is 0.5, expected greater than or equ",
        ),
        ({"scheme": "uniform", "max_weight": 2}, "scheme uniform does not take it .only longce"),
        ({"scheme": "sparse", "keep_fraction": 0}, "keep_fraction is 0, expected greater than 0"),
        ({"scheme": "sparse", "keep_fraction": 1.5}, "keep_fraction is 1.5, expected less than"),
        ({"scheme": "dense", "interpolation": -0.1}, "interpolation is -0.1, expected greater"),
        ({"scheme": "dense", "unscored": "half"}, "unscored is 'half', expected 'zero' or 'one'"),
        ({"scheme": "longce", "max_weight": float("inf")}, "max_weight is inf, expected a finite"),
        ({"scheme": "custom", "function": "math"}, "'math', expected `package.module:function`"),
        ({"scheme": "custom", "function": "no_such:f"}, "no_such:f: No module .*PYTHONPATH"),
        ({"scheme": "custom", "function": "math:no_such"}, "math has no no_such"),
        ({"scheme": "custom", "function": ".x:y"}, "'.x:y', expected `package.module:function`"),
        ({"scheme": "custom", "function": "a..b:y"}, "'a..b:y', expected `package"),
        ({"scheme": "custom", "function": "math:"}, "'math:', expected `package"),
        ({"scheme": "custom", "function": "os:system"}, r"system\(long_loss, short_loss, mask\)"),
        ({"scheme": "custom", "function": "math:pi"}, "pi is not a function"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_that_says_what_is_right(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_weighting(values)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("weighting")


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_shipped_fragments_are_valid_and_named_for_their_scheme(path: Path) -> None:
    weighting = parse_weighting(yaml.safe_load(path.read_text()))
    assert type(weighting.scheme) is SCHEMES[path.stem]


def test_every_scheme_has_a_fragment_and_a_line_of_documentation() -> None:
    assert {path.stem for path in FRAGMENTS} == set(SCHEMES) - {"custom"}
    description = WeightingConfig.model_fields["scheme"].description or ""
    for name, scheme in SCHEMES.items():
        assert name in description
        assert scheme.__doc__
