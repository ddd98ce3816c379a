"""The documents of a slice of a corpus file, one after the other."""

import codecs
import gzip
import io
import json
import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from lctw_megatron.data.preprocessing.corpus import Slice, parquet_errors
from lctw_megatron.errors import InputError, few

_BUFFER_BYTES = 1 << 20
_ROWS = 64
"""Rows of a parquet file decoded at a time."""
_FIRST_BYTES = 1 << 12


@dataclass(frozen=True, slots=True)
class Document:
    text: str | None
    """None: broken, and skipped."""
    size: int
    """UTF-8 bytes of the text."""
    position: int
    """How much of the slice's weight has been read so far."""


class _Broken(Exception):
    """Why one document cannot be read."""


def _too_long(most_bytes: int) -> _Broken:
    return _Broken(f"longer than {most_bytes} bytes, the limit that --max-document-bytes sets")


def read_documents(
    part: Slice, text_field: str, skip_bad: bool, scratch: str, most_bytes: int
) -> Iterator[Document]:
    """Documents of a slice, in order, one in memory at a time (of parquet, 64 rows).

    A document that cannot be read, or is longer than ``most_bytes`` (a jsonl line with all its
    fields), raises an InputError that names file and line (or row), or comes as ``text`` None if
    ``skip_bad``. Lines of white space are passed over. A file whose compression or format is
    damaged raises InputError either way. ``scratch`` is a folder for temporary files.
    """
    file = part.file
    try:
        if file.kind == "parquet":
            pieces = _rows(part, text_field, scratch, most_bytes)
        elif file.kind == "jsonl":
            pieces = _lines(part, text_field, most_bytes)
        else:
            pieces = _whole(part, most_bytes) if file.kind == "txt" else _package(part)
        for place, text, position in pieces:
            try:
                if isinstance(text, _Broken):
                    raise text
                size = len(text.encode())
            except (_Broken, UnicodeEncodeError) as error:
                if not skip_bad:
                    raise InputError(
                        f"{file.path}{_where(part, place)}: {error}; {_hint(part)}"
                    ) from None
                yield Document(None, 0, position)
            else:
                yield Document(text, size, position)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{file.path}: damaged or truncated gzip file ({error})") from None


# A reader yields (place, text or why it is broken, position).
_Piece = tuple[str | int, str | _Broken, int]


def _lines(part: Slice, text_field: str, most_bytes: int) -> Iterator[_Piece]:
    """jsonl. A place is the number of the line, counted from the slice's begin."""
    with open(part.file.path, "rb") as raw, _decompressed(raw, part.file.compression) as stream:
        begin = position = 0
        if not part.file.compression and part.begin:
            # The line that is under way at `begin` belongs to the slice before.
            stream.seek(part.begin - 1)
            begin = part.begin
            position = begin - 1 + _rest_of_line(stream)
        number = 0
        while part.file.compression or position < part.end:
            line = stream.readline(most_bytes + 1)
            if not line:
                break
            position += len(line)
            number += 1
            too_long = len(line) > most_bytes
            if too_long and not line.endswith(b"\n"):
                position += _rest_of_line(stream)
            if not too_long and line.isspace():
                continue
            done = raw.tell() if part.file.compression else position - begin
            try:
                yield (
                    number,
                    _too_long(most_bytes) if too_long else _text_of(line, text_field),
                    done,
                )
            except _Broken as error:
                yield number, error, done


def _rest_of_line(stream: io.BufferedIOBase) -> int:
    """Read to the end of the line, however far it is; how many bytes that were."""
    size = 0
    while block := stream.readline(_BUFFER_BYTES):
        size += len(block)
        if block.endswith(b"\n"):
            break
    return size


