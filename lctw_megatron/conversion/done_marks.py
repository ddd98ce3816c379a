"""Running a conversion again: finished work is recognised, nothing of the user's is overwritten."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lctw_megatron.atomic import atomic_directory, write_json
from lctw_megatron.data.json_object import read_json
from lctw_megatron.errors import InputError, few
from lctw_megatron.model.checkpoint_folder import MANIFEST
from lctw_megatron.ownership import left_unfinished, sole_writer

MARK = "conversion.json"
"""In every folder that a conversion wrote: what it was made from, and of its files the sizes of
those that nobody edits and the digests of all else (earlier versions: their sizes)."""

_NOT_EDITED = (".safetensors", ".distcp", ".metadata", MANIFEST)
"""Weights, and a checkpoint's index and manifest, in which an identifier is new each time."""


@contextmanager
def conversion_into(
    output: Path, source: dict[str, Any], log: Callable[[str], None], read: Sequence[Path]
) -> Iterator[Path | None]:
    """The folder to be filled, which becomes ``output`` at the end; None if ``output`` was made
    from ``source`` before. What a killed conversion has left beside it is removed.

    A folder that was made from something else (a checkpoint of an earlier step) is replaced if it
    holds nothing but what the conversion wrote, as it wrote it; a link stays, and leads to what was
    made. Raises InputError if the folder holds anything else, if another process is writing it, if
    it is a mount point, or if one of the folders ``read`` is it or in it.
    """
    place = output.resolve()
    for folder in (path.resolve() for path in read):
        if place == folder or place in folder.parents:
            raise InputError(
                f"--output {output}: is read from ({folder}), and would be replaced; name another"
            )
    if _is_done(output, source, log):
        if left_unfinished(place):
            with suppress(OSError, InputError), sole_writer(place, log):
                pass
        yield None
        return
    if place.is_mount():  # which cannot be renamed
        raise InputError(
            f"--output {output}: is a mount point, but a folder that appears whole or not at all "
            "was expected; name a folder in it"
        )
    with sole_writer(place, log), atomic_directory(place) as folder:
        yield folder
        write_json(folder / MARK, {"source": source, "files": _contents(folder)})


def source_of(checkpoint: Path, kind: str, **settings: Any) -> dict[str, Any]:
    """What an export of ``kind`` is made from: ``checkpoint`` and ``settings``."""
    # Every save writes an identifier of its own into .metadata.
    content = (checkpoint / ".metadata").read_bytes() + (checkpoint / MANIFEST).read_bytes()
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return {"format": kind, "checkpoint": digest, **settings}


def _is_done(output: Path, source: dict[str, Any], log: Callable[[str], None]) -> bool:
    above = next(parent for parent in output.absolute().parents if parent.exists())
    if not above.is_dir():
        raise InputError(f"{output}: {above} is a file, a folder was expected")
    if not output.exists():
        return False
    if not output.is_dir():
        raise InputError(f"{output}: is a file; choose another --output")
    if not any(output.iterdir()):
        return False
    try:
        mark = read_json(output / MARK)
        made_from, files = mark["source"], dict(mark["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{output}: exists and was not written by this command; remove it or choose another "
            "--output"
        ) from None
    found = _sizes(output)
    reason, foreign = "was made from something else", found.keys() - files.keys() - {MARK}
    if made_from == source:
        damaged = [name for name, was in files.items() if _is_damaged(name, found.get(name), was)]
        if not damaged:
            log(f"{output}: is finished, nothing to do")
            return True
        reason = f"is damaged ({few(damaged)} missing or of another size)"
    ours = found.keys() & files.keys()
    foreign |= {name for name in ours if _is_edited(output / name, name, files[name])}
    if foreign:
        raise InputError(
            f"{output}: {reason} and holds files of yours: {few(sorted(foreign))}; remove it or "
            "choose another --output"
        )
    log(f"{output}: {reason}, is replaced")
    return False


def _is_damaged(name: str, found: int | None, was: int | str) -> bool:
    """Such files as config.json may have been edited since."""
    return found is None or (name.endswith(_NOT_EDITED) and found != was)


def _is_edited(path: Path, name: str, was: int | str) -> bool:
    """Whether it is a file to edit, and another than the conversion wrote."""
    if name.endswith(_NOT_EDITED):
        return False
    return was != (path.lstat().st_size if isinstance(was, int) else _digest(path))


def _contents(folder: Path) -> dict[str, int | str]:
    sizes = _sizes(folder)
    return {
        n: size if n.endswith(_NOT_EDITED) else _digest(folder / n) for n, size in sizes.items()
    }


def _digest(path: Path) -> str:
    content = path.read_bytes() if path.exists() else b""  # or a link that leads nowhere
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    return {str(path.relative_to(folder)): path.lstat().st_size for path in files}
