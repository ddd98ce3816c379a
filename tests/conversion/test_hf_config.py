"""config.json is read as transformers reads it, and what we cannot compute is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lctw_megatron.config.schema import ModelConfig, RopeScaling
from lctw_megatron.conversion.architectures import ARCHITECTURES
from lctw_megatron.conversion.hf_config import config_values, read_config
from lctw_megatron.errors import InputError
from tests.conversion.hf_models import EXPERT_FIELDS

SIZES = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 32,
}  # fmt: skip


def write(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def minimal(kind: str, **changes: Any) -> dict[str, Any]:
    values = {"model_type": kind, **SIZES, **changes}
    if kind == "mistral":
        values.setdefault("sliding_window", None)
    if kind == "phi":  # turns half a head, which must be an even number
        values["num_attention_heads"] = 16
    return values


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_what_config_json_leaves_out_means_what_transformers_means(kind, tmp_path):
    from transformers import AutoConfig

    write(tmp_path, minimal(kind))
    theirs, ours = AutoConfig.from_pretrained(tmp_path), read_config(tmp_path).model
    assert ours.num_query_groups == theirs.num_key_value_heads
    width = getattr(theirs, "head_dim", None) or 64 // theirs.num_attention_heads
    assert ours.kv_channels == width
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.layernorm_epsilon == getattr(theirs, ARCHITECTURES[kind].epsilon[0])
    rope = rope_of_transformers(tmp_path)
    share = rope.get("partial_rotary_factor", getattr(theirs, "partial_rotary_factor", 1.0))
    assert ours.partial_rotary_factor == share
    assert ours.attention_dropout == theirs.attention_dropout == 0
    assert theirs.hidden_act in ARCHITECTURES[kind].activations
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.init_method_std == theirs.initializer_range
    assert ours.rope_theta == rope["rope_theta"] and ours.rope_scaling is None


def rope_of_transformers(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "rope_parameters"):  # transformers 5
        return config.rope_parameters
    return {"rope_theta": config.rope_theta, **(config.rope_scaling or {"rope_type": "default"})}


UNSUPPORTED = {
    "tied by a word": ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    "an odd head": ("llama", {"head_dim": 7}, "head_dim is 7"),
    "heads that share nothing": (
        "llama", {"hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 32",
    ),
    "one expert": ("qwen3_moe", {"num_experts": 1}, "num_experts is 1"),
    "no auxiliary loss": (
        "mixtral", {"router_aux_loss_coef": None}, "router_aux_loss_coef is None",
    ),
    "more experts of a token than there are": (
        "mixtral", {"num_local_experts": 2, "num_experts_per_tok": 3},
        "num_experts_per_tok is 3, expected at most num_local_experts 2",
    ),
    "two numbers of experts": (
        "mixtral", {"num_local_experts": 2, "num_experts": 4}, "num_local_experts is 2, but",
    ),
    "attention bias": ("llama", {"attention_bias": True}, "attention_bias True"),
    "attention bias of Qwen3": ("qwen3", {"attention_bias": True}, "attention_bias True"),
    "feed-forward bias": ("llama", {"mlp_bias": True}, "mlp_bias True"),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "Mistral's window": ("mistral", {"sliding_window": 4096}, "sliding_window 4096"),
    "Qwen2's window": (
        "qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window True",
    ),
    "Qwen3MoE's window, which begins in the first layer": (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 16, "max_position_embeddings": 64,
         "max_window_layers": 3},
        "use_sliding_window True",
    ),
    "a window shorter than the positions": (
        "mistral", {"sliding_window": 4095, "max_position_embeddings": 4096}, "sliding_window 4095",
    ),
    "layers of another kind": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 99, "max_position_embeddings": 99,
         "layer_types": ["full_attention", "chunked_attention", "full_attention"]},
        "layer_types 'chunked_attention'",
    ),
    "window layers without a window": (
        "qwen2", {"layer_types": ["sliding_attention"] * 3, "max_position_embeddings": 9},
        "layer_types 'sliding_attention'",
    ),
    "Qwen3's layer types": (
        "qwen3",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "layer_types 'sliding_attention'",
    ),
    "tokens that see what follows": ("llama", {"is_causal": False}, "is_causal False"),
    "layers of their own": (
        "llama", {"per_layer_config": {"1": {"hidden_act": "relu"}}}, "per_layer_config {'1'",
    ),
    "perhaps the same: a null": ("qwen2", {"is_causal": None}, "is_causal None"),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "own code": ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    "another class": (
        "llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequence",
    ),
    "another model": ("gpt2", {}, "model_type 'gpt2'"),
    "uneven groups": ("llama", {"num_key_value_heads": 5}, "num_key_value_heads 5"),
    "a word for a number": ("llama", {"hidden_size": "big"}, "hidden_size is 'big'"),
    "no size": ("llama", {"vocab_size": None}, "vocab_size is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(UNSUPPORTED))
def test_what_we_cannot_compute_is_refused_by_name(case, tmp_path):
    assert_refused(tmp_path, *UNSUPPORTED[case])


def assert_refused(folder: Path, kind: str, changes: dict[str, Any], named: str) -> None:
    """In one line that names the file and ``named``."""
    write(folder, minimal(kind, **changes))
    with pytest.raises(InputError, match=r"config\.json") as caught:
        read_config(folder)
    assert named in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


IDLE = {
    "Mistral's window of all positions": (
        "mistral", {"sliding_window": 64, "max_position_embeddings": 64}
    ),
    "Mistral's window by default": (
        "mistral", {"sliding_window": 4096, "max_position_embeddings": 2048}
    ),
    "Qwen2's window above the last layer": ("qwen2", {"use_sliding_window": True}),
    "Qwen3's window of all positions": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 64, "max_position_embeddings": 64,
         "max_window_layers": 1},
    ),
    "Qwen3's window of all positions, by layer": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 64, "max_position_embeddings": 64,
         "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "Mixtral says nothing": (
        "mixtral", {"num_local_experts": 2, "max_position_embeddings": 64},
    ),
    "rope type null": ("llama", {"rope_scaling": {"rope_type": None, "type": "default"}}),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(IDLE))
def test_what_changes_nothing_is_no_reason_to_refuse(case, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, changes = IDLE[case]
    write(tmp_path, minimal(kind, num_key_value_heads=8, **changes))
    found = read_config(tmp_path)
    assert found.model.rope_scaling is None
    assert [note for note in found.notes if "window hides nothing" in note] == found.notes
    assert bool(found.notes) == ("window" in case)
    if "null" in case:  # which transformers 5 does not take
        return
    theirs = AutoConfig.from_pretrained(tmp_path, attn_implementation="eager")
    plain_folder = tmp_path / "plain"
    plain_folder.mkdir()
    write(plain_folder, config_values(found.model, "fp32", {}))
    plain = AutoConfig.from_pretrained(plain_folder, attn_implementation="eager")
    logits = []
    for config in (theirs, plain):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        tokens = torch.arange(min(config.max_position_embeddings, 80))[None] % 160
        logits.append(model(tokens).logits)
    assert torch.equal(*logits)


def test_null_means_the_default(tmp_path):
    names = ("attention_bias", "mlp_bias", "tie_word_embeddings", "initializer_range", "head_dim")
    write(tmp_path, minimal("llama", **dict.fromkeys(names)))
    given = read_config(tmp_path)
    write(tmp_path, minimal("llama"))
    assert read_config(tmp_path) == given


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_null_key_value_heads_are_as_many_as_attention_heads(kind, tmp_path):
    from transformers import AutoConfig

    write(tmp_path, minimal(kind, num_key_value_heads=None) | {"num_attention_heads": 16})
    assert read_config(tmp_path).model.num_query_groups == 16
    if kind in ("llama", "qwen2", "qwen3", "phi"):  # version 5 refuses it in the others
        assert AutoConfig.from_pretrained(tmp_path).num_key_value_heads == 16


def test_mistral_without_a_word_on_its_window_means_4096_as_in_transformers(tmp_path):
    write(tmp_path, {"model_type": "mistral", **SIZES})
    with pytest.raises(InputError, match="sliding_window 4096, transformers' default"):
        read_config(tmp_path)


def test_all_unsupported_options_are_named_at_once(tmp_path):
    write(tmp_path, minimal("llama", mlp_bias=True, attention_bias=True, hidden_act="relu"))
    with pytest.raises(InputError) as caught:
        read_config(tmp_path)
    for name in ("mlp_bias", "attention_bias", "hidden_act"):
        assert name in str(caught.value)


def test_fields_without_meaning_are_listed(tmp_path):
    known = {"torch_dtype": "bfloat16", "use_cache": True, "is_causal": True}
    write(tmp_path, minimal("llama", unknown_thing=1, **known))
    assert read_config(tmp_path).ignored == ["unknown_thing"]


@pytest.mark.parametrize("text, named", [(None, "missing"), ("{", "JSON"), ("[]", "object")])
def test_a_folder_without_a_config_is_refused(text, named, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=named):
        read_config(tmp_path)


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling(factor=8.0, original_max_position_embeddings=8192),
        RopeScaling(rope_type="linear", factor=4),
        RopeScaling(rope_type="dynamic", factor=4, original_max_position_embeddings=32768),
        RopeScaling(
            rope_type="yarn",
            factor=4,
            original_max_position_embeddings=8192,
            mscale=0.7,
            mscale_all_dim=0.5,
            truncate=False,
        ),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_survives_the_way_out_and_back_and_transformers_reads_it(
    kind, scaling, tied, tmp_path
):
    from transformers import AutoConfig

    model = ModelConfig(
        architecture=kind, num_layers=3, hidden_size=64, ffn_hidden_size=100,
        num_attention_heads=8, num_query_groups=2, kv_channels=24, vocab_size=161,
        max_position_embeddings=32768, rope_theta=15.3e6, rope_scaling=scaling,
        layernorm_epsilon=1e-6, tie_word_embeddings=tied, init_method_std=0.03,
        qkv_bias=ARCHITECTURES[kind].flags["qkv_bias"],
        qk_norm=ARCHITECTURES[kind].flags["qk_norm"],
        **EXPERT_FIELDS.get(kind, {}),
        **{name: 0.25 for name in ARCHITECTURES[kind].dropouts.values()},
    )  # fmt: skip
    write(tmp_path, config_values(model, "bf16", {"eos_token_id": [2, 3]}))
    back = read_config(tmp_path)
    assert back.model == model
    assert back.ignored == []
    assert any("attention_dropout 0.25" in note for note in back.notes)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__.lower() == f"{kind.replace('_', '')}config"
    assert theirs.max_position_embeddings == 32768 and theirs.head_dim == 24
    rope = rope_of_transformers(tmp_path)
    assert rope["rope_theta"] == 15.3e6
    assert rope["rope_type"] == (scaling.rope_type if scaling else "default")
    assert str(getattr(theirs, "dtype", None) or theirs.torch_dtype) == "torch.bfloat16"


def test_a_model_with_parts_that_its_architecture_lacks_is_not_written():
    model = ModelConfig(
        num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, vocab_size=10,
        max_position_embeddings=8, qkv_bias=True,
    )  # fmt: skip
    with pytest.raises(InputError, match="qkv_bias.*use architecture qwen2"):
        config_values(model, "fp32", {})
