"""Windows that end early are run no wider than they need, and score the same."""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from lctw_megatron.config.schema import LayoutConfig, ModelConfig, RopeScaling
from lctw_megatron.data import zigzag
from lctw_megatron.model.checkpoint import CheckpointManifest, model_state
from lctw_megatron.model.device_batch import move
from lctw_megatron.scoring import self_scoring
from lctw_megatron.scoring.scorer import Scorer
from lctw_megatron.scoring.self_scoring import SelfScorer, window_widths
from lctw_megatron.scoring.windows import windows
from lctw_megatron.training.checkpoint import CheckpointWriter
from tests.distributed import run_distributed
from tests.scoring.scorers import write_corpus
from tests.training.layouts import MODEL, VOCABULARY

WINDOW, STRIDE, LENGTH = 256, 192, 2048
# Last windows of 65 to 256 inputs; a piece without windows; padding.
PIECES = [[192 + 70, 192 + 65, 384 + 128, 100, 384 + 200], [192 + 256, 384 + 90, 200, 300]]


LAYOUTS: list[dict[str, Any]] = [
    {"context": 2},
    {"tensor": 2, "sequence": True},
    {"pipeline": 2, "virtual_pipeline": 2},
]


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    return packed_batch()


def packed_batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=draw)
    labels = tokens.roll(-1, 1)
    boundaries = torch.full((2, 7), LENGTH, dtype=torch.int32)
    for row, pieces in enumerate(PIECES):
        ends = np.cumsum([0, *pieces])
        boundaries[row, : len(ends)] = torch.from_numpy(ends)
        labels[row, ends[-1] :] = -100
    streams = {"tokens": tokens, "labels": labels, "boundaries": boundaries}
    return streams | {"sequence_tokens": tokens, "sequence_labels": labels}


@pytest.fixture(scope="module")
def chunks() -> list[Any]:
    return model_under({})


def model_under(layout: dict[str, Any], **changes: Any) -> list[Any]:
    from lctw_megatron.model.gpt import build_model
    from lctw_megatron.platform.world import initialize

    sizes = LayoutConfig(**layout)
    world = initialize(sizes, 1)
    options: dict[str, Any] = dict(dtype=torch.float32, device=world.device, seed=1)
    return build_model(
        ModelConfig(**MODEL | changes), sizes, max_sequence_length=WINDOW, packed=False, **options
    )


def scored_under_layouts() -> list[Any]:
    """What this rank got under each layout: None where it is no last stage."""
    return [scored(model_under(layout), packed_batch())[0] for layout in LAYOUTS]


def scored(chunks: list[Any], batch: dict[str, torch.Tensor]) -> tuple[Any, int]:
    """Short losses, and the tokens that the first chunk read for them."""
    from megatron.core import parallel_state

    group = parallel_state.get_context_parallel_group()
    scorer = SelfScorer(chunks, WINDOW, STRIDE, 2 * WINDOW, 1, group)
    moved = move(batch, torch.device("cpu"))
    forward, read = chunks[0].forward, []

    def counting(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        read.append(tokens.numel())
        return forward(tokens, *args, **kwargs)

    with mock.patch.object(chunks[0], "forward", counting):
        scorer.fill([moved])
    return moved.get("short_loss"), sum(read)


def test_windows_grouped_by_width_score_as_padded_ones_and_read_less(
    chunks: list[Any], batch: dict[str, torch.Tensor]
) -> None:
    grouped, read = scored(chunks, batch)
    with mock.patch.object(self_scoring, "round_width", lambda length: WINDOW):
        padded, read_padded = scored(chunks, batch)
    known = ~padded.isnan()
    assert torch.equal(known, ~grouped.isnan()) and known.sum() > 1000
    assert (grouped - padded)[known].abs().max() < 1e-6 * padded[known].abs().max()
    assert read < 0.9 * read_padded


@pytest.mark.parametrize(("original", "whole"), [(WINDOW - 1, True), (WINDOW, False)])
def test_windows_are_run_whole_where_a_dynamic_rope_turns_by_their_width(
    batch: dict[str, torch.Tensor], original: int, whole: bool
) -> None:
    dynamic = RopeScaling(rope_type="dynamic", factor=4, original_max_position_embeddings=original)
    chunks = model_under({}, rope_scaling=dynamic)
    found, read = scored(chunks, batch)
    with mock.patch.object(self_scoring, "round_width", lambda length: WINDOW):
        padded, read_padded = scored(chunks, batch)
    assert (read == read_padded) == whole
    torch.testing.assert_close(found, padded, equal_nan=True)


@pytest.mark.parametrize("multiple", [1, 4, 48])
def test_a_width_holds_all_that_is_scored_and_divides_among_the_ranks(multiple: int) -> None:
    window = 480
    draw = np.random.default_rng(0)
    last = draw.integers(1, window + 1, 200)
    mask = torch.arange(window)[None] < torch.from_numpy(last)[:, None]
    widths = window_widths(mask, window, multiple)
    assert (widths >= last).all() and (widths <= window).all()
    assert (widths % multiple == 0).all()
    assert len(set(widths.tolist())) <= 8


def test_grouped_windows_score_the_same_under_every_layout(
    chunks: list[Any], batch: dict[str, torch.Tensor]
) -> None:
    alone = scored(chunks, batch)[0].numpy()
    ranks = run_distributed(scored_under_layouts, 2)
    (first, second), (tensor, _), (_, pipeline) = zip(*ranks, strict=True)
    parts = [first.numpy(), second.numpy()]
    np.testing.assert_allclose(zigzag.join(parts, dim=1), alone, rtol=2e-6)
    np.testing.assert_allclose(tensor.numpy(), alone, rtol=2e-6)
    np.testing.assert_allclose(pipeline.numpy(), alone, rtol=2e-6)


PHI = {"architecture": "phi", "qk_norm": False, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("changes", [{}, PHI], ids=["llama", "phi"])
def test_the_training_model_scores_as_its_frozen_checkpoint_without_dropout(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    chunks = model_under({}, hidden_dropout=0.3, attention_dropout=0.3, **changes)
    for parameter in chunks[0].parameters():  # biases begin as 0
        parameter.data += 0.1
    model = ModelConfig(**MODEL | changes)
    writer = CheckpointWriter(tmp_path, keep_last=1)
    writer.save(model_state(chunks), CheckpointManifest(step=0, model=model, dtype="fp32"))
    dataset = write_corpus(tmp_path / "data", [LENGTH + 1])
    text = torch.from_numpy(dataset.get(0).astype(np.int64))[None]
    batch = {"tokens": text[:, :-1], "labels": text[:, 1:]}
    streams = {"sequence_tokens": batch["tokens"], "sequence_labels": batch["labels"]}
    chunks[0].train()
    own, _ = scored(chunks, batch | streams)

    frozen = Scorer(
        tmp_path / "step_00000000", LayoutConfig(), WINDOW, 2 * WINDOW, "fp32", torch.device("cpu")
    )
    table = windows(LENGTH + 1, WINDOW, STRIDE)[1:]
    table = np.concatenate([np.zeros((len(table), 1), np.int64), table], axis=1)
    (_, expected), *others = frozen.losses(dataset, [table, table[:2], table[2:]], 1)
    parts = np.concatenate([losses for _, losses in others])
    np.testing.assert_allclose(parts, expected, rtol=2e-6)
    found = own[0][~own[0].isnan()].numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert found.std() > 0.1
