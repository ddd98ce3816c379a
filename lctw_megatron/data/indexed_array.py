"""Megatron's indexed files: one array per document in PREFIX.bin, where each begins in PREFIX.idx.

``PREFIX.bin`` holds the values of all documents, one after the other, and nothing else.
``PREFIX.idx``, little-endian, n documents:

    9 bytes      b"MMIDIDX" and two zero bytes
    uint64       version, always 1
    uint8        dtype code, see DTYPE_CODES
    uint64       n, the number of sequences; ours hold one sequence per document
    uint64       n + 1, the number of document boundaries
    int32[n]     length of each sequence, in values
    int64[n]     where each sequence begins in PREFIX.bin, in bytes
    int64[n+1]   the first sequence of each document, and n: 0, 1, ... n

Unmodified Megatron-LM reads these files (megatron.core.datasets.indexed_dataset). Token datasets
and sidecars share them, and so do the shards both are merged from.
"""

import hashlib
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import IO, Any

import numpy as np

from lctw_megatron.atomic import atomic_file
from lctw_megatron.closing import Closing
from lctw_megatron.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {
    "uint8": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "float64": 6,
    "float32": 7,
    "uint16": 8,
}
BLOCK_BYTES = 4 << 20
"""How much is read or written at a time."""
_BLOCK_LENGTHS = BLOCK_BYTES // 8
_CHECKED_AT_OPENING = 1 << 20
"""Documents whose boundaries are read at every opening (a millisecond); more by check_index."""


def data_path(prefix: str) -> str:
    return prefix + ".bin"


def index_path(prefix: str) -> str:
    return prefix + ".idx"


class IndexedArrayReader:
    """Memory-mapped reader. Opening reads the header and checks the sizes, whatever their size.

    ``lengths`` int32 [n] in values and ``pointers`` int64 [n] in bytes are memory maps, read-only.
    Raises InputError for missing, truncated or damaged files. Pickles as its prefix.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        data, index = data_path(self.prefix), index_path(self.prefix)
        for path in (data, index):
            if not os.path.isfile(path):
                raise InputError(f"{path}: no such file; {self.prefix} needs a .bin and an .idx")
        count, self.dtype = _read_header(index)
        lengths_at = HEADER.size
        pointers_at = lengths_at + 4 * count
        self.lengths = _map(index, np.dtype("<i4"), count, lengths_at)
        self.pointers = _map(index, np.dtype("<i8"), count, pointers_at)
        self._documents = _map(index, np.dtype("<i8"), count + 1, pointers_at + 8 * count)
        if count <= _CHECKED_AT_OPENING:
            self._check_documents(0, count + 1)
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if count else 0
        size = os.path.getsize(data)
        if end != size:
            raise InputError(
                f"{data}: {size} bytes, but {index} describes {end}: one of the two is truncated "
                f"or damaged; make both again"
            )
        self.num_values = size // self.dtype.itemsize
        self.values = _map(data, self.dtype, self.num_values, 0)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> np.ndarray:
        return self.get(document)

    def get(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Values [offset, offset + length) of a document: a read-only view, ``length`` values.

        ``length`` None means up to the document's end. Raises IndexError beyond the document.
        """
        size = int(self.lengths[document])
        if length is None:
            length = size - offset
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(
                f"values {offset} to {offset + length} of document {document} of {self.prefix}, "
                f"which has {size}"
            )
        begin = int(self.pointers[document]) // self.dtype.itemsize + offset
        view = self.values[begin : begin + length]
        if begin < 0 or len(view) != length:
            raise InputError(
                f"{index_path(self.prefix)}: document {document} lies outside the .bin file: the "
                f"index is damaged; make both again"
            )
        return view

    def length_blocks(self) -> Iterator[np.ndarray]:
        """``lengths``, a bounded piece at a time."""
        for begin in range(0, len(self), _BLOCK_LENGTHS):
            yield self.lengths[begin : begin + _BLOCK_LENGTHS]

    def check_index(self) -> None:
        """Read the whole index: InputError unless documents lie end to end in the .bin file."""
        end = 0
        for begin in range(0, len(self), _BLOCK_LENGTHS):
            lengths = self.lengths[begin : begin + _BLOCK_LENGTHS].astype(np.int64)
            ends = end + np.cumsum(lengths) * self.dtype.itemsize
            expected = ends - lengths * self.dtype.itemsize
            wrong = (self.pointers[begin : begin + len(lengths)] != expected) | (lengths < 0)
            if wrong.any():
                raise InputError(
                    f"{index_path(self.prefix)}: document {begin + int(wrong.argmax())} does not "
                    f"begin where the one before it ends: the index is damaged; make it again"
                )
            end = int(ends[-1])
            self._check_documents(begin, begin + len(lengths) + 1)

    def _check_documents(self, begin: int, end: int) -> None:
        """InputError unless document i is sequence i: as many of both may be there by chance."""
        wrong = self._documents[begin:end] != np.arange(begin, min(end, len(self) + 1))
        if wrong.any():
            at = begin + int(wrong.argmax())
            raise InputError(
                f"{index_path(self.prefix)}: document {at} begins with sequence "
                f"{int(self._documents[at])}; LCTW-Megatron needs one sequence per document "
                f"(Megatron's preprocess without --split-sentences)"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.prefix,)


