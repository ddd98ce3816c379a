"""The tokens that the small files of a folder add to those of its tokenizer.json.

AutoTokenizer makes them tokens, with the next free ids. Ours are those of tokenizer.json alone, so
that a folder is refused that says more: its texts would get other ids, without a word. What
`save_pretrained` writes has all of them in tokenizer.json.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lctw_megatron.data.special_tokens import (
    CONFIG,
    DECODER,
    MAP,
    read_small_file,
    token_name,
)
from lctw_megatron.errors import InputError

_LEGACY = "added_tokens.json"
_NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
"""Other fields that end in _token are read by transformers 5 alone, and are not looked at: Code
Llama's `fill_token` is no token of its vocabulary."""
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_AGAIN = "save the folder again with AutoTokenizer.from_pretrained(...).save_pretrained(...)"


def check_added_tokens(folder: Path, id_of: Callable[[str], int | None]) -> None:
    """InputError if a small file of ``folder`` adds a token that tokenizer.json, whose ids are
    ``id_of``, has not, or under another id."""
    for file, name, id in _added(folder):
        known = id_of(name)
        if known is None:
            raise InputError(
                f"{folder / file}: adds {name!r:.80}, which tokenizer.json has not; {_AGAIN}"
            )
        if id is not None and id != known:
            raise InputError(
                f"{folder / file}: has {name!r:.80} as token {id}, tokenizer.json as {known}; "
                f"{_AGAIN}"
            )


def _added(folder: Path) -> Iterator[tuple[str, str, int | None]]:
    """File, name and, where the file has it, id of each token that transformers reads."""
    config = read_small_file(folder, CONFIG)
    if DECODER in config:  # which says all of it: the other files are not read
        for id, value in _items(config, DECODER, folder / CONFIG):
            if name := token_name(value, f"{DECODER}.{id}", folder):
                yield CONFIG, name, _number(id, name, folder / CONFIG)
        yield from _special(folder, CONFIG, config)
        return
    named = read_small_file(folder, MAP)
    yield from _special(folder, MAP, named)
    said_there = set(named) - set(_LISTS)
    yield from _special(
        folder, CONFIG, {key: value for key, value in config.items() if key not in said_there}
    )
    for name, id in read_small_file(folder, _LEGACY).items():
        yield _LEGACY, name, _number(id, name, folder / _LEGACY)


def _special(
    folder: Path, file: str, settings: dict[str, Any]
) -> Iterator[tuple[str, str, int | None]]:
    values = [(field, settings.get(field)) for field in _NAMED]
    for field in _LISTS:
        found = settings.get(field)
        if isinstance(found, list):
            values += [(field, value) for value in found]
        elif found is not None:  # an object of names for them
            values += [(field, value) for _, value in _items(settings, field, folder / file)]
    for field, value in values:
        if name := token_name(value, field, folder):  # transformers leaves an empty one out
            yield file, name, None


def _items(settings: dict[str, Any], field: str, path: Path) -> list[tuple[str, Any]]:
    found = settings[field]
    if not isinstance(found, dict):
        raise InputError(
            f"{path}: {field} is {str(found):.80}, expected an object of tokens; {_AGAIN}"
        )
    return list(found.items())


def _number(id: Any, name: str, path: Path) -> int:
    try:
        return int(id)
    except (TypeError, ValueError):
        raise InputError(
            f"{path}: the id of {name!r:.80} is {str(id):.80}, expected a whole number; {_AGAIN}"
        ) from None
