import os
import pickle
import random
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lctw_megatron.data import indexed_array
from lctw_megatron.data.indexed_array import (
    DTYPE_CODES,
    HEADER,
    IndexedArrayReader,
    IndexedArrayWriter,
)
from lctw_megatron.errors import InputError

DOCUMENTS = [[5, 6, 7], [], [8], list(range(100))]


def write(prefix, documents, dtype="int32"):
    with IndexedArrayWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(np.array(document, dtype))
    return IndexedArrayReader(prefix)


@pytest.fixture
def prefix(tmp_path):
    write(tmp_path / "a", DOCUMENTS)
    return str(tmp_path / "a")


@settings(max_examples=30)
@given(
    dtype=st.sampled_from(sorted(DTYPE_CODES)),
    lengths=st.lists(st.integers(0, 50), max_size=20),
    seed=st.integers(0, 1000),
)
def test_what_is_written_is_read(tmp_path_factory, dtype, lengths, seed):
    generator = np.random.default_rng(seed)
    documents = [generator.integers(0, 120, length).astype(dtype) for length in lengths]
    reader = write(tmp_path_factory.mktemp("x") / "a", documents, dtype)
    assert reader.dtype == np.dtype(dtype)
    assert reader.lengths.tolist() == lengths
    assert reader.num_values == sum(lengths)
    for number, document in enumerate(documents):
        assert np.array_equal(reader[number], document)
    reader.check_index()


