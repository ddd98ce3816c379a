"""Matrix products of half precision summed in float32, on the CPU and on a GPU; and weight
gradients that are added to their float32 sums by the product itself.

Apart, the product is written in half precision, read, and added to the sum: on four H200, under
CP4, the additions were 3 % of a step of 8 of Llama-3-8B's layers. megatron-core has a place for
such a product, `gradient_accumulation_fusion`, and takes it from a module of NVIDIA's apex. Where
that is not installed it gets torch's.
"""

from types import SimpleNamespace

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the result in float32 also where a and b are bfloat16."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())  # CPU kernels have no mixed product


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with the products of bfloat16 summed in total's float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(product(a, b))


def _add_weight_gradient_(inputs: Tensor, grad_output: Tensor, total: Tensor) -> None:
    """In the words of apex's kernels: [tokens, inputs], [tokens, outputs], [outputs, inputs]."""
    add_product_(total, grad_output.t(), inputs)


def fuse_weight_gradients() -> None:
    """Give megatron-core's linear layers torch's product where they have not apex's. Idempotent."""
    from megatron.core.tensor_parallel import layers

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
            wgrad_gemm_accum_fp32=_add_weight_gradient_,
            wgrad_gemm_accum_fp16=_add_weight_gradient_,
        )
        layers._grad_accum_fusion_available = True
