"""What lies already where chosen documents are to be written: an earlier choice, or work that is
nobody's to replace, such as a sidecar that was scored for the chosen documents anew."""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from lctw_megatron.data.indexed_array import data_path
from lctw_megatron.data.manifest import SidecarManifest, TokenManifest, manifest_path, read_manifest
from lctw_megatron.data.sidecar import Sidecar
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import InputError
from lctw_megatron.inspection.describe_data import sidecar_names
from lctw_megatron.scoring.windows import Windowing


def how_made(manifest: SidecarManifest) -> str:
    """A digest of how the values of a sidecar were made, which a copy shares and no fingerprint of
    fewer documents can tell."""
    how = {name: getattr(manifest, name) for name in (*Windowing._fields, "windows_version")}
    text = json.dumps([how, manifest.scorer], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Wanted:
    """A choice that is to be at a prefix."""

    choice: dict[str, Any]
    sidecars: dict[str, str]
    """``how_made`` of each."""


def check_free(prefix: str, dataset: TokenDataset) -> None:
    """InputError if ``prefix`` has ``dataset`` itself, or what is no choice of documents."""
    if os.path.realpath(data_path(prefix)) == os.path.realpath(data_path(dataset.prefix)):
        raise InputError(f"{prefix}: is the dataset to choose from; give another --output-prefix")
    taken = [path for path in (data_path(prefix), manifest_path(prefix)) if os.path.exists(path)]
    if taken and _manifest(prefix) is None:
        raise InputError(
            f"{taken[0]}: is no earlier choice of documents, and would be replaced; give another "
            "--output-prefix, or remove it"
        )


def is_there(prefix: str, wanted: Wanted) -> bool:
    """Whether the choice is there whole, with sidecars of the same values. If another one is there,
    says that it is going to be replaced; InputError if that would replace, or leave without its
    tokens, a sidecar that is no copy."""
    manifest = _manifest(prefix)
    if manifest is None:
        return False
    same = manifest.source["choice"] == wanted.choice
    # Choices of before do not say of what their sidecars are copies.
    copied = manifest.source.get("sidecars", wanted.sidecars)
    try:
        found = _sidecars(TokenDataset(prefix))
    except InputError:  # its tokens are damaged, so that no sidecar fits them
        return False
    for name, sidecar in found.items():
        if name in wanted.sidecars:
            # One that does not fit is what an interrupted choice left.
            copy = sidecar is None or how_made(sidecar) in (wanted.sidecars[name], copied.get(name))
        else:
            copy = same  # it is left alone, and goes on to fit
        if not copy:
            raise InputError(_refusal(prefix, name, sidecar, same))
    if not same:
        print(f"{prefix}: was another choice, {_differences(manifest, wanted)}, is replaced")
        return False
    made = {name: how_made(sidecar) for name, sidecar in found.items() if sidecar is not None}
    return all(made.get(name) == how for name, how in wanted.sidecars.items())


def _sidecars(chosen: TokenDataset) -> dict[str, SidecarManifest | None]:
    """Those beside ``chosen``; None for one that is damaged or of other tokens."""
    found: dict[str, SidecarManifest | None] = {}
    for name in sidecar_names(chosen):
        try:
            found[name] = Sidecar(chosen, name).manifest
        except InputError:
            found[name] = None
    return found


def _refusal(prefix: str, name: str, sidecar: SidecarManifest | None, same: bool) -> str:
    if sidecar is None:
        what = "damaged or of other tokens"
    else:
        scorer = sidecar.scorer.get("checkpoint", "another scorer")
        what = f"no copy (window {sidecar.window}, scored by {scorer})"
    loss = "it" if same else "the choice that it belongs to"
    return (
        f"{prefix}.{name}: is {what}, and {loss} would be replaced; choose another "
        "--output-prefix, or remove it"
    )


def _differences(manifest: TokenManifest, wanted: Wanted) -> str:
    before = manifest.source["choice"]
    if before.get("keep") != wanted.choice["keep"]:
        return f"--keep {before.get('keep')}"
    return f"from {manifest.source.get('chosen_from')} as it was or by other losses"


def _manifest(prefix: str) -> TokenManifest | None:
    """Of an earlier choice; None if there is none, or of something else."""
    try:
        manifest = read_manifest(prefix, TokenManifest)
    except (FileNotFoundError, InputError):
        return None
    return manifest if isinstance(manifest.source.get("choice"), dict) else None
