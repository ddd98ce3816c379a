"""How our settings become megatron-core's."""

import pytest
import torch

from lctw_megatron.config.schema import LayoutConfig, ModelConfig
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


def test_selective_recomputation_is_left_out_where_it_frees_nothing(monkeypatch):
    model, layout = ModelConfig.model_validate(MODEL), LayoutConfig(recompute="selective")
    assert spec.recomputes(model, layout, torch.bfloat16, packed=False) == "selective"
    monkeypatch.setattr(spec, "uses_transformer_engine", lambda *_: True)
    assert spec.recomputes(model, layout, torch.bfloat16, packed=False) == "none"
    assert spec.recomputes(model, layout, torch.bfloat16, packed=True) == "selective"
    assert spec.transformer_config(model, layout, torch.bfloat16, False).recompute_granularity is (
        None
    )
