"""From a mapping table and a model to tensors: which rows of what lie where."""

from collections.abc import Iterator
from dataclasses import dataclass

from lctw_megatron.config.layout_rules import padded_vocabulary
from lctw_megatron.config.model_sizes import expert_width, head_width
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
    """A checkpoint tensor, or one layer of one, or one expert of a layer: layers are stacked along
    a new first axis, experts along a second.

    place: number of the layer and of the expert, as far as there are any; stack: how many there
    are. shape is that of one layer or expert. Rows that no part covers are the padding of the
    vocabulary: zero.
    """

    key: str
    place: tuple[int, ...]
    stack: tuple[int, ...]
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def layer(self) -> int | None:
        return self.place[0] if self.place else None

    @property
    def where(self) -> str:
        """The place as a reader counts: ", layer 2, expert 0"."""
        names = zip(("layer", "expert"), self.place, strict=False)
        return "".join(f", {name} {number}" for name, number in names)

    @property
    def global_shape(self) -> tuple[int, ...]:
        return (*self.stack, *self.shape)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where this layer or expert begins in the stored tensor of global_shape."""
        return (*self.place, *(0 for _ in self.shape))

    @property
    def box(self) -> tuple[int, ...]:
        """The extent of this layer or expert in the stored tensor of global_shape."""
        return (*(1 for _ in self.place), *self.shape)

    @property
    def covered_rows(self) -> int:
        return sum(part.shape[0] for part in self.parts)


def stored_tensors(model: ModelConfig) -> Iterator[StoredTensor]:
    """All tensors of ``model`` (vocab_size set), in the order of the forward pass."""
    table = architecture(model)
    sizes = _sizes(model)
    for row in table.first:
        yield _stored(row, sizes, model, "", "", ())
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        for row in table.layer:
            yield _stored(row, sizes, model, LAYERS, prefix, (layer,))
        for expert in range(model.num_moe_experts or 0):
            for row in table.expert:
                yield _stored(row, sizes, model, LAYERS, prefix, (layer, expert))
    for row in table.last + (() if model.tie_word_embeddings else table.head):
        yield _stored(row, sizes, model, "", "", ())


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
        "e": model.num_moe_experts or 0,
        "x": expert_width(model),
    }


def _stored(
    row: Row,
    sizes: dict[str, int],
    model: ModelConfig,
    prefix: str,
    hf_prefix: str,
    place: tuple[int, ...],
) -> StoredTensor:
    shapes = {
        name.format(*place[1:]): tuple(sizes[a] for a in axes.split())
        for name, axes in row.parts.items()
    }
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
        place=place,
        stack=(model.num_layers, model.num_moe_experts or 0)[: len(place)],
        shape=(total, *first[1:]),
        parts=tuple(parts),
    )
