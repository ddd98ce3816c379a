"""How far back a target's token last occurred in its context: near, far, or first seen.

A target whose token stood a few tokens before can be copied by any model; one that last occurred
thousands of tokens ago needs long context; one never seen in the piece cannot be copied at all.
"""

import torch
from torch import Tensor

CLASSES = ("near", "far", "first_seen")
"""Rows of ``sum_by_distance``."""


def batch_occurrence_distance(
    tokens: Tensor, labels: Tensor, boundaries: Tensor | None = None
) -> Tensor:
    """How far back the token of each target last stood: int64 [sequences, S].

    Entry i of a sequence is (i + 1) - j for the largest j <= i with tokens[j] == labels[i]; -1 if
    there is none: the token is seen for the first time.

    Args:
        tokens, labels: int64 [sequences, S], not cut for context parallelism; labels below 0 (not
            live) give -1.
        boundaries: int [sequences, pieces + 1]: context does not reach back over the start of a
            piece. None: every sequence is one piece.

    One stable sort of 2·S numbers a sequence: O(S log S) time, O(S) memory.
    """
    sequences, length = tokens.shape
    position = torch.arange(length, device=tokens.device)
    # Which piece, counted through the batch: contexts of other pieces must not match.
    piece = torch.arange(sequences, device=tokens.device)[:, None]
    if boundaries is not None:
        starts = boundaries.to(position).contiguous()
        where = position.expand(sequences, length).contiguous()
        piece = piece * (starts.shape[1] + 1) + torch.searchsorted(starts, where, right=True)
    # Events in the order of time: token 0 is seen, label 0 is asked for, token 1 is seen, ...
    # A label below 0 makes a key that no token has.
    seen, asked = (piece << 32) + tokens, (piece << 32) + labels
    key, event = torch.stack([seen, asked], dim=2).flatten().sort(stable=True)
    # Sorted by key, then time. An asked event's answer is the latest seen event before it, if that
    # has the same key.
    place = torch.arange(len(event), device=tokens.device)
    is_seen = event % 2 == 0
    latest = place.where(is_seen, -1).cummax(0).values.clamp(min=0)
    found = is_seen[latest] & (key[latest] == key)
    distance = ((event - event[latest]) // 2 + 1).where(found, -1)
    answers = torch.empty_like(distance).scatter_(0, event, distance)
    return answers.view(sequences, length, 2)[:, :, 1].contiguous()


def sum_by_distance(loss: Tensor, distance: Tensor, mask: Tensor, near: int) -> Tensor:
    """Σ loss and the number of live targets of each class: float64 [3, 2], rows as in ``CLASSES``.

    ``loss``, ``distance`` and ``mask`` have one shape, of whole sequences or of a rank's part.
    near: 1 <= distance <= ``near``; far: beyond; first_seen: -1. Add the results of batches and
    ranks, then divide.
    """
    live = mask != 0
    classes = (
        (distance >= 0) & (distance <= near),
        distance > near,
        distance < 0,
    )
    loss = loss.double()
    rows = [
        torch.stack([loss.where(live & chosen, 0.0).sum(), (live & chosen).sum().double()])
        for chosen in classes
    ]
    return torch.stack(rows)