@settings(max_examples=20)
@given(cuts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=6))
def test_extend_copies_any_run_of_documents(tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("x")
    reader = write(folder / "a", DOCUMENTS)
    with IndexedArrayWriter(folder / "b", "int32") as writer:
        for begin, end in cuts:
            writer.extend(reader, begin, end)
    expected = [document for begin, end in cuts for document in DOCUMENTS[begin:end]]
    copy = IndexedArrayReader(folder / "b")
    assert [document.tolist() for document in copy] == expected
    assert writer.fingerprint == write_fingerprint(folder / "c", expected)


def write_fingerprint(prefix, documents):
    with IndexedArrayWriter(prefix, "int32") as writer:
        for document in documents:
            writer.add(np.array(document))
    return writer.fingerprint


def test_extend_works_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("lctw_megatron.data.indexed_array.BLOCK_BYTES", 16)
    monkeypatch.setattr("lctw_megatron.data.indexed_array._BLOCK_LENGTHS", 2)
    reader = write(tmp_path / "a", DOCUMENTS)
    with IndexedArrayWriter(tmp_path / "b", "int32") as writer:
        writer.extend(reader)
    assert (tmp_path / "b.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()
    assert (tmp_path / "b.idx").read_bytes() == (tmp_path / "a.idx").read_bytes()
    reader.check_index()


def test_get_reads_a_piece_and_nothing_beyond_the_document(prefix):
    reader = IndexedArrayReader(prefix)
    assert reader.get(3, 10, 3).tolist() == [10, 11, 12]
    assert reader.get(0, 1).tolist() == [6, 7]
    assert reader.get(0, 3).tolist() == []
    for offset, length in ((1, 3), (4, None), (-1, 2)):
        with pytest.raises(IndexError, match="which has 3"):
            reader.get(0, offset, length)


def test_values_are_read_only_views(prefix):
    with pytest.raises(ValueError, match="read-only"):
        IndexedArrayReader(prefix)[0][0] = 1


def test_a_reader_pickles_as_its_prefix(prefix):
    pickled = pickle.dumps(IndexedArrayReader(prefix))
    assert len(pickled) < 300
    assert pickle.loads(pickled)[3].tolist() == DOCUMENTS[3]


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_a_missing_file_is_named(prefix, missing):
    os.unlink(prefix + missing)
    with pytest.raises(InputError, match=f"{missing}: no such file"):
        IndexedArrayReader(prefix)


def test_a_truncated_bin_names_both_sizes(prefix):
    os.truncate(prefix + ".bin", 400)
    with pytest.raises(InputError, match=r"a\.bin: 400 bytes, but .*a\.idx describes 416"):
        IndexedArrayReader(prefix)


DAMAGES = {
    "empty": (lambda content: b"", "0 bytes, the header alone has 34"),
    "no magic": (lambda content: b"X" + content[1:], "it begins with b'XMIDIDX"),
    "version": (lambda content: content[:9] + b"\2" + content[10:], "expected .* version 1"),
    "dtype": (lambda content: content[:17] + b"\x63" + content[18:], "dtype code 99"),
    "truncated": (lambda content: content[:-1], "its header promises 122"),
    "count": (lambda content: content[:18] + b"\7" + content[19:], "its header promises"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_idx_is_refused(prefix, damage):
    change, message = DAMAGES[damage]
    with open(prefix + ".idx", "rb+") as file:
        content = file.read()
        file.seek(0)
        file.truncate()
        file.write(change(content))
    with pytest.raises(InputError, match=message):
        IndexedArrayReader(prefix)


def test_several_sequences_a_document_are_refused(tmp_path):
    index = HEADER.pack(b"MMIDIDX\0\0", 1, DTYPE_CODES["int32"], 2, 2)
    index += struct.pack("<2i2q2q", 1, 1, 0, 4, 0, 2)
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(bytes(8))
    with pytest.raises(
        InputError, match="2 sequences in 1 documents; .* one sequence per document"
    ):
        IndexedArrayReader(tmp_path / "a")


@pytest.mark.parametrize("many", [False, True])
def test_as_many_documents_as_sequences_by_chance_are_refused(prefix, monkeypatch, many):
    count = len(IndexedArrayReader(prefix))
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[-8 * count : -8 * (count - 1)] = struct.pack("<q", 2)  # of two, then none
    path.write_bytes(content)
    if many:
        monkeypatch.setattr(indexed_array, "_CHECKED_AT_OPENING", 0)
    with pytest.raises(InputError, match="document 1 begins with sequence 2; .* one sequence per"):
        IndexedArrayReader(prefix).check_index()


def test_a_wrong_pointer_is_found_when_used_and_by_check_index(prefix):
    with open(prefix + ".idx", "rb+") as file:
        file.seek(HEADER.size + 4 * 4 + 8)  # the pointer of document 1
        file.write(struct.pack("<2q", 12, 10**9))
    reader = IndexedArrayReader(prefix)
    with pytest.raises(InputError, match="document 2 lies outside"):
        reader[2]
    with pytest.raises(InputError, match="document 2 does not begin where the one before it ends"):
        reader.check_index()


def test_an_exception_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), IndexedArrayWriter(tmp_path / "a", "int32") as writer:
        writer.add(np.array([1]))
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_values_that_do_not_fit_the_dtype_are_refused(tmp_path):
    with IndexedArrayWriter(tmp_path / "a", "uint16") as writer:
        with pytest.raises(ValueError, match="values that uint16 cannot hold"):
            writer.add(np.array([70000]))
        with pytest.raises(ValueError, match="values that uint16 cannot hold"):
            writer.add(np.array([-1]))
        writer.add(np.array([65535]))


def test_a_damaged_index_is_an_input_error_or_harmless(prefix):
    path = Path(f"{prefix}.idx")
    whole = path.read_bytes()
    for seed in range(400):
        draw = random.Random(seed)
        content = bytearray(whole)
        if draw.random() < 0.3:
            del content[draw.randrange(len(content)) :]
        for _ in range(draw.randrange(3)):
            if content:
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        print(f"seed {seed}: {bytes(content)!r}")  # pytest shows it of what fails
        path.write_bytes(content)
        with suppress(InputError):
            reader = IndexedArrayReader(prefix)
            reader.check_index()
            assert [len(reader[i]) for i in range(len(reader))] == reader.lengths.tolist()
