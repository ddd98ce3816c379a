import os
import pickle
from typing import Any

import numpy as np
import pytest

from lctw_megatron.data import TokenDataset
from lctw_megatron.data.indexed_array import IndexedArrayWriter
from lctw_megatron.data.manifest import MADE_ELSEWHERE, TokenizerIdentity, write_manifest
from lctw_megatron.data.token_dataset import TokenWriter
from lctw_megatron.errors import InputError
from tests.data.small_data import count_up, write_tokens

DOCUMENTS = count_up([5, 0, 3, 4000])


@pytest.fixture
def dataset(tmp_path):
    return write_tokens(tmp_path / "corpus", DOCUMENTS)


def change(path, position, value):
    with open(path, "rb+") as file:
        file.seek(position)
        file.write(value)


def test_documents_counts_and_manifest_agree(dataset):
    assert [document.tolist() for document in dataset] == DOCUMENTS
    assert len(dataset) == dataset.manifest.documents == 4
    assert dataset.num_tokens == dataset.manifest.tokens == 4008
    assert dataset.fingerprint == dataset.manifest.fingerprint
    dataset.verify()


def test_the_fingerprint_covers_tokens_and_lengths_and_nothing_else(tmp_path):
    def fingerprint(name, documents, **tokenizer):
        return write_tokens(tmp_path / name, documents, **tokenizer).fingerprint

    known = fingerprint("a", [[1, 2], [3]])
    assert fingerprint("b", [[1, 2], [3]], path="elsewhere") == known
    assert fingerprint("c", [[1, 2], [4]]) != known
    assert fingerprint("d", [[1], [2, 3]]) != known


def test_a_dataset_pickles_as_its_prefix(dataset):
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 300
    assert pickle.loads(pickled).fingerprint == dataset.fingerprint


def test_a_corpus_without_manifest_opens_and_says_how_to_make_one(dataset):
    os.unlink(dataset.prefix + ".json")
    bare = TokenDataset(dataset.prefix)
    assert bare[2].tolist() == DOCUMENTS[2]
    with pytest.raises(InputError, match=r"corpus\.json: no such file.*--write-manifest"):
        _ = bare.fingerprint


def test_files_of_two_runs_are_not_mixed(tmp_path, dataset):
    write_tokens(tmp_path / "other", DOCUMENTS[:-1] + [[9] * 4000])
    os.replace(tmp_path / "other.bin", tmp_path / "corpus.bin")
    with pytest.raises(InputError, match=r"corpus\.bin: sample_digest is .*corpus\.json says"):
        TokenDataset(tmp_path / "corpus")


def test_the_same_tokens_with_other_lengths_are_noticed(tmp_path, dataset):
    write_tokens(tmp_path / "other", [DOCUMENTS[0] + DOCUMENTS[2], [], [], DOCUMENTS[3]])
    os.replace(tmp_path / "other.idx", tmp_path / "corpus.idx")
    with pytest.raises(InputError, match="sample_digest"):
        TokenDataset(tmp_path / "corpus")


def test_counts_are_compared_with_the_manifest(tmp_path, dataset):
    write_tokens(tmp_path / "other", DOCUMENTS[:2])
    for ending in (".bin", ".idx"):
        os.replace(tmp_path / f"other{ending}", tmp_path / f"corpus{ending}")
    with pytest.raises(InputError, match=r"documents is 2, but .*corpus\.json says 4"):
        TokenDataset(tmp_path / "corpus")


def test_verify_finds_one_changed_token_that_the_sample_misses(tmp_path):
    dataset = write_tokens(tmp_path / "corpus", [list(range(200_000))])
    blocks = np.linspace(0, 800_000 - 4096, 64)
    unsampled = int(blocks[1]) + 5000 & ~3
    assert all(not start <= unsampled < start + 4096 for start in blocks)
    change(dataset.prefix + ".bin", unsampled, b"\0\0\0\0")
    changed = TokenDataset(dataset.prefix)
    with pytest.raises(InputError, match=r"corpus\.bin: fingerprint .*corpus\.json says"):
        changed.verify()


def test_every_writer_says_the_largest_token_id(tmp_path):
    dataset = write_tokens(tmp_path / "corpus", [*count_up([3, 5]), [7]])
    with TokenWriter(tmp_path / "part", dataset.manifest.tokenizer) as writer:
        writer.extend(dataset, 0, 1)
        writer.extend(dataset, 2)
    assert dataset.manifest.largest_id == 2004
    assert TokenDataset(tmp_path / "part").manifest.largest_id == 1002


@pytest.mark.parametrize("older", [False, True])
def test_a_model_must_know_every_token_not_every_one_of_the_tokenizer(tmp_path, older):
    dataset = write_tokens(tmp_path / "corpus", count_up([3, 5]), vocab_size=3000)
    if older:
        write_manifest(dataset.prefix, dataset.manifest.model_copy(update={"largest_id": None}))
        dataset = TokenDataset(dataset.prefix)
    dataset.verify()
    dataset.check_fits(2005, "the model")
    with pytest.raises(
        InputError,
        match=r"corpus: holds token id 2004, but the model has a vocabulary of 2004 \(ids 0 to "
        r"2003\); take the model of the tokenizer a/tokenizer, or preprocess",
    ):
        dataset.check_fits(2004, "the model")


