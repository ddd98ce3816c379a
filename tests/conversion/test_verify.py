"""verify sees what differs, however little, and says where."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.normalizers import Replace
from transformers import AutoTokenizer, PreTrainedTokenizerFast, __version__

from lctw_megatron.conversion.hf_export import export_hf
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.conversion.tokenizer_agreement import tokenizer_line
from lctw_megatron.conversion.verify import (
    compare_logits,
    compare_tensors,
    config_differences,
    hf_logits,
    megatron_logits,
    tensor_table,
)
from lctw_megatron.errors import InputError
from tests.conversion.hf_models import make_model, random_tokens


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    make_model("qwen2", tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    return tmp_path / "hf", tmp_path / "checkpoint"


def change(hf: Path, name: str, amount: float) -> None:
    path = hf / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[-1] += amount
    save_file(tensors, path, {"format": "pt"})


def test_equal_folders_are_equal(pair):
    assert config_differences(*pair) == []
    results = compare_tensors(*pair)
    assert sum(result.tensors for result in results) == 4 * 12 + 3
    assert all(result.different == 0 for result in results)
    assert compare_logits(*pair, random_tokens(100)).largest < 1e-5
    with pytest.raises(InputError, match="token id 161: .* has a vocabulary of 161"):
        compare_logits(*pair, torch.tensor([[1, 161]]))


def test_one_element_of_one_tensor_is_seen_and_named(pair):
    change(pair[0], "model.layers.2.self_attn.v_proj.bias", 0.5)
    results = {result.key: result for result in compare_tensors(*pair)}
    changed = results.pop("decoder.layers.self_attention.linear_qkv.bias")
    assert changed.different == 1 and changed.largest == pytest.approx(0.5)
    assert all(result.different == 0 for result in results.values())
    assert "DIFFERENT" in tensor_table([changed]).splitlines()[1]
    assert compare_logits(*pair, random_tokens(100)).largest > 1e-3


def test_a_bit_that_no_tolerance_would_see_is_seen(pair):
    change(pair[0], "model.layers.0.mlp.up_proj.weight", 1e-8)
    assert sum(result.different for result in compare_tensors(*pair)) == 1


def test_not_a_number_is_different_unless_on_both_sides(pair):
    change(pair[0], "model.norm.weight", float("nan"))
    result = next(r for r in compare_tensors(*pair) if r.different)
    assert result.key == "decoder.final_layernorm.weight" and result.largest == float("inf")


def test_a_rounded_import_is_equal_after_rounding(tmp_path):
    make_model("llama", tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "checkpoint", "bf16")
    results = compare_tensors(tmp_path / "hf", tmp_path / "checkpoint")
    assert all(result.different == 0 for result in results)
    tokens = random_tokens(50)
    assert compare_logits(tmp_path / "hf", tmp_path / "checkpoint", tokens).largest < 1e-5


def test_a_rounded_export_is_equal_after_rounding(pair, tmp_path):
    export_hf(pair[1], tmp_path / "rounded", "bf16")
    results = compare_tensors(tmp_path / "rounded", pair[1])
    assert all(result.different == 0 for result in results)
    tokens = random_tokens(50)
    assert compare_logits(tmp_path / "rounded", pair[1], tokens).largest < 1e-5
    # Against the weights themselves the logits do differ.
    assert compare_logits(*pair, tokens).largest < 1e-5
    assert (megatron_logits(pair[1], tokens) - hf_logits(tmp_path / "rounded", tokens)).max() > 1e-4


def test_another_configuration_is_named(pair):
    path = pair[0] / "config.json"
    values = json.loads(path.read_text())
    for place in (values, values.get("rope_parameters") or {}):
        if "rope_theta" in place:
            place["rope_theta"] = 2e6
    path.write_text(json.dumps(values))
    assert config_differences(*pair) == [
        "rope_theta: 2000000.0 in the folder, 1000000.0 in the checkpoint"
    ]


def test_of_a_rope_only_what_differs_is_named_and_an_epsilon_through_float32_is_the_same(tmp_path):
    hf = make_model("llama_yarn", tmp_path / "hf")
    import_hf(hf, tmp_path / "checkpoint", log=lambda line: None)
    config = json.loads((hf / "config.json").read_text())
    rope = config.get("rope_parameters") or config["rope_scaling"]
    config["rms_norm_eps"], rope["mscale"] = 9.999999747378752e-06, None
    (hf / "config.json").write_text(json.dumps(config))
    assert config_differences(hf, tmp_path / "checkpoint") == [
        "rope_scaling.mscale: None in the folder, 0.707 in the checkpoint"
    ]


def test_logits_are_computed_in_float32_whatever_is_stored(tmp_path):
    make_model("qwen3", tmp_path / "hf", torch.bfloat16)
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    tokens = random_tokens(130)
    assert compare_logits(tmp_path / "hf", tmp_path / "checkpoint", tokens).largest < 1e-5


def test_a_config_that_wants_tuples_of_transformers_is_compared_like_any(pair):
    path = pair[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"return_dict": False}))
    assert compare_logits(*pair, random_tokens(50)).largest < 1e-5


def test_a_tokenizer_that_transformers_reads_otherwise_is_told(hf_folder, monkeypatch):
    """Some of its classes rebuild one from vocabulary and merges, by rules of their own."""
    text = "Alpha beta.\n\n\n\ngamma delta\n\n   epsilon"
    assert re.fullmatch(r"tokenizer: equal \(\d+ tokens\)", tokenizer_line(hf_folder, text))
    other = PreTrainedTokenizerFast.from_pretrained(hf_folder)
    other.backend_tokenizer.normalizer = Replace("gamma", "beta")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: other)
    line = tokenizer_line(hf_folder, text)
    assert f"transformers {__version__} (" in line
    assert re.search(r"reads 'gamma delta' as \[\d.*\] from token \d on, not as \[\d", line)


def test_a_tokenizer_that_transformers_cannot_load_is_told(hf_folder, monkeypatch):
    def load(*args: object, **options: object) -> None:
        raise TypeError("not\na tokenizer")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    line = tokenizer_line(hf_folder, "Alpha")
    assert line.endswith(f"transformers {__version__} cannot load it (not a tokenizer)")


def test_a_tokenizer_that_we_cannot_read_does_not_hide_that_the_weights_are_equal(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    line = tokenizer_line(tmp_path, "Alpha")
    assert line.startswith("tokenizer: not compared (") and "tokenizer.json" in line
