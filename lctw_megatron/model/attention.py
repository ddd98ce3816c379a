"""Core attention on torch's scaled dot product kernels, with context parallelism and document
masks.

Context parallelism: every rank holds two zigzag chunks of the queries (data/zigzag.py) and gathers
the keys and values of the whole sequence. Gathering, rather than passing blocks around a ring,
keeps the arithmetic that of one process (no merging of partial softmaxes), lets any document mask
through, and under grouped-query attention moves few bytes: it is what Llama 3 was trained with
(Grattafiori et al. 2024, section 3.3.2). The price is memory for one layer's keys and values of the
whole sequence. Of a sequence that is one document large chunks go to model/context_attention.py,
which computes while it gathers.

Documents: every chunk of queries is cut at the piece boundaries. A run of queries inside one piece
sees the keys from the piece's start to its own position: a causal rectangle, aligned at its lower
right corner. Work is proportional to the area of those rectangles; no S x S mask is ever built.

Kernels: half precision on a GPU runs large rectangles on cuDNN where torch would take it for their
squares (model/cudnn_attention.py), and all others in one call of torch's variable-length flash
kernel (torch >= 2.10). Elsewhere each rectangle goes to scaled_dot_product_attention: square ones
as `is_causal`, wider ones (context parallelism) in row blocks, the only place where a mask is made:
[row block, keys]. On a GPU those masks, and float32, run its memory-efficient kernel, which has no
grouped heads: keys and values are then repeated for every query head, or torch would fall to the
kernel that stores all probabilities (S x S of them for every head).

Shapes: S full sequence, s = S / CP of this rank, b sequences, n query heads, g key/value heads, d
head.
"""

import functools
import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lctw_megatron.data import zigzag
from lctw_megatron.model import context_attention, cudnn_attention
from lctw_megatron.platform.capabilities import capabilities
from lctw_megatron.platform.host_copies import to_device

# Query rows of a rectangle that is wider than high. The mask is [rows, keys] booleans: at 32k keys
# and 1,024 rows 32 MiB; half a block of masked area per row is computed for nothing.
_ROW_BLOCK = 1024


class Rectangle(NamedTuple):
    """Queries [query_start, query_end) of this rank see keys [key_start, key_end) of the sequence.

    The last query sees the last key, the one before it all but the last key, and so on.
    """

    query_start: int
    query_end: int
    key_start: int
    key_end: int


def rectangles(
    boundaries: list[int], sequence_length: int, rank: int, size: int
) -> list[Rectangle]:
    """The causal rectangles of context rank ``rank`` of ``size``.

    ``boundaries``: increasing starts of the pieces, first 0, last ``sequence_length``. Rank r holds
    the chunks r and 2*size-1-r of sequence_length / (2*size) positions each, in this order.
    """
    chunk = sequence_length // (2 * size)
    spans = [(rank * chunk, (rank + 1) * chunk)]
    last = 2 * size - 1 - rank
    spans.append((last * chunk, (last + 1) * chunk))
    if size == 1:
        spans = [(0, sequence_length)]
    result: list[Rectangle] = []
    offset = 0  # where the current span begins among this rank's queries
    for start, end in spans:
        for piece_start, piece_end in zip(boundaries[:-1], boundaries[1:], strict=True):
            first, stop = max(start, piece_start), min(end, piece_end)
            if first < stop:
                result.append(
                    Rectangle(offset + first - start, offset + stop - start, piece_start, stop)
                )
        offset += end - start
    return result


