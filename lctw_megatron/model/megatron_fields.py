"""What a recipe may set of megatron-core: its `megatron` section.

Free are fields that change how fast training is and what memory it takes, or how the optimizer
decays weights. All others are refused, those of newer versions too: what a recipe has a field of
its own for has one place, and of the rest nobody has shown that losses and gradients stay those of
one process.
"""

import re
from importlib.metadata import version
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.config.validation_errors import nearest
from lctw_megatron.errors import InputError, few
from lctw_megatron.platform.megatron_version import MEGATRON

_HYBRID_SINCE = (0, 18)

_Count = Annotated[int, Field(gt=0, le=2**31 - 1)]

FREE: dict[str, dict[str, Any]] = {
    "transformer": {
        "gradient_accumulation_fusion": None,
        "bias_activation_fusion": None,
        "bias_dropout_fusion": None,
        "apply_rope_fusion": None,  # TransformerEngine's kernel
        "cp_comm_type": Literal["p2p", "all_gather", "a2a"],  # of TransformerEngine's attention
        "deallocate_pipeline_outputs": None,
        "overlap_p2p_comm_warmup_flush": None,
        "distribute_saved_activations": None,
        "clone_scatter_output_in_embedding": None,
    },
    "ddp": {
        "overlap_grad_reduce": None,
        "overlap_param_gather": None,
        "bucket_size": _Count,
        "pad_buckets_for_high_nccl_busbw": None,
    },
    "optimizer": {
        "decoupled_weight_decay": None,
        "apply_wd_to_qk_layernorm": None,
    },
}
"""Section -> field: a narrower type than megatron-core's, or None."""

_OF_THE_RECIPE = {
    "transformer": {
        "model.qkv_bias": "add_qkv_bias",
        "model.rope_scaling": "softmax_scale|yarn_.*",
        "model.qk_norm": "qk_layernorm",
        "model.attention": "attention_backend|transformer_impl",
        r"model.\g<0>": "num_layers|hidden_size|ffn_hidden_size|num_attention_heads|kv_channels|"
        "num_query_groups|layernorm_epsilon|hidden_dropout|attention_dropout|init_method_std|"
        "num_moe_experts|moe_ffn_hidden_size|moe_router_topk|moe_aux_loss_coeff",
        "model.norm_topk_prob": "moe_router_pre_softmax",
        "layout.tensor": "tensor_model_parallel_size",
        "layout.sequence": "sequence_parallel",
        "layout.pipeline": "pipeline_model_parallel_size",
        "layout.virtual_pipeline": "virtual_pipeline_model_parallel_size",
        "layout.context": "context_parallel_size",
        "layout.expert": "expert_model_parallel_size",
        "layout.recompute": "recompute_.*",
        "layout.loss_block_rows": "cross_entropy_.*",
        "training.precision": "bf16|fp16|(params|pipeline|autocast)_dtype|enable_autocast",
        "training.deterministic": "deterministic_mode",
    },
    "ddp": {"training.nonfinite_budget": "check_for_nan_in_grad|check_for_large_grads"},
    "optimizer": {
        r"training.\g<0>": "lr|min_lr|weight_decay|adam_beta1|adam_beta2|adam_eps|clip_grad",
        "training.precision": "bf16|fp16|params_dtype",
        "megatron.ddp.overlap_param_gather": "overlap_param_gather",
    },
}
"""Section -> the recipe's field: a pattern of megatron-core's that it takes the place of."""

_BREAKS = {
    "transformer": {
        "the objective is a sum divided once by the targets of the global batch": (
            "calculate_per_token_loss"
        ),
        "the weights are filled by model/initialize.py, the same under every layout": (
            "perform_initialization|use_cpu_initialization|.*init_method.*|init_model_with.*"
        ),
        "with other messages two pipeline stages train on swapped tensors": (
            "overlap_p2p_comm|batch_p2p_.*|use_ring_exchange_p2p"
        ),
        "micro batches, windows, validation and recall come in multiples of layout.pipeline, which "
        "megatron-core takes for it": "microbatch_group_size_per_vp_stage",
        "its buffers hold one shape, and windows, validation and recall run in others": (
            "tp_comm_.*"
        ),
        "how far 8 and 4 bits move short_loss - long_loss has not been measured": "fp[48].*",
        "routers, their balance and what goes to experts are model/router.py's": "moe_.*|expert_.*",
        "the loss computes the gradient of the head itself": "defer_embedding_.*|wgrad_deferral.*",
    },
    "ddp": {
        "gradients are summed in float32, and divided once by the targets of the global batch": (
            "grad_reduce_in_fp32|average_in_collective|reduce_scatter_with.*"
        ),
        "optimizer and checkpoints are made for one distributed optimizer over all ranks": (
            "use_distributed_optimizer|num_distributed_optimizer_instances|.*fsdp.*|.*sharding.*"
        ),
    },
    "optimizer": {
        "training and its checkpoints are made for AdamW in float32 on the model's device": (
            "optimizer.*|.*_dtype|use_precision.*|store_param.*|muon.*|sgd.*|.*cpu.*|.*distributed.*"
        ),
        "one rate holds for all parameters": "decoupled_(min_)?lr",
    },
}
"""Section -> why: a pattern of the fields that are refused for it."""


def check_megatron_fields(run: RunConfig) -> None:
    """Refuse a model that the installed megatron-core has not, and fields of ``run.megatron`` that
    it does not know, values of another type and what is not ``FREE``. Imports megatron-core if a
    field is given. InputError."""
    if run.megatron.model == "hybrid" and MEGATRON < _HYBRID_SINCE:
        raise InputError(
            f"run {run.name}: megatron.model is hybrid, but megatron-core "
            f"{version('megatron-core')} has no HybridModel; install 0.18 or newer (Python 3.12), "
            "or set gpt"
        )
    given = run.megatron.model_dump(exclude={"model"})
    if not any(given.values()):
        return
    for section, config in _configs().items():
        hints = get_type_hints(config)
        for name, value in given[section].items():
            where = f"run {run.name}: megatron.{section}.{name}"
            if name not in hints:
                raise InputError(
                    f"{where}: {config.__name__} has no such field; {nearest(name, hints)}"
                )
            if name not in FREE[section]:
                raise InputError(f"{where} cannot be set: {_why(section, name)}")
            if name == "deallocate_pipeline_outputs" and value and run.layout.virtual_pipeline:
                raise InputError(
                    f"{where} cannot be set with layout.virtual_pipeline: together they gave other "
                    "losses in each run; leave one out"
                )
            try:
                TypeAdapter(FREE[section][name] or hints[name]).validate_python(value, strict=True)
            except ValidationError as error:
                expected = error.errors()[0]["msg"].removeprefix("Input should be ")
                expected = expected.replace("a valid ", "a ")
                raise InputError(f"{where} is {few([repr(value)])}, expected {expected}") from None


def _configs() -> dict[str, Any]:
    from lctw_megatron.platform.cpu import patch_megatron

    patch_megatron()
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    return {
        "transformer": TransformerConfig,
        "ddp": DistributedDataParallelConfig,
        "optimizer": OptimizerConfig,
    }


def _why(section: str, name: str) -> str:
    for field, pattern in _OF_THE_RECIPE[section].items():
        if found := re.fullmatch(pattern, name):
            return f"use {found.expand(field)}"
    for reason, pattern in _BREAKS[section].items():
        if re.fullmatch(pattern, name):
            return reason
    free = ", ".join(FREE[section])
    return f"no layout was shown to keep losses and gradients exact with it; free are {free}"
