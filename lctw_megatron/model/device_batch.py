"""A micro batch on the device, with what the host had better find out before it goes there."""

import torch
from torch import Tensor

from lctw_megatron.data.batch import IGNORE
from lctw_megatron.platform.host_copies import to_device


def move(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """``batch``, as the loader gives it, on ``device``, but for the piece boundaries, which the
    host reads; and with it

    live_rows: of its labels, see ``live_rows``;
    host_tokens, host_labels: its whole sequences where they were, which self-scoring cuts;
    device_boundaries: the piece boundaries, if there are any, on the device.
    """
    moved = {
        name: tensor if name == "boundaries" else to_device(tensor, device)
        for name, tensor in batch.items()
    }
    moved["live_rows"] = to_device(live_rows(batch["labels"]), device)
    moved |= {f"host_{name}": batch[f"sequence_{name}"] for name in ("tokens", "labels")}
    if "boundaries" in batch:
        moved["device_boundaries"] = to_device(batch["boundaries"], device)
    return moved


def live_rows(labels: Tensor) -> Tensor:
    """int64 [targets]: which rows of the model's hidden states [s * b, h] have a label, of labels
    [b, s]. How many there are a GPU can only tell a host that waits for it."""
    return torch.nonzero(labels.t().flatten() != IGNORE).squeeze(1)
