"""What of a saved optimizer comes back: its moments and the number of its steps, not its settings.

megatron-core puts the saved parameter groups in the place of the new ones. Their learning rate,
betas, eps and decay would then act instead of the recipe's, without a word; and a group that
torch's AdamW saved lacks what TransformerEngine's or apex's FusedAdam keeps in its own
(`bias_correction`), and the other way round.
"""

from typing import Any

_NOT_SETTINGS = ("params", "step")
_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What tells groups apart. Newer megatron-core adds the rates, which a recipe may change."""


def keep_own_settings(optimizer: Any, saved: dict[str, Any]) -> None:
    """Change ``saved``, the loaded sharded state dict of ``optimizer``, so that loading it leaves
    every group the settings that the recipe has just given it.

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


def _inner_states(saved: dict[str, Any]) -> list[dict[str, Any]]:
    """The state dicts of torch's form: of the optimizer, or of each of chained ones."""
    if "optimizer" in saved:
        return [saved["optimizer"]]
    return [part["optimizer"] for part in saved.values() if isinstance(part, dict)]


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    """The same for a saved group and the one at hand that it belongs to."""
    return tuple(group.get(key) for key in _IDENTITY)
