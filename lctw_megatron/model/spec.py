"""From our config to megatron-core's: TransformerConfig and layer specification."""

import math
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from lctw_megatron.config.model_sizes import expert_width, head_width
from lctw_megatron.config.rope import attention_factor
from lctw_megatron.config.schema import LayoutConfig, ModelConfig
from lctw_megatron.errors import InputError
from lctw_megatron.model.attention import SDPACoreAttention
from lctw_megatron.model.norms import LayerNorm, RMSNorm
from lctw_megatron.platform.capabilities import capabilities

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def takes_engine_layers(model: ModelConfig, dtype: torch.dtype, there: bool) -> bool:
    """Whether `attention: auto | te | sdpa` means TransformerEngine's layers where it is ``there``.

    Half precision only: it multiplies float32 matrices in TF32 (losses of a small model differ by
    1e-2 nats), and its one attention for float32 stores all probabilities and knows no context
    parallelism.
    """
    return there and model.attention != "sdpa" and dtype in (torch.bfloat16, torch.float16)


def uses_transformer_engine(model: ModelConfig, dtype: torch.dtype) -> bool:
    """``takes_engine_layers`` on this machine. InputError if it is asked for and cannot be used."""
    here = capabilities()
    if model.attention == "te" and here.transformer_engine is None:
        why = here.transformer_engine_error or (
            "it is not installed" if here.gpu else "there is no GPU that torch can use"
        )
        raise InputError(
            f"model.attention: te, but TransformerEngine cannot be used here ({why}); mend its "
            "installation (a container's own fits its torch) or set model.attention=sdpa"
        )
    return takes_engine_layers(model, dtype, here.transformer_engine is not None)


def has_own_core_attention(model: ModelConfig, dtype: torch.dtype, packed: bool) -> bool:
    """Whether the layers get our core attention (model/attention.py): TransformerEngine's cuts
    packed sequences for context parallelism piece by piece, where ours are cut as a whole."""
    return packed or not uses_transformer_engine(model, dtype)


def recomputes(layout: LayoutConfig, dtype: torch.dtype, packed: bool, own: bool) -> str:
    """What of `layout.recompute` acts. `selective` frees what core attention, if it is our ``own``,
    gathers over context ranks, copies of documents, or repeats of keys and values (float32 on a
    GPU). All other keeps nothing but inputs and output, which others keep anyway: there it would
    run attention forward once more for nothing."""
    frees = own and (packed or layout.context > 1 or dtype == torch.float32)
    return "none" if layout.recompute == "selective" and not frees else layout.recompute


