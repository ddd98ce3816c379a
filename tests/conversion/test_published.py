"""Published config.json files: each imports, exports and verifies in small, or is refused in one
line that names the field.

published_configs.json holds 44 of them as they are on the Hub. Scaled down they keep the ratios of
their heads, their head width, feed-forward width and every field that decides the arithmetic.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lctw_megatron.config.load import load_fragment
from lctw_megatron.config.schema import LayoutConfig, ModelConfig
from lctw_megatron.conversion.hf_config import read_config
from lctw_megatron.conversion.hf_export import export_hf
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.conversion.verify import (
    compare_logits,
    compare_tensors,
    config_differences,
)
from lctw_megatron.errors import InputError
from lctw_megatron.platform.world import initialize, shut_down

CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "published_configs.json").read_text()
)
VOCABULARY, WIDTH, LAYERS = 131, 8, 2

REFUSED = {
    "baichuan": "model_type 'baichuan' cannot be converted",
    "gemma3_1b_it": "model_type 'gemma3_text' cannot be converted",
    "gemma_2b": "model_type 'gemma' cannot be converted",
    "internlm2": "model_type 'internlm2' cannot be converted",
    "llama_omni": "model_type 'omni_speech_llama' cannot be converted",
    "llava": "model_type 'llava' cannot be converted",
    "ministral3_3b_2512": "model_type 'ministral3' cannot be converted",
    # 4,096 of 32,768 positions, by transformers' default.
    "mistral_7b": "sliding_window 4096, transformers' default (supported: null)",
    "olmo2_7b": "model_type 'olmo2' cannot be converted",
    "phi-3_5": "model_type 'phi3' cannot be converted",
    "qwen": "model_type 'qwen' cannot be converted",
    "qwen2moe": "model_type 'qwen2_moe' cannot be converted",
}
IMPORTED = [name for name in CONFIGS if name not in REFUSED]


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a model of a few thousand parameters."""
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    hidden = config["hidden_size"]
    few_groups = min(2, math.gcd(heads, groups))
    few_heads = heads // groups * few_groups
    # Phi turns a part of a head, which must be an even number.
    width = 20 if config["model_type"] == "phi" else WIDTH
    changed: dict[str, Any] = {
        "num_attention_heads": few_heads,
        "hidden_size": few_heads * width,
        "intermediate_size": round(few_heads * width * config["intermediate_size"] / hidden),
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
    }
    if config.get("num_key_value_heads"):
        changed["num_key_value_heads"] = few_groups
    if config.get("head_dim"):
        changed["head_dim"] = WIDTH * config["head_dim"] * heads // hidden
    if config.get("layer_types"):
        changed["layer_types"] = config["layer_types"][:LAYERS]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        match config.get(name):
            case int(id):
                changed[name] = id % VOCABULARY
            case [*ids]:
                changed[name] = [id % VOCABULARY for id in ids]
    return config | changed


@pytest.fixture(scope="module", autouse=True)
def one_world() -> Iterator[None]:
    """Process groups, formed once for all."""
    initialize(LayoutConfig(), seed=1)
    yield
    shut_down()


def write_model(config: dict[str, Any], folder: Path) -> None:
    """Random weights by transformers, beside the config as published."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.1)
    model.float().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", IMPORTED)
def test_a_published_model_comes_and_goes_unchanged(name: str, tmp_path: Path) -> None:
    config = small(CONFIGS[name])
    hf, checkpoint, back = (tmp_path / part for part in ("hf", "checkpoint", "back"))
    write_model(config, hf)
    import_hf(hf, checkpoint, log=lambda line: None)
    export_hf(checkpoint, back)
    assert config_differences(back, checkpoint) == []
    assert all(result.different == 0 for result in compare_tensors(hf, checkpoint))
    tokens = (torch.arange(40) * 37 % VOCABULARY)[None]
    assert compare_logits(hf, checkpoint, tokens).largest < 1e-4
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (hf, back))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    written = json.loads((back / "config.json").read_text())
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert written.get(field) == config.get(field)
    assert written["max_position_embeddings"] == config.get("max_position_embeddings", 2048)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    with pytest.raises(InputError) as error:
        import_hf(tmp_path, tmp_path / "checkpoint")
    line = str(error.value)
    assert line.startswith(f"{tmp_path / 'config.json'}: ") and "\n" not in line
    assert REFUSED[name] in line and len(line) < 400
    assert not (tmp_path / "checkpoint").exists()


FRAGMENTS = {
    "llama31_8b": "llama3_1_8b",
    "llama31_70b": "llama3_1_70b",
    "llama32_1b": "llama3_2_1b",
    "llama32_3b": "llama3_2_3b",
    "mistral_7b": "mistral_7b_v03",
    "mixtral_8x7b": "mixtral_8x7b",
    "phi2": "phi_2",
    "qwen2_500m": "qwen2_0_5b",
    "qwen25_1.5b": "qwen2_1_5b",
    "qwen25_500m": "qwen2.5_0.5b_instruct",
    "qwen25_3b": "qwen2.5_3b",
    "qwen25_7b": "qwen2_7b",
    "qwen3_600m": "qwen3_0.6b",
    "qwen3_1.7b": "qwen3_1.7b",
    "qwen3_8b": "qwen3_8b",
    "smollm2_135m": "smollm2_135m",
    "smollm2_360m": "smollm2_360m",
}
"""Fragment of configs/models -> the published config.json of that model, or of the generation
before it in the same shape (Qwen2.5 of Qwen2)."""


@pytest.mark.parametrize(("fragment", "published"), FRAGMENTS.items())
def test_a_model_by_name_is_the_published_one(
    tmp_path: Path, fragment: str, published: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[published]))
    theirs = read_config(tmp_path).model
    ours = ModelConfig(**load_fragment("model", fragment, "the test"))
    resolved = {
        "num_query_groups": ours.num_query_groups or ours.num_attention_heads,
        "max_position_embeddings": theirs.max_position_embeddings,
    }
    if ours.num_moe_experts:
        resolved["moe_ffn_hidden_size"] = ours.moe_ffn_hidden_size or ours.ffn_hidden_size
    if ours.kv_channels is None:
        assert theirs.kv_channels in (None, ours.hidden_size // ours.num_attention_heads)
        resolved["kv_channels"] = theirs.kv_channels
    assert ours.model_copy(update=resolved) == theirs
