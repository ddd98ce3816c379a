"""The gradient norm without apex and TransformerEngine; of waits see tests/gpu."""

import pytest
import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads

from lctw_megatron.platform.gradient_norm import l2_norm_at_once, use_norm_at_once


def test_it_is_the_norm_of_all_gradients_together() -> None:
    rng = torch.Generator().manual_seed(0)
    grads = [torch.randn(size, generator=rng) for size in (7, 300, 1)] + [torch.zeros(0)]
    norm, _ = l2_norm_at_once(1, torch.zeros(1), [grads], False)
    assert norm.shape == (1,) and norm.dtype == torch.float32
    assert norm.item() == pytest.approx(torch.cat(grads).double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_only_the_stand_in_is_replaced(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    def kernel() -> None: ...

    found = kernel if fused else utils.local_multi_tensor_l2_norm
    monkeypatch.setattr(clip_grads, "l2_norm_impl", found)
    use_norm_at_once()
    assert clip_grads.l2_norm_impl is (kernel if fused else l2_norm_at_once)
