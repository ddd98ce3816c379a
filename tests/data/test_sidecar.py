import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lctw_megatron.data import Sidecar, TokenDataset
from lctw_megatron.data.indexed_array import HEADER, IndexedArrayWriter
from lctw_megatron.data.sidecar import SidecarWriter
from lctw_megatron.errors import InputError
from tests.data.small_data import count_up, write_sidecar, write_tokens

NAN = float("nan")
VALUES = [[NAN, NAN, 1.0, 2.0, 6.0], [], [NAN, 3.0, NAN]]
DETAILS = {
    "window": 8,
    "stride": 4,
    "sequence_length": None,
    "score_first_window": False,
    "min_context": 4,
    "mean_context": 5.5,
    "scorer": {},
}


@pytest.fixture
def dataset(tmp_path):
    return write_tokens(tmp_path / "corpus", count_up([5, 0, 3]))


@pytest.fixture
def sidecar(dataset):
    write_sidecar(dataset, VALUES)
    return Sidecar(dataset)


def test_values_lie_beside_their_tokens(dataset, sidecar):
    for number, values in enumerate(VALUES):
        assert np.array_equal(sidecar[number], np.array(values, np.float32), equal_nan=True)
    assert sidecar.get(0, 2, 2).tolist() == [1.0, 2.0]
    sidecar.verify()


def test_the_manifest_describes_the_scored_values(dataset, sidecar):
    manifest = sidecar.manifest
    assert (manifest.values, manifest.scored) == (8, 4)
    assert (manifest.min, manifest.mean, manifest.max) == (1.0, 3.0, 6.0)
    assert manifest.tokens_fingerprint == dataset.fingerprint
    assert manifest.tokenizer_digest == dataset.manifest.tokenizer.digest


