"""The files of a Hugging Face folder that make its tokenizer and that go with its model: one list.

They leave as they came, byte for byte, but for names that only transformers 5 knows
(conversion/side_files.py). Of config.json only what concerns tokens is kept: the type
of the model, from which AutoTokenizer knows the tokenizer's class, and the ids of special tokens.
"""

import shutil
from pathlib import Path
from typing import Any

from lctw_megatron.atomic import write_json
from lctw_megatron.data.json_object import read_json_object

GENERATION_CONFIG = "generation_config.json"
CONFIG = "config.json"
_NAMES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "tekken.json", GENERATION_CONFIG,
)  # fmt: skip


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()


def tokenizer_files(folder: Path) -> list[Path]:
    """Those that ``folder`` has."""
    found = [folder / name for name in _NAMES if (folder / name).is_file()]
    mistral = folder.glob("tokenizer.model.v*")  # as tekken.json, read by mistral-common
    return found + sorted(mistral) + sorted((folder / "additional_chat_templates").glob("*.jinja"))


def copy_tokenizer_files(folder: Path, target: Path) -> None:
    """Copy them from ``folder`` into ``target``, which need not exist."""
    target.mkdir(parents=True, exist_ok=True)
    for path in tokenizer_files(folder):
        copy = target / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def token_ids(settings: dict[str, Any]) -> dict[str, Any]:
    """What a config.json or generation_config.json says about the ids of special tokens. A null is
    kept: without it transformers takes its own default, which is an id."""
    return {
        name: value
        for name, value in settings.items()
        if name.endswith("_token_id") and (value is None or is_token_id(value))
    }


def is_token_id(value: Any) -> bool:
    """A whole number or a list of them; anything else is none to transformers either."""
    values = value if isinstance(value, list) else [value]
    return all(isinstance(each, int) and not isinstance(each, bool) for each in values)


def copy_token_config(folder: Path, target: Path) -> None:
    """Keep of ``folder``'s config.json, if it has one, what concerns tokens."""
    if (folder / CONFIG).is_file():
        settings = read_json_object(folder / CONFIG)
        kind = settings.get("model_type")
        kept = {"model_type": kind} if isinstance(kind, str) else {}
        write_json(target / CONFIG, kept | token_ids(settings))
