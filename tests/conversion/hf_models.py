"""Tiny random Hugging Face models of every architecture, made by transformers, with awkward sizes.

Heads are not key/value heads, the head width is not hidden / heads, the feed-forward width and the
vocabulary are no multiples of 128, and every parameter is random, so that no two are alike.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

MAX_POSITIONS = 64
VOCABULARY = 161

_SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=48, intermediate_size=100, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=MAX_POSITIONS,
    rms_norm_eps=1e-5, bos_token_id=3, eos_token_id=[4, 5], tie_word_embeddings=False,
)  # fmt: skip
_LLAMA3 = dict(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
_EXPERTS = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=28)
_YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_theta": 500000.0, "head_dim": 20}),
    "llama31_tied": (
        "llama", {"tie_word_embeddings": True, "rope_scaling": _LLAMA3, "num_key_value_heads": 4},
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {"rope_theta": 1e6}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True, "intermediate_size": 130}),
    "llama_linear": ("llama", {"rope_scaling": dict(rope_type="linear", factor=3.0)}),
    "qwen2_dynamic": (
        "qwen2", {"rope_scaling": dict(rope_type="dynamic", factor=2.5), "rope_theta": 1e6},
    ),
    "llama_yarn": (
        "llama", {"head_dim": 20, "rope_scaling": _YARN | dict(
            mscale=0.707, mscale_all_dim=0.4, beta_fast=16.0, beta_slow=0.5, truncate=False)},
    ),
    "qwen2_yarn": ("qwen2", {"rope_scaling": _YARN | dict(attention_factor=1.3)}),
    "qwen3": ("qwen3", {"rope_theta": 1e6, "head_dim": 20}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS | {"norm_topk_prob": True, "head_dim": 20}),
    "qwen3_moe_unscaled": (
        "qwen3_moe", _EXPERTS | {"norm_topk_prob": False, "head_dim": 12, "num_experts_per_tok": 1},
    ),
    "phi": ("phi", {"partial_rotary_factor": 0.4, "head_dim": 20}),
    "phi_tied_dynamic": (
        "phi",
        {"tie_word_embeddings": True, "rope_scaling": dict(rope_type="dynamic", factor=2.5)},
    ),
}  # fmt: skip
"""Name: model type and what differs from the shared sizes."""


EXPERT_FIELDS: dict[str, dict[str, Any]] = {
    "mixtral": dict(
        num_moe_experts=6, moe_ffn_hidden_size=100, moe_router_topk=3, moe_aux_loss_coeff=0.03,
    ),
    "qwen3_moe": dict(
        num_moe_experts=6, moe_ffn_hidden_size=28, moe_router_topk=4, moe_aux_loss_coeff=0.0,
        norm_topk_prob=False,
    ),
}  # fmt: skip
"""Of ModelConfig, for architectures that have experts."""


def make_model(
    name: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    **more: Any,
) -> Path:
    """Write the random model ``name`` to ``folder`` with transformers' save_pretrained."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, changes = MODELS[name]
    torch.manual_seed(sum(name.encode()))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**_SIZES, **changes, **more})
    )
    for parameter_name, parameter in model.named_parameters():
        spread, centre = (0.3, 1.0) if "norm" in parameter_name else (0.12, 0.0)
        parameter.data.normal_(centre, spread)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file of ``folder``."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_same_tensors(one: Path, other: Path) -> None:
    """Names, shapes, dtypes and bits."""
    a, b = all_tensors(one), all_tensors(other)
    assert a.keys() == b.keys() and len(a) > 30
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def random_tokens(length: int, rows: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCABULARY, (rows, length), generator=generator)