def transformer_config(
    model: ModelConfig,
    layout: LayoutConfig,
    dtype: torch.dtype,
    packed: bool,
    fields: Mapping[str, Any] = MappingProxyType({}),
    sublayers: int = 1,
) -> Any:
    """The megatron-core TransformerConfig of a model under a layout, parameters in ``dtype``.

    packed: as in ``layer_spec``. fields: a recipe's `megatron.transformer`, over what is set here;
    InputError if megatron-core refuses them. sublayers: megatron-core's layers for one of ours
    (model/hybrid.py).
    """
    from megatron.core.transformer import TransformerConfig

    on_gpu = capabilities().gpu
    deterministic = torch.are_deterministic_algorithms_enabled()
    recompute: dict[str, Any] = {}
    own = has_own_core_attention(model, dtype, packed)
    acting = recomputes(layout, dtype, packed, own)
    if acting == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": sublayers,
        }
    elif acting != "none":
        mlp = "moe" if model.num_moe_experts else "mlp"
        modules = {"selective": ["core_attn"], "mlp": [mlp]}[acting]
        recompute = {"recompute_granularity": "selective", "recompute_modules": modules}
    _check_fields(model, dtype, packed, fields)
    width, phi = head_width(model), model.parallel_block
    settings = dict(
        num_layers=model.num_layers * sublayers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=expert_width(model),
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=width,
        # yarn multiplies rotated queries and keys; rotation is linear and takes whole heads, so one
        # factor on the scores is the same, for every attention and every rotary kernel.
        softmax_scale=attention_factor(model.rope_scaling) ** 2 / math.sqrt(width),
        normalization="LayerNorm" if phi else "RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=not phi,
        activation_func=gelu_tanh if phi else torch.nn.functional.silu,
        add_bias_linear=phi,
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
        # Fused, F.gelu means the approximation by tanh, unfused the exact function.
        bias_activation_fusion=on_gpu and not phi,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        # See platform/mixed_products.py. Nothing to gain where weights are as wide as their
        # gradients. Rounded to bf16 before they are added, gradients have sums that hardly depend
        # on the order: deterministic data parallelism equals one GPU to the last bit.
        gradient_accumulation_fusion=dtype == torch.bfloat16 and not deterministic,
        persist_layer_norm=False,
        attention_backend=_attention_backend(),
        deterministic_mode=deterministic,
        **_experts(model, layout, dtype),
        **point_to_point(layout, on_gpu),
        **recompute,
    )
    return with_fields(TransformerConfig, settings, fields, "transformer")


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """`gelu_new` of Hugging Face configs (Hendrycks and Gimpel, 2016)."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def _experts(model: ModelConfig, layout: LayoutConfig, dtype: torch.dtype) -> dict[str, Any]:
    """megatron-core's fields of a mixture of experts. Choosing, balancing and counting are ours
    (model/router.py), so no loss is asked for here."""
    if not model.num_moe_experts:
        return {}
    return dict(
        num_moe_experts=model.num_moe_experts,
        moe_ffn_hidden_size=expert_width(model),
        moe_router_topk=model.moe_router_topk,
        moe_router_pre_softmax=True,  # or it refuses one expert a token
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=uses_transformer_engine(model, dtype),
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
    )


def with_fields(
    config: type[Any], settings: dict[str, Any], fields: Mapping[str, Any], section: str
) -> Any:
    """megatron-core's ``config`` of our ``settings`` and, over them, the ``fields`` of a recipe's
    `megatron.<section>`. InputError if it refuses them together."""
    try:
        return config(**{**settings, **fields})
    except (AssertionError, RuntimeError, ValueError) as error:
        if not fields:
            raise
        raise InputError(
            f"megatron.{section}: {fields} is refused by megatron-core ({error}); leave it out"
        ) from None


def _check_fields(
    model: ModelConfig, dtype: torch.dtype, packed: bool, fields: Mapping[str, Any]
) -> None:
    """Refuse what needs a kernel or layers that this run has not."""
    engine = "TransformerEngine's layers (model.attention te, training.precision bf16)"
    needs = {
        "apply_rope_fusion": (uses_transformer_engine(model, dtype), engine),
        "cp_comm_type": (
            not has_own_core_attention(model, dtype, packed),
            f"{engine} and data.packing chunk",
        ),
    }
    for name, (there, what) in needs.items():
        if fields.get(name) and not there:
            raise InputError(
                f"megatron.transformer.{name} needs {what}, which this run has not; leave it out"
            )


def point_to_point(layout: LayoutConfig, on_gpu: bool) -> dict[str, bool]:
    """How pipeline stages exchange tensors.

    Interleaved: one message a tensor, overlapped with the computation. Batched messages between two
    ranks that are each other's previous and next (two stages) are matched in the wrong order, and
    training goes on with swapped tensors; Megatron-LM's arguments refuse that combination,
    megatron-core alone does not. gloo sends batched messages one by one, so they gain nothing.
    """
    interleaved = layout.virtual_pipeline is not None
    return {
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": on_gpu and not interleaved,
        # For torch before 1.12, whose batched messages raced with the computation.
        "batch_p2p_sync": False,
    }


def _attention_backend() -> Any:
    """megatron-core's name of what NVTE_FLASH_ATTN, NVTE_FUSED_ATTN and NVTE_UNFUSED_ATTN ask for.

    It sets all three itself and stops at an assertion if they were set otherwise. InputError for a
    combination it has no name for.
    """
    from megatron.core.transformer.enums import AttnBackend

    if os.environ.get("NVTE_APPLY_QK_LAYER_SCALING", "0") != "0":
        raise InputError(
            "environment: NVTE_APPLY_QK_LAYER_SCALING is set, but no model here scales queries and "
            "keys by layer; unset it"
        )
    names = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
    backends = {
        AttnBackend.auto: ("1", "1", "1"),
        AttnBackend.flash: ("1", "0", "0"),
        AttnBackend.fused: ("0", "1", "0"),
        AttnBackend.unfused: ("0", "0", "1"),
    }
    wanted = [os.environ.get(name) for name in names]
    for backend, flags in backends.items():
        if all(value in (None, flag) for value, flag in zip(wanted, flags, strict=True)):
            return backend
    found = " ".join(f"{n}={v}" for n, v in zip(names, wanted, strict=True) if v is not None)
    raise InputError(
        f"environment: {found}: megatron-core knows all three 1 (or unset), or exactly one of them "
        "1; unset them, or set model.attention=sdpa and unset them"
    )


def block_spec(model: ModelConfig, config: Any, vp_stage: int | None, packed: bool) -> Any:
    """GPTModel's layers of this pipeline stage."""
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    layer, norm = layer_spec(model, config, packed)
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


def layer_spec(model: ModelConfig, config: Any, packed: bool) -> tuple[Any, Any]:
    """A layer and the last norm: TransformerEngine's, or megatron-core's with our parts.

    packed: the model will be given piece boundaries, which only our core attention knows.
    """
    from megatron.core.models.gpt import gpt_layer_specs

    # TransformerEngine multiplies all experts of a rank in one grouped kernel; without it they are
    # run one after the other.
    experts = dict(num_experts=model.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm)
    if uses_transformer_engine(model, config.params_dtype):
        layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=model.qk_norm, **experts
        )
        from megatron.core.extensions.transformer_engine import TENorm as norm

        if has_own_core_attention(model, config.params_dtype, packed):
            layer.submodules.self_attention.submodules.core_attention = SDPACoreAttention
    else:
        layer = gpt_layer_specs.get_gpt_layer_local_spec(
            qk_layernorm=model.qk_norm, normalization=config.normalization, **experts
        )
        norm = LayerNorm if model.parallel_block else RMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
        if model.num_moe_experts:  # the norm before experts is stored under its own name
            layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = SDPACoreAttention
        if model.qk_norm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    if model.parallel_block:
        from lctw_megatron.model.parallel_layer import side_by_side

        side_by_side(layer, norm)
    return layer, norm
