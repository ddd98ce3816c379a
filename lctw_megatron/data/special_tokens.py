"""Which special tokens the small files of a tokenizer folder name.

They are read as transformers reads them (4.34 and later): special_tokens_map.json goes before
tokenizer_config.json, but is not read at all where the latter has `added_tokens_decoder`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lctw_megatron.data.json_object import read_json_object
from lctw_megatron.errors import InputError

CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
DECODER = "added_tokens_decoder"


@dataclass(frozen=True)
class SpecialTokens:
    bos: str | None
    eos: str | None
    add_bos: bool | None
    """Counts only where there is no tokenizer.json, which itself adds BOS or not."""
    tokenizer_class: str | None
    """transformers' class, from which it knows what a tokenizer.model alone means."""


def read_special_tokens(folder: Path) -> SpecialTokens:
    """What tokenizer_config.json and special_tokens_map.json say; None: nothing. InputError if a
    token is written in no form that transformers knows, or where it would not be read."""
    config, named = (read_small_file(folder, name) for name in (CONFIG, MAP))
    if DECODER in config:
        # Without tokenizer.json AutoTokenizer itself is asked.
        if (folder / "tokenizer.json").exists():
            _check_said_by_config(folder, config, named)
        named = {}
    settings = config | named
    bos, eos = (
        token_name(settings.get(field), field, folder) for field in ("bos_token", "eos_token")
    )
    return SpecialTokens(bos, eos, settings.get("add_bos_token"), settings.get("tokenizer_class"))


def read_small_file(folder: Path, name: str) -> dict[str, Any]:
    """Its contents; empty if there is no such file."""
    return read_json_object(folder / name) if (folder / name).exists() else {}


def token_name(value: Any, field: str, folder: Path) -> str | None:
    """The text of a token: the value of ``field``, or in it; None if that is null."""
    content = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(content, str):
        raise InputError(
            f"tokenizer {folder}: {field} is {str(value):.80}, expected the token's text or an "
            'object with "content"; write the name that the vocabulary has for it'
        )
    return content


def _check_said_by_config(folder: Path, config: dict[str, Any], named: dict[str, Any]) -> None:
    """InputError for a BOS or EOS that only the map names: transformers takes the default of the
    tokenizer's class, or none, and whoever wrote the map meant this one."""
    for field in ("bos_token", "eos_token"):
        if field not in config and named.get(field) is not None:
            raise InputError(
                f"{folder / MAP}: its {field} is not read by transformers, because {CONFIG} has "
                f"{DECODER}; write {field} into {CONFIG} too, or null if there is none"
            )
