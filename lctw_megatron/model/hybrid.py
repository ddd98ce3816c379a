"""HybridModel, megatron-core's successor of GPTModel, as the same transformer (from 0.18 on).

It has attention and MLP (or experts) in layers of their own, which a pattern names one by one. Here
every layer of GPTModel is two of these, so the arithmetic is the same; and the stack names them in
checkpoints as GPTModel does, so a checkpoint of one is one of the other: weights and optimizer
state, under every layout, for import and export too. Upstream's HybridModel reads that form as well
(megatron.core.dist_checkpointing.gpt_checkpoint_interop, 0.19).
"""

from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import sharded_state_dict_default

from lctw_megatron.config.schema import LayoutConfig, ModelConfig
from lctw_megatron.model import spec
from lctw_megatron.model.gpt import PerTokenLossMixin
from lctw_megatron.platform.cpu import patch_megatron

patch_megatron()  # the modules that these imports have loaded

SUBLAYERS = 2
"""Layers of HybridModel for one of the model's."""


class _Stack(HybridStack):
    """HybridStack with any final norm (its own is TransformerEngine's) and GPTModel's names."""

    def __init__(self, config: Any, final_norm: Any, **arguments: Any) -> None:
        super().__init__(config, post_layer_norm=False, **arguments)
        if self.post_process:
            self.post_layer_norm = True
            self.final_norm = final_norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> Any:
        """As TransformerBlock's: the layers stacked along a new first axis."""
        state: dict[str, Any] = {}
        for number, layer in enumerate(self.layers):
            own, place = f"{prefix}layers.{number}.", (layer.layer_number - 1) // SUBLAYERS
            axis = (0, place, self.config.num_layers // SUBLAYERS)
            part = layer.sharded_state_dict(own, [axis], metadata)
            replace_prefix_for_sharding(part, own, f"{prefix}layers.")
            state.update(part)
        if self.post_process:
            own = f"{prefix}final_norm."
            part = sharded_state_dict_default(
                self.final_norm, own, sharded_offsets, metadata, tp_group=self.tp_group
            )
            replace_prefix_for_sharding(part, own, f"{prefix}final_layernorm.")
            state.update(part)
        return state


class TokenWeightedHybrid(PerTokenLossMixin, HybridModel):
    """HybridModel whose forward(..., labels=...) returns float32 losses [b, s]."""

    def sharded_state_dict(self, prefix: str = "", *arguments: Any, **more: Any) -> Any:
        state = super().sharded_state_dict(prefix, *arguments, **more)
        state.pop(f"{prefix}output_layer._extra_state", None)  # empty; GPTModel stores none
        return state


def layer_pattern(model: ModelConfig, layout: LayoutConfig) -> str:
    """The layers of all pipeline stages in the order of the forward pass: `*-*-|*-*-`, or
    `*E*E|*E*E` with experts."""
    stages = layout.pipeline * (layout.virtual_pipeline or 1)
    layer = Symbols.ATTENTION + (Symbols.MOE if model.num_moe_experts else Symbols.MLP)
    return Symbols.PIPE.join([layer * (model.num_layers // stages)] * stages)


def hybrid_chunk(
    model: ModelConfig, layout: LayoutConfig, config: Any, packed: bool, **arguments: Any
) -> TokenWeightedHybrid:
    layer, norm = spec.layer_spec(model, config, packed)
    return TokenWeightedHybrid(
        config=config,
        hybrid_stack_spec=stack_spec(layer, norm),
        hybrid_layer_pattern=layer_pattern(model, layout),
        **arguments,
    )


def stack_spec(layer: Any, norm: Any) -> Any:
    """layer: GPTModel's, of which attention and MLP are taken apart (config/rules.py refuses those
    that cannot be). norm: the last one."""
    whole = layer.submodules
    attention = replace(whole, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp)
    mlp = replace(
        whole, input_layernorm=IdentityOp, self_attention=IdentityOp, self_attn_bda=IdentityFuncOp
    )
    second = ModuleSpec(module=layer.module, submodules=mlp)
    return ModuleSpec(
        module=_Stack,
        params={"final_norm": norm},
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=layer.module, submodules=attention),
            mlp_layer=second,
            moe_layer=second,
        ),
    )