def test_an_older_manifest_costs_no_reading_where_the_tokenizer_fits(dataset, monkeypatch):
    write_manifest(dataset.prefix, dataset.manifest.model_copy(update={"largest_id": None}))
    monkeypatch.setattr("lctw_megatron.data.token_dataset.check_vocabulary", None)
    TokenDataset(dataset.prefix).check_fits(dataset.manifest.tokenizer.vocab_size, "the model")


def test_verify_finds_a_largest_token_id_that_is_not_the_tokens(dataset):
    write_manifest(dataset.prefix, dataset.manifest.model_copy(update={"largest_id": 1}))
    with pytest.raises(InputError, match=r"largest token id is \d+, but .*corpus\.json says 1"):
        TokenDataset(dataset.prefix).verify()


def test_verify_names_a_token_beyond_the_vocabulary(tmp_path):
    dataset = write_tokens(tmp_path / "corpus", count_up([3, 5]), vocab_size=3000)
    narrower = dataset.manifest.tokenizer.model_copy(update={"vocab_size": 2003})
    write_manifest(dataset.prefix, dataset.manifest.model_copy(update={"tokenizer": narrower}))
    with pytest.raises(
        InputError,
        match="token id 2003 at token 3 of document 1 is beyond the vocabulary of .*2003",
    ):
        TokenDataset(dataset.prefix).verify()


def test_the_writer_refuses_a_token_beyond_the_vocabulary_and_leaves_nothing(tmp_path):
    with pytest.raises(
        InputError, match="token id 2004 at token 4 of document 1 is beyond the vocabulary"
    ):
        write_tokens(tmp_path / "corpus", count_up([3, 6]), vocab_size=2004)
    assert os.listdir(tmp_path) == []


def test_a_failed_rewrite_leaves_the_old_dataset_whole(dataset):
    class Full(Exception):
        pass

    with pytest.raises(Full), TokenWriter(dataset.prefix, dataset.manifest.tokenizer) as writer:
        writer.add(np.array([1, 2]))
        raise Full
    TokenDataset(dataset.prefix).verify()


def test_empty_datasets_and_sidecar_prefixes_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no tokens"):
        write_tokens(tmp_path / "empty", [[]])
    with IndexedArrayWriter(tmp_path / "floats", "float32") as writer:
        writer.add(np.array([1.5], np.float32))
    with pytest.raises(InputError, match="holds float32 values.*prefix of a sidecar"):
        TokenDataset(tmp_path / "floats")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "Expecting property name"),
        ("[]", "valid dictionary"),
        ('{"format": "x"}', "format: Input should be 'lctw-megatron tokens 1'"),
    ],
)
def test_a_broken_manifest_is_named(dataset, content, message):
    with open(dataset.prefix + ".json", "w") as file:
        file.write(content)
    with pytest.raises(InputError, match=rf"corpus\.json: not a manifest .*{message}"):
        TokenDataset(dataset.prefix)


def test_a_model_with_bos_is_refused_where_the_data_have_none(tmp_path) -> None:
    """The digest of a SentencePiece model is of the file, which does not say whether BOS is added;
    a Hugging Face tokenizer's covers it. What other tools made is as it is."""
    theirs = {"add_bos": True, "path": "bare.model"}
    elsewhere = {"inputs": MADE_ELSEWHERE}

    def dataset(name: str, source: dict[str, Any], **identity: Any) -> TokenDataset:
        made_with = {"digest": "0" * 32, "vocab_size": 9, "bos_id": 1, "eos_id": 2}
        marks = {"add_bos": False, "add_eos": False, "path": "a/folder"}
        known = TokenizerIdentity(**{"kind": "sentencepiece", **made_with, **marks, **identity})
        with TokenWriter(str(tmp_path / name), known, source) as writer:
            writer.add(np.array([3, 4]))
        return TokenDataset(str(tmp_path / name))

    ours = dataset("ours", {})
    with pytest.raises(InputError) as error:
        ours.check_bos(theirs, "a/model")
    assert str(error.value).startswith(
        f"{ours.prefix}: its documents begin without BOS (tokenizer a/folder), but a text of "
        "a/model with BOS (tokenizer bare.model, the same but for BOS); "
    )
    with pytest.raises(InputError, match=r"begin with BOS .* a text of a/model without BOS"):
        dataset("more", {}, add_bos=True).check_bos({"add_bos": False}, "a/model")
    dataset("same", {}, add_bos=True).check_bos(theirs, "a/model")
    dataset("json", {}, kind="huggingface").check_bos(theirs, "a/model")
    for source in (elsewhere, {"choice": {}, "original": elsewhere}):
        dataset("found", source).check_bos(theirs, "a/model")
    ours.check_bos({}, "a checkpoint that does not say")
