"""Whether a run fits what it begins with: a start's model and tokenizer, its own checkpoint."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from lctw_megatron.config.model_sizes import expert_width, head_width
from lctw_megatron.config.rope import exported_maximum
from lctw_megatron.config.schema import ModelConfig, RunConfig, Section
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import InputError, few
from lctw_megatron.model.checkpoint import CheckpointManifest, find_checkpoint, read_manifest

# What a longer context changes of a start's model, and what its weights do not show.
_FREE_OF_THE_START = {
    "max_position_embeddings", "rope_theta", "rope_scaling", "attention", "hidden_dropout",
    "attention_dropout", "embedding_dropout", "init_method_std",
    "moe_aux_loss_coeff",
}  # fmt: skip
_FREE_ON_RESUME = {"tokens_per_forward", "attention"}
# Of the training section, what decides the weights. A run may go on with others, but is not called
# trained with what came when no step was left.
_DECIDES_THE_WEIGHTS = {
    "steps", "global_batch_size", "lr", "min_lr", "schedule", "warmup_steps", "adam_beta1",
    "adam_beta2", "adam_eps", "weight_decay", "clip_grad",
}  # fmt: skip


def complete_run(
    run: RunConfig, dataset: TokenDataset, own: tuple[Path, CheckpointManifest] | None
) -> tuple[RunConfig, Path | None, str | None]:
    """``run`` with what the tokenizer of its data (``dataset``) and its sequence length decide, and
    the checkpoint that it begins with, if any, and its identity. own: its own newest checkpoint
    and what that holds, which takes the place of a start that is gone, and has its identity.

    Raises InputError if `start` has another model or was trained with another tokenizer, or is gone
    where the run has no checkpoint of its own that began with it.
    """
    tokenizer = dataset.manifest.tokenizer
    positions = run.data.sequence_length
    start, manifest, identity = _begun_with(run, own) if run.start else (None, None, None)
    if manifest is not None:
        # Training on shorter sequences takes no position from a model.
        positions = max(positions, manifest.model.max_position_embeddings or 0)
    model = run.model.model_copy(
        update={
            "vocab_size": run.model.vocab_size or tokenizer.vocab_size,
            "max_position_embeddings": run.model.max_position_embeddings
            or exported_maximum(run.model, positions),
        }
    )
    if manifest is not None:
        model = fitted_model(model, manifest.model, str(start))
        theirs = (manifest.tokenizer or {}).get("digest")
        if theirs and theirs != tokenizer.digest:
            raise InputError(
                f"{dataset.prefix} was tokenised with tokenizer {tokenizer.digest}, but {start} "
                f"was trained with {theirs}; preprocess with the checkpoint's"
            )
        dataset.check_bos(manifest.tokenizer or {}, str(start))
    return run.model_copy(update={"model": model}), start, identity


def fitted_model(model: ModelConfig, theirs: ModelConfig, start: str) -> ModelConfig:
    """``model``, which begins with the weights of ``start``, a model of ``theirs``, with numbers as
    they are written there. InputError if it is another model."""
    found = _filled_in(theirs)
    for name, ours in _filled_in(model).items():
        other = found[name]
        if isinstance(ours, float) and np.float32(ours) == np.float32(other):
            # 1e-05 went through float32 on its way into some configs; it leaves as it came.
            model = model.model_copy(update={name: other})
        elif ours != other and name not in _FREE_OF_THE_START:
            raise InputError(
                f"model.{name} is {ours}, but {start} has {other}; leave the model section "
                "out to take the checkpoint's"
            )
    return model


def _begun_with(
    run: RunConfig, own: tuple[Path, CheckpointManifest] | None
) -> tuple[Path, CheckpointManifest, str | None]:
    """The start, what it holds and its identity. Once the run has a checkpoint of its own the start
    says nothing that this does not, so it may be gone."""
    assert run.start
    try:
        start = find_checkpoint(run.start)
        manifest = read_manifest(start)
        return start, manifest, manifest.identity
    except InputError as error:
        if own is None or (before := own[1].run) is None:
            raise
        path, held = own
        if _moved(run, before):
            began = before.start or "random weights"
            raise InputError(f"{error}; {path} began with {began}, which may be gone") from None
        print(f"start {run.start} is gone or damaged, and not needed to go on from {path}")
        return path, held, held.start


def check_unchanged(
    run: RunConfig, manifest: CheckpointManifest, start: str | None, allow_changes: bool = False
) -> None:
    """Raise InputError unless ``run`` has the start, model, weighting and precision of the
    checkpoint it resumes and, if no step is left, all else that decides the weights. start: the
    identity of the checkpoint that ``run.start`` stands for now. allow_changes: its vocabulary
    only."""
    ours, theirs = run.model.vocab_size, manifest.model.vocab_size
    if ours != theirs:
        # The loader takes tables of any length, as layouts pad them differently: rows would be cut
        # off, or be what was in the memory before.
        raise InputError(
            f"model.vocab_size is {ours}, but {run.run_dir} was trained with {theirs}, which "
            "cannot change in a run; restore it, or choose another run_dir"
        )
    if manifest.run is None or allow_changes:
        return
    compared: dict[str, set[str]] = {"weighting": set(), "model": set(), "training": {"precision"}}
    if manifest.step >= run.training.steps:
        compared["training"] |= _DECIDES_THE_WEIGHTS
        compared["megatron"] = {"optimizer"}
    changed = {
        f"{section}.{name}": (ours, theirs[name])
        for section, names in compared.items()
        for theirs in [_filled_in(getattr(manifest.run, section))]
        for name, ours in _filled_in(getattr(run, section)).items()
        if ours != theirs[name] and (name in names if names else name not in _FREE_ON_RESUME)
    }
    moved = _moved(run, manifest.run)
    known = bool(start and manifest.start)
    # Weights that are known decide, wherever they lie: after more training the same folder holds
    # others.
    if start != manifest.start if known else moved:
        paths = run.start, manifest.run.start
        changed["start"] = paths if moved else (start, manifest.start)
    if changed:
        found = few([f"{name} is {ours}, was {theirs}" for name, (ours, theirs) in changed.items()])
        raise InputError(
            f"{run.run_dir} was trained to step {manifest.step} with other settings ({found}); "
            "restore them, name the run or its output_dir anew, or pass --allow-changes to "
            "tools/train.py"
        )


def _filled_in(section: Section) -> dict[str, Any]:
    """The fields of a section of a run; of a model's those that are left out as what they stand
    for, which is no other model."""
    values = section.model_dump(mode="json")
    if isinstance(section, ModelConfig):
        values["num_query_groups"] = section.num_query_groups or section.num_attention_heads
        values["kv_channels"] = head_width(section)
        if section.num_moe_experts:
            values["moe_ffn_hidden_size"] = expert_width(section)
    return values


def _moved(run: RunConfig, before: RunConfig) -> bool:
    """Whether the start lies elsewhere than it did."""
    return _place(run) != _place(before) and run.start != before.start


def _place(run: RunConfig) -> str | None:
    """Where the start lies, seen from the run: a folder of both that was moved changes nothing."""
    return run.start and os.path.relpath(os.path.realpath(run.start), os.path.realpath(run.run_dir))
