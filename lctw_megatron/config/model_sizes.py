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


def expert_width(model: ModelConfig) -> int:
    """Of an expert's gate and up projections; a dense model's MLP is its one expert."""
    return model.moe_ffn_hidden_size or model.ffn_hidden_size


def layer_sizes(model: ModelConfig) -> LayerSizes:
    """The sizes of one layer of ``model``."""
    heads = model.num_attention_heads
    width = head_width(model)
    query, key_value = heads * width, (model.num_query_groups or heads) * width
    hidden, number = model.hidden_size, model.num_moe_experts or 0
    matrices, mlp = hidden * (2 * query + 2 * key_value), 3 * hidden * expert_width(model)
    router = number * hidden
    if not number:
        matrices += mlp
    return LayerSizes(
        query=query,
        key_value=key_value,
        matrices=matrices,
        biases=query + 2 * key_value if model.qkv_bias else 0,
        norms=2 * hidden + (2 * width if model.qk_norm else 0),
        router=router,
        expert=mlp if number else 0,
        experts=number * mlp,
        active=matrices + (router + model.moe_router_topk * mlp if number else 0),
    )


def parameters(model: ModelConfig) -> int:
    """All parameters, without the padding of the vocabulary; embedding and head once if tied."""
    layer = layer_sizes(model)
    every = layer.matrices + layer.biases + layer.norms + layer.router + layer.experts
    return _tables(model) + model.num_layers * every + model.hidden_size


def active_parameters(model: ModelConfig) -> int:
    """Those that one token uses: ``parameters`` less the experts that it does not go to."""
    layer = layer_sizes(model)
    every = layer.active + layer.biases + layer.norms
    return _tables(model) + model.num_layers * every + model.hidden_size


def _tables(model: ModelConfig) -> int:
    embeddings = 1 if model.tie_word_embeddings else 2
    return embeddings * (model.vocab_size or 0) * model.hidden_size
