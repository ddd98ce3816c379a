import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lctw_megatron.data.fingerprint import content_fingerprint, sample_digest
from tests.data.small_data import write_tokens


def files(folder, data, index):
    (folder / "a.bin").write_bytes(data)
    (folder / "a.idx").write_bytes(index)
    return str(folder / "a")


@given(size=st.integers(1, 20_000), at=st.integers(0, 19_999))
def test_the_sample_covers_small_files_completely(tmp_path_factory, size, at):
    folder = tmp_path_factory.mktemp("x")
    before = sample_digest(files(folder, bytes(size), b"index"))
    changed = bytearray(size)
    changed[at % size] = 1
    assert sample_digest(files(folder, bytes(changed), b"index")) != before


def test_the_sample_notices_sizes_and_moved_bytes(tmp_path):
    digests = [
        sample_digest(files(tmp_path, *contents))
        for contents in [(b"", b""), (b"a", b""), (b"", b"a"), (bytes(5), b""), (bytes(6), b"")]
    ]
    assert len(set(digests)) == len(digests)


def test_the_sample_reads_little_of_a_large_file(tmp_path):
    prefix = files(tmp_path, b"", b"")
    os.truncate(prefix + ".bin", 10**12)
    assert sample_digest(prefix)
    with open(prefix + ".bin", "rb+") as file:
        before = sample_digest(prefix)
        file.seek(10**12 - 1)
        file.write(b"\1")  # the last block is always in the sample
        file.flush()
        assert sample_digest(prefix) != before


@pytest.mark.parametrize("block", [1, 7, 4 << 20])
def test_writer_and_reader_agree_on_the_fingerprint(tmp_path, monkeypatch, block):
    dataset = write_tokens(tmp_path / "a", [[1, 2, 3], [], list(range(50))])
    monkeypatch.setattr("lctw_megatron.data.fingerprint.BLOCK_BYTES", block)
    assert content_fingerprint(dataset) == dataset.fingerprint
