"""From a mapping table and a model to tensors: which rows of what lie where."""

from collections.abc import Iterator
from dataclasses import dataclass

from lctw_megatron.config.layout_rules import padded_vocabulary
from lctw_megatron.config.model_sizes import head_width
from lctw_megatron.config.schema import ModelConfig
from lctw_megatron.conversion.architectures import Row, architecture

LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Block:
    """Rows (first axis) ``hf_row``... of a Hugging Face tensor are rows ``row``... of ours."""

    hf_row: int
    row: int
    rows: int


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor inside a stored tensor. Its blocks are ordered and cover it."""

    name: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A checkpoint tensor, or one layer of one: layers are stacked along a new first axis.

    shape is that of one layer. Rows that no part covers are the padding of the vocabulary: zero.
    """

    key: str
    layer: int | None
    layers: int
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def global_shape(self) -> tuple[int, ...]:
        return self.shape if self.layer is None else (self.layers, *self.shape)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where this layer begins in the stored tensor of global_shape."""
        zeros = (0,) * len(self.shape)
        return zeros if self.layer is None else (self.layer, *zeros)

    @property
    def box(self) -> tuple[int, ...]:
        """The extent of this layer in the stored tensor of global_shape."""
        return self.shape if self.layer is None else (1, *self.shape)

    @property
    def covered_rows(self) -> int:
        return sum(part.shape[0] for part in self.parts)


def stored_tensors(model: ModelConfig) -> Iterator[StoredTensor]:
    """All tensors of ``model`` (vocab_size set), in the order of the forward pass."""
    table = architecture(model)
    sizes = _sizes(model)
    for row in table.first:
        yield _stored(row, sizes, model, "", "", None)
    for layer in range(model.num_layers):
        for row in table.layer:
            yield _stored(row, sizes, model, LAYERS, f"model.layers.{layer}.", layer)
    for row in table.last + (() if model.tie_word_embeddings else table.head):
        yield _stored(row, sizes, model, "", "", None)


def query_groups(model: ModelConfig) -> int:
    return model.num_query_groups or model.num_attention_heads


def _sizes(model: ModelConfig) -> dict[str, int]:
    assert model.vocab_size is not None
    width = head_width(model)
    return {
        "h": model.hidden_size,
        "f": model.ffn_hidden_size,
        "v": model.vocab_size,
        "q": model.num_attention_heads * width,
        "k": query_groups(model) * width,
        "d": width,
    }


def _stored(
    row: Row,
    sizes: dict[str, int],
    model: ModelConfig,
    prefix: str,
    hf_prefix: str,
    layer: int | None,
) -> StoredTensor:
    shapes = {name: tuple(sizes[a] for a in axes.split()) for name, axes in row.parts.items()}
    heights = [shape[0] for shape in shapes.values()]
    groups = query_groups(model) if row.per_group else 1
    parts = []
    above = 0  # rows of the parts before this one, within a group
    for (name, shape), height in zip(shapes.items(), heights, strict=True):
        rows = height // groups
        blocks = tuple(
            Block(hf_row=group * rows, row=group * (sum(heights) // groups) + above, rows=rows)
            for group in range(groups)
        )
        parts.append(Part(hf_prefix + name, shape, blocks))
        above += rows
    total = sum(heights)
    if next(iter(row.parts.values())).startswith("v"):
        total = padded_vocabulary(total)
    first = next(iter(shapes.values()))
    return StoredTensor(
        key=prefix + row.key,
        layer=layer,
        layers=model.num_layers,
        shape=(total, *first[1:]),
        parts=tuple(parts),
    )