def test_nothing_scored_has_no_statistics(dataset):
    write_sidecar(dataset, [[NAN] * len(document) for document in dataset])
    manifest = Sidecar(dataset).manifest
    assert manifest.scored == 0
    assert manifest.min is manifest.mean is manifest.max is None


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=8).filter(any),
    cuts=st.lists(st.integers(0, 2400), max_size=5),
    seed=st.integers(0, 99),
)
def test_bytes_do_not_depend_on_how_the_values_are_handed_over(
    tmp_path_factory, lengths, cuts, seed
):
    folder = tmp_path_factory.mktemp("x")
    dataset = write_tokens(folder / "corpus", count_up(lengths))
    values = np.random.default_rng(seed).random(sum(lengths), dtype=np.float32)
    values[dataset.pointers[dataset.lengths > 0] // 4] = NAN
    for name, parts in {"whole": [values], "cut": np.split(values, sorted(cuts))}.items():
        with SidecarWriter(dataset, name, **DETAILS) as writer:
            for part in parts:
                writer.add(part)
    for ending in (".bin", ".idx", ".json"):
        whole = (folder / f"corpus.whole{ending}").read_bytes()
        assert (folder / f"corpus.cut{ending}").read_bytes() == whole


def test_the_mean_does_not_depend_on_the_block_size_beyond_rounding(dataset, monkeypatch):
    write_sidecar(dataset, VALUES)
    whole = Sidecar(dataset).manifest
    monkeypatch.setattr("lctw_megatron.data.sidecar.BLOCK_BYTES", 8)
    write_sidecar(dataset, VALUES)
    assert Sidecar(dataset).manifest == whole


def test_a_sidecar_pickles_as_dataset_and_name(sidecar):
    pickled = pickle.dumps(sidecar)
    assert len(pickled) < 500
    assert pickle.loads(pickled).get(2, 1, 1).tolist() == [3.0]


@pytest.mark.parametrize("count", [7, 9])
def test_the_writer_refuses_another_number_of_values(tmp_path, dataset, count):
    with (
        pytest.raises(ValueError, match=f"{count} values for 8 tokens"),
        SidecarWriter(dataset, "short_loss", **DETAILS) as writer,
    ):
        writer.add(np.full(count, NAN, np.float32))
    assert not list(tmp_path.glob("*short_loss*"))


@pytest.mark.parametrize(
    "position, value, message",
    [(0, 1.0, "index 0 of a document"), (5, 1.0, "index 0"), (7, np.inf, "infinite .* document 2")],
)
def test_the_writer_refuses_impossible_values(tmp_path, dataset, position, value, message):
    values = np.full(8, NAN, np.float32)
    values[position] = value
    with (
        pytest.raises(ValueError, match=message),
        SidecarWriter(dataset, "short_loss", **DETAILS) as writer,
    ):
        writer.add(values)
    assert not list(tmp_path.glob("*short_loss*"))


def test_checking_a_few_values_does_not_read_all_documents(tmp_path):
    many = 1 << 18
    with IndexedArrayWriter(tmp_path / "corpus", np.uint16) as tokens:
        tokens.add(np.zeros(8, np.uint16))
        tokens._append_lengths(np.zeros(many, np.int32))
    dataset = TokenDataset(tmp_path / "corpus")
    writer = SidecarWriter(dataset, "short_loss", **DETAILS)
    tracemalloc.start()
    writer._check(np.full(4, NAN, np.float32), 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    writer.give_up(RuntimeError())
    assert peak < many


def test_a_missing_sidecar_says_how_to_make_it(dataset):
    with pytest.raises(InputError, match=r"corpus\.other\.idx: no such file.*tools/score\.py"):
        Sidecar(dataset, "other")


def test_a_sidecar_without_manifest_is_unfinished(sidecar):
    os.unlink(sidecar.prefix + ".json")
    with pytest.raises(InputError, match=r"short_loss\.json: no such file, .*not finished"):
        Sidecar(sidecar.dataset)


def test_other_counts_name_both_sides(tmp_path, sidecar):
    other = write_tokens(tmp_path / "corpus", count_up([5, 3]))
    with pytest.raises(
        InputError,
        match=r"corpus\.short_loss: 3 documents with 8 values, .*corpus has 2 documents with 8 tok",
    ):
        Sidecar(other)


def test_other_lengths_name_both_sides(tmp_path, sidecar):
    other = write_tokens(tmp_path / "corpus", count_up([5, 1, 2]))
    with pytest.raises(InputError, match="document 1 has 0 values, but in .* it has 1 tokens"):
        Sidecar(other)


def test_one_changed_token_names_both_fingerprints(tmp_path, sidecar):
    documents = count_up([5, 0, 3])
    documents[2][1] += 1
    other = write_tokens(tmp_path / "corpus", documents)
    with pytest.raises(InputError) as error:
        Sidecar(other)
    assert sidecar.manifest.tokens_fingerprint in str(error.value)
    assert other.fingerprint in str(error.value)
    assert "made from other token data" in str(error.value)


def test_another_tokenizer_names_both_digests(tmp_path, sidecar):
    other = write_tokens(tmp_path / "corpus", count_up([5, 0, 3]), digest="f" * 32)
    with pytest.raises(
        InputError, match=f"tokenizer_digest is {'0' * 32}.* is {'f' * 32}: .*anoth"
    ):
        Sidecar(other)


def test_a_truncated_sidecar_is_refused(sidecar):
    os.truncate(sidecar.prefix + ".bin", 28)
    with pytest.raises(InputError, match=r"short_loss\.bin: 28 bytes, but .* describes 32"):
        Sidecar(sidecar.dataset)


def test_values_of_another_run_are_refused(tmp_path, dataset, sidecar):
    before = (tmp_path / "corpus.short_loss.json").read_bytes()
    write_sidecar(dataset, [[NAN] * 5, [], [NAN] * 3])
    (tmp_path / "corpus.short_loss.json").write_bytes(before)
    with pytest.raises(InputError, match=r"short_loss\.bin: sample_digest is .* says"):
        Sidecar(dataset)


def test_tokens_are_no_sidecar(tmp_path, dataset):
    write_tokens(tmp_path / "corpus.short_loss", count_up([5, 0, 3]))
    with pytest.raises(InputError, match="holds int32 values, a sidecar holds float32"):
        Sidecar(dataset)


def test_verify_finds_values_and_lengths_that_the_sample_misses(tmp_path):
    count = 100_000
    dataset = write_tokens(tmp_path / "corpus", [[1, 2]] * count)
    write_sidecar(dataset, [[NAN, 1.0]] * count)
    with open(tmp_path / "corpus.short_loss.bin", "rb+") as file:
        file.seek(6004)
        file.write(struct.pack("<f", 2.0))
    with pytest.raises(InputError, match=r"short_loss\.bin: fingerprint .* says"):
        Sidecar(dataset).verify()
    with open(tmp_path / "corpus.short_loss.idx", "rb+") as file:
        file.seek(HEADER.size + 4 * 2001)  # one value moves from a document to the next
        file.write(struct.pack("<2i", 1, 3))
        file.seek(HEADER.size + 4 * count + 8 * 2002)
        file.write(struct.pack("<q", 2001 * 8 + 4))
    with pytest.raises(InputError, match="document 2001 has 1 values, but in .* it has 2 tokens"):
        Sidecar(dataset).verify()


@pytest.mark.parametrize("field, wrong", [("window", 4), ("stride", 3)])
def test_window_and_stride_are_compared(sidecar, field, wrong):
    sidecar.check(window=3, stride=2)
    with pytest.raises(InputError, match=f"scored with {field} .*, but {field} {wrong} is asked"):
        sidecar.check(**{field: wrong})


def test_windows_restarting_at_documents_serve_any_sequence_length(sidecar):
    sidecar.check(sequence_length=1024, packing="pack")


def test_windows_restarting_at_multiples_serve_chunks_of_that_length(dataset):
    write_sidecar(dataset, VALUES, sequence_length=64)
    sidecar = Sidecar(dataset)
    sidecar.check(sequence_length=64, packing="chunk")
    with pytest.raises(InputError, match="--sequence-length 64, but sequences of 128 tokens"):
        sidecar.check(sequence_length=128, packing="chunk")
    with pytest.raises(InputError, match="fits packing chunk, not pack"):
        sidecar.check(sequence_length=64, packing="pack")


def test_the_dataset_needs_a_manifest(dataset, sidecar):
    os.unlink(dataset.prefix + ".json")
    with pytest.raises(InputError, match="--write-manifest"):
        Sidecar(TokenDataset(dataset.prefix))
