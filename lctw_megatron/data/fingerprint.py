"""Two digests of indexed files: the whole content, and a sample that is cheap at every open."""

import hashlib
import os

from lctw_megatron.data.indexed_array import (
    BLOCK_BYTES,
    IndexedArrayReader,
    data_path,
    index_path,
)

SAMPLE_BLOCKS = 64
SAMPLE_BYTES = 4096


def content_fingerprint(reader: IndexedArrayReader) -> str:
    """blake2b-128 of the .bin bytes followed by the int32 lengths. Reads everything."""
    digest = hashlib.blake2b(digest_size=16)
    with open(data_path(reader.prefix), "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    for lengths in reader.length_blocks():
        digest.update(lengths.tobytes())
    return digest.hexdigest()


def sample_digest(prefix: str) -> str:
    """blake2b-128 of the sizes and of up to 64 evenly spaced 4 KiB blocks of .bin and of .idx.

    Takes the same time for every size. Files under 256 KiB are read whole. It notices files that
    were mixed up, truncated or written anew; a few changed bytes only the fingerprint notices.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in (data_path(prefix), index_path(prefix)):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            last = max(size - SAMPLE_BYTES, 0)
            count = min(SAMPLE_BLOCKS, -(-size // SAMPLE_BYTES))
            for number in range(count):
                file.seek(last * number // max(count - 1, 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
