"""Settings of torch on a GPU: what is compiled, and which kernels are allowed.

torch.compile fuses small operations where TransformerEngine and apex do not. Without it
megatron-core's rotary embedding runs as eight kernels over queries and keys, which at 32k tokens of
a 1B model is a twentieth of a step on an H200.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo

from lctw_megatron.errors import InputError
from lctw_megatron.platform.capabilities import capabilities


def fuse_small_operations() -> None:
    """Compile the rotary embedding; give every shape a kernel of its own. Idempotent.

    A process sees few shapes (the sequence, the windows of scoring, with and without gradient), but
    more than torch._dynamo's default limit of recompilations, after which it stops compiling; and
    kernels for any shape ran three times slower than those for one.
    """
    if not capabilities().gpu:
        return
    from megatron.core.models.common.embeddings import rope_utils

    settings = torch._dynamo.config
    settings.automatic_dynamic_shapes = False
    settings.recompile_limit = 64
    plain = rope_utils._apply_rotary_pos_emb_bshd
    if not hasattr(plain, "_torchdynamo_orig_callable"):
        rope_utils._apply_rotary_pos_emb_bshd = torch.compile(plain)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, small operations on tensors of any shape, as one kernel: each is read once."""
    return torch.compile(function, dynamic=True)


_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain", "^NVLS"),  # Megatron-LM's list
}
"""Variable: values with which the libraries add up in one order, the first if it is not set."""


def use_deterministic_kernels(wanted: bool) -> None:
    """Only kernels that add up in one order, or any. Before the first kernel of the process.

    Not deterministic otherwise: the backward of torch's and TransformerEngine's flash attention,
    which adds the parts of the queries' gradient atomically, cuBLAS with several workspaces, and
    NCCL's choice of algorithm. InputError if the environment asks for one of those.
    """
    # Not warn_only, with which flash attention stays as it is.
    torch.use_deterministic_algorithms(wanted)
    for name, allowed in _DETERMINISTIC.items() if wanted else ():
        if os.environ.setdefault(name, allowed[0]) not in allowed:
            raise InputError(
                f"environment: {name}={os.environ[name]} does not go with training.deterministic; "
                f"unset it, or set it to {' or '.join(allowed)}"
            )