def _read_header(path: str) -> tuple[int, np.dtype]:
    """(number of documents, dtype) of an .idx file; InputError unless its size fits its header."""
    damaged = f"{path}: not a Megatron .idx file, or damaged: "
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
        size = os.fstat(file.fileno()).st_size
    if len(header) < HEADER.size:
        raise InputError(f"{damaged}{size} bytes, the header alone has {HEADER.size}")
    magic, version, code, count, boundaries = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise InputError(f"{damaged}it begins with {header[:17]!r}, expected {MAGIC!r}, version 1")
    names = [name for name, value in DTYPE_CODES.items() if value == code]
    if not names:
        raise InputError(f"{damaged}dtype code {code}, expected 1 to {len(DTYPE_CODES)}")
    expected = HEADER.size + 12 * count + 8 * boundaries
    if size not in (expected, expected + count):  # one more byte a sequence: multimodal corpora
        raise InputError(f"{damaged}{size} bytes, its header promises {expected}; make it again")
    if boundaries != count + 1:
        raise InputError(
            f"{path}: {count} sequences in {boundaries - 1} documents; LCTW-Megatron needs one "
            f"sequence per document (Megatron's preprocess without --split-sentences)"
        )
    return count, np.dtype(names[0]).newbyteorder("<")


def stored_dtype(prefix: str) -> np.dtype | None:
    """What PREFIX.idx says of its values, whatever else is wrong with it; None if nothing."""
    try:
        with open(index_path(prefix), "rb") as file:
            magic, _, code, _, _ = HEADER.unpack(file.read(HEADER.size))
    except (FileNotFoundError, struct.error):
        return None
    names = [name for name, value in DTYPE_CODES.items() if value == code and magic == MAGIC]
    return np.dtype(names[0]) if names else None


def _map(path: str, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
    """A read-only memory map; an empty array where there is nothing to map."""
    if count == 0:
        return np.empty(0, dtype)
    # asarray: a plain ndarray view, whose slices are far cheaper than those of np.memmap
    return np.asarray(np.memmap(path, dtype, "r", offset, (count,)))


def write_index(
    file: IO[bytes], dtype: np.dtype, count: int, blocks: Callable[[], Iterator[np.ndarray]]
) -> None:
    """Write an .idx file for ``count`` documents; ``blocks()`` yields their int32 lengths."""
    file.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype.name], count, count + 1))
    for lengths in blocks():
        file.write(lengths.astype("<i4").tobytes())
    begin = 0
    for lengths in blocks():
        ends = begin + np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
        file.write((ends - lengths.astype(np.int64) * dtype.itemsize).astype("<i8").tobytes())
        begin = int(ends[-1])
    for begin in range(0, count + 1, _BLOCK_LENGTHS):
        end = min(begin + _BLOCK_LENGTHS, count + 1)
        file.write(np.arange(begin, end, dtype="<i8").tobytes())


