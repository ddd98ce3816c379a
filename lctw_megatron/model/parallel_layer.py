"""Phi's layer: attention and MLP side by side, both on the output of one norm.

megatron-core's layer runs one after the other, each on a norm of its own, which TransformerEngine
fuses into the linear layer behind it.
"""

from typing import Any

from torch import Tensor

from lctw_megatron.platform.cpu import patch_megatron

patch_megatron()  # before the class below is derived from megatron-core's

from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.transformer import TransformerLayer  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402


class ParallelLayer(TransformerLayer):
    """x + attention(norm(x)) + MLP(norm(x)), dropout on the outputs of both."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [s, b, h], or its TP part under SP. The other arguments of megatron-core's
        layers are for inference, cross attention and mixtures of experts."""
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attention(
            normed, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb
        )
        if self.recompute_mlp:
            expanded = tensor_parallel.checkpoint(self._expand, False, normed), None
        else:
            expanded = self.mlp(normed)
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            hidden_states = add(attended, hidden_states, self.hidden_dropout)
            return add(expanded, hidden_states, self.hidden_dropout), None

    def _expand(self, normed: Tensor) -> Tensor:
        """With the bias, which the MLP gives beside its output: a parameter that comes out of what
        is recomputed would be given the recomputation as its history, and go round in circles."""
        output, bias = self.mlp(normed)
        return output + bias


def side_by_side(layer: Any, norm: Any) -> None:
    """Turn megatron-core's specification ``layer`` of a layer, of its own or TransformerEngine's
    parts, into that of a ``ParallelLayer`` with ``norm``."""
    parts = layer.submodules
    layer.module = ParallelLayer
    parts.input_layernorm, parts.pre_mlp_layernorm = norm, IdentityOp
    attention, mlp = parts.self_attention.submodules, parts.mlp
    # From 0.18 on the MLP is no specification but a partial function.
    mlp = mlp.keywords["submodules"] if hasattr(mlp, "keywords") else mlp.submodules
    attention.linear_qkv, mlp.linear_fc1 = _plain(attention.linear_qkv), _plain(mlp.linear_fc1)
    # The name of a fused norm, which other layers' have in checkpoints of both kinds of parts.
    fused = "self_attention.linear_qkv.layer_norm_"
    parts.sharded_state_dict_keys_map = {
        f"input_layernorm.{name}": fused + name for name in ("weight", "bias")
    }


def _plain(linear: Any) -> Any:
    """The linear layer without a norm inside."""
    if linear is tensor_parallel.ColumnParallelLinear:
        return linear
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    return TEColumnParallelLinear
