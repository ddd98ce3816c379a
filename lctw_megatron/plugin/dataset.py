"""GPTDataset whose `loss_mask` carries what weights are made from: ``loss_mask.py`` says how."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.utils import Split
from torch import Tensor

from lctw_megatron.data.sidecar import Sidecar
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import InputError
from lctw_megatron.plugin.loss_mask import DEAD, carries, carry_contexts
from lctw_megatron.weighting import parse_weighting

Piece = tuple[int, int, int]
"""(document, offset, tokens)"""


class _CarryingGPTDataset(GPTDataset):
    """GPTDataset, same samples in the same order, whose `loss_mask` carries a number a label."""

    dataset: Any

    @abstractmethod
    def carried(self, pieces: list[Piece], labels: int) -> Tensor:
        """float32 [labels] of a sample that is read from ``pieces``, padding at the end."""

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        low_level = self.dataset
        self.dataset = pieces = _Pieces(low_level)  # what the sample is read from, and remembers
        try:
            sample = super().__getitem__(idx)
        finally:
            self.dataset = low_level
        mask = sample["loss_mask"]
        carried = self.carried(pieces.read, len(mask))
        sample["loss_mask"] = carried.where(mask != 0, torch.full_like(carried, DEAD))
        return sample


class ContextGPTDataset(_CarryingGPTDataset):
    """GPTDataset whose `loss_mask` float32 [S] says how many tokens of its own document in the
    sample each label follows: what tools/train.py calls its context, also where the attention of
    this run reaches back into other documents."""

    def carried(self, pieces: list[Piece], labels: int) -> Tensor:
        context = torch.zeros(labels)
        # The sample's first token is no label.
        known = torch.cat([torch.arange(tokens) for _, _, tokens in pieces])[1 : labels + 1]
        context[: len(known)] = known
        return carry_contexts(context)


class ShortLossGPTDataset(_CarryingGPTDataset):
    """GPTDataset whose `loss_mask` float32 [S] holds short losses.

    Only those of the training split come from the sidecar, PREFIX.<sidecar_name>; in the others
    every live label is not scored, as validation weighs nothing.

    What training by tools/train.py would not use is not scored here either: the targets of a
    piece's first window, where the long context is not longer than the short one. InputError for a
    sidecar that is missing, made for other data, or does not fit the sequences.
    """

    sidecar_name = "short_loss"
    window: int | None = None
    stride: int | None = None
    """What the sidecar must have been scored with; None: anything."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sidecar: Sidecar | None = None
        if self.index_split == Split.train:
            self.sidecar = Sidecar(TokenDataset(self.dataset_path), self.sidecar_name)
            self.sidecar.check(self.window, self.stride)
            _check_fits(self.sidecar, self.config.sequence_length)

    def carried(self, pieces: list[Piece], labels: int) -> Tensor:
        short_loss = torch.full((labels,), torch.nan)
        if self.sidecar is not None:
            # The loss of the sample's first token belongs to the label before the sample.
            losses = np.concatenate([_losses(self.sidecar, *piece) for piece in pieces])[1:]
            short_loss[: len(losses)] = torch.from_numpy(losses)
        return short_loss

    def __reduce__(self) -> tuple[Any, ...]:
        # As this class: a data loader's worker cannot import those of ``dataset_class``, and what
        # they add has been checked.
        return object.__new__, (ShortLossGPTDataset,), self.__dict__


def dataset_class(weighting: Mapping[str, Any]) -> type[GPTDataset]:
    """Whose samples training with ``weighting``, the fields of a recipe's section, takes: schemes
    without short losses need no sidecar; for the others it is checked against the section's window
    and stride."""
    parsed = parse_weighting(weighting)
    needed = carries(parsed.scheme)
    if needed != "short losses":
        return ContextGPTDataset if needed == "lengths of contexts" else GPTDataset
    # Of the same name, by which Megatron finds the indices that it has built before.
    checks = {"window": parsed.config.window, "stride": parsed.config.stride}
    return type(ShortLossGPTDataset.__name__, (ShortLossGPTDataset,), checks)


class _Pieces:
    """Stands before a low-level dataset while one sample is read."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.read: list[Piece] = []

    def get(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        tokens = self.dataset.get(document, offset=offset, length=length)
        self.read.append((int(document), int(offset), len(tokens)))
        return tokens


def _losses(sidecar: Sidecar, document: int, offset: int, tokens: int) -> np.ndarray:
    """float32 [tokens]: the short loss of every token of a piece; the first is no target of it."""
    losses = np.full(tokens, np.nan, dtype=np.float32)
    if tokens > 1:
        losses[1:] = sidecar.usable(document, offset, tokens - 1)
    return losses


def _check_fits(sidecar: Sidecar, sequence_length: int) -> None:
    made = sidecar.manifest
    if made.sequence_length is not None:
        raise InputError(
            f"{sidecar.prefix}: scored with --sequence-length {made.sequence_length}, but the "
            "samples of GPTDataset begin anywhere in a document; score again without it"
        )
    if made.window >= sequence_length:
        raise InputError(
            f"{sidecar.prefix}: scored with window {made.window}, but the samples have "
            f"{sequence_length} tokens: the short context must be shorter; score with a smaller "
            "window or train longer sequences"
        )
