"""The last step of preprocessing: finished shards become one token dataset, and what is held out
another."""

import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lctw_megatron.atomic import sync_directory
from lctw_megatron.data.manifest import TokenizerIdentity, files_of, remove_manifest
from lctw_megatron.data.preprocessing.corpus import Shard
from lctw_megatron.data.preprocessing.our_files import VALIDATION
from lctw_megatron.data.preprocessing.token_shard import (
    ShardResult,
    ShardSettings,
    Tally,
    document_sizes,
    kept_documents,
    open_tokens,
)
from lctw_megatron.data.token_dataset import TokenWriter
from lctw_megatron.errors import InputError
from lctw_megatron.progress import Progress


def merge_shards(
    shards: Sequence[Shard],
    folders: Sequence[Path],
    results: Sequence[ShardResult],
    settings: ShardSettings,
    tokenizer: TokenizerIdentity,
    source: dict[str, Any],
    held_out: int,
    prefix: str,
) -> None:
    """Write the token dataset ``prefix``, and with ``held_out`` > 0 also ``prefix``-validation with
    that many documents, evenly spaced, and their text as .jsonl. Copies blocks of the shards.

    Documents after the first that does not fit into ``settings.max_bytes`` are left out, and those
    of which the tokenizer made nothing: they count as empty.
    """
    kept = _kept(folders, results, settings.max_bytes)
    runs = _with_tokens(folders, kept)
    total = sum(run.end - run.begin for run in runs)
    without_tokens = sum(kept) - total
    if total == 0 and without_tokens:
        raise InputError(
            f"tokenizer {tokenizer.path}: makes no token of any of the {without_tokens} documents "
            "with text; take one that knows their characters"
        )
    if total == 0:
        raise InputError(_why_nothing(results, settings.max_bytes))
    if held_out >= total:
        raise InputError(
            f"--validation-documents {held_out}: the corpus has {total} documents, so none would "
            f"be left to train on; hold out fewer"
        )
    source = {
        **source,
        "skipped": sum(result.skipped for result in results),
        "empty": sum(result.empty for result in results) + without_tokens,
    }
    chosen = [(2 * number + 1) * total // (2 * held_out) for number in range(held_out)]
    train, validation = divide(runs, chosen)
    _write(prefix, folders, train, tokenizer, {**source, "held_out": held_out})
    if chosen:
        origin = {**source, "documents": chosen}
        _write(prefix + VALIDATION, folders, validation, tokenizer, origin)
        with open(prefix + VALIDATION + ".jsonl", "w", encoding="utf-8") as file:
            scratch = os.path.dirname(prefix)  # not /tmp, which may be small
            texts = _texts(shards, validation, settings, scratch)
            for number, text in zip(chosen, texts, strict=True):
                line = json.dumps({"text": text, "document": number}, ensure_ascii=False)
                file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Run:
    """Documents [begin, end) of a shard."""

    shard: int
    begin: int
    end: int


def divide(runs: Sequence[Run], chosen: Sequence[int]) -> tuple[list[Run], list[Run]]:
    """(runs of all other documents, runs of one chosen document each), both in order.

    ``chosen`` are numbers among the documents of ``runs``, ascending.
    """
    others, ours = [], []
    waiting = list(reversed(chosen))
    first = 0
    for run in runs:
        begin, count = run.begin, run.end - run.begin
        while waiting and waiting[-1] < first + count:
            at = run.begin + waiting.pop() - first
            others.append(Run(run.shard, begin, at))
            ours.append(Run(run.shard, at, at + 1))
            begin = at + 1
        others.append(Run(run.shard, begin, run.end))
        first += count
    return [run for run in others if run.begin < run.end], ours


def _write(
    prefix: str,
    folders: Sequence[Path],
    runs: Sequence[Run],
    tokenizer: TokenizerIdentity,
    source: dict[str, Any],
) -> None:
    label = "merge held out" if prefix.endswith(VALIDATION) else "merge"
    total = sum(run.end - run.begin for run in runs)
    parts = [(folders[shard], list(ours)) for shard, ours in itertools.groupby(runs, _shard)]
    source = {**source, "bytes": sum(_bytes(folder, ours) for folder, ours in parts)}
    with (
        TokenWriter(prefix, tokenizer, source) as writer,
        Progress(label, total, "documents") as progress,
    ):
        for folder, ours in parts:
            tokens = open_tokens(folder)
            for run in ours:
                before = writer.num_tokens
                writer.extend(tokens, run.begin, run.end)
                progress.update(run.end - run.begin, tokens=writer.num_tokens - before)


def _texts(
    shards: Sequence[Shard], runs: Sequence[Run], settings: ShardSettings, folder: str
) -> Iterator[str]:
    """The text of single documents, read once more from the corpus."""
    for shard, ours in itertools.groupby(runs, _shard):
        wanted = {run.begin for run in ours}
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            documents = kept_documents(shards[shard], settings, scratch, Tally())
            for number, (text, _, _) in zip(range(max(wanted) + 1), documents, strict=False):
                if number in wanted:
                    yield text


def _kept(
    folders: Sequence[Path], results: Sequence[ShardResult], max_bytes: int | None
) -> list[int]:
    """How many documents of each shard are used: all, up to the first beyond ``max_bytes``."""
    kept: list[int] = []
    size = 0
    for folder, result in zip(folders, results, strict=False):
        if max_bytes is None or size + result.size <= max_bytes:
            kept.append(result.documents)
            size += result.size
        else:
            ends = size + np.cumsum(document_sizes(folder))
            kept.append(int(np.searchsorted(ends, max_bytes, side="right")))
            break
    return kept


def _with_tokens(folders: Sequence[Path], kept: Sequence[int]) -> list[Run]:
    """The documents that are used, but for those without any token, in runs as long as can be.
    (A tokenizer without EOS makes nothing of white space that it strips, or of unknown letters.)"""
    runs = []
    for shard, (folder, count) in enumerate(zip(folders, kept, strict=False)):
        begin = 0
        for at in np.flatnonzero(open_tokens(folder).lengths[:count] == 0).tolist():
            runs.append(Run(shard, begin, at))
            begin = at + 1
        runs.append(Run(shard, begin, count))
    return [run for run in runs if run.begin < run.end]


def _bytes(folder: Path, runs: Sequence[Run]) -> int:
    sizes = document_sizes(folder)
    return sum(int(sizes[run.begin : run.end].sum()) for run in runs)


def _shard(run: Run) -> int:
    return run.shard


def _why_nothing(results: Sequence[ShardResult], max_bytes: int | None) -> str:
    skipped, empty = (sum(getattr(each, name) for each in results) for name in ("skipped", "empty"))
    if any(result.full or result.documents for result in results):
        return f"--max-bytes {max_bytes}: the first document alone is larger; allow more"
    return f"the corpus holds no text: {skipped} documents are broken and {empty} empty"


def publish(work_prefix: str, prefix: str) -> None:
    """Move the merged files to where they belong, the manifest of the training data last.

    Held-out documents of an earlier run at this prefix are removed, or this run's training data
    might hold them.
    """
    for name in (prefix, prefix + VALIDATION):
        remove_manifest(name)
    for part in (VALIDATION, ""):
        for ending in [".jsonl"] * bool(part) + files_of(""):
            source, target = work_prefix + part + ending, prefix + part + ending
            if os.path.exists(source):
                os.replace(source, target)
            elif part:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(target)
    sync_directory(Path(prefix).parent)
