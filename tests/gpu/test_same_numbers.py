"""One GPU computes what a CPU process, float64 and the paper's published code compute."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from lctw_megatron.config.schema import LayoutConfig
from lctw_megatron.model import attention
from lctw_megatron.model.attention import Rectangle, attend
from lctw_megatron.platform.capabilities import capabilities

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_llama"


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_losses_and_all_gradients_are_those_of_a_cpu_process(
    precision: str, allowed: float, tmp_path: Path
) -> None:
    answers = {}
    for place, devices in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        path = tmp_path / f"{place}.npz"
        command = [sys.executable, "-m", "tests.gpu.small_pass", precision, str(path)]
        subprocess.run(command, check=True, env={**os.environ, **devices})
        answers[place] = dict(np.load(path))
    for name, right in answers["cpu"].items():
        error = np.linalg.norm(answers["gpu"][name] - right) / np.linalg.norm(right)
        assert error < allowed, (name, error)


@pytest.fixture(params=["this torch", "torch before 2.10"])
def varlen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's variable-length kernel, and as where there is none."""
    if request.param != "this torch":
        older = dataclasses.replace(capabilities(), varlen_attention=False)
        monkeypatch.setattr(attention, "capabilities", lambda: older)


BOUNDARIES = [[0, 1, 100, 611, 1024], [0, 512, 1024, 1024, 1024]]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_is_that_of_float64(
    dtype: torch.dtype, allowed: float, packed: bool, varlen: None
) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(1024, 2, n, 64, generator=generator).bfloat16() for n in (8, 2, 2, 8)]
    boundaries = torch.tensor(BOUNDARIES, dtype=torch.int32) if packed else None

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (x.to(device, dtype).requires_grad_() for x in inputs[:3])
        out = attend(q, k, v, boundaries)
        gradients = torch.autograd.grad(out, (q, k, v), inputs[3].to(device, dtype))
        return [x.detach().double().cpu() for x in (out, *gradients)]

    for found, right in zip(run("cuda", dtype), run("cpu", torch.float64), strict=True):
        assert float((found - right).norm() / right.norm()) < allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pieces", ["one", "packed", "context parallel"])
def test_grouped_heads_never_store_the_probabilities(
    dtype: torch.dtype, pieces: str, varlen: None
) -> None:
    """32 heads over 8,192 tokens: their probabilities are 8 GiB in float32, all else is 0.6."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    q, k, v = (
        torch.randn(8192, 1, heads, 128, device="cuda", dtype=dtype, requires_grad=True)
        for heads in (32, 8, 8)
    )
    boundaries = torch.tensor([[0, 3000, 8192]], dtype=torch.int32) if pieces == "packed" else None
    if pieces == "context parallel":  # the second half of the queries, all keys: one rectangle
        with mock.patch.object(attention, "rectangles", lambda *_: [Rectangle(0, 4096, 0, 8192)]):
            attend(q[4096:], k, v, boundaries).sum().backward()
    else:
        attend(q, k, v, boundaries).sum().backward()
    assert torch.cuda.max_memory_allocated() < 2 * 2**30


def test_the_golden_losses_of_the_papers_code(tmp_path: Path) -> None:
    from lctw_megatron.conversion.hf_import import import_hf
    from lctw_megatron.model.checkpoint import load_weights, read_manifest
    from lctw_megatron.model.gpt import build_model
    from lctw_megatron.platform.world import initialize
    from lctw_megatron.scoring.forward import window_losses
    from lctw_megatron.scoring.self_scoring import cut_windows

    scores = np.load(GOLDEN / "scores.npz")
    import_hf(GOLDEN / "model", tmp_path / "checkpoint")
    world = initialize(LayoutConfig(), 1)
    options: dict[str, Any] = dict(dtype=torch.float32, device=world.device, seed=None)
    model = read_manifest(tmp_path / "checkpoint").model
    chunks = build_model(model, LayoutConfig(), max_sequence_length=512, **options)
    load_weights(chunks, tmp_path / "checkpoint")
    text = torch.from_numpy(scores["tokens"]).long()
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    positions = torch.arange(511, device=world.device).expand(2, -1)
    with torch.no_grad():
        long = chunks[0](tokens.cuda(), positions, None, labels=labels.cuda()).cpu().numpy()
    batch = {"host_tokens": tokens, "host_labels": labels}
    window_tokens, window_labels, where = cut_windows(batch, 128, 96, None)
    losses = window_losses(chunks, window_tokens, window_labels, 4096)
    assert losses is not None
    short = np.full(2 * 511, np.nan, dtype=np.float32)
    scored = where >= 0
    short[where[scored].numpy()] = losses.cpu()[scored].numpy()
    assert np.abs(long - scores["long_loss"]).max() < 1e-4
    assert np.nanmax(np.abs(short.reshape(2, 511) - scores["short_loss"])) < 1e-4
