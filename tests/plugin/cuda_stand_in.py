"""What megatron.training asks of CUDA, answered on a machine without: for these tests only.

platform/cpu.py gives megatron-core such a view of torch. megatron.training asks for more, which no
part of the product runs: streams, memory counters, and that there be a GPU at all.
"""

import sys
from contextlib import nullcontext
from typing import Any

import torch

from lctw_megatron.platform import cpu


class _Stream:
    """A stream of one device that does everything in order."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def stand_in(*packages: str) -> None:
    """Give the loaded modules of ``packages`` (megatron.training, megatron.bridge), and those that
    megatron-core loads with them, a view of torch in which the CPU is the one GPU."""
    cpu.patch_megatron()
    cpu._VIEW.ones = cpu._on_cpu(torch.ones)  # the causal mask of its own attention
    view = cpu._TorchView()
    answers = {
        "is_available": True, "device_count": 1, "set_device": None, "empty_cache": None,
        "current_stream": _Stream(), "Stream": _Stream(), "stream": nullcontext(),
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0,
        "max_memory_reserved": 0, "device_memory_used": 0, "memory_stats": {}, "Event": _Stream(),
        "get_device_capability": (9, 0), "reset_peak_memory_stats": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(view.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    view.rand, view.ones = cpu._on_cpu(torch.rand), cpu._on_cpu(torch.ones)
    view.empty = cpu._on_cpu(torch.empty)
    for name, module in list(sys.modules.items()):
        if name.startswith(packages) and getattr(module, "torch", None) is torch:
            module.torch = view  # type: ignore[attr-defined]
