"""From our config to megatron-core's: TransformerConfig and layer specification."""

import importlib.util
from typing import Any

import torch

from lctw_megatron.config.schema import LayoutConfig, ModelConfig
from lctw_megatron.errors import InputError
from lctw_megatron.model.attention import SDPACoreAttention
from lctw_megatron.model.norms import RMSNorm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def uses_transformer_engine(model: ModelConfig) -> bool:
    """Whether `attention: auto | te | sdpa` means TransformerEngine's layers on this machine."""
    if model.attention == "te":
        if not has_transformer_engine():
            raise InputError(
                "model.attention: te, but transformer-engine is not installed; install it (extra "
                "`gpu`) or set model.attention=sdpa"
            )
        return True
    return model.attention == "auto" and torch.cuda.is_available() and has_transformer_engine()


def transformer_config(model: ModelConfig, layout: LayoutConfig, dtype: torch.dtype) -> Any:
    """The megatron-core TransformerConfig of a model under a layout, parameters in ``dtype``."""
    from megatron.core.transformer import TransformerConfig

    on_gpu = torch.cuda.is_available()
    recompute: dict[str, Any] = {}
    if layout.recompute == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif layout.recompute != "none":
        modules = {"selective": ["core_attn"], "mlp": ["mlp"]}[layout.recompute]
        recompute = {"recompute_granularity": "selective", "recompute_modules": modules}
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.kv_channels or model.hidden_size // model.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_method_std,
        # Weights are filled by model/initialize.py, the same under every layout.
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Sums of weighted losses, divided once by the targets of the global batch.
        calculate_per_token_loss=True,
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        # Fusions compile CUDA kernels.
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        # One message per tensor: gloo has no batched point-to-point communication.
        batch_p2p_comm=on_gpu,
        **recompute,
    )


def block_spec(model: ModelConfig, config: Any, vp_stage: int | None, packed: bool) -> Any:
    """The layers of this pipeline stage: TransformerEngine's, or megatron-core's with our parts.

    packed: the model will be given piece boundaries. TransformerEngine cuts packed sequences for
    context parallelism piece by piece, ours are cut as a whole, so that its layers then get our
    core attention (flash kernels, too).
    """
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    if uses_transformer_engine(model):
        layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=model.qk_norm
        )
        from megatron.core.extensions.transformer_engine import TENorm as norm

        if packed:
            layer.submodules.self_attention.submodules.core_attention = SDPACoreAttention
    else:
        layer = gpt_layer_specs.get_gpt_layer_local_spec(
            qk_layernorm=model.qk_norm, normalization="RMSNorm"
        )
        norm = RMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = SDPACoreAttention
        if model.qk_norm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)
