"""An imported checkpoint loads under any layout, and one written under any layout exports."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lctw_megatron.conversion.hf_export import export_hf
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.conversion.verify import hf_logits
from tests.conversion.hf_models import MODELS, assert_same_tensors, make_model, random_tokens
from tests.distributed import run_distributed
from tests.training.layouts import KINDS

LENGTH = 160  # beyond the models' maximum of 64
LOSSES = 1e-5  # float32, absolute; losses are around 6

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "CP2": {"context": 2},
        "TP2": {"tensor": 2},
        "DP2": {},
    },
    4: {
        "TP2xPP2": {"tensor": 2, "pipeline": 2},
        "TP2+SPxPP2+VPP2": {
            "tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2,
        },
        "TP2xCP2": {"tensor": 2, "context": 2},
        "PP4": {"pipeline": 4},
    },
}  # fmt: skip
"""Ranks, and the layouts that are tried on them."""

EXPERT_LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "TP2xEP2": {"tensor": 2, "sequence": True, "expert": 2},
        "TP2xEP2, no SP": {"tensor": 2, "expert": 2},  # as scoring and evaluation have it
    },
    4: {
        "PP2xEP2": {"pipeline": 2, "expert": 2},
        "TP2xPP2xEP2": {"tensor": 2, "sequence": True, "pipeline": 2, "expert": 2},
        "CP2xEP4": {"context": 2, "expert": 4},
        "TP2xCP2xEP4, no SP": {"tensor": 2, "context": 2, "expert": 4},
    },
}
EXPERTS = ["mixtral", "qwen3_moe"]
"""Of MODELS."""


def save_from(
    layouts: dict[str, dict[str, Any]], names: list[str], root: str, kind: Literal["gpt", "hybrid"]
) -> dict[str, float]:
    """On every rank: load each imported model under each layout, save it from there with
    megatron-core. Returns the largest error of this rank's losses, if it has any."""
    from lctw_megatron.config.schema import LayoutConfig
    from lctw_megatron.data import zigzag
    from lctw_megatron.model.checkpoint import load_weights, model_state, read_manifest
    from lctw_megatron.model.gpt import build_model
    from lctw_megatron.platform.world import initialize
    from lctw_megatron.scoring.forward import window_losses
    from lctw_megatron.training.checkpoint import CheckpointWriter

    errors = {}
    for label, sizes in layouts.items():
        layout = LayoutConfig.model_validate(sizes)
        world = initialize(layout, seed=1)
        for name in names:
            manifest = read_manifest(Path(root) / f"{name}_checkpoint")
            chunks = build_model(
                manifest.model, layout, max_sequence_length=LENGTH, dtype=torch.float32,
                device=world.device, seed=None, kind=kind,
            )  # fmt: skip
            for chunk in chunks:  # what is not loaded must be seen
                for parameter in chunk.parameters():
                    parameter.data.fill_(float("nan"))
            load_weights(chunks, Path(root) / f"{name}_checkpoint")
            for chunk in chunks:
                assert not any(p.isnan().any() for p in chunk.parameters()), (label, name)
            expected = torch.load(Path(root) / f"{name}_losses.pt")
            if layout.pipeline == 1:
                part = losses(chunks[0], world.context_rank, layout.context)
                expected = zigzag.cut(expected, world.context_rank, layout.context, 1)
            else:
                tokens = random_tokens(LENGTH + 1)
                part = window_losses(chunks, tokens[:, :-1], tokens[:, 1:], LENGTH)
            if part is not None:
                errors[f"{label} {name}"] = float((part - expected).abs().max())
            writer = CheckpointWriter(Path(root) / f"{name} {label}", keep_last=1)
            writer.save(model_state(chunks), manifest)
            writer.close()
    return errors


@torch.no_grad()
def losses(chunk: Any, context_rank: int, context_size: int) -> Tensor:
    """This context rank's part of the losses of the same tokens as in ``prepare``."""
    from lctw_megatron.data import zigzag

    tokens = random_tokens(LENGTH + 1)
    cut = [
        zigzag.cut(stream, context_rank, context_size, 1)
        for stream in (tokens[:, :-1], torch.arange(LENGTH)[None], tokens[:, 1:])
    ]
    return chunk.eval()(cut[0], cut[1], None, labels=cut[2])


def prepare(names: list[str], root: Path) -> None:
    for name in names:
        make_model(name, root / f"{name}_hf")
        import_hf(root / f"{name}_hf", root / f"{name}_checkpoint")
        tokens = random_tokens(LENGTH + 1)
        logits = hf_logits(root / f"{name}_hf", tokens[:, :-1])
        expected = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        torch.save(expected, root / f"{name}_losses.pt")


def check(
    names: list[str], layouts: dict[str, dict[str, Any]], ranks: int, root: Path, kind: str = "gpt"
) -> None:
    if kind == "hybrid":  # it runs attention and MLP one after the other
        names = [name for name in names if not name.startswith("phi")]
    prepare(names, root)
    found: dict[str, float] = {}
    for errors in run_distributed(save_from, ranks, layouts, names, str(root), kind, timeout=500):
        assert all(error < LOSSES for error in errors.values()), errors
        found |= errors
    assert len(found) == len(names) * len(layouts)
    for name in names:
        for label in layouts:
            output = root / f"{name} {label} hf"
            export_hf(root / f"{name} {label}", output, max_file_bytes=150_000)
            assert_same_tensors(root / f"{name}_hf", output)


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_saved_and_exported_from_four_ranks(kind, tmp_path):
    layouts = {label: LAYOUTS[4][label] for label in ("TP2+SPxPP2+VPP2", "TP2xCP2")}
    check(["llama", "qwen3_tied", "phi"], layouts, 4, tmp_path, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_loaded_saved_and_exported_from_two_ranks(kind, tmp_path):
    check(EXPERTS, EXPERT_LAYOUTS[2], 2, tmp_path, kind)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_loaded_saved_and_exported_from_four_ranks(kind, tmp_path):
    check(["mixtral"], EXPERT_LAYOUTS[4], 4, tmp_path, kind)
    layouts = {label: EXPERT_LAYOUTS[4][label] for label in ("PP2xEP2", "TP2xPP2xEP2")}
    check(["qwen3_moe"], layouts, 4, tmp_path, kind)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", sorted(LAYOUTS))
def test_every_architecture_loaded_saved_and_exported_from_every_layout(ranks, kind, tmp_path):
    dense = [name for name in sorted(MODELS) if MODELS[name][0] not in EXPERTS]
    check(dense, LAYOUTS[ranks], ranks, tmp_path, kind)
