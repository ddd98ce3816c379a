"""How our settings become megatron-core's."""

import pytest
import torch

from lctw_megatron.config.schema import LayoutConfig, ModelConfig
from lctw_megatron.errors import InputError
from lctw_megatron.model import spec
from tests.training.layouts import MODEL


@pytest.mark.parametrize(
    ("layout", "on_gpu", "overlap", "batch"),
    [
        ({}, True, False, True),
        ({"pipeline": 2}, True, False, True),
        # Two stages are each other's previous and next: NCCL would match batched messages wrongly.
        ({"pipeline": 2, "virtual_pipeline": 2}, True, True, False),
        ({"pipeline": 4, "virtual_pipeline": 2}, True, True, False),
        ({"pipeline": 2, "virtual_pipeline": 2}, False, True, False),
        ({"pipeline": 2}, False, False, False),
    ],
)
def test_interleaved_stages_overlap_unbatched_messages(layout, on_gpu, overlap, batch):
    found = spec.point_to_point(LayoutConfig.model_validate(layout), on_gpu)
    assert (found["overlap_p2p_comm"], found["batch_p2p_comm"]) == (overlap, batch)
    assert not found["batch_p2p_sync"]


def test_the_activation_of_phi_is_never_fused_as_unfused_it_would_be_another():
    phi = {"architecture": "phi", "qk_norm": False}
    model = ModelConfig.model_validate(MODEL | phi)
    config = spec.transformer_config(model, LayoutConfig(), torch.bfloat16, False)
    x = torch.linspace(-4, 4, 999, dtype=torch.float64)
    tanh = torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    torch.testing.assert_close(config.activation_func(x), 0.5 * x * (1 + tanh))
    assert not config.bias_activation_fusion
    with pytest.raises(InputError, match="bias_activation_fusion.*refused by megatron-core"):
        fields = {"bias_activation_fusion": True}
        spec.transformer_config(model, LayoutConfig(), torch.bfloat16, False, fields)


@pytest.mark.parametrize(
    ("context", "dtype", "packed", "own", "acting"),
    [
        (2, torch.bfloat16, False, True, "selective"),
        (2, torch.bfloat16, False, False, "none"),  # TransformerEngine's attention
        (1, torch.bfloat16, True, True, "selective"),
        (1, torch.bfloat16, False, True, "none"),
        (1, torch.float32, False, True, "selective"),
    ],
)
def test_selective_recomputation_is_left_out_where_it_frees_nothing(
    context, dtype, packed, own, acting
):
    layout = LayoutConfig(recompute="selective", context=context)
    assert spec.recomputes(layout, dtype, packed, own) == acting
    full = LayoutConfig(recompute="full", context=context)
    assert spec.recomputes(full, dtype, packed, own) == "full"


def test_left_out_recomputation_reaches_no_config_of_megatron_core():
    model, layout = ModelConfig.model_validate(MODEL), LayoutConfig(recompute="selective")
    for packed, found in ((False, None), (True, "selective")):
        config = spec.transformer_config(model, layout, torch.bfloat16, packed)
        assert config.recompute_granularity == found
