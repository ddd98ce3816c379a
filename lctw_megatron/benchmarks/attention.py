"""Attention inside documents beside the same with a dense mask."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lctw_megatron.benchmarks.measure import measure_in_turn
from lctw_megatron.model.attention import attend


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
