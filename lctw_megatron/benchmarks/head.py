"""The row-block loss beside full logits and cross-entropy, and its backward under sparse
weights.
"""

from typing import Any

import torch
from torch import Tensor

from lctw_megatron.benchmarks.measure import measure_in_turn
from lctw_megatron.model.cross_entropy import row_block_cross_entropy


def head_benchmark(
    rows: int,
    hidden_size: int,
    vocabulary: int,
    device: torch.device,
    dtype: torch.dtype,
    block_rows: int = 1024,
    repeats: int = 3,
) -> dict[str, Any]:
    """Forward and backward of one head both ways.

    Peak memory counts what is held beyond the inputs and their gradients, which both ways need.
    `sparse_over_dense` is the row-block loss with a tenth of its rows' gradients not zero over the
    same with all (the forward is the same).
    """
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        tensor = torch.randn(shape, device=device, dtype=dtype, generator=generator)
        return (tensor * hidden_size**-0.5).requires_grad_()

    hidden, weight = normal(rows, hidden_size), normal(vocabulary, hidden_size)
    labels = torch.randint(vocabulary, (rows,), device=device, generator=generator)
    weights = torch.rand(rows, device=device, generator=generator)
    sparse = weights * (torch.rand(rows, device=device, generator=generator) < 0.1)
    # Gradients exist before, so that they count for neither side.
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)

    def full() -> None:
        logits = (hidden @ weight.t()).float()
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        (loss * weights).sum().backward()

    def blocks(w: Tensor) -> None:
        loss = row_block_cross_entropy(hidden, weight, labels, block_rows=block_rows)
        (loss * w).sum().backward()

    whole, ours, few = measure_in_turn(
        [full, lambda: blocks(weights), lambda: blocks(sparse)], device, repeats
    )
    # Autograd adds each new weight gradient to the old one: that one buffer is a gradient.
    gradients = (hidden.numel() + weight.numel()) * hidden.element_size()
    return {
        "shape": f"{rows} x {vocabulary}, hidden {hidden_size}, {str(dtype).split('.')[-1]}",
        "full_seconds": whole.seconds,
        "row_block_seconds": ours.seconds,
        "sparse_seconds": few.seconds,
        "full_peak_gib": (whole.peak_bytes - gradients) / 2**30,
        "row_block_peak_gib": (ours.peak_bytes - gradients) / 2**30,
        "time_ratio": ours.seconds / whole.seconds,
        "memory_ratio": (ours.peak_bytes - gradients) / max(whole.peak_bytes - gradients, 1),
        "sparse_over_dense": few.seconds / ours.seconds,
    }
