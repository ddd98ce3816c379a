"""How many parameters the parts of a model have. Pure arithmetic on a ModelConfig."""

from dataclasses import dataclass

from lctw_megatron.config.schema import ModelConfig


@dataclass(frozen=True)
class LayerSizes:
    """One transformer layer. Tensor parallelism splits all of it but the norms and what comes with
    experts, which expert parallelism shares out."""

    query: int
    """Width of the queries, and of the attention's output: heads x head width."""
    key_value: int
    """Width of the keys, and of the values: query groups x head width."""
    matrices: int
    """Parameters of the projections: query, key, value, output and, without experts, gate, up,
    down."""
    biases: int
    norms: int
    output_biases: int
    """Of the projections back to hidden_size; tensor parallelism splits them no more than norms."""
    router: int
    """Parameters of the matrix that chooses experts; 0 without them, like the next two."""
    expert: int
    """Parameters of one expert: gate, up, down."""
    experts: int
    """Of all experts."""
    active: int
    """Parameters of the matrices that one token passes."""


def head_width(model: ModelConfig) -> int:
    """Of queries, keys and values."""
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def rotary_width(model: ModelConfig) -> int:
    """How much of a head positions turn; rounded as transformers does."""
    return int(head_width(model) * model.partial_rotary_factor)


def norm_size(model: ModelConfig) -> int:
    """Parameters of one norm over hidden_size."""
    return model.hidden_size * (2 if model.parallel_block else 1)


def forward_tokens(model: ModelConfig, device: str) -> int:
    """How many tokens a forward without gradients takes at once, unless told: on a GPU (``device``
    "cuda") 16,384 to 65,536, so many that a layer's widest bf16 tensors (gate, up, their product
    and four of the hidden size) take a GiB. Launching the kernels of a small model takes the host
    longer than 16,384 tokens take the GPU. On a CPU 16,384."""
    if device != "cuda":
        return 16384
    experts = model.moe_router_topk if model.num_moe_experts else 1
    widest = 3 * experts * expert_width(model) + 4 * model.hidden_size
    tokens = 2**30 // (2 * widest)
    return min(max(1 << tokens.bit_length() - 1, 16384), 65536)


def expert_width(model: ModelConfig) -> int:
    """Of an expert's gate and up projections; a dense model's MLP is its one expert."""
    return model.moe_ffn_hidden_size or model.ffn_hidden_size


def layer_sizes(model: ModelConfig) -> LayerSizes:
    """The sizes of one layer of ``model``."""
    heads = model.num_attention_heads
    width = head_width(model)
    query, key_value = heads * width, (model.num_query_groups or heads) * width
    hidden, ffn, phi = model.hidden_size, model.ffn_hidden_size, model.parallel_block
    number = model.num_moe_experts or 0
    matrices = hidden * (2 * query + 2 * key_value)
    mlp = (2 if phi else 3) * hidden * expert_width(model)
    router = number * hidden
    if not number:
        matrices += mlp
    return LayerSizes(
        query=query,
        key_value=key_value,
        matrices=matrices,
        biases=(query + 2 * key_value if model.qkv_bias else 0) + (ffn if phi else 0),
        norms=(1 if phi else 2) * norm_size(model) + (2 * width if model.qk_norm else 0),
        output_biases=2 * hidden if phi else 0,
        router=router,
        expert=mlp if number else 0,
        experts=number * mlp,
        active=matrices + (router + model.moe_router_topk * mlp if number else 0),
    )


def parameters(model: ModelConfig) -> int:
    """All parameters, without the padding of the vocabulary; embedding and head once if tied."""
    layer = layer_sizes(model)
    return _with_layers(model, layer.matrices + layer.router + layer.experts)


def active_parameters(model: ModelConfig) -> int:
    """Those that one token uses: ``parameters`` less the experts that it does not go to."""
    return _with_layers(model, layer_sizes(model).active)


def _with_layers(model: ModelConfig, matrices: int) -> int:
    """Parameters of a model with so many in the matrices of each layer."""
    layer, vocabulary = layer_sizes(model), model.vocab_size or 0
    embeddings = 1 if model.tie_word_embeddings else 2
    return (
        embeddings * vocabulary * model.hidden_size
        + model.num_layers * (matrices + layer.biases + layer.norms + layer.output_biases)
        + norm_size(model)
        + (vocabulary if model.parallel_block else 0)
    )
