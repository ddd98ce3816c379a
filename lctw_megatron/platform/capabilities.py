"""What this machine and its libraries can do, asked once a process by everything with a choice.

`python -m lctw_megatron` prints it for bug reports; runs print it as one line when they start and
keep it in their checkpoints' manifests and metrics.
"""

import functools
import importlib
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

import lctw_megatron
from lctw_megatron.platform.cudnn import share_torch_s_cudnn


@dataclass(frozen=True)
class Capabilities:
    """Versions, devices and optional accelerators."""

    gpu: bool
    """Whether there is a GPU that torch can use."""
    gpus: int
    """GPUs of this machine that torch sees."""
    cuda: str | None
    nccl: str | None
    transformer_engine: str | None
    """Version of a TransformerEngine that can be imported as megatron-core imports it."""
    transformer_engine_error: str | None
    """Why one that is installed cannot be imported."""
    fused_adam: str | None
    """Where megatron-core takes its Adam from: transformer_engine or apex (NVIDIA's; PyPI's apex is
    a web toolkit); None: torch's AdamW."""
    varlen_attention: bool
    """torch's variable-length flash kernel (torch >= 2.10), for half precision on a GPU."""
    torch: str
    megatron_core: str
    python: str
    lctw_megatron: str = lctw_megatron.__version__

    def line(self) -> str:
        """All of it for the log."""
        return ", ".join(self.parts())

    def parts(self) -> list[str]:
        """All of it, one thing after the other. Asks CUDA for the name of this process's GPU and so
        starts it: not before a process forks others."""
        device = "CPU, gloo"
        if self.gpu:
            name = torch.cuda.get_device_name(local_gpu(self.gpus))
            device = f"{name} (1 of {self.gpus}, CUDA {self.cuda}, NCCL {self.nccl})"
        engine = self.transformer_engine or "none"
        if self.transformer_engine_error:
            engine = f"unusable ({self.transformer_engine_error})"
        return [
            f"lctw-megatron {self.lctw_megatron}",
            f"megatron-core {self.megatron_core}",
            f"torch {self.torch}",
            f"Python {self.python}",
            device,
            f"TransformerEngine {engine}",
            f"Adam {self.fused_adam or 'torch'}",
            f"variable-length attention {'yes' if self.varlen_attention else 'no'}",
        ]


def local_gpu(gpus: int) -> int:
    """The number of this process's GPU among the ``gpus`` of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) % gpus


@functools.cache
def capabilities() -> Capabilities:
    """Look, once. To be called before megatron-core is imported (platform.cpu.patch_megatron does).
    Imports TransformerEngine where a GPU and the package are there: seconds."""
    gpu = torch.cuda.is_available()
    engine, error = _transformer_engine(gpu)
    return Capabilities(
        gpu=gpu,
        gpus=torch.cuda.device_count() if gpu else 0,
        cuda=torch.version.cuda if gpu else None,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if gpu else None,
        transformer_engine=engine,
        transformer_engine_error=error,
        fused_adam=_fused_adam(engine),
        varlen_attention=_is_there("torch.nn.attention.varlen"),
        torch=torch.__version__,
        megatron_core=version("megatron-core"),
        python=platform.python_version(),
    )


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _transformer_engine(gpu: bool) -> tuple[str | None, str | None]:
    """(version, why it cannot be used). Being installed is not enough: wheels without the torch
    extension, or built for another torch, fail on import, with more than ImportErrors, which
    megatron-core does not expect and then cannot be imported itself. One that cannot be used is
    hidden from it; so is any where there is no GPU, as its Adam runs nowhere else."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None, None
    if not gpu:
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # import fails from now
        return None, None
    share_torch_s_cudnn()
    try:
        engine = importlib.import_module("transformer_engine.pytorch")
        importlib.import_module("transformer_engine.pytorch.optimizers")
        return str(getattr(engine, "__version__", None) or version("transformer-engine")), None
    except PackageNotFoundError:
        return "unknown", None
    except Exception as error:
        for name in [n for n in sys.modules if n.split(".")[0].startswith("transformer_engine")]:
            del sys.modules[name]
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # import fails from now
        reason = " ".join(str(error).split())[:200]
        return None, f"{type(error).__name__}: {reason}"


def _fused_adam(engine: str | None) -> str | None:
    if engine is not None:
        return "transformer_engine"
    try:
        importlib.import_module("apex.optimizers")
    except Exception:  # PyPI's apex, or NVIDIA's built for another torch
        return None
    return "apex"
