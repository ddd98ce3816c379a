"""The mapping tables: one class per Hugging Face architecture.

A table row says which Hugging Face tensors lie, one below the other, in one tensor of the
checkpoint. Axes are written with one letter each:

    h  hidden_size                        q  attention heads x head width
    f  ffn_hidden_size                    k  query groups (key/value heads) x head width
    v  vocab_size                         d  head width
    e  experts                            x  width of one expert

Checkpoint names are those that megatron-core gives its sharded state dict. They are the same for
TransformerEngine's layers and its own: the norm that TransformerEngine fuses into the following
linear layer (parameter `linear_qkv.layer_norm_weight`) is a module of its own in the local layers
(`input_layernorm.weight`), but megatron-core stores it under the fused name, too
(`sharded_state_dict_keys_map`).

Another architecture is another class here, and its place in ``ARCHITECTURES``; the options of its
config.json that change the arithmetic are in the class, too.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from lctw_megatron.config.model_sizes import expert_width
from lctw_megatron.config.schema import ModelConfig
from lctw_megatron.errors import InputError


@dataclass(frozen=True)
class Row:
    """One checkpoint tensor: its name and the Hugging Face tensors in it, with their axes.

    per_group: the tensors are not simply stacked; for each query group in turn come that group's
    query heads, its key head and its value head.
    """

    key: str
    parts: dict[str, str]
    per_group: bool = False


@dataclass(frozen=True)
class Option:
    """A field of config.json that changes the arithmetic: its default and what we can compute."""

    default: Any
    supported: tuple[Any, ...]


_NO_SLIDING_WINDOW = {
    "use_sliding_window": Option(False, (False, None)),
    "layer_types": Option(None, (None, "full_attention")),
}


class Llama:
    """Llama 2, 3, 3.1, 3.2 and everything published as LlamaForCausalLM."""

    model_type: ClassVar[str] = "llama"
    hf_class: ClassVar[str] = "LlamaForCausalLM"
    flags: ClassVar[dict[str, bool]] = {"qkv_bias": False, "qk_norm": False}
    """Fields of ModelConfig that the architecture fixes."""
    experts: ClassVar[dict[str, tuple[str, Any]]] = {}
    """Field of ModelConfig about experts: config.json's name of it, and transformers' default."""
    head_dim: ClassVar[int | None] = None
    """Head width where config.json has none; None: hidden_size / num_attention_heads."""
    key_value_heads: ClassVar[int | None] = None
    """Key/value heads where config.json says nothing; None: as many as attention heads."""
    max_position_embeddings: ClassVar[int] = 2048
    """Where config.json says nothing."""
    epsilon: ClassVar[tuple[str, float]] = ("rms_norm_eps", 1e-6)
    """The norms' field of config.json, and what it is where config.json says nothing."""
    partial_rotary_factor: ClassVar[float | None] = None
    """Where config.json says nothing; None: heads are turned whole."""
    dropouts: ClassVar[dict[str, str]] = {"attention_dropout": "attention_dropout"}
    """Fields of config.json, and ours, 0 where config.json says nothing."""
    activations: ClassVar[tuple[str, ...]] = ("silu", "swish")
    """Names of the one activation; the first is written, and meant where config.json has none."""
    rope_theta: ClassVar[float] = 10000.0
    """Where config.json says nothing."""
    options: ClassVar[dict[str, Option]] = {
        "attention_bias": Option(False, (False, None)),
        "mlp_bias": Option(False, (False, None)),
    }
    written: ClassVar[dict[str, Any]] = {
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
    }
    """Fields of an exported config.json beside those that all architectures share."""

    first: ClassVar[tuple[Row, ...]] = (
        Row("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "v h"}),
    )
    layer: ClassVar[tuple[Row, ...]] = (
        Row("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": "h"}),
        Row(
            "self_attention.linear_qkv.weight",
            {
                "self_attn.q_proj.weight": "q h",
                "self_attn.k_proj.weight": "k h",
                "self_attn.v_proj.weight": "k h",
            },
            per_group=True,
        ),
        Row("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "h q"}),
        Row("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": "h"}),
        Row("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": "f h", "mlp.up_proj.weight": "f h"}),
        Row("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "h f"}),
    )
    """Names inside `decoder.layers.` and `model.layers.<layer>.`."""
    expert: ClassVar[tuple[Row, ...]] = ()
    """As ``layer``, for each expert, whose number stands for {} in the names."""
    last: ClassVar[tuple[Row, ...]] = (
        Row("decoder.final_layernorm.weight", {"model.norm.weight": "h"}),
    )
    head: ClassVar[tuple[Row, ...]] = (Row("output_layer.weight", {"lm_head.weight": "v h"}),)
    """Left out where embedding and output layer share their weights."""


