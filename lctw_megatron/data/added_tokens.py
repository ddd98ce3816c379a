"""What the small files of a folder say about the special tokens of its tokenizer.json.

AutoTokenizer goes by them: how a token is found in a text (`lstrip`, `normalized` and so on), and
that a name of the vocabulary is one token wherever a text has it. So do we. Tokens that
tokenizer.json has not it gives the next free ids; there a folder is refused: its texts would get
other ids, without a word. What `save_pretrained` writes has all of them in tokenizer.json.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

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
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word")
"""Of an added token: what decides where a text has it."""
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_AGAIN = "save the folder again with AutoTokenizer.from_pretrained(...).save_pretrained(...)"


def follow_small_files(folder: Path, fast: FastTokenizer) -> dict[str, Any]:
    """Make of ``fast``, the tokenizer.json of ``folder``, what its small files say, and return how
    ids came to differ by it; empty if they did not. InputError if one adds a token that
    tokenizer.json has not, or under another id."""
    changed: dict[str, Any] = {}
    for file, token, id in _added(folder):
        name = token.content
        known = fast.token_to_id(name)
        if known is None:
            raise InputError(
                f"{folder / file}: adds {name!r:.80}, which tokenizer.json has not; {_AGAIN}"
            )
        if id is not None and id != known:
            raise InputError(
                f"{folder / file}: has {name!r:.80} as token {id}, tokenizer.json as {known}; "
                f"{_AGAIN}"
            )
        there = fast.get_added_tokens_decoder().get(known)
        described = id is not None and file == CONFIG
        if there is not None and (not described or repr(there) == repr(token)):
            continue  # of a name alone nothing more is read
        fast.add_tokens([token])
        flags = {flag: getattr(token, flag) for flag in _FLAGS}
        if there is None or flags != {flag: getattr(there, flag) for flag in _FLAGS}:
            changed[name] = flags
    if read_small_file(folder, CONFIG).get("split_special_tokens") is True:
        fast.encode_special_tokens = True  # their names in texts are letters
        changed["split_special_tokens"] = True
    return {"changed": changed} if changed else {}


def _added(folder: Path) -> Iterator[tuple[str, AddedToken, int | None]]:
    """File, token and, where the file has it, id of each token that transformers reads."""
    config = read_small_file(folder, CONFIG)
    if DECODER in config:  # which says all of it: the other files are not read
        special = list(_special(folder, CONFIG, config))
        named = {token.content for _, token, _ in special}
        for id, value in _items(config, DECODER, folder / CONFIG):
            if name := token_name(value, f"{DECODER}.{id}", folder):
                number = _number(id, name, folder / CONFIG)
                yield CONFIG, _token(name, value, name in named), number
        yield from special
        return
    named_by_map = read_small_file(folder, MAP)
    special = list(_special(folder, MAP, named_by_map))
    said_there = set(named_by_map) - set(_LISTS)
    others = {key: value for key, value in config.items() if key not in said_there}
    special += _special(folder, CONFIG, others)
    yield from special
    named = {token.content for _, token, _ in special}
    for name, id in read_small_file(folder, _LEGACY).items():
        token = AddedToken(name, special=name in named, normalized=name not in named)
        yield _LEGACY, token, _number(id, name, folder / _LEGACY)


def _token(name: str, value: Any, special: bool) -> AddedToken:
    """``value`` as transformers has it: the name, or an object of it and flags."""
    flags = value if isinstance(value, dict) else {"special": True}
    given = {flag: bool(flags[flag]) for flag in _FLAGS if flag in flags}
    return AddedToken(name, special=special or bool(flags.get("special")), **given)


def _special(
    folder: Path, file: str, settings: dict[str, Any]
) -> Iterator[tuple[str, AddedToken, None]]:
    values = [(field, settings.get(field)) for field in _NAMED]
    for field in _LISTS:
        found = settings.get(field)
        if isinstance(found, list):
            values += [(field, value) for value in found]
        elif found is not None:  # an object of names for them
            values += [(field, value) for _, value in _items(settings, field, folder / file)]
    for field, value in values:
        if name := token_name(value, field, folder):  # transformers leaves an empty one out
            yield file, _token(name, value, special=True), None


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
