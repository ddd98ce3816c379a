"""The scheme `position` in the plug-in: contexts are counted as tools/train.py counts them."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lctw_megatron.data.batch import PieceData, assemble, collate
from lctw_megatron.data.zigzag import cut, join
from lctw_megatron.errors import InputError
from lctw_megatron.plugin.dataset import ContextGPTDataset, dataset_class
from lctw_megatron.plugin.forward_step import weighted_forward_step
from lctw_megatron.plugin.loss_mask import DEAD, carry_contexts
from lctw_megatron.weighting import compute_weights, parse_weighting
from tests.distributed import run_distributed
from tests.plugin.scene import EOD, SEQUENCE, build, write_corpus

LAMBDA = 0.25
POSITION = {"scheme": "position", "window": 5, "interpolation": LAMBDA}


def plugin_weights(
    masks: Tensor, weighting: dict[str, Any] = POSITION, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The weight of every label of loss_masks [b, s], by the wrapped forward step: what the total
    loss changes by with the label's own."""
    losses = torch.ones_like(masks, requires_grad=True)

    def loss_func(mask: Tensor, losses: Tensor) -> Any:
        return (losses * mask).sum(), mask.sum().to(torch.int), {}

    def step(data_iterator: Any, model: Any) -> Any:
        return losses, partial(loss_func, masks)

    model = SimpleNamespace(
        config=SimpleNamespace(calculate_per_token_loss=True, mtp_num_layers=None),
        training=True,
        pg_collection=SimpleNamespace(cp=group),
    )
    output, function = weighted_forward_step(step, weighting)(None, model)
    total, *_ = function(output)
    (weights,) = torch.autograd.grad(total, losses)
    return weights


def trainer_weights(text: np.ndarray, weighting: dict[str, Any]) -> np.ndarray:
    """Of the same pieces of documents, packed by tools/train.py: of its targets, in order."""
    ends = [*(np.flatnonzero(text == EOD) + 1), len(text)]
    pieces = [
        PieceData(number, 0, text[begin:end])
        for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
        if end > begin + 1
    ]
    batch = collate([assemble(pieces, SEQUENCE, None)], with_boundaries=True)
    mask = torch.from_numpy(batch["loss_mask"])
    weights = compute_weights(
        parse_weighting(weighting), torch.ones_like(mask), None, mask,
        boundaries=torch.from_numpy(batch["boundaries"]),
    )  # fmt: skip
    return weights[mask != 0].numpy()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("window", [{"window": 5}, {}])
def test_the_weights_of_packed_documents_are_the_trainer_s(tmp_path, window):
    lengths = np.random.default_rng(2).integers(2, 40, 80).tolist()
    write_corpus(tmp_path / "a", lengths, 10_000)
    weighting = {"scheme": "position", "interpolation": LAMBDA, **window}
    cls = dataset_class(weighting)
    samples, _, _ = build(cls, [str(tmp_path / "a")], tmp_path, 60, eod_mask_loss=True)
    several = uneven = 0
    for number in range(60):
        sample = samples[number]
        text = np.append(sample["tokens"].numpy(), sample["labels"].numpy()[-1])
        live = sample["tokens"] != EOD  # all others are first tokens of the next document
        found = plugin_weights(sample["loss_mask"][None], weighting)[0]
        np.testing.assert_allclose(found[live], trainer_weights(text, weighting), rtol=1e-6)
        assert not found[~live].any()
        several += int((~live).sum() > 1)
        uneven += int(found[live].unique().numel() > 2)
    assert several > 20 and uneven > 20, "too little happens for the test to say anything"


@pytest.mark.usefixtures("process_group")
def test_a_document_s_first_token_has_no_context_to_be_weighted_for(tmp_path):
    write_corpus(tmp_path / "a", [20] * 30, 1000)
    samples, _, _ = build(ContextGPTDataset, [str(tmp_path / "a")], tmp_path, 20)
    first = 0
    for number in range(20):
        begins = samples[number]["tokens"] == EOD
        weights = plugin_weights(samples[number]["loss_mask"][None])[0]
        assert (weights[begins] == LAMBDA).all()
        assert (weights > LAMBDA).any()
        first += int(begins.sum())
    assert first > 10


CONTEXTS = torch.tensor(
    [
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 1, 2, 3, 0, 0],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2],
    ]
)


def masks() -> Tensor:
    """As datasets make them of CONTEXTS, with labels that do not count, the first one too."""
    carried = carry_contexts(CONTEXTS.float())
    carried[0, 10], carried[1, 3:8], carried[2, :2] = DEAD, DEAD, DEAD
    return carried


def weights_of_this_rank() -> Tensor:
    part = cut(masks(), dist.get_rank(), dist.get_world_size(), dim=1)
    return plugin_weights(part, group=dist.group.WORLD)


def test_context_ranks_count_over_the_whole_sequence():
    found = join(run_distributed(weights_of_this_rank, 2), dim=1)
    live, long = masks() != DEAD, CONTEXTS > 5
    scores = torch.zeros(CONTEXTS.shape)
    for row, col in zip(*torch.where(live & long), strict=True):
        bucket = CONTEXTS[row, col].log2().ceil()
        scores[row, col] = 1 / (live & long & (CONTEXTS.log2().ceil() == bucket))[row].sum()
    expected = LAMBDA + (1 - LAMBDA) * scores * live.sum(1, keepdim=True) / scores.sum(
        1, keepdim=True
    )
    torch.testing.assert_close(found, expected * live)


@pytest.mark.parametrize("mask, found", [([1.0, 0, 1], "only 0 and 1"), ([2.5, DEAD, 0], "short")])
def test_masks_of_another_dataset_are_refused(mask, found):
    with pytest.raises(InputError, match=f"holds {found}.* needs lengths .* of ContextGPTDataset"):
        plugin_weights(torch.tensor([mask]))


def test_contexts_are_not_taken_for_short_losses():
    needs = "holds lengths of contexts, but .* needs {}; build the datasets of {}"
    for scheme, what, cls in (
        ({"scheme": "dense"}, "short losses", "ShortLossGPTDataset"),
        ({"scheme": "eslm", "keep_fraction": 0.5}, "only 0 and 1", "GPTDataset"),
    ):
        with pytest.raises(InputError, match=needs.format(what, cls)):
            plugin_weights(masks(), scheme)
