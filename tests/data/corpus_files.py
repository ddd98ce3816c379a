"""Corpus files of every kind with the same documents, for the tests of preprocessing."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet


def compress(content: bytes, ending: str) -> bytes:
    if ending.endswith(".gz"):
        return gzip.compress(content)
    if ending.endswith(".zst"):
        return pyarrow.compress(content, codec="zstd", asbytes=True)
    return content


def write_corpus(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    """``texts`` in the format of the path's name: .jsonl, .txt (one text) or .parquet (rows in
    groups of 3), then perhaps .gz or .zst."""
    ending = path.name.partition(".")[2]
    if ending.startswith("jsonl"):
        content = "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()
    elif ending.startswith("txt"):
        (text,) = texts
        content = text.encode()
    else:
        buffer = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table({field: list(texts)}), buffer, row_group_size=3)
        content = buffer.getvalue().to_pybytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compress(content, ending))
    return path


def texts(count: int, length: int = 40) -> list[str]:
    """Different texts, with characters of one to four bytes."""
    return [f"Document {number}: ä世🙂\n" + "word " * (number % length) for number in range(count)]