def _with_bias(key: str, parts: dict[str, str], per_group: bool = False) -> tuple[Row, Row]:
    """The rows of weight and bias of modules; the axis of a bias is the first of the weight."""
    return (
        Row(key.format("weight"), {f"{p}.weight": a for p, a in parts.items()}, per_group),
        Row(key.format("bias"), {f"{p}.bias": a[0] for p, a in parts.items()}, per_group),
    )


class Mistral(Llama):
    """Mistral without its sliding window (7B v0.2 and later)."""

    model_type = "mistral"
    hf_class = "MistralForCausalLM"
    key_value_heads = 8
    max_position_embeddings = 131072
    # transformers reads a missing sliding_window as 4096.
    options = {"sliding_window": Option(4096, (None,))}
    written = {"sliding_window": None}


class Qwen2(Llama):
    """Qwen2 and Qwen2.5: bias on query, key and value."""

    model_type = "qwen2"
    hf_class = "Qwen2ForCausalLM"
    flags = {"qkv_bias": True, "qk_norm": False}
    key_value_heads = 32
    max_position_embeddings = 32768
    options = _NO_SLIDING_WINDOW
    written = {"use_sliding_window": False}
    layer = (
        *Llama.layer,
        Row(
            "self_attention.linear_qkv.bias",
            {
                "self_attn.q_proj.bias": "q",
                "self_attn.k_proj.bias": "k",
                "self_attn.v_proj.bias": "k",
            },
            per_group=True,
        ),
    )


