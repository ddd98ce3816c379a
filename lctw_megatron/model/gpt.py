"""megatron-core's model with a per-token loss that never holds the logits."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from lctw_megatron.platform.cpu import patch_megatron

patch_megatron()  # before the classes below are derived from megatron-core's

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.moe.moe_layer import BaseMoELayer  # noqa: E402

from lctw_megatron.config.layout_rules import loss_block_rows, padded_vocabulary  # noqa: E402
from lctw_megatron.config.schema import LayoutConfig, ModelConfig  # noqa: E402
from lctw_megatron.errors import InputError  # noqa: E402
from lctw_megatron.model import spec  # noqa: E402
from lctw_megatron.model.cross_entropy import (  # noqa: E402
    IGNORE,
    row_block_cross_entropy,
    row_block_is_likeliest,
)
from lctw_megatron.model.initialize import initialize_weights  # noqa: E402
from lctw_megatron.model.rotary import frequencies  # noqa: E402
from lctw_megatron.model.router import balance_routers  # noqa: E402


class _HandThrough(tensor_parallel.ColumnParallelLinear):
    """The output layer: logits, or, while labels are given, its input untouched.

    In all supported versions GPTModel's forward (as its successor HybridModel's) ends with
    `self.output_layer(hidden_states, ...)` and, given labels, with
    `self.compute_language_model_loss(labels, <what the output layer returned>)`. Handing the hidden
    states through lets the second compute the loss without logits; no forward is copied.
    """

    hands_through = False

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if self.hands_through:
            return input_, None
        return super().forward(input_, *args, **kwargs)


class PerTokenLossMixin:
    """Returns per-token losses [b, s] when labels are given, logits [b, s, padded vocabulary] if
    not; losses [2, b, s] with ``likeliest``, whose second part is 1 where the label is the
    likeliest token, else 0.
    """

    true_vocab_size: int
    loss_block_rows: int
    _likeliest = False
    _live_rows: Tensor | None = None
    _zero_gradients = True
    takes_boundaries: bool
    """Whether all layers have our core attention, which knows piece boundaries."""

    def use_row_block_loss(
        self, true_vocab_size: int, loss_block_rows: int, head_bias: bool = False
    ) -> None:
        """Prepare the finished model. Padding columns of the vocabulary get no probability.
        head_bias: gives the output layer the bias that megatron-core builds it without."""
        self.true_vocab_size = true_vocab_size
        self.loss_block_rows = loss_block_rows
        if self.post_process:  # type: ignore[attr-defined]
            layer: Any = self.output_layer  # type: ignore[attr-defined]
            layer.__class__ = _HandThrough
            if head_bias:
                bias = torch.empty(layer.output_size_per_partition, dtype=layer.config.params_dtype)
                layer.bias = torch.nn.Parameter(bias)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        likeliest: bool = False,
        live_rows: Tensor | None = None,
        zero_gradients: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """attention_mask: the piece boundaries [b, P+1], or None where sequences are one piece.
        live_rows: those of the labels (device_batch.live_rows); None: looked for. zero_gradients:
        whether losses may get a gradient of 0, whose rows the backward then looks for to skip them.
        To look for rows on a GPU makes the host wait."""
        self._likeliest = likeliest
        self._live_rows, self._zero_gradients = live_rows, zero_gradients
        if attention_mask is not None and not self.takes_boundaries:
            raise ValueError("piece boundaries given to a model that was built with packed=False")
        if self.post_process:  # type: ignore[attr-defined]
            self.output_layer.hands_through = labels is not None  # type: ignore[attr-defined]
        if labels is not None and self.config.num_moe_experts:  # type: ignore[attr-defined]
            kwargs["padding_mask"] = labels == IGNORE  # what does not count in the balance
        return super().forward(  # type: ignore[misc]
            input_ids, position_ids, attention_mask, labels=labels, **kwargs
        )

    def compute_language_model_loss(self, labels: Tensor, hidden: Tensor) -> Tensor:
        """labels [b, s] (IGNORE: loss 0, no work); hidden [s, b, h], or its TP part under SP."""
        group = self.pg_collection.tp  # type: ignore[attr-defined]
        # Both mappings sum the gradient of hidden over the TP ranks in the backward.
        if self.config.sequence_parallel:  # type: ignore[attr-defined]
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=group)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=group)
        if self.share_embeddings_and_output_weights:  # type: ignore[attr-defined]
            weight = self.shared_embedding_or_output_weight()  # type: ignore[attr-defined]
        else:
            weight = self.output_layer.weight  # type: ignore[attr-defined]
        bias = self.output_layer.bias  # type: ignore[attr-defined]
        first_column = group.rank() * weight.shape[0]
        live = min(max(self.true_vocab_size - first_column, 0), weight.shape[0])
        if live < weight.shape[0]:
            weight = weight[:live]
            bias = bias if bias is None else bias[:live]
        arguments = (
            hidden.flatten(0, 1), weight, labels.t().flatten(), first_column, group,
            self.loss_block_rows, self._live_rows, bias,
        )  # fmt: skip
        found = [row_block_cross_entropy(*arguments, zero_gradients=self._zero_gradients)]
        if self._likeliest:
            found.append(row_block_is_likeliest(*arguments))
        found = [values.view(labels.shape[1], labels.shape[0]).t() for values in found]
        return torch.stack(found) if self._likeliest else found[0]


class TokenWeightedGPT(PerTokenLossMixin, GPTModel):
    """GPTModel whose forward(..., labels=...) returns float32 losses [b, s]."""


def _gpt_chunk(
    model: ModelConfig, layout: LayoutConfig, config: Any, packed: bool, **arguments: Any
) -> TokenWeightedGPT:
    layers = spec.block_spec(model, config, arguments["vp_stage"], packed)
    return TokenWeightedGPT(config=config, transformer_layer_spec=layers, **arguments)


class _Rotary(RotaryEmbedding):
    """megatron-core's, with the frequencies of model/rotary.py. The whole sequence's length reaches
    it under every layout: `dynamic` depends on it."""

    def __init__(self, model: ModelConfig, config: Any, group: Any) -> None:
        super().__init__(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_base=model.rope_theta,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=group,
        )
        self.model = model

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        self.inv_freq: Tensor = frequencies(self.model, max_seq_len, device=self.inv_freq.device)
        return super().get_emb(max_seq_len, offset)


def _mark_tensor_parallel(chunk: torch.nn.Module) -> None:
    """Mark the parameters that are split over TP ranks, so that the gradient norm counts all parts.

    megatron-core sets these marks only where it initialises the weights itself, which
    model/initialize.py does instead.
    """
    split = {
        tensor_parallel.ColumnParallelLinear: {"weight": 0, "bias": 0},
        tensor_parallel.RowParallelLinear: {"weight": 1},
        tensor_parallel.VocabParallelEmbedding: {"weight": 0},
    }
    for module in chunk.modules():
        for kind, dimensions in split.items():
            for name, dimension in dimensions.items() if isinstance(module, kind) else ():
                parameter = getattr(module, name, None)
                if parameter is not None and not hasattr(parameter, "tensor_model_parallel"):
                    tensor_parallel.set_tensor_model_parallel_attributes(
                        parameter, is_parallel=True, dim=dimension, stride=1
                    )


def _mark_experts(chunk: TokenWeightedGPT) -> None:
    """Give experts gradient buffers and an optimizer of their own, over the ranks that hold copies
    of the same experts.

    megatron-core does so only where expert_model_parallel_size is above 1. But experts are whole on
    every tensor-parallel rank too, each of which sees other tokens. And each rank's are counted in
    the gradient norm.
    """
    for layer in chunk.modules():
        for parameter in layer.experts.parameters() if isinstance(layer, BaseMoELayer) else ():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


_ALONE: dict[int, Any] = {}


def _alone_group() -> Any:
    """A process group of this rank only. Made on all ranks at once, once per process."""
    rank = torch.distributed.get_rank()
    if rank not in _ALONE:
        for other in range(torch.distributed.get_world_size()):
            group = torch.distributed.new_group([other])
            if other == rank:
                _ALONE[rank] = group
    return _ALONE[rank]


def build_model(
    model: ModelConfig,
    layout: LayoutConfig,
    *,
    max_sequence_length: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int | None,
    packed: bool = True,
    fields: Mapping[str, Any] = MappingProxyType({}),
    kind: Literal["gpt", "hybrid"] = "gpt",
) -> list[Any]:
    """This rank's model chunks (one, or `virtual_pipeline` of them), on ``device``.

    seed: fills the weights, the same under every layout; None leaves them unset, for loading.
    packed: whether forwards will be given piece boundaries. False lets TransformerEngine's own
    attention run, where it is there. fields: a recipe's `megatron.transformer`. kind: GPTModel or
    HybridModel, which megatron-core has from 0.18 on (model/hybrid.py).
    The process groups must exist (platform.world.initialize).
    """
    if model.vocab_size is None:
        raise InputError("model.vocab_size: not set and no tokenizer gives it; set it")
    make, sublayers = _gpt_chunk, 1
    if kind == "hybrid":
        from lctw_megatron.model.hybrid import SUBLAYERS as sublayers
        from lctw_megatron.model.hybrid import hybrid_chunk as make
    config = spec.transformer_config(model, layout, dtype, packed, fields, sublayers)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    block_rows = loss_block_rows(layout, model.vocab_size, device.type)
    stages = range(layout.virtual_pipeline) if layout.virtual_pipeline else [None]
    chunks = []
    for stage in stages:
        chunk = make(
            model,
            layout,
            config,
            packed,
            vocab_size=padded_vocabulary(model.vocab_size),
            max_sequence_length=max_sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=stage is None, vp_stage=stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=stage is None, vp_stage=stage
            ),
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rope_theta,
            pg_collection=groups,
            vp_stage=stage,
        )
        chunk.rotary_pos_emb = _Rotary(model, config, groups.cp)
        if layout.context > 1:
            chunk.rotary_pos_emb_alone = _Rotary(model, config, _alone_group())
        chunk.takes_boundaries = spec.has_own_core_attention(model, dtype, packed)
        chunk.use_row_block_loss(model.vocab_size, block_rows, head_bias=model.parallel_block)
        if chunk.pre_process and model.embedding_dropout is not None:
            chunk.embedding.embedding_dropout.p = model.embedding_dropout
        _mark_tensor_parallel(chunk)
        _mark_experts(chunk)
        chunk.to(device)
        balance_routers(chunk, model)
        chunks.append(chunk)
    if seed is not None:
        initialize_weights(chunks, model, seed)
    return chunks


@contextmanager
def without_dropout(chunks: list[Any]) -> Iterator[None]:
    """Inside, chunks that train do not. Others are left alone: to walk through 30 layers twice
    takes the host 8 ms."""
    in_training = [chunk for chunk in chunks if chunk.training]
    for chunk in in_training:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in in_training:
            chunk.train()


@contextmanager
def without_context_parallel(chunks: list[Any]) -> Iterator[None]:
    """Inside, every context rank runs whole sequences of its own (short windows need no CP)."""
    config = chunks[0].config
    size = config.context_parallel_size
    if size == 1:
        yield
        return
    attentions = [
        module
        for chunk in chunks
        for module in chunk.modules()
        if hasattr(module, "set_context_parallel_group")  # TransformerEngine's
    ]
    config.context_parallel_size = 1
    for chunk in chunks:
        chunk.rotary_pos_emb, chunk.rotary_pos_emb_alone = (
            chunk.rotary_pos_emb_alone,
            chunk.rotary_pos_emb,
        )
    restored = [(a.cp_group, a.cp_global_ranks, a.cp_stream, a.cp_comm_type) for a in attentions]
    for attention in attentions:
        attention.set_context_parallel_group(None, None, None, "p2p")
    try:
        yield
    finally:
        config.context_parallel_size = size
        for chunk in chunks:
            chunk.rotary_pos_emb, chunk.rotary_pos_emb_alone = (
                chunk.rotary_pos_emb_alone,
                chunk.rotary_pos_emb,
            )
        for attention, arguments in zip(attentions, restored, strict=True):
            attention.set_context_parallel_group(*arguments)
