"""What travels beside the weights: tokenizer files and generation settings."""

import shutil
from pathlib import Path
from typing import Any

from lctw_megatron.atomic import write_json
from lctw_megatron.conversion.hf_config import GENERATION_CONFIG
from lctw_megatron.data.json_object import read_json_object
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.model.checkpoint import TOKENIZER, CheckpointManifest

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()


def tokenizer_identity(folder: Path) -> dict[str, Any] | None:
    """Identity of the folder's tokenizer, as in a token dataset's manifest; None without one."""
    return load_tokenizer(folder).identity.model_dump() if has_tokenizer(folder) else None


def bring_in(folder: Path, checkpoint: Path, token_ids: dict[str, Any]) -> None:
    """Copy the side files of a Hugging Face folder into a checkpoint that is being written.

    The generation settings lie with the tokenizer, whose token ids they name; so they go with it
    into the checkpoints of runs that start from this one. ``token_ids`` are those of config.json,
    taken where generation_config.json does not say.
    """
    target = checkpoint
    if has_tokenizer(folder):
        target = checkpoint / TOKENIZER
        target.mkdir()
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
    path = folder / GENERATION_CONFIG
    settings = read_json_object(path) if path.is_file() else {}
    if settings := {**token_ids, **settings}:
        write_json(target / GENERATION_CONFIG, settings)


def take_out(checkpoint: Path, manifest: CheckpointManifest, folder: Path) -> dict[str, Any]:
    """Copy the side files of a checkpoint into a Hugging Face folder; returns its token ids.

    Without generation settings (a model trained from scratch) BOS and EOS are the tokenizer's.
    """
    source = checkpoint / TOKENIZER
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    settings: dict[str, Any] = {}
    for place in (checkpoint, source):
        if (place / GENERATION_CONFIG).is_file():
            settings = read_json_object(place / GENERATION_CONFIG)
    if not settings and manifest.tokenizer:
        ids = {f"{kind}_token_id": manifest.tokenizer.get(f"{kind}_id") for kind in ("bos", "eos")}
        settings = {name: value for name, value in ids.items() if value is not None}
    write_json(folder / GENERATION_CONFIG, settings)
    return {name: value for name, value in settings.items() if name.endswith("_token_id")}