class _GatherSequence(torch.autograd.Function):
    """All ranks' zigzag parts [s, ...] joined into the whole sequence [S, ...]; grads are
    summed.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return zigzag.join(parts, dim=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        size = ctx.group.size()
        parts = torch.cat([zigzag.cut(grad, rank, size, dim=0) for rank in range(size)])
        own = parts.new_empty((parts.shape[0] // size, *parts.shape[1:]))
        dist.reduce_scatter_tensor(own, parts, group=ctx.group)
        return own, None


def _attend_rectangle(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
    """Causal attention aligned at the lower right. q [b, n, rows, d]; k, v [b, g, keys, d]."""
    rows, keys = q.shape[2], k.shape[2]
    kwargs: dict[str, Any] = {"scale": scale, "dropout_p": dropout}
    if q.shape[1] != k.shape[1]:
        if q.is_cuda and (q.dtype == torch.float32 or rows != keys):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        else:
            kwargs["enable_gqa"] = True
    if rows == keys:
        return scaled_dot_product_attention(q, k, v, is_causal=True, **kwargs)
    blocks = []
    for start in range(0, rows, _ROW_BLOCK):
        end = min(start + _ROW_BLOCK, rows)
        seen = keys - rows + end  # keys that the block's last row sees
        mask = torch.ones(end - start, seen, dtype=torch.bool, device=q.device).tril(
            seen - (end - start)
        )
        blocks.append(
            scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], attn_mask=mask, **kwargs
            )
        )
    return torch.cat(blocks, dim=2)


@functools.cache
def _varlen_attention() -> Callable[..., Any]:
    """torch's kernel, causal and aligned at the lower right in the words of the installed torch. It
    takes fewer key than query heads by itself; newer versions want that said, too."""
    from torch.nn.attention.varlen import varlen_attn

    words = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True}
    if "window_size" in words:
        options = {"window_size": (-1, 0)}
    if "enable_gqa" in words:
        options["enable_gqa"] = True
    return functools.partial(varlen_attn, **options)


def _attend_parts(parts: list[tuple[Tensor, Tensor, Tensor]], scale: float) -> Tensor:
    """Causal attention, aligned at the lower right, of many rectangles, in half precision on a GPU.

    parts: q [rows, n, d] and k, v [keys, g, d] of every rectangle -> [all rows, n, d].
    """
    large = [cudnn_attention.takes(*part) for part in parts]
    if not any(large):
        return attend_varlen(parts, scale)
    others = [part for part, alone in zip(parts, large, strict=True) if not alone]
    rows = [part[0].shape[0] for part in others]
    flash = iter(attend_varlen(others, scale).split(rows) if others else ())
    return torch.cat(
        [
            cudnn_attention.attend_rectangle(*part, scale) if alone else next(flash)
            for part, alone in zip(parts, large, strict=True)
        ]
    )


def attend_varlen(parts: list[tuple[Tensor, Tensor, Tensor]], scale: float) -> Tensor:
    """The same in one flash call."""
    queries, keys, values = zip(*parts, strict=True)
    q_lengths, k_lengths = (tuple(x.shape[0] for x in own) for own in (queries, keys))
    out = _varlen_attention()(
        torch.cat(queries),
        torch.cat(keys),
        torch.cat(values),
        _cumulative(q_lengths, queries[0].device),
        _cumulative(k_lengths, queries[0].device),
        max(q_lengths),
        max(k_lengths),
        scale=scale,
    )
    assert isinstance(out, Tensor)  # and not, as on request, with its log-sum-exps
    return out


@functools.lru_cache(maxsize=64)
def _cumulative(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept for the other layers of a micro batch."""
    return to_device(torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32), device)


def _runs_varlen(q: Tensor, cuts: list[list[Rectangle]], dropout: float) -> bool:
    """Whether flash kernels take all rectangles: half precision on a GPU, something to cut."""
    half = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    one_square = all(len(cut) == 1 and cut[0].query_end == cut[0].key_end for cut in cuts)
    return half and capabilities().varlen_attention and not dropout and not one_square


