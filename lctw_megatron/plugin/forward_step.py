"""A forward step whose loss is the token-weighted objective, around the one that a run has.

The run's own loss function is kept, with all that it checks and reports: it gets a mask of 0 and 1
and every label's loss times its weight. So the masks are binary, the count of tokens is right, and
`calculate_per_token_loss` divides the sum over micro batches, data- and context-parallel ranks by
the count over all of them, once.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_micro_batch_size
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from lctw_megatron.config.schema import WeightingConfig
from lctw_megatron.errors import InputError
from lctw_megatron.plugin.loss_mask import TakeOut, boundaries, carries
from lctw_megatron.weighting.compute import compute_weights_and_counts
from lctw_megatron.weighting.parse import Weighting, parse_weighting


def weighted_forward_step(
    forward_step: Callable[..., Any], weighting: Mapping[str, Any] | WeightingConfig
) -> Callable[..., Any]:
    """``forward_step`` with the objective of ``weighting``, the fields of a recipe's section.

    forward_step: Megatron-LM's (data_iterator, model, ...) or Megatron-Bridge's (state,
    data_iterator, model, ...): has a parameter `model` and returns (losses [b, s] per label,
    functools.partial(loss_func, loss_mask, ...)), whose loss_func(loss_mask, losses, ...) returns
    (sum, number of tokens, report). The batches come from the class that ``dataset.dataset_class``
    gives for the same weighting; a row of loss_mask is a sequence.

    In training the report's own loss is the weighted one; added are `unweighted lm loss` and
    `unscored`, the share of labels without a short loss. In evaluation all weights are 1.

    Raises InputError for what cannot be right: here for `mode: self` and a ``forward_step`` without
    `model`, when it is called for a model without `calculate_per_token_loss`, and in the loss for
    masks of another dataset and for sequences joined to one row.
    """
    parsed = parse_weighting(weighting)
    if parsed.config.mode == "self" and parsed.scheme.needs_short_loss:
        raise InputError(
            "weighting.mode is self, but only tools/train.py can score with the training model; "
            "leave it out and score the data with tools/score.py"
        )
    signature = inspect.signature(forward_step)
    if "model" not in signature.parameters:
        name = getattr(forward_step, "__qualname__", repr(forward_step))
        raise InputError(
            f"the forward step {name}{signature} has no parameter `model`, whose settings have to "
            "be looked at; give it one, or put functools.wraps on what is around it"
        )
    take_out = TakeOut(carries(parsed.scheme))

    @wraps(forward_step)  # Megatron-Bridge looks at the signature
    def step(*args: Any, **kwargs: Any) -> Any:
        model = signature.bind(*args, **kwargs).arguments["model"]
        _check_config(get_model_config(model))
        losses, loss_func = forward_step(*args, **kwargs)
        group = get_attr_wrapped_model(model, "pg_collection").cp
        chosen = parsed if model.training else None
        return losses, partial(_weighted_loss, chosen, group, loss_func, take_out)

    return step


def _weighted_loss(
    weighting: Weighting | None,
    group: dist.ProcessGroup,
    loss_func: Any,
    take_out: TakeOut,
    losses: Tensor,
    **kwargs: Any,
) -> Any:
    """What ``loss_func`` returns for the weighted losses of [b, s], this context rank's part.
    weighting None: all weights are 1."""
    if not isinstance(loss_func, partial) or not isinstance(next(iter(loss_func.args), 0), Tensor):
        raise InputError(
            f"the forward step returned {loss_func!r}, expected functools.partial(loss_func, "
            "loss_mask, ...), as of pretrain_gpt.py and Megatron-Bridge's gpt_step.py"
        )
    carried, *others = loss_func.args
    live, short_loss = take_out(carried)
    # Chosen, not multiplied by 0: a masked loss may be infinite.
    losses = losses.where(live, 0.0)
    inner = partial(loss_func.func, live.to(torch.float32))
    if weighting is None:
        return inner(losses, *others, **loss_func.keywords, **kwargs)
    _check_rows(losses)
    plain = losses.detach()
    pieces = boundaries(carried, group) if take_out.carries == "lengths of contexts" else None
    weights, counts = compute_weights_and_counts(weighting, plain, short_loss, live, group, pieces)
    result = inner(losses * weights, *others, **loss_func.keywords, **kwargs)
    if len(result) != 3:
        raise InputError(
            f"the loss function returned {len(result)} values, expected three (sum, number of "
            "tokens, report), as megatron-core needs to divide by the tokens of the global batch"
        )
    total, tokens, report = result
    more = {
        "unweighted lm loss": torch.stack([plain.sum(), tokens]),
        "unscored": torch.stack([counts.unscored, tokens]).to(plain.dtype),
    }
    return total, tokens, {**report, **more}


def _check_rows(losses: Tensor) -> None:
    """InputError unless each sequence of the micro batch is a row, as weights are normalised by
    row."""
    try:
        sequences = get_micro_batch_size()
    except AttributeError:  # a loop of the user's own, which has not set it
        return
    if len(losses) != sequences:
        raise InputError(
            f"the micro batch has {sequences} sequences, but their losses are {len(losses)} row(s) "
            f"of {losses.shape[1]}: joined, as by --dataloader-inter-document-masking, they would "
            "be weighted as one; set --micro-batch-size 1 or leave the joining out"
        )


def _check_config(config: Any) -> None:
    if not config.calculate_per_token_loss:
        raise InputError(
            "calculate_per_token_loss is off, so megatron-core would divide every micro batch and "
            "rank by its own tokens; set --calculate-per-token-loss (Megatron-Bridge: "
            "model.calculate_per_token_loss=True)"
        )
    if config.mtp_num_layers:
        raise InputError(
            f"mtp_num_layers is {config.mtp_num_layers}: multi-token prediction reads loss_mask, "
            "which here holds short losses, inside the model; leave it out"
        )
    if getattr(config, "hybrid_context_parallel", False):
        raise InputError(
            "hybrid_context_parallel is on, under which the ranks that share a sequence change "
            "from one batch to the next; leave it out"
        )