class _Twice(dict[str, Any]):
    """An object in which names occur twice, which Python's parser lets pass: the last one wins."""

    names: set[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    names = Counter(name for name, _ in pairs)
    twice = _Twice(value)
    twice.names = {name for name, count in names.items() if count > 1}
    return twice


_parse = json.JSONDecoder(object_pairs_hook=_object).decode


def _text_of(line: bytes, text_field: str) -> str:
    try:
        value = _parse(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _Broken(f"not valid UTF-8 (byte {error.start} of the line)") from None
    except (ValueError, RecursionError) as error:
        raise _Broken(f"not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise _Broken(f"a JSON object was expected, found {type(value).__name__}")
    if text_field not in value:
        found = few(list(value)) or "none"
        raise _Broken(f"no field {text_field!r} (fields: {found}); name it with --text-field")
    if isinstance(value, _Twice) and text_field in value.names:
        raise _Broken(f"field {text_field!r} is there twice, one text was expected")
    text = value[text_field]
    if not isinstance(text, str):
        raise _Broken(f"field {text_field!r} is {type(text).__name__}, a string was expected")
    return text


def _whole(part: Slice, most_bytes: int) -> Iterator[_Piece]:
    """txt: the file is the document."""
    with open(part.file.path, "rb") as raw, _decompressed(raw, part.file.compression) as stream:
        content = stream.read(most_bytes + 1)
    if len(content) > most_bytes:
        yield "", _too_long(most_bytes), part.weight
        return
    try:
        yield "", content.decode("utf-8-sig"), part.weight
    except UnicodeDecodeError as error:
        yield "", _Broken(f"not valid UTF-8 (byte {error.start})"), part.weight


def _package(part: Slice) -> Iterator[_Piece]:
    """A folder of Python modules: their sources joined, in the order of their names. The few that
    are not UTF-8 (tests of the interpreter's decoding) are left out."""
    sources = []
    for name in sorted(os.listdir(part.file.path)):
        if name.endswith(".py"):
            with open(os.path.join(part.file.path, name), "rb") as file:
                content = file.read()
            try:
                sources.append(content.decode())
            except UnicodeDecodeError:
                continue
    yield "", "\n".join(source for source in sources if source.strip()), part.weight


def _rows(part: Slice, text_field: str, scratch: str, most_bytes: int) -> Iterator[_Piece]:
    """parquet. A place is the number of the row in the file, from 1."""
    path = part.file.path
    with open(path, "rb") as raw, tempfile.TemporaryFile(dir=scratch) as plain:
        source: IO[bytes] = raw
        if part.file.compression:  # parquet is read from its end, so the stream is unpacked first
            with _decompressed(raw, part.file.compression) as stream:
                shutil.copyfileobj(stream, plain, _BUFFER_BYTES)
            source = plain
        with parquet_errors(path):
            yield from _cells(part, source, text_field, most_bytes)


def _cells(part: Slice, source: IO[bytes], text_field: str, most_bytes: int) -> Iterator[_Piece]:
    import pyarrow  # here, because only parquet and .zst need it and it takes a while
    from pyarrow import parquet

    table = parquet.ParquetFile(source)
    _check_column(table, part.file.path, text_field)
    groups = range(table.num_row_groups)
    if not part.file.compression:
        groups = range(part.begin, part.end)
    rows = [table.metadata.row_group(group).num_rows for group in range(groups.stop)]
    first = row = sum(rows[: groups.start])
    total = sum(rows) - first
    batches = table.iter_batches(
        _ROWS, row_groups=list(groups), columns=[text_field], use_threads=False
    )
    for batch in batches:
        # As bytes: pyarrow gives up a whole batch for one cell that is not UTF-8.
        for cell in batch.column(text_field).cast(pyarrow.large_binary()):
            row += 1
            done = part.weight * (row - first) // total
            try:
                yield f" row {row}", _text_of_cell(cell.as_buffer(), text_field, most_bytes), done
            except _Broken as error:
                yield f" row {row}", error, done


def _text_of_cell(cell: Any, text_field: str, most_bytes: int) -> str:
    """``cell``: a pyarrow.Buffer or None."""
    if cell is None:
        raise _Broken(f"no text in column {text_field!r} (it is null)")
    if cell.size > most_bytes:
        raise _too_long(most_bytes)
    try:
        return cell.to_pybytes().decode()
    except UnicodeDecodeError as error:
        raise _Broken(f"not valid UTF-8 (byte {error.start} of the cell)") from None


def _check_column(table: Any, path: str, text_field: str) -> None:
    from pyarrow import types

    names = table.schema_arrow.names
    if names.count(text_field) != 1:
        found = "no column" if text_field not in names else f"{names.count(text_field)} columns"
        raise InputError(
            f"{path}: {found} {text_field!r} (columns: {few(names)}); name one with --text-field"
        )
    kind = table.schema_arrow.field(text_field).type
    value = kind.value_type if types.is_dictionary(kind) else kind  # categories, as pandas has them
    # String views came with pyarrow 16.
    is_view = getattr(types, "is_string_view", lambda value: False)
    if not (types.is_string(value) or types.is_large_string(value) or is_view(value)):
        raise InputError(f"{path}: column {text_field!r} holds {kind}, strings were expected")


def _decompressed(raw: IO[bytes], compression: str) -> io.BufferedIOBase:
    """A buffered stream of the file's content."""
    if compression == "gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), _BUFFER_BYTES)  # type: ignore[arg-type]
    if compression == "zst":
        return io.BufferedReader(_ZstdStream(raw), _BUFFER_BYTES)
    return raw  # type: ignore[return-value]


def _hint(part: Slice) -> str:
    """What to do about a broken document. Of a file that is one JSON array, or objects of several
    lines, no line is a document, whichever of its lines was read first."""
    if part.file.kind == "jsonl":
        with open(part.file.path, "rb") as raw, _decompressed(raw, part.file.compression) as stream:
            start = stream.read(_FIRST_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
        first = start.partition(b"\n")[0].rstrip()
        if first[:1] == b"[" or first == b"{":
            values = "'.[]'" if first[:1] == b"[" else "."
            return (
                "the file is not jsonl, one JSON object a line; make it so: "
                f"jq -c {values} FILE > FILE.jsonl"
            )
    return "mend it, or pass --skip-bad to leave such documents out"


class _ZstdStream(io.RawIOBase):
    """Decompresses zstd, all frames of the file; InputError if the last one is cut short.

    (The readers of the zstandard package end without an error there, and documents would be lost.)
    """

    def __init__(self, raw: IO[bytes]) -> None:
        from pyarrow import CompressedInputStream

        self._name = raw.name
        self._stream = CompressedInputStream(raw, "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            block = self._stream.read(len(buffer))
        except OSError as error:
            if error.errno is not None:
                raise
            if "too much memory" in str(error):
                raise InputError(
                    f"{self._name}: compressed with a window larger than 128 MiB (zstd --long), "
                    f"which is not read; decompress it with zstd -d --long=31"
                ) from None
            raise InputError(f"{self._name}: damaged or truncated zstd file ({error})") from None
        buffer[: len(block)] = block
        return len(block)


def _where(part: Slice, place: str | int) -> str:
    """`` line N`` of the file, counted only now that somebody wants to know."""
    if isinstance(place, str):
        return place
    line = place
    if part.begin:
        # Lines that begin before the slice: as many as newlines before its first byte, and one more
        # if that byte is not the begin of a line.
        with open(part.file.path, "rb") as file:
            left, last = part.begin, b"\n"
            while left > 0 and (block := file.read(min(_BUFFER_BYTES, left))):
                line += block.count(b"\n")
                left -= len(block)
                last = block[-1:]
            line += last != b"\n"
    return f" line {line}"
