"""Which special tokens the small files of a tokenizer folder name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lctw_megatron.data.json_object import read_json_object
from lctw_megatron.errors import InputError


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
    token is written in no form that transformers knows."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            found = read_json_object(folder / name)
            settings.update({key: value for key, value in found.items() if value is not None})

    def token(value: Any, field: str) -> str | None:
        content = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(content, str):
            raise InputError(
                f"tokenizer {folder}: {field} is {str(value):.80}, expected the token's text or an "
                'object with "content"; write the name that the vocabulary has for it'
            )
        return content

    bos, eos = (token(settings.get(field), field) for field in ("bos_token", "eos_token"))
    return SpecialTokens(bos, eos, settings.get("add_bos_token"), settings.get("tokenizer_class"))
