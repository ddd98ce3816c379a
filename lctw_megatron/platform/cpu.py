"""Make megatron-core run where there is no GPU.

megatron-core says "cuda" literally in many places (device="cuda", torch.cuda.current_device(),
pinned memory, CUDA generators). On a machine without CUDA each of its modules is given, under the
name `torch`, a view of torch in which the device "cuda" is the CPU. Nothing outside megatron-core
sees the view, tensors and autograd are torch's own, and a machine with CUDA is never touched.

Seen to be needed with megatron-core 0.16.1 and 0.19.2; tests/platform/test_cpu.py fails once
upstream makes a patch needless.
"""

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import ModuleType
from typing import Any

import torch

from lctw_megatron.platform.capabilities import capabilities

CPU = torch.device("cpu")

# Modules that megatron-core imports inside functions: imported before the view is handed out, since
# a module imported later would see the real torch.
_LAZY_MODULES = (
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.pipeline_parallel",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.transformer.utils",
)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The tensor constructor ``function`` with "cuda" read as the CPU and memory never pinned."""

    @wraps(function)
    def constructor(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return constructor


def _empty_like(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A place on the GPU to receive what belongs in ``tensor``, which dist_checkpointing asks for
    if the tensor is on the CPU: here that is the tensor itself, as for one that is on the GPU."""
    if kwargs.get("device") == "cuda":
        return tensor
    return torch.empty_like(tensor, *args, **kwargs)


_empty = _on_cpu(torch.empty)


class _Stream:
    """Stands for a CUDA stream, and for an event of it, which is past as soon as it is there."""

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, other: Any) -> None: ...

    def record_event(self) -> "_Stream":
        return self

    def synchronize(self) -> None: ...


class _CudaView(ModuleType):
    """`torch.cuda` of a machine whose one device is the CPU; the rest is the real module's."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.current_device = lambda: CPU
        self.synchronize = lambda *args, **kwargs: None
        self.manual_seed = torch.manual_seed
        self.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        # Gradient buffers (0.17 and later) and the dispatcher of experts' tokens wait for streams.
        only = _Stream()
        self.Stream = self.current_stream = lambda *args, **kwargs: only

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _TorchView(ModuleType):
    """`torch` with `cuda` and the tensor constructors replaced; the rest is the real module's."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaView()
        self.tensor, self.zeros = _on_cpu(torch.tensor), _on_cpu(torch.zeros)
        self.empty_like = _empty_like

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_VIEW = _TorchView()


def patch_megatron() -> None:
    """Give every loaded megatron-core module the CPU view of torch. Idempotent; a no-op with
    CUDA.
    """
    if capabilities().gpu:  # asked before megatron-core is imported, see there
        return
    for name in _LAZY_MODULES:
        importlib.import_module(name)
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _VIEW  # type: ignore[attr-defined]
    # The tracker of tensor-parallel random states works on CUDA's generator through these two, and
    # complains of every change to the CPU's, which here is the same one.
    random = sys.modules["megatron.core.tensor_parallel.random"]
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # type: ignore
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)  # type: ignore
    logging.getLogger(random.__name__).addFilter(_is_no_false_alarm)
    # A rank that loads is also sent what only others hold, their experts. The place for it is made
    # by the real torch.empty, the default of a parameter.
    mapping = sys.modules["megatron.core.dist_checkpointing.mapping"]
    mapping.ShardedTensor.init_data.__defaults__ = (_empty,)  # type: ignore[attr-defined]
    # How many tokens go to which rank: numbers, which gloo wants, once they are off the GPU.
    dispatcher = sys.modules["megatron.core.transformer.moe.token_dispatcher"]
    dispatcher.maybe_move_tensor_to_cpu = _moved_to_cpu  # type: ignore[attr-defined]
    # Tensors are shared with everyone; without CUDA the real method can only raise.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]


def _moved_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _is_no_false_alarm(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


@contextmanager
def optimizer_construction() -> Iterator[None]:
    """While megatron-core builds an optimizer, CPU parameters report CUDA tensor types.

    It sorts parameters by `param.type() == 'torch.cuda.FloatTensor'` and refuses all others
    (optimizer.py and distrib_optimizer.py).
    """
    if capabilities().gpu:
        yield
        return
    real = torch.Tensor.type

    def reported(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = reported  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = real  # type: ignore[method-assign]