class Qwen3(Llama):
    """Qwen3 (dense): RMSNorm on the queries and keys of every head."""

    model_type = "qwen3"
    hf_class = "Qwen3ForCausalLM"
    flags = {"qkv_bias": False, "qk_norm": True}
    head_dim: ClassVar[int | None] = 128
    key_value_heads = 32
    max_position_embeddings = 32768
    options = {"attention_bias": Option(False, (False, None)), **_NO_SLIDING_WINDOW}
    written = {"attention_bias": False, "use_sliding_window": False}
    layer = (
        *Llama.layer,
        Row("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "d"}),
        Row("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "d"}),
    )


class Phi(Llama):
    """Phi-1, 1.5 and 2: attention and MLP side by side on one LayerNorm, biases everywhere."""

    model_type = "phi"
    hf_class = "PhiForCausalLM"
    flags = {"qkv_bias": True, "qk_norm": False}
    epsilon = ("layer_norm_eps", 1e-5)
    partial_rotary_factor = 0.5
    dropouts = {
        "attention_dropout": "attention_dropout",
        "resid_pdrop": "hidden_dropout",
        "embd_pdrop": "embedding_dropout",
    }
    activations = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
    options = {"qk_layernorm": Option(False, (False, None))}
    written = {"qk_layernorm": False}
    layer = (
        *_with_bias("self_attention.linear_qkv.layer_norm_{}", {"input_layernorm": "h"}),
        *_with_bias(
            "self_attention.linear_qkv.{}",
            {"self_attn.q_proj": "q h", "self_attn.k_proj": "k h", "self_attn.v_proj": "k h"},
            per_group=True,
        ),
        *_with_bias("self_attention.linear_proj.{}", {"self_attn.dense": "h q"}),
        *_with_bias("mlp.linear_fc1.{}", {"mlp.fc1": "f h"}),
        *_with_bias("mlp.linear_fc2.{}", {"mlp.fc2": "h f"}),
    )
    last = (
        *_with_bias("decoder.final_layernorm.{}", {"model.final_layernorm": "h"}),
        Row("output_layer.bias", {"lm_head.bias": "v"}),
    )


def _with_experts(table: type[Llama], block: str) -> tuple[Row, ...]:
    """The rows of a layer of ``table`` whose MLP is `block`, with a matrix that chooses experts.
    The norm before it is a module of its own here, whichever layers there are."""
    rows = [row for row in table.layer if not row.key.startswith("mlp.")]
    return (
        *rows,
        Row("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": "h"}),
        Row("mlp.router.weight", {f"{block}.gate.weight": "e h"}),
    )


def _expert(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    name = f"{block}.experts.{{}}."
    fc1 = {f"{name}{gate}.weight": "x h", f"{name}{up}.weight": "x h"}
    return (
        Row("mlp.experts.experts.linear_fc1.weight", fc1),
        Row("mlp.experts.experts.linear_fc2.weight", {f"{name}{down}.weight": "h x"}),
    )


class Mixtral(Mistral):
    """Mixtral 8x7B and 8x22B: experts in every layer, the weights of a token's scaled to sum 1."""

    model_type = "mixtral"
    hf_class = "MixtralForCausalLM"
    epsilon = ("rms_norm_eps", 1e-5)
    rope_theta = 1e6
    experts = {
        "num_moe_experts": ("num_local_experts", 8),
        "moe_ffn_hidden_size": ("intermediate_size", None),
        "moe_router_topk": ("num_experts_per_tok", 2),
        "moe_aux_loss_coeff": ("router_aux_loss_coef", 0.001),
    }
    options = {
        "sliding_window": Option(None, (None,)),
        "router_jitter_noise": Option(0.0, (0.0, None)),
    }
    written = {"sliding_window": None, "router_jitter_noise": 0.0, "output_router_logits": False}
    layer = _with_experts(Llama, "block_sparse_moe")
    expert = _expert("block_sparse_moe", "w1", "w3", "w2")


class Qwen3MoE(Qwen3):
    """Qwen3-30B-A3B, 235B-A22B: experts in every layer. `intermediate_size`, the width of layers
    without them, goes through as it is."""

    model_type = "qwen3_moe"
    hf_class = "Qwen3MoeForCausalLM"
    key_value_heads = 4
    head_dim = None
    experts = {
        "num_moe_experts": ("num_experts", 128),
        "moe_ffn_hidden_size": ("moe_intermediate_size", 768),
        "moe_router_topk": ("num_experts_per_tok", 8),
        "norm_topk_prob": ("norm_topk_prob", False),
        "moe_aux_loss_coeff": ("router_aux_loss_coef", 0.001),
    }
    options = {
        **Qwen3.options,
        "decoder_sparse_step": Option(1, (1,)),
        "mlp_only_layers": Option(None, (None,)),
    }
    written = {
        **Qwen3.written, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "output_router_logits": False,
    }  # fmt: skip
    layer = _with_experts(Qwen3, "mlp")
    expert = _expert("mlp", "gate_proj", "up_proj", "down_proj")


ARCHITECTURES: dict[str, type[Llama]] = {
    table.model_type: table for table in (Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3MoE, Phi)
}


def architecture(model: ModelConfig) -> type[Llama]:
    """The table of ``model``. Raises InputError if the model has parts that the table lacks."""
    table = ARCHITECTURES[model.architecture]
    for field, value in _fixed(table).items():
        if _value(model, field) != value:
            fitting = [
                name
                for name, other in ARCHITECTURES.items()
                if all(_value(model, key) == wanted for key, wanted in _fixed(other).items())
            ]
            said = f"{field} {value}"
            if field == "num_moe_experts":
                said = "experts" if value else "none"
            raise InputError(
                f"model.{field} is {getattr(model, field)}, but a Hugging Face "
                f"{model.architecture} has {said}; "
                + (
                    f"use architecture {' or '.join(fitting)}"
                    if fitting
                    else "none fits all of the model's parts"
                )
            )
    if table is Mixtral and expert_width(model) != model.ffn_hidden_size:
        raise InputError(
            f"model.moe_ffn_hidden_size is {model.moe_ffn_hidden_size}, but a Hugging Face mixtral "
            f"has one width, and ffn_hidden_size is {model.ffn_hidden_size}; make them equal"
        )
    return table


def _fixed(table: type[Llama]) -> dict[str, bool]:
    fixed = table.flags | {"num_moe_experts": bool(table.experts)}
    return fixed if "norm_topk_prob" in table.experts else fixed | {"norm_topk_prob": True}


def _value(model: ModelConfig, field: str) -> bool:
    return bool(getattr(model, field))
