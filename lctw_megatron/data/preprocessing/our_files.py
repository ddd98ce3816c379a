"""What this project wrote among the files of a corpus, and is none of it: read as text, it would
bring held-out documents into the training data."""

import os

from lctw_megatron.data.manifest import TokenManifest, manifest_path, read_manifest
from lctw_megatron.data.sequence_cache import INDEX_CACHE
from lctw_megatron.errors import InputError

VALIDATION = "-validation"
"""What is appended to a prefix for the documents held out of it."""
_HEAD = b'{\n "format": "lctw-megatron '
"""How all manifests begin."""


def is_own(path: str, output_prefix: str) -> bool:
    """Whether ``path`` is written for ``output_prefix`` or its held-out part: a manifest, that of a
    sidecar too, held-out text, something in shards, or an index of the sequences beside it. Links
    to folders are followed: a scratch disk often has two names."""
    path, prefix = _place(path), _place(output_prefix)
    if path.startswith(os.path.join(os.path.dirname(prefix), INDEX_CACHE, "")):
        return True
    rest = path.removeprefix(prefix) if path.startswith(prefix) else ""
    name, _, inside = rest.removeprefix(VALIDATION).partition("/")
    if inside:
        return name.startswith(".") and name.endswith(".shards")
    return (name.startswith(".") and name.endswith(".json")) or rest == f"{VALIDATION}.jsonl"


def is_of_a_dataset(path: str) -> bool:
    """Whether ``path`` belongs to a dataset of any prefix: a manifest, held-out text, or an index
    of its sequences."""
    folder, name = os.path.split(path)
    if name.endswith(f"{VALIDATION}.jsonl"):
        return _is_held_out(path.removesuffix(".jsonl"))
    if name == "index.json" and os.path.basename(os.path.dirname(folder)) == INDEX_CACHE:
        return True
    if not name.endswith(".json") or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(len(_HEAD)) == _HEAD


def _is_held_out(prefix: str) -> bool:
    """Whether its text was taken out of another corpus. A user's own text may have such a name, and
    a dataset made of it beside it."""
    if not os.path.exists(manifest_path(prefix)):
        return False
    try:
        return "documents" in read_manifest(prefix, TokenManifest).source
    except InputError:
        return False


def _place(path: str) -> str:
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)
