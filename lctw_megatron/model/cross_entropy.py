"""Per-token cross-entropy that never holds the logits.

Logits of a 32k-token sequence over a 128k vocabulary are 8 to 31 GiB. Here they exist for one block
of rows at a time: the forward keeps one log-sum-exp per row, the backward computes each block
again. Rows without a label do no work at all, rows whose incoming gradient is zero (sparse weights)
none in the backward. Products are accumulated and losses computed in float32 (float64 stays
float64), whatever the dtype of the weights: bfloat16 losses would make a large part of the score
differences exactly 0.

Vocabulary-parallel over TP as Megatron-LM's (Shoeybi et al., 2019), with two all-reduces per call.

Shapes: n rows, h hidden, v columns of the vocabulary on this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lctw_megatron.data.batch import IGNORE
from lctw_megatron.platform.gpu import compiled
from lctw_megatron.platform.mixed_products import add_product_, product


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logits(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = product(inputs, weight.t())
    return logits if bias is None else logits.add_(bias)


class _RowBlockLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        first_column: int,
        group: dist.ProcessGroup | None,
        block_rows: int,
        rows: Tensor,
        zero_gradients: bool,
    ) -> Tensor:
        dtype = _accumulation_dtype(hidden.dtype)
        columns = labels[rows] - first_column
        own = (columns >= 0) & (columns < weight.shape[0])
        # A rank may hold only padding columns, none that counts: exp(-inf) is what they add.
        lse = torch.full((rows.shape[0],), -torch.inf, dtype=dtype, device=hidden.device)
        target = torch.zeros_like(lse)
        for start in range(0, rows.shape[0] if weight.shape[0] else 0, block_rows):
            block = slice(start, start + block_rows)
            logits = _logits(hidden[rows[block]], weight, bias)
            column = columns[block].clamp(0, weight.shape[0] - 1)
            target[block] = logits.gather(1, column.unsqueeze(1)).squeeze(1)
            lse[block] = _logsumexp_(logits)
        target.mul_(own)
        if group is not None and group.size() > 1:
            largest = lse.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
            sums = torch.stack([(lse - largest).exp_(), target])
            dist.all_reduce(sums, group=group)
            lse, target = sums[0].log().add_(largest), sums[1]
        loss = torch.zeros(labels.shape[0], dtype=dtype, device=hidden.device)
        loss[rows] = lse - target
        ctx.save_for_backward(hidden, weight, bias, rows, columns, own, lse)
        ctx.block_rows, ctx.zero_gradients = block_rows, zero_gradients
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, rows, columns, own, lse = ctx.saved_tensors
        grad = grad[rows]
        if ctx.zero_gradients:
            kept = torch.nonzero(grad).squeeze(1)
            if kept.shape[0] < rows.shape[0]:
                rows, columns, own, lse, grad = (x[kept] for x in (rows, columns, own, lse, grad))
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        if ctx.needs_input_grad[2]:
            grad_bias = torch.zeros(bias.shape, dtype=lse.dtype, device=bias.device)
        for start in range(0, rows.shape[0] if weight.shape[0] else 0, ctx.block_rows):
            block = slice(start, start + ctx.block_rows)
            inputs = hidden[rows[block]]
            logits = _logits(inputs, weight, bias)
            gradient = _logits_gradient_(
                logits, lse[block], columns[block], own[block], grad[block], hidden.dtype
            )
            del logits
            if grad_hidden is not None:
                grad_hidden[rows[block]] = torch.mm(gradient, weight)
            if grad_weight is not None:
                add_product_(grad_weight, gradient.t(), inputs)
            if grad_bias is not None:
                grad_bias.add_(gradient.sum(0, dtype=grad_bias.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def _logsumexp_(logits: Tensor) -> Tensor:
    """log(sum(exp(logits))) over the columns; may overwrite ``logits``."""
    if logits.is_cuda:
        return compiled(_fused_logsumexp)(logits)
    largest = logits.amax(1, keepdim=True)
    return logits.sub_(largest).exp_().sum(1).log_().add_(largest.squeeze(1))


def _logits_gradient_(
    logits: Tensor, lse: Tensor, columns: Tensor, own: Tensor, grad: Tensor, dtype: torch.dtype
) -> Tensor:
    """(softmax - one_hot(label)) times the incoming gradient of the row, in ``dtype``.

    May overwrite ``logits``, which a block of rows needs no longer.
    """
    if logits.is_cuda:
        return compiled(_fused_gradient)(logits, lse, columns, own, grad, dtype)
    gradient = logits.sub_(lse.unsqueeze(1)).exp_()
    column = columns.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    gradient.scatter_add_(1, column, -own.to(gradient.dtype).unsqueeze(1))
    return gradient.mul_(grad.unsqueeze(1)).to(dtype)


def _fused_logsumexp(logits: Tensor) -> Tensor:
    return torch.logsumexp(logits, 1)


def _fused_gradient(
    logits: Tensor, lse: Tensor, columns: Tensor, own: Tensor, grad: Tensor, dtype: torch.dtype
) -> Tensor:
    column = torch.arange(logits.shape[1], device=logits.device)
    hot = (column == columns.unsqueeze(1)) & own.unsqueeze(1)
    softmax = (logits - lse.unsqueeze(1)).exp()
    return ((softmax - hot.to(logits.dtype)) * grad.unsqueeze(1)).to(dtype)


def row_block_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    first_column: int = 0,
    group: dist.ProcessGroup | None = None,
    block_rows: int = 1024,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    zero_gradients: bool = True,
) -> Tensor:
    """-log softmax(hidden @ weightᵀ + bias)[label] for every row, in nats.

    hidden [n, h]; weight [v, h] and bias [v], this rank's columns of the vocabulary beginning with
    token ``first_column`` (padding columns cut off); labels [n] int64 token ids over the whole
    vocabulary, or IGNORE. group: the tensor-parallel ranks, each with the same hidden and labels.
    rows: int64, those with a label, increasing; None: they are looked for. zero_gradients: whether
    the backward looks for rows whose gradient is 0, to do no work for them. Looking for rows on a
    GPU makes the host wait for it. Returns [n] float32 (float64 for float64 inputs), 0 where the
    label is IGNORE.

    The gradient of hidden is this rank's part: sum it over the group (megatron-core's
    copy_to_tensor_model_parallel_region and gather_from_sequence_parallel_region do).
    """
    rows = _live(labels) if rows is None else rows
    return _RowBlockLoss.apply(
        hidden, weight, bias, labels, first_column, group, block_rows, rows, zero_gradients
    )


def _live(labels: Tensor) -> Tensor:
    return torch.nonzero(labels != IGNORE).squeeze(1)


@torch.no_grad()
def row_block_is_likeliest(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    first_column: int = 0,
    group: dist.ProcessGroup | None = None,
    block_rows: int = 1024,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Whether no token is likelier than the label: 1 or 0, in the dtype of the losses [n]; 0 where
    the label is IGNORE.

    Arguments as of ``row_block_cross_entropy``. Of tokens with equal logits the one with the lowest
    id counts as the likeliest, under every layout.
    """
    rows = _live(labels) if rows is None else rows
    dtype = _accumulation_dtype(hidden.dtype)
    largest = torch.full((rows.shape[0],), -torch.inf, dtype=dtype, device=hidden.device)
    token = torch.full_like(rows, torch.iinfo(torch.int64).max)
    for start in range(0, rows.shape[0] if weight.shape[0] else 0, block_rows):
        block = slice(start, start + block_rows)
        logits = _logits(hidden[rows[block]], weight, bias)
        largest[block] = logits.amax(1)
        # argmax may give any of equal ones: the first of them is asked for.
        token[block] = (logits == largest[block].unsqueeze(1)).int().argmax(1) + first_column
    if group is not None and group.size() > 1:
        own = largest.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        token.masked_fill_(own < largest, torch.iinfo(torch.int64).max)
        dist.all_reduce(token, dist.ReduceOp.MIN, group=group)
    result = torch.zeros(labels.shape[0], dtype=dtype, device=hidden.device)
    result[rows] = (token == labels[rows]).to(dtype)
    return result
