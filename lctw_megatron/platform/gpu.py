"""Settings of torch on a GPU: what is compiled, and which kernels are allowed.

torch.compile fuses small operations where TransformerEngine and apex do not. Without it
megatron-core's rotary embedding runs as eight kernels over queries and keys, which at 32k tokens of
a 1B model is a twentieth of a step on an H200.
"""

import os

import torch
import torch._dynamo

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


def use_deterministic_kernels(wanted: bool) -> None:
    """Only kernels that add up in one order, or any. Before the first kernel of the process.

    Not deterministic otherwise: the backward of torch's and TransformerEngine's flash attention,
    which adds the parts of the queries' gradient atomically, and cuBLAS with several workspaces.
    """
    # Not warn_only, with which flash attention stays as it is.
    torch.use_deterministic_algorithms(wanted)
    if wanted:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
