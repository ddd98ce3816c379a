"""Whether a run fits what it begins with: a start's model and tokenizer, its own checkpoint."""

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.data.manifest import TokenizerIdentity
from lctw_megatron.errors import InputError
from lctw_megatron.model.checkpoint import CheckpointManifest, find_checkpoint, read_manifest

# What a longer context changes of a start's model, and what its weights do not show.
_FREE_OF_THE_START = {
    "max_position_embeddings", "rope_theta", "rope_scaling", "attention", "hidden_dropout",
    "attention_dropout", "init_method_std",
}  # fmt: skip
_FREE_ON_RESUME = {"tokens_per_forward", "attention"}


def complete_run(run: RunConfig, tokenizer: TokenizerIdentity, prefix: str) -> RunConfig:
    """``run`` with what the tokenizer of its data (``prefix``) and its sequence length decide.

    Raises InputError if `start` has another model or was trained with another tokenizer.
    """
    model = run.model.model_copy(
        update={
            "vocab_size": run.model.vocab_size or tokenizer.vocab_size,
            "max_position_embeddings": run.model.max_position_embeddings
            or run.data.sequence_length,
        }
    )
    if run.start:
        start = find_checkpoint(run.start)
        manifest = read_manifest(start)
        for name in type(model).model_fields:
            ours, theirs = getattr(model, name), getattr(manifest.model, name)
            derived = ours is None and name in ("num_query_groups", "kv_channels")
            if ours != theirs and not derived and name not in _FREE_OF_THE_START:
                raise InputError(
                    f"model.{name} is {ours}, but {start} has {theirs}; leave the model section "
                    "out to take the checkpoint's"
                )
        theirs = (manifest.tokenizer or {}).get("digest")
        if theirs and theirs != tokenizer.digest:
            raise InputError(
                f"{prefix} was tokenised with tokenizer {tokenizer.digest}, but {start} was "
                f"trained with {theirs}; preprocess with the checkpoint's"
            )
    return run.model_copy(update={"model": model})


def check_unchanged(run: RunConfig, manifest: CheckpointManifest) -> None:
    """Raise InputError unless ``run`` has the model and weighting of the checkpoint it resumes."""
    if manifest.run is None:
        return
    for section in ("weighting", "model"):
        ours = getattr(run, section).model_dump(mode="json")
        theirs = getattr(manifest.run, section).model_dump(mode="json")
        for name in ours:
            if ours[name] != theirs[name] and name not in _FREE_ON_RESUME:
                raise InputError(
                    f"{section}.{name} is {ours[name]}, but {run.run_dir} was trained to step "
                    f"{manifest.step} with {theirs[name]}; restore it, choose another run_dir, or "
                    "pass --allow-changes"
                )