class IndexedArrayWriter(Closing):
    """Writes PREFIX.bin and PREFIX.idx, document by document; both appear whole at ``close``.

    A context manager: leaving it with an exception leaves neither file. Memory is bounded: the
    lengths wait in an unnamed temporary file. After ``finish``, ``fingerprint`` is the blake2b-128
    of the .bin bytes followed by the int32 lengths; ``largest`` is the largest of whole numbers.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype | str | type) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.count = 0
        self.num_values = 0
        self.largest = -1
        self.fingerprint = ""
        self._hash = hashlib.blake2b(digest_size=16)
        self._files = ExitStack()
        index = index_path(self.prefix)
        self._index = self._files.enter_context(atomic_file(index))
        self._data = self._files.enter_context(atomic_file(data_path(self.prefix)))
        self._lengths = self._files.enter_context(
            tempfile.TemporaryFile(dir=os.path.dirname(index) or ".")  # noqa: SIM115
        )

    def add(self, values: np.ndarray) -> None:
        """Append one document. Raises ValueError if a value does not fit the dtype."""
        stored = np.ascontiguousarray(values, dtype=self.dtype)
        if stored.dtype.kind != "f" and not np.array_equal(stored, values):
            raise ValueError(f"{self.prefix}: values that {self.dtype} cannot hold")
        self._append(stored.tobytes())
        self._append_lengths(np.array([len(stored)]))

    def extend(self, reader: IndexedArrayReader, begin: int = 0, end: int | None = None) -> None:
        """Append documents [begin, end) of ``reader``, copied block by block."""
        end = len(reader) if end is None else end
        if reader.dtype != self.dtype:
            raise ValueError(f"{reader.prefix} is {reader.dtype}, {self.prefix} is {self.dtype}")
        if begin >= end:
            return
        position = int(reader.pointers[begin])
        stop = int(reader.pointers[end - 1]) + int(reader.lengths[end - 1]) * self.dtype.itemsize
        with open(data_path(reader.prefix), "rb") as file:
            file.seek(position)
            while position < stop:
                block = file.read(min(BLOCK_BYTES, stop - position))
                if not block:
                    raise InputError(f"{data_path(reader.prefix)}: shorter than when it was opened")
                self._append(block)
                position += len(block)
        for first in range(begin, end, _BLOCK_LENGTHS):
            self._append_lengths(reader.lengths[first : min(first + _BLOCK_LENGTHS, end)])

    def finish(self) -> None:
        """Write the index and bring both files safely to disk, still under temporary names.

        A full disk shows here, before anything of that name is replaced.
        """
        try:
            self._lengths.flush()
            for block in self._length_blocks():
                self._hash.update(block.tobytes())
            write_index(self._index, self.dtype, self.count, self._length_blocks)
            for file in (self._index, self._data):
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            self.give_up(error)
            raise
        self.fingerprint = self._hash.hexdigest()

    def close(self) -> None:
        """Finish, and let both files appear."""
        if not self.fingerprint:
            self.finish()
        self._files.close()

    def give_up(self, error: BaseException) -> None:
        self._files.__exit__(type(error), error, error.__traceback__)

    def _append(self, block: bytes) -> None:
        self._data.write(block)
        self._hash.update(block)
        count = len(block) // self.dtype.itemsize
        self.num_values += count
        if count and self.dtype.kind != "f":
            self.largest = max(self.largest, int(np.frombuffer(block, self.dtype, count).max()))

    def _append_lengths(self, lengths: np.ndarray) -> None:
        if lengths.max() > np.iinfo(np.int32).max:
            raise ValueError(
                f"{self.prefix}: a document of {lengths.max()} values, more than 2^31-1"
            )
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.count += len(lengths)

    def _length_blocks(self) -> Iterator[np.ndarray]:
        self._lengths.seek(0)
        while block := self._lengths.read(4 * _BLOCK_LENGTHS):
            yield np.frombuffer(block, "<i4")
