"""Products of bfloat16 are summed in float32, those of weight gradients in place."""

from typing import Any

import pytest
import torch

from lctw_megatron.benchmarks.steps import StepBench
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.platform.mixed_products import add_product_, product
from tests.distributed import run_distributed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_are_summed_in_the_dtype_of_the_total(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator).to(dtype) for size in ((5, 300), (300, 7)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = torch.randn(5, 7, generator=generator).to(wide)
    expected = total.double() + a.double() @ b.double()
    add_product_(total, a, b)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    assert product(a, b).dtype == wide
    add_product_(total.zero_(), a, b)
    torch.testing.assert_close(product(a, b), total, rtol=1e-5, atol=1e-5)


MODELS: list[dict[str, Any]] = [
    {"tie_word_embeddings": True},
    {"architecture": "phi"},
    {"num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_router_topk": 2},
]


def gradients(model: dict[str, Any], fused: list[bool]) -> list[dict[str, torch.Tensor]]:
    """Of a step of three micro batches in bfloat16, by parameter."""
    answers = []
    for each in fused:
        run = RunConfig.model_validate({
            "name": "test", "run_dir": "none", "data": {"train": [], "sequence_length": 64},
            "model": {
                "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4,
                "vocab_size": 250, **model,
            },
            "layout": {"tensor": 2, "sequence": True},
            "megatron": {"transformer": {"gradient_accumulation_fusion": each}},
            "training": {
                "steps": 1, "global_batch_size": 3, "micro_batch_size": 1, "precision": "bf16",
            },
        })  # fmt: skip
        bench: Any = StepBench(run)
        torch.manual_seed(1)
        for weight in bench.chunks[0].parameters():
            torch.nn.init.normal_(weight, std=0.1)
        bench.stepper({"scheme": "uniform"}).gradients(0, bench.batches())
        named = bench.chunks[0].named_parameters()
        answers.append({name: weight.main_grad.clone() for name, weight in named})
    return answers


@pytest.mark.parametrize("model", MODELS)
def test_weight_gradients_are_added_without_a_rounding_between(model: dict[str, Any]) -> None:
    """Apart they are rounded to 8 bits before they are added."""
    for fused, apart in run_distributed(gradients, 2, model, [True, False]):
        assert fused.keys() == apart.keys()
        for name, gradient in fused.items():
            assert gradient.dtype == torch.float32 and gradient.abs().max() > 0, name
            error = (gradient - apart[name]).norm() / gradient.norm()
            assert error < 3e-3, name
            matrix = "linear" in name and gradient.dim() == 2
            assert (error > 1e-4) == matrix, (name, error)
