"""Attention over one document that is cut over context ranks, in large chunks on cuDNN: while the
other ranks' keys and values are on their way, a rank does what it can do alone.

Of both its zigzag chunks (data/zigzag.py) a rank sees the keys of the chunk itself, a causal square
on the diagonal, and all keys of earlier chunks, a full block. The squares need nothing of other
ranks: they run while the keys are gathered, and in the backward while the gradients of the blocks'
keys are summed over the ranks. How square and block are merged, model/cudnn_attention.py says.

A full block has no order of its keys. So the early halves of all ranks are gathered behind the late
halves, each in the order of the ranks; there what either chunk sees lies in one piece, and nothing
is put in the order of the sequence. For four ranks, whose late chunks are 7, 6, 5 and 4::

    7 6 5 4 | 0 1 2 3      rank 1 holds 1 and 6: chunk 1 sees [0], chunk 6 sees [5 4 | 0 1 2 3]

Shapes: s positions of this rank, half of them in a chunk, b sequences, n query heads, g key/value
heads, d head.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lctw_megatron.model import cudnn_attention
from lctw_megatron.model.cudnn_attention import Block, merge_


def takes(q: Tensor, k: Tensor, v: Tensor, ranks: int) -> bool:
    """Whether ``attend`` should have these: large chunks, whose squares torch itself would give to
    cuDNN. q [s, b, n, d]; k, v [s, b, g, d]."""
    large = cudnn_attention.is_large(q.shape[0] // 2, q.shape[0] * ranks)
    return large and cudnn_attention.is_preferred(*(_heads_first(_halves(x)[0]) for x in (q, k, v)))


def attend(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, scale: float) -> Tensor:
    """Causal attention of this rank's queries over the sequence of all ranks of ``group``, at least
    two. q [s, b, n, d]; k, v [s, b, g, d]: its zigzag parts -> [s, b, n, d]."""
    out: Tensor = _ContextAttention.apply(q, k, v, group, scale)
    return out


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, scale: float
    ) -> Tensor:
        own = torch.cat([k, v], dim=-1)
        gathered = own.new_empty((group.size() * q.shape[0], *own.shape[1:]))
        works = [
            dist.all_gather_into_tensor(whole, part, group=group, async_op=True)
            for whole, part in zip(_halves(gathered)[::-1], _halves(own), strict=True)
        ]
        squares, block = cudnn_attention.forward(_two(q), _two(k), _two(v), True, scale)
        out, lse = _of_two(squares, q.shape[1]), block.log_sum_exp.unflatten(0, (2, q.shape[1]))
        rests = [block.rest]
        for chunk, work in enumerate(works):
            work.wait()
            keys = gathered[_seen(chunk, group, q.shape[0] // 2)]
            if not keys.shape[0]:  # the first chunk of all
                continue
            query, result = (_heads_first(_halves(x)[chunk]) for x in (q, out))
            key, value = _heads_first(keys).chunk(2, dim=-1)
            full, block = cudnn_attention.forward(query, key, value, False, scale)
            merge_(result, lse[chunk], full, block.log_sum_exp)
            rests.append(block.rest)
        ctx.save_for_backward(q, gathered, out, lse)
        ctx.group, ctx.scale, ctx.rests = group, scale, rests
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, gathered, out, lse = ctx.saved_tensors
        group, scale, half = ctx.group, ctx.scale, q.shape[0] // 2
        sums = torch.empty_like(gathered)
        of_blocks: list[tuple[int, Tensor]] = []
        for chunk in (1, 0):  # what the early chunk sees, the late one sees, too
            seen = _seen(chunk, group, half)
            if seen.start == seen.stop:
                continue
            query, gradient, result = (_heads_first(_halves(x)[chunk]) for x in (q, grad, out))
            key, value = _heads_first(gathered[seen]).chunk(2, dim=-1)
            block = Block(lse[chunk], ctx.rests[-1 if chunk else 1])
            grad_query, *others = cudnn_attention.backward(
                gradient, query, key, value, result, block, False, scale
            )
            of_blocks.append((chunk, grad_query))
            if chunk:
                sums[: seen.start].zero_()
            for part, other in zip(sums[seen].chunk(2, dim=-1), others, strict=True):
                if chunk:
                    _heads_first(part).copy_(other)
                else:
                    _heads_first(part).add_(other)
        summed = gathered.new_empty((2 * half, *gathered.shape[1:]))
        works = [
            dist.reduce_scatter_tensor(part, whole, group=group, async_op=True)
            for whole, part in zip(_halves(sums)[::-1], _halves(summed), strict=True)
        ]
        late, early = (
            x.unflatten(0, (group.size(), half))[group.rank()] for x in _halves(gathered)
        )
        key, value = _two(torch.cat([early, late])).chunk(2, dim=-1)
        block = Block(lse.flatten(0, 1), ctx.rests[0])
        grad_q, grad_k, grad_v = (
            _of_two(x, q.shape[1])
            for x in cudnn_attention.backward(
                _two(grad), _two(q), key, value, _two(out), block, True, scale
            )
        )
        for chunk, grad_query in of_blocks:
            _heads_first(_halves(grad_q)[chunk]).add_(grad_query)
        for work in works:
            work.wait()
        for own, other in zip((grad_k, grad_v), summed.chunk(2, dim=-1), strict=True):
            own.add_(other)
        return grad_q, grad_k, grad_v, None, None


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the first dimension: of a rank's part the early and the late chunk, of what is gathered
    the late chunks of all ranks and the early ones. Views."""
    first, second = x.unflatten(0, (2, -1))
    return first, second


def _seen(chunk: int, group: dist.ProcessGroup, half: int) -> slice:
    """Where in what is gathered the chunks lie that come before the early (0) or the late (1) one
    of this rank."""
    rank, size = group.rank(), group.size()
    first, end = (rank + 1, 2 * size) if chunk else (size, size + rank)
    return slice(first * half, end * half)


def _heads_first(x: Tensor) -> Tensor:
    """[length, b, heads, d] -> [b, heads, length, d], a view."""
    return x.permute(1, 2, 0, 3)


def _two(x: Tensor) -> Tensor:
    """Both chunks as sequences of their own: [2 half, b, heads, d] -> [2 b, heads, half, d], a view
    of one sequence, a copy of several."""
    return x.unflatten(0, (2, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)


def _of_two(x: Tensor, batch: int) -> Tensor:
    """The other way round."""
    return x.unflatten(0, (2, batch)).permute(0, 3, 1, 2, 4).flatten(0, 1)
