"""Causal rectangles on cuDNN's attention, of which torch offers squares alone.

On Hopper cuDNN's kernels are faster than FlashAttention-2's, which torch's variable-length call
runs. A causal rectangle aligned at its lower right is a full block, the keys before its first
query, and a square on the diagonal. Each is one cuDNN call; the two are merged by the log-sum-exps
of their scores, as the blocks of ring attention are (Liu et al. 2023). In the backward each kernel
gets the merged output and log-sum-exp, from which it makes its part of the whole softmax.

Shapes: n query heads, g key/value heads, d head.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from lctw_megatron.platform.gpu import compiled

LARGE_ROWS = 3072
"""Queries of a square from which a call of its own pays: on an H100 the kernels were even at about
2,700. Of 1,024 queries, a third, of 16,000 keys cuDNN took 0.85 of the time on an H200
(`benchmark.py gpu --only kernels`)."""


def is_large(rows: int, keys: int) -> bool:
    """Whether a call of its own pays for a rectangle: the area of a square of LARGE_ROWS, and not
    so narrow that it leaves units of the GPU without work."""
    return 3 * rows >= LARGE_ROWS and rows * keys >= LARGE_ROWS**2


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether ``attend_rectangle`` should have this rectangle: a large one, whose square torch
    itself would give to cuDNN. q [rows, n, d]; k, v [keys, g, d]."""
    if not is_large(q.shape[0], k.shape[0]):
        return False
    return is_preferred(*(_heads_first(x[-q.shape[0] :]) for x in (q, k, v)))


def is_preferred(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch itself would give this causal square to cuDNN. q [b, n, rows, d]; k and v
    [b, g, rows, d]."""
    if torch.are_deterministic_algorithms_enabled():
        return False
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, True, enable_gqa=True)
    return choice == SDPBackend.CUDNN_ATTENTION.value


def attend_rectangle(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention, aligned at the lower right, in half precision on a GPU. q [rows, n, d];
    k, v [keys, g, d], rows <= keys -> [rows, n, d]."""
    query, key, value = (_heads_first(x) for x in (q, k, v))
    if q.shape[0] == k.shape[0]:
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
    else:
        out = _Rectangle.apply(query, key, value, scale)
    return out[0].transpose(0, 1)


def _heads_first(x: Tensor) -> Tensor:
    """[length, heads, d] -> [1, heads, length, d], a view."""
    return x.transpose(0, 1)[None]


class Block(NamedTuple):
    """What a block's backward wants of its forward."""

    log_sum_exp: Tensor
    """float32 [1, n, rows, 1]"""
    rest: tuple[Any, ...]
    """Of dropout and of sequences of many lengths."""


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Block]:
    """One cuDNN call; q [1, n, rows, d], k and v [1, g, keys, d] -> output [1, n, rows, d]."""
    out, log_sum_exp, *rest, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return out, Block(log_sum_exp, tuple(rest))


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, block: Block, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, given the output and log-sum-exp over all blocks."""
    q_starts, k_starts, q_length, k_length, seed, offset = block.rest
    gradients: tuple[Tensor, Tensor, Tensor] = (
        torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, block.log_sum_exp, seed, offset, None,
            q_starts, k_starts, q_length, k_length, 0.0, causal, scale=scale,
        )
    )  # fmt: skip
    return gradients


class _Rectangle(torch.autograd.Function):
    """q [1, n, rows, d]; k, v [1, g, keys, d], rows < keys -> [1, n, rows, d]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        (full, block), (out, square) = (
            forward(q, key, value, causal, scale) for causal, key, value in _blocks(q, k, v)
        )
        merge_(out, square.log_sum_exp, full, block.log_sum_exp)
        ctx.save_for_backward(q, k, v, out, square.log_sum_exp)
        ctx.rest, ctx.scale = [block.rest, square.rest], scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, out, merged = ctx.saved_tensors
        parts = [
            backward(grad, q, key, value, out, Block(merged, rest), causal, ctx.scale)
            for rest, (causal, key, value) in zip(ctx.rest, _blocks(q, k, v), strict=True)
        ]
        queries, keys, values = zip(*parts, strict=True)
        return queries[0] + queries[1], torch.cat(keys, 2), torch.cat(values, 2), None


def merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """``out`` and ``lse`` become output and log-sum-exp over the keys of both. Outputs
    [b, n, rows, d], log-sum-exps float32 [b, n, rows, 1]."""
    (compiled(_merge_) if out.is_cuda else _merge_)(out, lse, other, other_lse)


def _merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    both = torch.logaddexp(lse, other_lse)
    out.copy_(out * (lse - both).exp() + other * (other_lse - both).exp())
    lse.copy_(both)


def _blocks(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[bool, Tensor, Tensor]]:
    """Whether causal, keys and values of the full block and of the square."""
    before = k.shape[2] - q.shape[2]
    return [
        (False, k[:, :, :before], v[:, :, :before]),
        (True, k[:, :, before:], v[:, :, before:]),
    ]
