"""The YAML dialect of recipes: safe, numbers as people write them, no key twice.

PyYAML reads YAML 1.1, where ``1e-5`` is a string, ``24:00:00`` is the number 86400 and ``no`` is
false. The loader here follows the core schema of YAML 1.2 instead (section 10.3 of its
specification); the dumper quotes by the same rules, so that what it writes reads back the same.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from lctw_megatron.errors import InputError, few

_RESOLVERS = [
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    ),
    ("tag:yaml.org,2002:merge", re.compile(r"^(?:<<)$"), ["<"]),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._flat: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Write what ``node`` merges into it, after which a key may be there twice."""
        if id(node) not in self._flat:
            self._flat.add(id(node))
            self._check_keys(node)
        super().flatten_mapping(node)

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise InputError(f"line {line}: the key {key!r} is not text; put it in quotes")
            if key in seen:
                raise InputError(f"line {line}: {key} was already given on line {seen[key]}")
            seen[key] = line


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    """007 is seven in YAML 1.2; PyYAML's own constructor reads a leading zero as octal."""
    return int(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)

_MOST_BYTES = 1 << 20
_MOST_VALUES = 100_000
_MOST_LEVELS = 30


def _check_size(values: Any) -> None:
    """ValueError if ``values`` are nested deeply or many, each counted as often as it is named:
    aliases make a few lines a value that no memory holds, or one that holds itself."""
    left, count = [(values, 1)], 0
    while left:
        value, level = left.pop()
        count += 1
        if level > _MOST_LEVELS:
            raise ValueError(f"nested more than {_MOST_LEVELS} levels deep")
        if count > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES} values")
        if isinstance(value, dict | list):
            inner = value.values() if isinstance(value, dict) else value
            left += [(each, level + 1) for each in inner]


def parse_yaml(text: str, where: str) -> Any:
    """The values in ``text``; ``where`` (a file, an option) begins every error's message.

    Raises InputError for broken YAML (with the line), for a key given twice (with both lines), for
    a value that its tag does not fit, and for what is larger or deeper than any recipe.
    """
    try:
        if len(text) > _MOST_BYTES:
            raise ValueError(f"larger than {_MOST_BYTES} bytes")
        values = yaml.load(text, _Loader)  # noqa: S506  a SafeLoader
        _check_size(values)
        return values
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"{where}:{line} not valid YAML: {problem}") from None
    except RecursionError:
        raise InputError(f"{where}: not valid YAML: nested too deeply") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:  # !!int abc, !!bool x
        raise InputError(f"{where}: not valid YAML: {few([error])}") from None


def parse_yaml_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in the file ``path``. An empty file is an empty mapping."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}, expected `field: value` lines")
    return values


def to_yaml(values: Any) -> str:
    """``values`` (dicts, lists, strings, numbers, booleans, None) as YAML, in the order given."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
