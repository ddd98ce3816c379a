"""The state of megatron-core's distributed optimizer in a checkpoint.

Every rank of a data x context group owns a run of elements of each of its parameters, wherever the
gradient buffers were cut. megatron-core has two forms for them: `dp_reshardable`, those runs as
they are, which no other tensor, pipeline or bucket layout can read; and `fully_reshardable`, whole
tensors, for which every rank gathers the state of its whole group. Here a run is stored as what it
is of the parameter: at most three boxes of a matrix (the end of a row, whole rows, the beginning of
a row). Nothing is gathered, every rank writes and reads its own, and any layout finds its boxes in
those of any other.

Each layer has a key of its own, `optimizer.state.exp_avg.3.decoder.layers.mlp.linear_fc1.weight`,
since torch compares the boxes of a key with each other. Checkpoints of before, which
`fully_reshardable` wrote, have one key for the layers stacked, and are read box by box as well.
"""

import math
from collections.abc import Container, Iterator
from dataclasses import replace
from typing import Any

from lctw_megatron.model.initialize import parameter_shards

_NOT_SETTINGS = ("params", "step")
_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What tells groups apart. Newer megatron-core adds the rates, which a recipe may change."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""


def optimizer_shards(chunks: list[Any], optimizer: Any, stored: Container[str] = ()) -> list[Any]:
    """megatron-core ShardedTensors of the master weights and moments that this rank owns.

    Their data are views of the optimizer's own tensors: to load into them is to load the optimizer.
    stored: the keys of the checkpoint that is to be read.
    """
    pieces: dict[Any, list[tuple[str, Any]]] = {}
    for parameter, name, shard in parameter_shards(chunks):
        pieces.setdefault(parameter, []).append((name, shard))
    found = []
    for part, parameter, start, end in _owned_runs(optimizer):
        state = part._get_main_param_and_optimizer_states(parameter)
        for name, shard in pieces[parameter]:
            # A gated MLP's matrix is stored as two.
            begin = shard.data.storage_offset() - parameter.storage_offset()
            first, last = max(start, begin), min(end, begin + shard.data.numel())
            place = first - start
            for offsets, sizes in boxes(shard.local_shape, first - begin, last - begin):
                count = math.prod(sizes)
                for key, tensor in state.items():
                    if key == "step":  # a number, kept in the parameter groups
                        continue
                    box = tensor.detach()[place : place + count].view(sizes)
                    prefix = f"optimizer.state.{key}"
                    found.append(_stored_box(prefix, name, shard, box, offsets, stored))
                place += count
    return found


def _owned_runs(optimizer: Any) -> Iterator[tuple[Any, Any, int, int]]:
    """(optimizer part, parameter, first element, end) of all that this rank owns."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for buffer in part.gbuf_ranges:
            for buckets in buffer.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        yield part, parameter, ranges["param"].start, ranges["param"].end


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """The boxes that hold, one after the other, elements ``start`` to ``end`` of a row-major array
    of ``shape``."""
    if len(shape) < 2:
        if start < end:
            yield (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    first, last = min(-(-start // row) * row, end), end // row * row
    if start < first:
        yield from _in_row(shape, row, start, first)
    if first < last:
        rest = shape[1:]
        yield (first // row, *(0 for _ in rest)), ((last - first) // row, *rest)
    if max(first, last) < end:
        yield from _in_row(shape, row, last, end)


def _in_row(shape: tuple[int, ...], row: int, start: int, end: int) -> Iterator[Box]:
    number = start // row
    for offsets, sizes in boxes(shape[1:], start - number * row, end - number * row):
        yield (number, *offsets), (1, *sizes)


def _stored_box(
    prefix: str, name: str, shard: Any, box: Any, offsets: tuple[int, ...], stored: Container[str]
) -> Any:
    """``box``, a part of the parameter's ``shard``, under the key that a checkpoint has for it."""
    axes = shard.prepend_axis_num
    key = f"{prefix}.{name}"
    if stacked := axes > 0 and key not in stored and f"{prefix}.{shard.key}" in stored:
        key = f"{prefix}.{shard.key}"
        box = box.view((1,) * axes + box.shape)
    layer, where = shard.global_offset[:axes], shard.global_offset[axes:]
    inside = tuple(a + b for a, b in zip(where, offsets, strict=True))
    return replace(
        shard,
        key=key,
        data=box,
        dtype=box.dtype,
        local_shape=tuple(box.shape),
        global_shape=shard.global_shape if stacked else shard.global_shape[axes:],
        global_offset=(*layer, *inside) if stacked else inside,
        axis_fragmentations=None,
        # Of a parameter that tensor or pipeline ranks share, the first has it written.
        replica_id=(*shard.replica_id[:2], 0),
        prepend_axis_num=0,
    )


def keep_own_settings(optimizer: Any, saved: Any) -> None:
    """Change ``saved``, the loaded state dict of ``optimizer``, so that loading it leaves every
    group the settings that the recipe has just given it.

    What comes back of a saved optimizer are its moments and the number of its steps. megatron-core
    puts the saved parameter groups in the place of the new ones: their learning rate, betas, eps
    and decay would act instead of the recipe's, without a word; and a group that torch's AdamW
    saved lacks what TransformerEngine's or apex's FusedAdam keeps in its own (`bias_correction`),
    and the other way round.

    The steps of all groups are one whole number, from which megatron-core makes what the optimizer
    at hand keeps: torch's a tensor for every parameter, the fused ones a number for every group.
    KeyError: what ``saved`` lacks of an optimizer.
    """
    own = {_identity(group): group for group in optimizer.param_groups}
    for inner in _inner_states(saved):
        for group in inner["param_groups"]:
            # The fused ones count from their first step on.
            step = int(group.get("step") or 0)
            settings = own.get(_identity(group), group)
            kept = {key: settings[key] for key in settings if key not in _NOT_SETTINGS}
            group.clear()
            group.update(kept, step=step)


def _inner_states(saved: Any) -> list[dict[str, Any]]:
    """The state dicts of torch's form: of the optimizer, or of each of chained ones (experts have
    their own), which megatron-core puts in a list, or under numbers."""
    if isinstance(saved, list):
        return [part["optimizer"] for part in saved]
    if "optimizer" in saved:
        return [saved["optimizer"]]
    return [part["optimizer"] for part in saved.values() if isinstance(part, dict)]


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    """The same for a saved group and the one at hand that it belongs to."""
    return tuple(group.get(key) for key in _IDENTITY)
