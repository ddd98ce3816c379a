"""megatron-core's data parallelism and distributed optimizer around our model."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer import get_standard_config_overrides as weight_decay_rules

from lctw_megatron.config.schema import TrainingConfig
from lctw_megatron.model.spec import with_fields
from lctw_megatron.platform.capabilities import capabilities
from lctw_megatron.platform.cpu import optimizer_construction
from lctw_megatron.platform.gradient_norm import use_norm_at_once
from lctw_megatron.platform.torch_adam import prepare_torch_adam


def wrap_data_parallel(
    chunks: list[Any], fields: Mapping[str, Any] = MappingProxyType({})
) -> list[Any]:
    """The chunks with gradient buffers sharded for the distributed optimizer.

    Gradients are summed, never averaged: the schedule divides them once by the number of targets of
    the global batch (calculate_per_token_loss). bf16 gradients are accumulated in float32. fields:
    a recipe's `megatron.ddp`.
    """
    config = chunks[0].config
    on_gpu = capabilities().gpu
    settings = dict(
        grad_reduce_in_fp32=config.params_dtype == torch.bfloat16,
        use_distributed_optimizer=True,
        overlap_grad_reduce=on_gpu,
        overlap_param_gather=False,
    )
    ddp_config = with_fields(DistributedDataParallelConfig, settings, fields, "ddp")
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in wrapped]
        if len(wrapped) == 1:
            config.no_sync_func = config.no_sync_func[0]
    return wrapped


def gather_weights(wrapped: list[Any]) -> None:
    """Make the weights of the last step whole before they are saved. Under `overlap_param_gather`
    only a forward pass would do it. All ranks call it."""
    for chunk in wrapped:
        if chunk.use_forward_hook:
            chunk.start_param_sync(force_sync=True)


def build_optimizer(
    wrapped: list[Any],
    training: TrainingConfig,
    fields: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """AdamW (apex's or TransformerEngine's if present) sharded over the data-parallel ranks, and
    one for experts over the ranks that hold the same ones. The gradient norm is that of both.

    Biases and norms are not decayed (Megatron-LM's rule). Clipping is ours (``clip_gradients``),
    after the gradient norm was seen to be finite. fields: a recipe's `megatron.optimizer`.
    """
    settings = dict(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        bf16=training.precision == "bf16",
        params_dtype=torch.bfloat16 if training.precision == "bf16" else torch.float32,
        use_distributed_optimizer=True,
        clip_grad=0.0,
    )
    config = with_fields(OptimizerConfig, settings, fields, "optimizer")
    with optimizer_construction():
        optimizer = get_megatron_optimizer(
            config, wrapped, config_overrides=weight_decay_rules(config)
        )
    # Moments from the start: a run may save before its first good step.
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.init_state_fn(part.optimizer, config)
    prepare_torch_adam(optimizer)
    use_norm_at_once()
    return optimizer


def learning_rate(training: TrainingConfig, step: int) -> float:
    """The rate of optimizer step ``step`` (0-based): linear warm-up, then constant or cosine.

    Cosine falls from lr after the warm-up to min_lr at the last step.
    """
    if step < training.warmup_steps:
        return training.lr * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.lr
    span = max(1, training.steps - 1 - training.warmup_steps)
    progress = min(1.0, (step - training.warmup_steps) / span)
    return training.min_lr + (training.lr - training.min_lr) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )


def set_rates(optimizer: Any, training: TrainingConfig, rate: float) -> None:
    """Learning rate and weight decay of every group: its multiplier times ours. Each step anew, as
    megatron-core's own scheduler does, which alone reads the multipliers: `wd_mult` is 0 for biases
    and norms."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = training.weight_decay * group.get("wd_mult", 1.0)


@torch.no_grad()
def clip_gradients(optimizer: Any, norm: float, largest: float) -> None:
    """Scale the gradients so that their global norm ``norm`` is at most ``largest`` (0: never)."""
    if largest and norm > largest:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(largest / norm)
