"""A step whose loss or gradient is not finite: which sequences and documents it was, on the screen
and in a file. And weights that are not, which no checkpoint is to hold."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lctw_megatron.atomic import write_json
from lctw_megatron.data.loader import TokenLoader
from lctw_megatron.errors import InputError, few
from lctw_megatron.platform.world import first_rank_decides


class NonFinite(Exception):
    """The loss or the gradient of a step is not finite. No weight was changed, on any rank."""

    def __init__(self, step: int, loss: float, norm: float, rows: list[tuple[int, int]]) -> None:
        """rows: (global rank that saw it, row of the global batch) of every sequence whose loss is
        not finite; empty if only the gradient is not."""
        super().__init__(f"step {step}: weighted loss {loss}, gradient norm {norm}")
        self.step, self.loss, self.norm, self.rows = step, loss, norm, rows


def write_nonfinite(loader: TokenLoader, error: NonFinite, run_dir: Path) -> str:
    """Write RUN_DIR/nonfinite_step_N.json and return the line for the screen."""
    samples = describe_samples(loader, error.step)
    chosen = sorted({row for _, row in error.rows}) or list(range(len(samples)))
    path = run_dir / f"nonfinite_step_{error.step:08d}.json"
    details = {
        "step": error.step,
        "weighted_loss": str(error.loss),
        "gradient_norm": str(error.norm),
        "ranks": sorted({rank for rank, _ in error.rows}),
        "sequences": [samples[row] for row in chosen],
    }
    try:
        write_json(path, details)
        written = f"details in {path}"
    except OSError as failure:  # this rank alone must not end by it
        written = f"{path} could not be written ({failure.strerror})"
    where = "; ".join(
        f"{samples[row]['corpus']} sequence {samples[row]['sequence']} (documents "
        f"{few([piece['document'] for piece in samples[row]['pieces']])})"
        for row in chosen[:3]
    )
    more = f" and {len(chosen) - 3} more" if len(chosen) > 3 else ""
    what = f"the loss of {where}{more}" if error.rows else "the gradient, all losses are finite,"
    ranks = few(sorted({rank for rank, _ in error.rows}))
    seen = f" on rank {ranks}" if ranks else ""
    return f"{error}: {what} is not finite{seen}; no weight was changed, {written}"


def describe_samples(loader: TokenLoader, step: int) -> list[dict[str, Any]]:
    """The sequences of a step's global batch, row by row, as plain values."""
    return [
        {
            "sample": traced.sample,
            "corpus": traced.prefix,
            "epoch": traced.epoch,
            "sequence": traced.sequence,
            "pieces": [
                {"document": int(d), "offset": int(o), "length": int(n)}
                for d, o, n in traced.pieces
            ],
        }
        for traced in loader.documents(step)
    ]


def check_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Refuse to write ``state``, a sharded state dict, to ``checkpoint`` unless all its tensors are
    finite. A collective call. InputError.

    One weight may be NaN, as after a fault of the memory, and every loss finite for long: that of a
    token that has not come up. The checkpoint would take the place of one that is good.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    shards = [
        shard
        for shard in nested_values(state)
        if isinstance(shard, ShardedTensor | ShardedTensorFactory)
        and shard.data.numel()
        and shard.data.is_floating_point()
    ]
    # Least and largest, which a NaN makes NaN, need no memory.
    mine = {s.key for s in shards if not torch.stack(s.data.detach().aminmax()).isfinite().all()}
    everyones = [mine]
    if dist.is_initialized():
        everyones *= dist.get_world_size()
        dist.all_gather_object(everyones, mine)
    if wrong := sorted(set.union(*everyones)):

        def refuse() -> None:
            raise InputError(
                f"{checkpoint}: not written, as numbers of {few(wrong)} are not finite; the "
                "checkpoints before it are whole, start again to go on from the newest, and with a "
                "lower training.lr if it happens again"
            )

        first_rank_decides(refuse)
