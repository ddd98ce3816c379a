"""Checksums of a checkpoint's files: made by the ranks that wrote them, compared before loading.

CRC-32 of zlib, 2.3 GB/s on a core: it finds every single flipped bit and what a disk or a copy does
to a file, not what a forger does. LCTW_SKIP_CHECKSUMS=1 in the environment loads without comparing.
"""

import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from lctw_megatron.errors import InputError
from lctw_megatron.platform.world import first_rank_decides

_BLOCK_BYTES = 1 << 24
_THREADS = 4  # zlib and reading let the others go on; more than a rank's share of the cores is rude


def file_sum(path: Path) -> str:
    """CRC-32 of the file's bytes, eight hexadecimal digits."""
    found = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            found = zlib.crc32(block, found)
    return f"{found:08x}"


def sum_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Name to ``file_sum`` of files of ``folder``."""
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(file_sum, (folder / name for name in names)), strict=True))


def folder_names(folder: Path) -> list[str]:
    """All files of ``folder`` and its subfolders, as a manifest names them."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def check_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Refuse files of ``folder`` whose bytes are not those that were written."""
    if complaint := _complaint(folder, sums):
        raise InputError(complaint)


def check_sums_together(folder: Path, sums: Mapping[str, str]) -> None:
    """``check_sums`` with the files shared over all ranks, refused on all of them. What is missing
    on one may be there already for the first, which then looks for it."""
    names, ranks = sorted(sums), dist.get_world_size()
    parts = [{name: sums[name] for name in names[rank::ranks]} for rank in range(ranks)]
    found: list[tuple[bool, str | None]] = [(False, None)] * ranks
    mine = parts[dist.get_rank()]
    lacks = not all((folder / name).exists() for name in mine)
    dist.all_gather_object(found, (lacks, None if lacks else _complaint(folder, mine)))
    late = {
        name: sums[name]
        for part, (lacks, _) in zip(parts, found, strict=True)
        if lacks
        for name in part
    }
    complaints = [complaint for _, complaint in found]
    if late:  # or not, alike on all ranks
        complaints.append(first_rank_decides(lambda: _complaint(folder, late)))
    for complaint in filter(None, complaints):
        raise InputError(complaint)


def _complaint(folder: Path, sums: Mapping[str, str]) -> str | None:
    """What is wrong with the first damaged file. Failing to read one must not keep ranks apart."""
    if os.environ.get("LCTW_SKIP_CHECKSUMS") == "1":
        return None
    try:
        found = sum_files(folder, sums)
    except OSError as error:
        lacks = isinstance(error, FileNotFoundError)
        reason = "missing" if lacks else error.strerror
        return f"{error.filename}: {reason}; the checkpoint is damaged, use another"
    for name, expected in sums.items():
        if found[name] != expected:
            return (
                f"{folder / name}: damaged, its checksum is {found[name]}, was {expected} when it "
                "was written; use another checkpoint or, if the change is yours, load it with "
                "LCTW_SKIP_CHECKSUMS=1 in the environment"
            )
    return None
