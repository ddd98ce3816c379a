"""All experts of a layer in one tensor, as transformers 5 has them in memory and writes them with
`save_original_format=False`: seen as the tensors of single experts, which everything else reads."""

from dataclasses import replace

from lctw_megatron.conversion.hf_safetensors import Entry
from lctw_megatron.conversion.placement import StoredTensor

_FUSED = {
    "mlp.experts.experts.linear_fc1.weight": "mlp.experts.gate_up_proj",
    "mlp.experts.experts.linear_fc2.weight": "mlp.experts.down_proj",
    "mlp.router.weight": "mlp.gate.weight",
}
"""How a checkpoint's name ends, and what is in the fused form inside `model.layers.<layer>.`: an
axis of experts before those of one, whose parts lie as in ours; of the router another name."""


def split_fused(entries: dict[str, Entry], tensors: list[StoredTensor]) -> None:
    """Put the experts of ``tensors`` in the place of fused ones of their shape in ``entries``."""
    fused = set()
    for stored in tensors:
        ending = next((end for end in _FUSED if stored.key.endswith(end)), None)
        if ending is None:
            continue
        name = f"model.layers.{stored.layer}.{_FUSED[ending]}"
        entry, expert = entries.get(name), stored.place[1:]
        if entry is None or entry.shape != (*stored.stack[1:], *stored.shape):
            continue
        for part in stored.parts:
            if part.name not in entries:
                inside = (name, *expert), part.blocks[0].row
                entries[part.name] = replace(entry, shape=part.shape, inside=inside)
                fused.add(name)
    for name in fused:
        del entries[name]
