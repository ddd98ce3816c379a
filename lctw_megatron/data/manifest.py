"""PREFIX.json: what a token dataset is, and PREFIX.<name>.json: what a sidecar is."""

import contextlib
import os
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from lctw_megatron.atomic import write_json
from lctw_megatron.data.indexed_array import data_path, index_path
from lctw_megatron.data.json_object import parse_json
from lctw_megatron.errors import InputError

MADE_ELSEWHERE = ["a corpus in Megatron format"]
"""The inputs that the source of a manifest names if it was made for tokens that were there."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TokenizerIdentity(_Strict):
    """Which tokenizer made the tokens, and what it put around every document."""

    kind: Literal["sentencepiece", "huggingface"]
    path: str
    """Where it was. Not compared: the digest is the identity."""
    digest: str
    """blake2b-128 of the content of the tokenizer's files; of a SentencePiece model without
    ``add_bos``, which no file of it decides."""
    vocab_size: int
    """One more than the largest id."""
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    """Every stored document begins with BOS; pieces and windows must, too."""
    add_eos: bool
    """Every stored document ends with EOS."""

    @property
    def first_id(self) -> int | None:
        """The token that every text begins with: BOS, or None."""
        return self.bos_id if self.add_bos else None


class TokenManifest(_Strict):
    """Of PREFIX.bin and PREFIX.idx."""

    format: Literal["lctw-megatron tokens 1"] = "lctw-megatron tokens 1"
    fingerprint: str
    """blake2b-128 of the .bin bytes followed by the int32 lengths."""
    sample_digest: str
    """See ``fingerprint.sample_digest``; compared at every open."""
    documents: int
    tokens: int
    dtype: str
    largest_id: int | None = None
    """Largest token id, which decides whether a model's vocabulary is large enough; null in older
    manifests."""
    tokenizer: TokenizerIdentity
    source: dict[str, Any]
    """Where the text came from."""

    @property
    def made_elsewhere(self) -> bool:
        """Whether other tools made the tokens, or those that these were chosen from: then BOS and
        EOS are as the documents have them, whatever the tokenizer adds."""
        source = self.source
        while isinstance(source.get("original"), dict):
            source = source["original"]
        return source.get("inputs") == MADE_ELSEWHERE


class SidecarManifest(_Strict):
    """Of PREFIX.<name>.bin and .idx: one float32 per token of PREFIX, NaN = not scored."""

    format: Literal["lctw-megatron sidecar 1"] = "lctw-megatron sidecar 1"
    fingerprint: str
    sample_digest: str
    dtype: Literal["float32"] = "float32"
    values: int
    scored: int
    """Values that are not NaN."""
    min: float | None
    """Of the scored values, in nats, as are mean and max; null if there are none."""
    mean: float | None
    max: float | None
    tokens_fingerprint: str
    """Fingerprint of the token dataset that was scored."""
    tokenizer_digest: str
    window: int
    """K: tokens the scorer saw at once."""
    stride: int
    """Distance between windows."""
    sequence_length: int | None
    """Windows restarted at every multiple of this too; null: only at documents."""
    score_first_window: bool
    """Whether the targets in the first window of a document (or region) were scored as well."""
    windows_version: int = 1
    """Of the rules that cut the windows (scoring/windows.py)."""
    min_context: int | None
    """Fewest tokens of context a scored target had; null if none was scored."""
    mean_context: float | None
    scorer: dict[str, Any]
    """Checkpoint path, weights digest, whatever else identifies the model."""


def manifest_path(prefix: str) -> str:
    return prefix + ".json"


def files_of(prefix: str) -> list[str]:
    """All of a token dataset or a sidecar; last its manifest, without which it is not whole."""
    return [data_path(prefix), index_path(prefix), manifest_path(prefix)]


def check_prefix(prefix: str) -> None:
    """InputError unless ``prefix``, which the user gives as `--output-prefix`, names files."""
    if not prefix:
        raise InputError(
            "--output-prefix: is empty; give the path of the result without its ending"
        )
    if prefix.endswith(os.sep) or os.path.isdir(prefix):
        raise InputError(
            f"--output-prefix {prefix}: is a folder; a prefix is the path of the result without "
            f"its ending, such as {os.path.join(prefix, 'corpus')}"
        )


Manifest = TypeVar("Manifest", TokenManifest, SidecarManifest)


def read_manifest(prefix: str, kind: type[Manifest]) -> Manifest:
    """Read PREFIX.json. FileNotFoundError if there is none, InputError if it is not one of ours."""
    path = manifest_path(prefix)
    with open(path, "rb") as file:
        text = file.read()
    try:
        return kind.model_validate(parse_json(text))
    except ValueError as error:  # broken JSON, broken UTF-8 or ValidationError
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            reason = f"{where}: {first['msg']}"
        else:
            reason = str(error)
        expected = kind.model_fields["format"].default
        raise InputError(
            f"{path}: not a manifest of the format {expected!r} ({reason}); was another file "
            f"given, or was it changed by hand?"
        ) from None


def write_manifest(prefix: str, manifest: TokenManifest | SidecarManifest) -> None:
    """Write PREFIX.json, atomically."""
    write_json(manifest_path(prefix), manifest.model_dump())


def remove_manifest(prefix: str) -> None:
    """Before the files it describes change: a dataset without manifest is not finished."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(manifest_path(prefix))
