"""What self-scoring computes for packed sequences: windows padded to K beside windows grouped by
width. Counts, no timing."""

from typing import Any

import numpy as np
import torch

from lctw_megatron.config.schema import ModelConfig
from lctw_megatron.scoring.self_scoring import cut_windows, window_widths
from lctw_megatron.training.flops import forward_flops


def count_packed_windows(
    model: ModelConfig, sequence_length: int, window: int, stride: int, median: int
) -> dict[str, Any]:
    """Tokens run and FLOPs of self-scoring 16 packed sequences. Lengths of documents are
    log-normal with the ``median`` and sigma 1.2, about that of web pages; longer ones are cut."""
    draw = np.random.default_rng(0)
    rows, length = 16, sequence_length
    boundaries = np.full((rows, 4 * length // median + 64), length, dtype=np.int32)
    for row in boundaries:
        lengths = np.exp(draw.normal(np.log(median), 1.2, len(row) - 1)).astype(np.int64)
        row[0], row[1:] = 0, np.minimum(np.cumsum(lengths.clip(1, length)), length)
    tokens = torch.zeros((rows, length), dtype=torch.int64)
    batch = {"host_tokens": tokens, "host_labels": tokens, "boundaries": torch.tensor(boundaries)}
    _, _, where = cut_windows(batch, window, stride, None)
    needed = (where >= 0).int().mul(torch.arange(1, window + 1)).amax(1).tolist()
    ways = {
        "padded": [window] * len(where),
        "grouped": window_widths(where >= 0, window).tolist(),
        "needed": needed,
    }
    scored = int((where >= 0).sum())
    result: dict[str, Any] = {"windows": len(where), "shapes": len(set(ways["grouped"]))}
    for name, widths in ways.items():
        result[f"{name}_tokens"] = sum(widths)
        result[f"{name}_tflops"] = forward_flops(model, widths, scored) / 1e12
    result["flops_ratio"] = result["grouped_tflops"] / result["padded_tflops"]
    return result


def packed_windows_benchmark(model: ModelConfig) -> dict[str, dict[str, Any]]:
    """At 32k tokens, for documents and windows of three kinds."""
    return {
        f"packed windows of {window} every {stride}, documents of {median}": count_packed_windows(
            model, 32768, window, stride, median
        )
        for window, stride, median in (
            (8192, 6144, 6000),
            (2048, 1536, 2000),
            (2048, 512, 2000),
        )
    }
