"""What travels beside the weights: tokenizer files and generation settings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lctw_megatron.atomic import write_json
from lctw_megatron.data.json_object import read_json_object
from lctw_megatron.data.special_tokens import CONFIG as TOKENIZER_CONFIG
from lctw_megatron.data.special_tokens import read_small_file
from lctw_megatron.data.tokenizer_files import (
    CONFIG,
    GENERATION_CONFIG,
    copy_token_config,
    copy_tokenizer_files,
    has_tokenizer,
    token_ids,
)
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.model.checkpoint import TOKENIZER, CheckpointManifest


def tokenizer_identity(folder: Path) -> dict[str, Any] | None:
    """Identity of the folder's tokenizer, as in a token dataset's manifest; None without one."""
    return load_tokenizer(folder).identity.model_dump() if has_tokenizer(folder) else None


def bring_in(folder: Path, checkpoint: Path, log: Callable[[str], None]) -> None:
    """Copy the side files of a Hugging Face folder into a checkpoint that is being written. ``log``
    gets a line if none of them makes a tokenizer, and if one has code of its own.

    The generation settings lie with the tokenizer, whose token ids they name; so they go with it
    into the checkpoints of runs that start from this one.
    """
    if (folder / GENERATION_CONFIG).is_file():
        read_json_object(folder / GENERATION_CONFIG)  # refused here rather than at the export
    if not has_tokenizer(folder):
        log(
            f"{folder}: has neither tokenizer.json nor tokenizer.model, so nothing will compare "
            "the model's tokenizer with that of the data; put one there and import again"
        )
    if read_small_file(folder, TOKENIZER_CONFIG).get("auto_map"):
        log(
            f"{folder / TOKENIZER_CONFIG}: auto_map names code of the folder's own, which is not "
            "run: tokens are those of tokenizer.json. Nor is it exported; remove auto_map, or copy "
            "the code into what is exported"
        )
    copy_tokenizer_files(folder, checkpoint / TOKENIZER)
    copy_token_config(folder, checkpoint / TOKENIZER)


def take_out(checkpoint: Path, manifest: CheckpointManifest, folder: Path) -> dict[str, Any]:
    """Copy the side files of a checkpoint into a Hugging Face folder; returns the token ids for its
    config.json.

    They are those of the config.json that came, nulls too, else of the generation settings, else
    (a model trained from scratch) BOS and EOS of the tokenizer. Settings that never came are these
    ids.
    """
    source = checkpoint / TOKENIZER
    copy_tokenizer_files(source, folder)
    _name_for_all_versions(folder / TOKENIZER_CONFIG)
    path = source / GENERATION_CONFIG
    if not path.is_file() and (checkpoint / GENERATION_CONFIG).is_file():
        path = checkpoint / GENERATION_CONFIG  # an import without a tokenizer, of earlier versions
    settings = read_json_object(path) if path.is_file() else {}
    config = read_json_object(source / CONFIG) if (source / CONFIG).is_file() else {}
    known = manifest.tokenizer or {}
    own = {f"{k}_token_id": known[f"{k}_id"] for k in ("bos", "eos") if f"{k}_id" in known}
    ids = token_ids(config) or token_ids(settings) or token_ids(own)
    if not (folder / GENERATION_CONFIG).is_file() and (settings or ids):
        write_json(folder / GENERATION_CONFIG, settings or ids)
    return ids


def _name_for_all_versions(path: Path) -> None:
    """Say with the names of transformers 4, which version 5 reads as well, what version 5 alone
    knows: the class, without which 4.48 to 4.57 load no tokenizer, and a list of special tokens."""
    if not path.is_file():
        return
    settings = read_json_object(path)
    named = dict(settings)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        named["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        named["additional_special_tokens"] = named.pop("extra_special_tokens")
    if named != settings:
        path.write_text(json.dumps(named, indent=2) + "\n")
