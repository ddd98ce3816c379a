"""Token datasets and sidecars in words; and a manifest for a corpus that has none."""

import contextlib
import glob
import os

import numpy as np

from lctw_megatron.config.sidecar_name import is_sidecar_name
from lctw_megatron.data.fingerprint import content_fingerprint, sample_digest
from lctw_megatron.data.indexed_array import index_path
from lctw_megatron.data.json_object import read_json
from lctw_megatron.data.manifest import (
    MADE_ELSEWHERE,
    SidecarManifest,
    TokenizerIdentity,
    TokenManifest,
    files_of,
    manifest_path,
    read_manifest,
    write_manifest,
)
from lctw_megatron.data.sidecar import Sidecar
from lctw_megatron.data.token_dataset import TokenDataset, check_vocabulary
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError


def describe(dataset: TokenDataset) -> str:
    """The manifest of a token dataset, for people. Reads the lengths."""
    manifest = dataset.manifest
    lengths = np.sort(dataset.lengths)
    quarters = [int(lengths[(len(lengths) - 1) * quarter // 4]) for quarter in range(5)]
    tokenizer = manifest.tokenizer
    lines = [
        ("documents", f"{manifest.documents:,}"),
        ("tokens", f"{manifest.tokens:,} ({manifest.dtype})"),
        ("largest token id", "not said" if manifest.largest_id is None else manifest.largest_id),
        ("document length", "min {:,}, quartiles {:,}, {:,}, {:,}, max {:,}".format(*quarters)),
        ("tokenizer", f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens, {tokenizer.path}"),
        ("tokenizer digest", tokenizer.digest),
        ("documents begin", _mark("BOS", tokenizer.bos_id, tokenizer.add_bos)),
        ("documents end", _mark("EOS", tokenizer.eos_id, tokenizer.add_eos)),
        ("fingerprint", manifest.fingerprint),
        *((f"source: {name}", str(value)) for name, value in manifest.source.items() if value),
    ]
    return "\n".join([dataset.prefix, *(f"  {name:24} {value}" for name, value in lines)])


def _mark(name: str, id: int | None, added: bool) -> str:
    return f"with {name} (token {id})" if added else f"without {name}"


def describe_sidecar(sidecar: Sidecar) -> str:
    """The manifest of a sidecar, for people."""
    manifest: SidecarManifest = sidecar.manifest
    restart = f", and multiples of {manifest.sequence_length}" if manifest.sequence_length else ""
    first = "scored" if manifest.score_first_window else "not scored"
    share = 100 * manifest.scored / manifest.values
    lines = [
        ("scored", f"{manifest.scored:,} of {manifest.values:,} values ({share:.1f} %)"),
        ("values", f"min {manifest.min}, mean {manifest.mean}, max {manifest.max} nats"),
        ("window, stride", f"{manifest.window}, {manifest.stride}; first window {first}"),
        ("windows restart at", f"documents{restart}"),
        ("context", f"min {manifest.min_context}, mean {manifest.mean_context} tokens"),
        ("fingerprint", manifest.fingerprint),
        *((f"scorer: {name}", str(value)) for name, value in manifest.scorer.items()),
    ]
    return "\n".join([sidecar.prefix, *(f"  {name:24} {value}" for name, value in lines)])


def sidecar_names(dataset: TokenDataset) -> list[str]:
    """Names of the sidecars that lie beside a token dataset: not of other token datasets there, nor
    of theirs."""
    names = filter(is_sidecar_name, _names_beside(dataset.prefix))
    return [name for name in names if _is_sidecar(f"{dataset.prefix}.{name}")]


def stored_files(prefix: str) -> list[str]:
    """All of a token dataset and of the sidecars beside it, finished or not, and of the datasets
    whose prefixes begin with its own: nothing that a view may be written over."""
    prefixes = (prefix, *(f"{prefix}.{name}" for name in _names_beside(prefix)))
    return [file for each in prefixes for file in files_of(each)]


def _names_beside(prefix: str) -> list[str]:
    """NAME of every PREFIX.NAME that has an index."""
    ending = index_path("")
    paths = glob.glob(f"{glob.escape(prefix)}.*{ending}")
    return sorted(path[len(prefix) + 1 : -len(ending)] for path in paths)


def _is_sidecar(prefix: str) -> bool:
    """Whether it has a manifest that is not of tokens; also a damaged one, so that someone hears of
    it."""
    try:
        read_manifest(prefix, TokenManifest)
    except InputError:
        return True
    except FileNotFoundError:
        pass
    return False


def make_manifest(prefix: str, tokenizer_path: str) -> None:
    """Write PREFIX.json for a corpus in Megatron format that has none. Reads all tokens.

    BOS and EOS are looked for in the data: the manifest says a document has one if all have.
    Raises InputError if there is a manifest already, a damaged index or a token id beyond the
    tokenizer's vocabulary.
    """
    if os.path.exists(manifest_path(prefix)):
        raise InputError(f"{manifest_path(prefix)}: {_what_is_there(prefix)}")
    dataset = TokenDataset(prefix)
    tokenizer = load_tokenizer(tokenizer_path).identity
    dataset.check_index()
    largest = check_vocabulary(dataset, tokenizer)
    manifest = TokenManifest(
        fingerprint=content_fingerprint(dataset),
        sample_digest=sample_digest(prefix),
        documents=len(dataset),
        tokens=dataset.num_tokens,
        dtype=dataset.dtype.name,
        largest_id=largest,
        tokenizer=_as_found(dataset, tokenizer),
        source={"inputs": MADE_ELSEWHERE},
    )
    write_manifest(prefix, manifest)


def _what_is_there(prefix: str) -> str:
    """Of PREFIX.json, which may be the corpus itself."""
    text: object = None
    with contextlib.suppress(InputError):
        text = read_json(manifest_path(prefix))
    if isinstance(text, dict) and str(text.get("format")).startswith("lctw-megatron "):
        return "there is a manifest already; remove it first if the tokens were changed on purpose"
    return "is no manifest of ours; rename it, or the dataset"


def _as_found(dataset: TokenDataset, tokenizer: TokenizerIdentity) -> TokenizerIdentity:
    """The tokenizer with add_bos and add_eos as the documents have them."""
    filled = dataset.lengths > 0
    first = dataset.pointers[filled] // dataset.dtype.itemsize
    last = first + dataset.lengths[filled] - 1
    begins, ends = dataset.values[first], dataset.values[last]
    return tokenizer.model_copy(
        update={
            "add_bos": tokenizer.bos_id is not None and bool((begins == tokenizer.bos_id).all()),
            "add_eos": tokenizer.eos_id is not None and bool((ends == tokenizer.eos_id).all()),
        }
    )
