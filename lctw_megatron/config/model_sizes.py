"""How many parameters the parts of a model have. Pure arithmetic on a ModelConfig."""

from dataclasses import dataclass

from lctw_megatron.config.schema import ModelConfig


@dataclass(frozen=True)
class LayerSizes:
    """One transformer layer. Tensor parallelism splits all of it but the norms."""

    query: int
    """Width of the queries, and of the attention's output: heads x head width."""
    key_value: int
    """Width of the keys, and of the values: query groups x head width."""
    matrices: int
    """Parameters of the seven projections (query, key, value, output; gate, up, down)."""
    biases: int
    norms: int
    output_biases: int
    """Of the projections back to hidden_size; tensor parallelism splits them no more than norms."""


def head_width(model: ModelConfig) -> int:
    """Of queries, keys and values."""
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def rotary_width(model: ModelConfig) -> int:
    """How much of a head positions turn; rounded as transformers does."""
    return int(head_width(model) * model.partial_rotary_factor)


def norm_size(model: ModelConfig) -> int:
    """Parameters of one norm over hidden_size."""
    return model.hidden_size * (2 if model.parallel_block else 1)


def layer_sizes(model: ModelConfig) -> LayerSizes:
    """The sizes of one layer of ``model``."""
    heads = model.num_attention_heads
    width = head_width(model)
    query, key_value = heads * width, (model.num_query_groups or heads) * width
    hidden, ffn, phi = model.hidden_size, model.ffn_hidden_size, model.parallel_block
    return LayerSizes(
        query=query,
        key_value=key_value,
        matrices=hidden * (2 * query + 2 * key_value) + (2 if phi else 3) * hidden * ffn,
        biases=(query + 2 * key_value if model.qkv_bias else 0) + (ffn if phi else 0),
        norms=(1 if phi else 2) * norm_size(model) + (2 * width if model.qk_norm else 0),
        output_biases=2 * hidden if phi else 0,
    )


def parameters(model: ModelConfig) -> int:
    """All parameters, without the padding of the vocabulary; embedding and head once if tied."""
    layer = layer_sizes(model)
    embeddings = 1 if model.tie_word_embeddings else 2
    vocabulary = model.vocab_size or 0
    return (
        embeddings * vocabulary * model.hidden_size
        + model.num_layers * (layer.matrices + layer.biases + layer.norms + layer.output_biases)
        + norm_size(model)
        + (vocabulary if model.parallel_block else 0)
    )
