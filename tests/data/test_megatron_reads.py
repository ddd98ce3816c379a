import warnings

import numpy as np
import pytest

from lctw_megatron.data import Sidecar
from tests.data.small_data import write_sidecar, write_tokens

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about accelerators that a CPU has no use for
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from lctw_megatron.data.indexed_array import IndexedArrayReader  # noqa: E402

NAN = float("nan")


@pytest.mark.parametrize("vocab_size, dtype", [(65499, np.uint16), (65500, np.int32)])
def test_megatron_reads_tokens_and_sidecar(tmp_path, vocab_size, dtype):
    documents = [[1, 2, 3, 65498], [4, 5], list(range(3000))]
    dataset = write_tokens(tmp_path / "corpus", documents, vocab_size=vocab_size)
    values = [[NAN] + [0.1 * t for t in range(len(document) - 1)] for document in documents]
    write_sidecar(dataset, values)
    theirs = IndexedDataset(str(tmp_path / "corpus"))
    assert len(theirs) == 3
    for ours, document in zip(theirs, documents, strict=True):
        assert ours.dtype == dtype
        assert ours.tolist() == document
    assert theirs.sequence_lengths.tolist() == [4, 2, 3000]
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]
    assert theirs.get(2, offset=7, length=3).tolist() == [7, 8, 9]
    sidecar = IndexedDataset(str(tmp_path / "corpus.short_loss"))
    mine = Sidecar(dataset)
    for number, expected in enumerate(values):
        assert sidecar[number].dtype == np.float32
        assert np.array_equal(sidecar[number], np.array(expected, np.float32), equal_nan=True)
        assert np.array_equal(sidecar[number], mine[number], equal_nan=True)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # megatron-core's, with numpy 2
def test_the_files_are_those_megatron_writes(tmp_path):
    import torch

    documents = [[1, 2, 3], [7], list(range(500))]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write_tokens(tmp_path / "ours", documents)
    for ending in (".bin", ".idx"):
        ours = (tmp_path / f"ours{ending}").read_bytes()
        assert ours == (tmp_path / f"theirs{ending}").read_bytes()
    theirs = IndexedArrayReader(tmp_path / "theirs")
    assert [document.tolist() for document in theirs] == documents
