"""Attention inside documents beside the same with a dense mask, and the kernels that can do it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lctw_megatron.benchmarks.large_model import LARGE
from lctw_megatron.benchmarks.measure import measure_in_turn
from lctw_megatron.model.attention import Rectangle, attend, attend_varlen, rectangles
from lctw_megatron.model.cudnn_attention import attend_rectangle


def attention_benchmark(
    length: int,
    heads: int,
    groups: int,
    width: int,
    pieces: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 3,
) -> dict[str, Any]:
    """Forward and backward over one packed sequence of ``pieces`` random documents."""
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randperm(length - 1, generator=generator)[: pieces - 1] + 1
    bounds = [0, *sorted(cuts.tolist()), length]
    boundaries = torch.tensor([bounds], dtype=torch.int32)
    area = sum((b - a) * (b - a + 1) // 2 for a, b in zip(bounds[:-1], bounds[1:], strict=True))

    def normal(number: int) -> Tensor:
        tensor = torch.randn(length, 1, number, width, generator=generator)
        return tensor.to(device, dtype).requires_grad_()

    q, k, v = normal(heads), normal(groups), normal(groups)

    def ours() -> None:
        attend(q, k, v, boundaries).sum().backward()

    def dense() -> None:
        piece = torch.bucketize(torch.arange(length), boundaries[0], right=True)
        mask = (piece[:, None] == piece[None]).tril().to(device)
        heads_first = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
        out = scaled_dot_product_attention(
            heads_first[0],
            heads_first[1],
            heads_first[2],
            attn_mask=mask,
            enable_gqa=heads != groups,
        )
        out.sum().backward()

    fast, slow = measure_in_turn([ours, dense], device, repeats)
    return {
        "shape": f"{length} tokens, {pieces} documents, {heads}/{groups} heads of {width}",
        "unmasked_share": area / length**2,
        "seconds": fast.seconds,
        "dense_seconds": slow.seconds,
        "time_ratio": fast.seconds / slow.seconds,
        "memory_ratio": fast.peak_bytes / max(slow.peak_bytes, 1),
    }


def time_kernels(results: dict[str, Any]) -> None:
    """Attention of one layer of the 1B Llama at 32,768 tokens, alone: a call of cuDNN for each
    rectangle beside one flash call for all. Forward; forward and backward.

    TFLOP/s are of the model (a backward is two forwards), though the kernels take their scores
    twice. `model.cudnn_attention.LARGE_ROWS` is where the two are even.
    """
    length = LARGE["data"]["sequence_length"]
    cases = {"one document": rectangles([0, length], length, 0, 1)}
    for size in (2, 4, 8, 16):
        cases[f"CP{size}, the last rank"] = rectangles([0, length], length, size - 1, size)
    for size in (8192, 4096, 2048, 1024):
        starts = [*range(0, length + 1, size)]
        cases[f"documents of {size:,}"] = rectangles(starts, length, 0, 1)
    for name, cut in cases.items():
        results[f"attention alone, {name}"] = kernel_rates(cut, length)


def kernel_rates(cut: list[Rectangle], length: int) -> dict[str, float]:
    """TFLOP/s of both kernels on the rectangles ``cut`` of one rank of a sequence of ``length``."""
    model = LARGE["model"]
    heads, groups = model["num_attention_heads"], model["num_query_groups"]
    width = model["hidden_size"] // heads
    shapes = ((cut[-1].query_end, heads), (length, groups), (length, groups))
    q, k, v = (
        torch.randn(*shape, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for shape in shapes
    )
    parts, pairs = [], 0
    for r in cut:
        keys = slice(r.key_start, r.key_end)
        parts.append((q[r.query_start : r.query_end], k[keys], v[keys]))
        rows = r.query_end - r.query_start
        pairs += rows * (r.key_end - r.key_start) - rows * (rows - 1) // 2
    scale, grad = width**-0.5, torch.randn_like(q)

    def cudnn() -> Tensor:
        return torch.cat([attend_rectangle(*part, scale=scale) for part in parts])

    def flash() -> Tensor:
        return attend_varlen(parts, scale)

    def both(forward: Callable[[], Tensor]) -> None:
        torch.autograd.grad(forward(), (q, k, v), grad)

    costs = measure_in_turn(
        [cudnn, flash, partial(both, cudnn), partial(both, flash)], torch.device("cuda"), 5
    )
    tera = 4 * pairs * heads * width / 1e12
    names = ("cuDNN forward", "flash forward", "cuDNN both", "flash both")
    rates = {
        what: round(work * tera / cost.seconds, 1)
        for what, work, cost in zip(names, (1, 1, 3, 3), costs, strict=True)
    }
    return rates | {"time_ratio": costs[2].seconds / costs[3].seconds}