def _cut(
    q: Tensor, k: Tensor, v: Tensor, boundaries: list[int], cut: list[Rectangle], dim: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of every rectangle of one sequence, whose length is dimension ``dim``.

    Split, not sliced: in the backward a slice makes a whole sequence of zeros around its gradient,
    one for every rectangle, while the gradients of a split are put side by side.
    """
    queries = q.split([r.query_end - r.query_start for r in cut], dim)
    lengths = [end - start for start, end in pairwise(boundaries)]
    keys, values = (dict(zip(boundaries, x.split(lengths, dim), strict=False)) for x in (k, v))
    seen = [(r.key_start, r.key_end - r.key_start) for r in cut]
    return [
        (query, keys[start].narrow(dim, 0, length), values[start].narrow(dim, 0, length))
        for query, (start, length) in zip(queries, seen, strict=True)
    ]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of this rank's queries over the whole sequence.

    q [s, b, n, d]; k, v [s, b, g, d]: this context rank's zigzag part, all in one dtype. boundaries
    [b, P+1] int (on any device) gives the pieces of every whole sequence, padded with S; None means
    one piece. group: the context-parallel ranks. Returns [s, b, n, d].
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    if group is not None and size > 1:
        if boundaries is None and not dropout and context_attention.takes(q, k, v, size):
            return context_attention.attend(q, k, v, group, scale)
        k, v = _GatherSequence.apply(torch.cat([k, v], dim=-1), group).split(
            [k.shape[-1], v.shape[-1]], dim=-1
        )
    sequence_length, batch = k.shape[0], k.shape[1]
    if boundaries is None:
        pieces = [[0, sequence_length]]
    else:
        pieces = [_deduplicated(row) for row in boundaries.tolist()]
    cuts = [rectangles(starts, sequence_length, rank, size) for starts in pieces]
    if _runs_varlen(q, cuts, dropout):
        if boundaries is None:
            pieces, cuts = pieces * batch, cuts * batch
        rows = zip(q.unbind(1), k.unbind(1), v.unbind(1), pieces, cuts, strict=True)
        out = _attend_parts([part for row in rows for part in _cut(*row, dim=0)], scale)
        return out.view(batch, q.shape[0], *out.shape[1:]).transpose(0, 1)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [b, heads, length, d]
    # Without boundaries all sequences are cut alike and stay together.
    together = batch if boundaries is None else 1
    rows = zip(*(x.split(together) for x in (q, k, v)), pieces, cuts, strict=True)
    outputs = [
        _joined([_attend_rectangle(*part, scale, dropout) for part in _cut(*row, dim=2)], dim=2)
        for row in rows
    ]
    return _joined(outputs, dim=0).permute(2, 0, 1, 3)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """A single one as it is: kernels give their output in the order of the queries in memory, and
    what joins it, one though it be, copies it into another."""
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _deduplicated(row: list[int]) -> list[int]:
    """Piece starts without the padding (a repeated S) at the end."""
    return [row[0], *(b for a, b in zip(row, row[1:], strict=False) if b > a)]


def _random_states_of_heads(config: Any) -> AbstractContextManager[None]:
    """Inside, tensor ranks draw masks of their own, as each has heads of its own. Under sequence
    parallelism megatron-core's layers have done it around the whole attention, and doing it twice
    would draw other masks when activations are recomputed."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return nullcontext() if config.sequence_parallel else get_cuda_rng_tracker().fork()


class SDPACoreAttention(torch.nn.Module):
    """``attend`` in the place of megatron-core's core attention.

    The `attention_mask` that megatron-core passes through all layers carries the piece boundaries
    [b, P+1], or None where every sequence is one piece.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [s, b, n, d]; key, value [s, b, g, d] -> [s, b, n * d]."""
        # Short windows run with context_parallel_size 1 (model.gpt.without_context_parallel).
        group = self.context_group if self.config.context_parallel_size > 1 else None
        dropout = self.dropout if self.training else 0.0
        with _random_states_of_heads(self.config) if dropout else nullcontext():
            out = attend(query, key, value, attention_mask, group, self.softmax_scale, dropout)
        return out.reshape(*out.shape[:2], -1)
