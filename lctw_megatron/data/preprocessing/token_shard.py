"""One shard of a corpus, tokenised into a folder of its own that is there whole or not at all.

The folder's name is a digest of everything that decides its content, so a finished shard is found
again by any later run that needs the same one, and by no other. In it:

    tokens.bin, tokens.idx   the documents (IndexedArray)
    sizes.bin                int64 [documents]: UTF-8 bytes of each document's text
    shard.json               ShardResult
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lctw_megatron.atomic import atomic_directory, write_json
from lctw_megatron.config.schema import MOST_DOCUMENT_BYTES
from lctw_megatron.data.indexed_array import IndexedArrayReader, IndexedArrayWriter
from lctw_megatron.data.json_object import read_json_object
from lctw_megatron.data.manifest import TokenizerIdentity
from lctw_megatron.data.preprocessing.corpus import Shard
from lctw_megatron.data.preprocessing.documents import read_documents
from lctw_megatron.data.token_dataset import token_dtype
from lctw_megatron.data.tokenizers import Tokenizer
from lctw_megatron.errors import InputError

_FORMAT = 1
"""To be raised when the same settings give other bytes."""
_BATCH_BYTES = 1 << 20
"""Text that is handed to the tokenizer at a time (one document at least)."""

Report = Callable[[int, int, int], None]
"""Called after every batch with the further bytes read, documents and tokens; may raise to stop."""


@dataclass(frozen=True)
class ShardSettings:
    """What decides a shard's content, besides the corpus."""

    text_field: str
    skip_bad: bool
    max_bytes: int | None
    """A shard ends before the document that would bring its text above this."""
    max_document_bytes: int = MOST_DOCUMENT_BYTES
    """A longer document is broken."""


@dataclass(frozen=True)
class ShardResult:
    documents: int
    tokens: int
    size: int
    """UTF-8 bytes of the documents' text."""
    skipped: int
    """Broken documents that were left out."""
    empty: int
    """Documents without any text, left out too."""
    full: bool
    """It ends before its end, because of ``max_bytes``."""


def shard_key(shard: Shard, settings: ShardSettings, tokenizer: TokenizerIdentity) -> str:
    """Digest of the files' identity (path, size, time of change), their parts, the settings and the
    tokenizer's content. ``skip_bad`` is not in it: where nothing was skipped it changes nothing."""
    decides = [
        _FORMAT,
        [dataclasses.astuple(part) for part in shard],
        settings.text_field,
        settings.max_bytes,
        settings.max_document_bytes,
        tokenizer.model_dump(exclude={"path"}),
    ]
    return hashlib.blake2b(json.dumps(decides).encode(), digest_size=16).hexdigest()


def finished_shard(folder: Path, skip_bad: bool) -> ShardResult | None:
    """The result of a shard that an earlier run has finished; None if it must be made."""
    try:
        result = ShardResult(**read_json_object(folder / "shard.json"))
        tokens = open_tokens(folder)
        sizes = (folder / "sizes.bin").stat().st_size
    except (OSError, ValueError, TypeError, InputError):
        return None
    whole = len(tokens) == result.documents == sizes // 8 and tokens.num_values == result.tokens
    return result if whole and (skip_bad or not result.skipped) else None


def open_tokens(folder: Path) -> IndexedArrayReader:
    return IndexedArrayReader(folder / "tokens")


def document_sizes(folder: Path) -> np.ndarray:
    """int64 [documents]: UTF-8 bytes of each document's text."""
    return np.fromfile(folder / "sizes.bin", "<i8")


def tokenise_shard(
    shard: Shard, settings: ShardSettings, tokenizer: Tokenizer, folder: Path, report: Report
) -> ShardResult:
    """Tokenise ``shard`` into ``folder``; if reading it raises, there is no folder."""
    vocab_size = tokenizer.identity.vocab_size
    shutil.rmtree(folder, ignore_errors=True)  # only a damaged one can be there
    tally = Tally()
    position_before = 0
    with atomic_directory(folder) as unfinished:
        with (
            IndexedArrayWriter(unfinished / "tokens", token_dtype(vocab_size)) as writer,
            open(unfinished / "sizes.bin", "wb") as size_file,
        ):
            for texts, sizes, position in _batches(shard, settings, str(unfinished), tally):
                tokens_before = writer.num_values
                for ids in tokenizer.encode_documents(texts):
                    _check_ids(ids, tokenizer.identity)
                    writer.add(ids)
                size_file.write(np.array(sizes, "<i8").tobytes())
                tokens = writer.num_values - tokens_before
                report(position - position_before, len(texts), tokens)
                position_before = position
        result = ShardResult(
            documents=writer.count,
            tokens=writer.num_values,
            size=tally.size,
            skipped=tally.skipped,
            empty=tally.empty,
            full=tally.full,
        )
        write_json(unfinished / "shard.json", dataclasses.asdict(result))
    return result


@dataclass
class Tally:
    """Of the documents read so far."""

    size: int = 0
    skipped: int = 0
    empty: int = 0
    full: bool = False


def kept_documents(
    shard: Shard, settings: ShardSettings, scratch: str, tally: Tally
) -> Iterator[tuple[str, int, int]]:
    """(text, its UTF-8 bytes, how much of the shard's weight is read) of every document that is
    stored, in order. What is left out is counted in ``tally``."""
    before = 0
    for part in shard:
        for document in read_documents(
            part, settings.text_field, settings.skip_bad, scratch, settings.max_document_bytes
        ):
            if document.text is None:
                tally.skipped += 1
            elif not document.text:
                tally.empty += 1
            elif settings.max_bytes and tally.size + document.size > settings.max_bytes:
                tally.full = True
                return
            else:
                tally.size += document.size
                yield document.text, document.size, before + min(document.position, part.weight)
        before += part.weight


def _batches(
    shard: Shard, settings: ShardSettings, scratch: str, tally: Tally
) -> Iterator[tuple[list[str], list[int], int]]:
    """(texts, their sizes, how much of the shard's weight is read)."""
    texts: list[str] = []
    sizes: list[int] = []
    gathered = 0
    for text, size, position in kept_documents(shard, settings, scratch, tally):
        texts.append(text)
        sizes.append(size)
        gathered += size
        if gathered >= _BATCH_BYTES:
            yield texts, sizes, position
            texts, sizes, gathered = [], [], 0
    yield texts, sizes, sum(part.weight for part in shard)


def _check_ids(ids: np.ndarray, tokenizer: TokenizerIdentity) -> None:
    if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
        raise InputError(
            f"tokenizer {tokenizer.path}: gave token id {int(ids.max())}, beyond its vocabulary of "
            f"{tokenizer.vocab_size}; are its files of one tokenizer?"
        )
