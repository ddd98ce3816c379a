"""Self-scoring: the training model scores its own short windows, every step anew.

The windows of a step's sequences are run forward without gradient before the training pass, with
the weights of that step. Context-parallel ranks share them out, each runs whole windows by itself,
and the losses are exchanged, so that the short loss of a target is the same under every layout.
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from lctw_megatron.config.rope import narrowest_forward
from lctw_megatron.data import zigzag
from lctw_megatron.data.batch import IGNORE
from lctw_megatron.platform.host_copies import to_device
from lctw_megatron.scoring.forward import forwards_of, window_losses
from lctw_megatron.scoring.window_plan import round_width
from lctw_megatron.scoring.windows import windows

Batch = dict[str, Tensor]


class WindowIndex:
    """Where the windows of one sequence lie in it, as index arrays.

    positions [windows, K] int64: the position in the sequence whose input the window reads there;
    -1 past its end. scored [windows, K] bool: whether the target at that position (its label) is
    scored. The first window of every piece is left out: its targets have the same context in the
    long pass.
    """

    def __init__(self, boundaries: list[int], live: np.ndarray, window: int, stride: int) -> None:
        positions, scored = [], []
        for start, end in zip(boundaries[:-1], boundaries[1:], strict=True):
            length = int(live[start:end].sum())  # a last piece of padding has no targets
            if length < 1:
                continue
            # The piece's tokens are its inputs and, one further, the label of the last of them.
            for first, _, score_start, score_end in windows(length + 1, window, stride)[1:]:
                column = np.arange(window)
                target = first + column + 1  # the token that position predicts
                inside = target < score_end
                positions.append(np.where(inside, start + first + column, -1))
                scored.append((target >= score_start) & inside)
        self.positions = np.array(positions, dtype=np.int64).reshape(-1, window)
        self.scored = np.array(scored, dtype=bool).reshape(-1, window)


def cut_windows(batch: Batch, window: int, stride: int, bos_id: int | None) -> tuple[Tensor, ...]:
    """The windows of all sequences of a batch: tokens, labels [windows, K] and where they belong.

    batch: `host_tokens` and `host_labels` int64 [b, S], whole sequences on the host; `boundaries`
    int32 [b, P+1] if they are packed. The last result, int64 [windows, K], is the index of each
    scored target in the flattened [b, S], -1 elsewhere.
    """
    tokens, labels = batch["host_tokens"], batch["host_labels"]
    rows, length = tokens.shape
    bounds = batch["boundaries"].tolist() if "boundaries" in batch else [[0, length]] * rows
    parts = []
    for row in range(rows):
        index = WindowIndex(
            sorted(set(bounds[row])), (labels[row] != IGNORE).numpy(), window, stride
        )
        positions, scored = torch.from_numpy(index.positions), torch.from_numpy(index.scored)
        inside = positions >= 0
        at = positions.clamp(min=0)
        window_tokens = tokens[row][at].where(inside, 0)
        if bos_id is not None:
            window_tokens[:, 0] = bos_id
        window_labels = labels[row][at].where(scored, IGNORE)
        parts.append((window_tokens, window_labels, (at + row * length).where(scored, -1)))
    return tuple(torch.cat(stream) for stream in zip(*parts, strict=True))


def window_widths(scored: Tensor, window: int, multiple: int = 1, narrowest: int = 1) -> np.ndarray:
    """How many positions of each window are run, of ``scored`` bool [windows, K]: int64 [windows].

    A piece's last window may end early, and what follows its last scored target is computed for
    nothing. Few widths (``round_width``), as kernels are compiled for every shape, that are
    multiples of ``multiple`` where the window is, and none below ``narrowest``.
    """
    needed = (scored * torch.arange(1, scored.shape[1] + 1)).amax(1).tolist()
    return np.array(
        [min(-(-max(round_width(n), narrowest) // multiple) * multiple, window) for n in needed],
        dtype=np.int64,
    )


class SelfScorer:
    """Fills in the short losses of a step's micro batches with the training model itself."""

    def __init__(
        self,
        chunks: list[Any],
        window: int,
        stride: int,
        tokens_per_forward: int,
        bos_id: int | None,
        context_group: dist.ProcessGroup,
    ) -> None:
        self.chunks = chunks
        self.window, self.stride = window, stride
        self.tokens_per_forward = tokens_per_forward
        self.bos_id = bos_id
        self.group = context_group
        model = getattr(chunks[0], "module", chunks[0])
        self._config = config = model.config
        self._narrowest = narrowest_forward(model.rotary_pos_emb.model, window)
        # Sequence parallelism splits the windows too.
        self._multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1

    def fill(self, batches: list[Batch]) -> None:
        """Put `short_loss` float32 [b, S / CP] into every batch (of device_batch.move), NaN where
        not scored.

        A collective call of all model-parallel ranks. Only the last pipeline stage gets losses.
        """
        rank, size = self.group.rank(), self.group.size()
        cuts = [cut_windows(batch, self.window, self.stride, self.bos_id) for batch in batches]
        tokens, labels = (torch.cat([cut[i] for cut in cuts]) for i in (0, 1))
        places = [batch["host_tokens"].numel() for batch in batches]
        offsets = np.concatenate([[0], np.cumsum(places)[:-1]])
        where = torch.cat(
            [(cut[2] + int(o)).where(cut[2] >= 0, -1) for cut, o in zip(cuts, offsets, strict=True)]
        )
        parameter = next(self.chunks[0].parameters())
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        losses = torch.zeros(sum(places), dtype=dtype, device=parameter.device)
        widths = window_widths(where >= 0, self.window, self._multiple, self._narrowest)
        # Longest first, so that context ranks get alike windows.
        mine = np.argsort(-widths, kind="stable")[rank::size]
        groups = [
            (width, torch.from_numpy(mine[widths[mine] == width]))
            for width in np.unique(widths[mine])[::-1].tolist()
        ]
        missing = self._missing_forwards(groups, parameter.device)
        for width, rows in groups:
            own = window_losses(
                self.chunks, tokens[rows, :width], labels[rows, :width], self.tokens_per_forward
            )
            if own is not None:
                # Found on the host, which has all it takes: to ask a GPU would be to wait for it.
                target = where[rows, :width].flatten()
                scored = torch.nonzero(target >= 0).squeeze(1)
                losses[to_device(target[scored], own.device)] = own.flatten()[
                    to_device(scored, own.device)
                ]
        if missing:
            width = min(-(-self._narrowest // self._multiple) * self._multiple, self.window)
            padding = torch.zeros((missing, width), dtype=torch.int64)
            window_losses(self.chunks, padding, torch.full_like(padding, IGNORE), width)
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return
        # Every target is scored by one window of one rank: summing the ranks' parts joins them.
        if size > 1:
            dist.all_reduce(losses, group=self.group)
        unknown = torch.ones(sum(places), dtype=torch.bool)
        unknown[where[where >= 0]] = False
        losses = losses.masked_fill(to_device(unknown, losses.device), float("nan"))
        for batch, part in zip(batches, losses.split(places), strict=True):
            whole = part.view(batch["host_tokens"].shape)
            batch["short_loss"] = zigzag.cut(whole, rank, size, dim=1)

    def _missing_forwards(self, groups: list[tuple[int, Tensor]], device: torch.device) -> int:
        """How many forwards of padding this rank must run after those of its ``groups`` (width,
        windows), to have run as many as every rank that shares experts with it: in each of its
        layers they wait for its tokens."""
        if self._config.expert_model_parallel_size == 1:
            return 0
        own = sum(
            forwards_of(self.chunks, len(rows), width, self.tokens_per_forward)
            for width, rows in groups
        )
        most = torch.tensor(own, device=device)
        group = parallel_state.get_expert_model_parallel_group()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        return int(most) - own
