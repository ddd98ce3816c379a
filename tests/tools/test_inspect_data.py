import os
import struct
from pathlib import Path

import numpy as np
import pytest

from lctw_megatron.data import TokenDataset
from lctw_megatron.data.indexed_array import HEADER, IndexedArrayWriter
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.inspection.describe_data import sidecar_names
from tests.data.small_data import count_up, write_sidecar, write_tokens
from tests.tools.command import call
from tools import inspect_data

NAN = float("nan")


@pytest.fixture
def ask(capsys):
    return lambda *arguments: call(inspect_data.main, capsys, *arguments)


@pytest.fixture
def dataset(tmp_path):
    return write_tokens(tmp_path / "corpus", count_up([5, 3, 900]), eos_id=2, add_eos=True)


def write_two_sidecars(dataset, values):
    write_sidecar(dataset, values)
    for end in ("bin", "idx", "json"):
        os.rename(f"{dataset.prefix}.short_loss.{end}", f"{dataset.prefix}.long_loss.{end}")
    write_sidecar(dataset, values)


def test_it_prints_dataset_and_sidecars(ask, dataset):
    write_sidecar(dataset, [[NAN] * 5, [NAN, 1.0, 3.0], [NAN] * 900], sequence_length=64)
    answer = ask(dataset.prefix, "--verify")
    assert answer.status == 0
    for part in (
        "documents                3",
        "largest token id         3899",
        "min 3, quartiles 3, 5, 5, max 900",
        "documents end            with EOS (token 2)",
        "documents begin          without BOS",
        dataset.fingerprint,
        "verified                 every token and length",
        "corpus.short_loss",
        "2 of 908 values (0.2 %)",
        "min 1.0, mean 2.0, max 3.0 nats",
        "documents, and multiples of 64",
        "verified                 every value and length",
    ):
        assert part in answer.out
    assert ask(dataset.prefix).out.count("verified") == 0


def test_a_dataset_beside_is_no_sidecar_a_damaged_sidecar_is_one(ask, dataset):
    write_tokens(f"{dataset.prefix}.en", count_up([4]))
    answer = ask(dataset.prefix, "--verify")
    assert answer.status == 0 and "corpus.en" not in answer.out
    write_sidecar(dataset, [[NAN] * 5, [NAN, 1.0, 3.0], [NAN] * 900])
    manifest = Path(f"{dataset.prefix}.short_loss.json")
    for text in ("{", manifest.read_text().replace("sidecar 1", "sidecar 9")):
        manifest.write_text(text)
        assert "corpus.short_loss.json: not a manifest" in ask(dataset.prefix).err


def test_the_sidecars_of_a_dataset_beside_are_its_own(ask, dataset):
    beside = write_tokens(f"{dataset.prefix}.v2", count_up([4]))
    write_sidecar(beside, [[NAN, 1.0, 2.0, 3.0]])
    answer = ask(dataset.prefix, "--verify")
    assert answer.status == 0 and "corpus.v2" not in answer.out
    assert sidecar_names(dataset) == [] and sidecar_names(beside) == ["short_loss"]


def test_verify_refuses_a_changed_token(ask, tmp_path):
    dataset = write_tokens(tmp_path / "corpus", [list(range(200_000))])
    with open(dataset.prefix + ".bin", "rb+") as file:
        file.seek(4096)  # between the sampled blocks
        file.write(struct.pack("<i", 7))
    assert ask(dataset.prefix).status == 0
    answer = ask(dataset.prefix, "--verify")
    assert answer.status == 2
    assert "corpus.bin: fingerprint" in answer.err and "the tokens were changed" in answer.err


def damage(path, size=None, position=None):
    if size is not None:
        os.truncate(path, size)
    else:
        with open(path, "rb+") as file:
            file.seek(position)
            file.write(b"\x7f")


@pytest.mark.parametrize(
    "ending, how, message",
    [
        (".bin", {"size": 100}, "corpus.bin: 100 bytes, but "),
        (".idx", {"size": 60}, "corpus.idx: not a Megatron .idx file, or damaged: 60 bytes"),
        (".idx", {"position": 0}, "corpus.idx: not a Megatron .idx file"),
        (".idx", {"position": 17}, "dtype code 127, expected 1 to 8"),
        (".idx", {"position": HEADER.size}, "corpus.bin: sample_digest is "),
    ],
)
def test_damaged_files_are_one_line(ask, dataset, ending, how, message):
    damage(dataset.prefix + ending, **how)
    assert message in ask(dataset.prefix).error_line()


def megatron_corpus(prefix, documents, dtype="int32"):
    with IndexedArrayWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(np.array(document))
    return str(prefix)


def test_a_megatron_corpus_gets_a_manifest_from_its_data(ask, tmp_path, sentencepiece_model):
    prefix = megatron_corpus(tmp_path / "theirs", [[7, 8, 2], [], [9, 2]])
    assert "--write-manifest --tokenizer" in ask(prefix).error_line()
    arguments = (prefix, "--write-manifest", "--tokenizer", sentencepiece_model)
    assert ask(*arguments).status == 0
    dataset = TokenDataset(prefix)
    dataset.verify()
    known = load_tokenizer(sentencepiece_model).identity
    assert dataset.manifest.tokenizer == known.model_copy(update={"add_bos": False})
    assert "there is a manifest already; remove it first" in ask(*arguments).error_line()


@pytest.mark.parametrize("text", ['{"text": "a"}\n{"text": "b"}', '[{"text": "a"}]', '{"text": 1}'])
def test_a_corpus_called_as_a_manifest_would_be_is_not_to_be_removed(ask, tmp_path, text):
    prefix = megatron_corpus(tmp_path / "theirs", [[7, 8, 2]])
    Path(prefix + ".json").write_text(text)
    assert ask(prefix, "--write-manifest", "--tokenizer", "x").error_line() == (
        f"{prefix}.json: is no manifest of ours; rename it, or the dataset"
    )


def test_equal_weights_are_said_to_be_equal(ask, tmp_path, sentencepiece_model):
    identity = load_tokenizer(sentencepiece_model).identity.model_dump()
    dataset = write_tokens(tmp_path / "some", [[300] * 9], **identity)
    write_two_sidecars(dataset, [[NAN, *[1.0] * 8]])
    view = (dataset.prefix, "--document", 0, "--weighting", "uniform")
    assert "nothing in \u27e6brackets\u27e7: all targets have the same weight\n" in ask(*view).out
    write_two_sidecars(dataset, [[NAN] * 9])
    said = ask(*view, "--by", "difference").out
    assert "nothing in \u27e6brackets\u27e7: all targets have no known difference\n" in said


@pytest.mark.parametrize(
    "documents, add_bos, add_eos",
    [
        ([[1, 7, 2], [1, 2]], True, True),
        ([[1, 7, 2], [7, 2]], False, True),
        ([[1, 7, 2], [1, 8]], True, False),
    ],
)
def test_bos_and_eos_are_what_all_documents_have(
    ask, tmp_path, sentencepiece_model, documents, add_bos, add_eos
):
    prefix = megatron_corpus(tmp_path / "theirs", documents, "uint16")
    assert ask(prefix, "--write-manifest", "--tokenizer", sentencepiece_model).status == 0
    found = TokenDataset(prefix).manifest.tokenizer
    assert (found.add_bos, found.add_eos) == (add_bos, add_eos)


def test_a_token_beyond_the_vocabulary_gets_no_manifest(ask, tmp_path, sentencepiece_model):
    prefix = megatron_corpus(tmp_path / "theirs", [[7], [8, 9, 500]])
    answer = ask(prefix, "--write-manifest", "--tokenizer", sentencepiece_model)
    assert "token id 500 at token 2 of document 1 is beyond the vocabulary" in answer.error_line()
    assert not os.path.exists(prefix + ".json")


@pytest.mark.parametrize("option", ["--rank-documents", "--top 3 --html", "--document 0 --png"])
@pytest.mark.parametrize("file", [".json", ".bin", ".long_loss.idx", ".other.bin", ".v2.json"])
def test_what_is_looked_at_is_not_written_over(ask, dataset, option, file):
    write_sidecar(dataset, [[NAN] * 5, [NAN] * 3, [NAN] * 900])
    for end in ("bin", "idx", "json"):
        os.rename(f"{dataset.prefix}.short_loss.{end}", f"{dataset.prefix}.other.{end}")
    write_tokens(f"{dataset.prefix}.v2", count_up([4]))
    path = Path(f"{dataset.prefix}{file}")
    before = path.read_bytes() if path.exists() else None
    line = ask(dataset.prefix, *option.split(), path).error_line()
    assert line == f"{option.split()[-1]} {path}: is read from, and would be replaced; name another"
    assert (path.read_bytes() if path.exists() else None) == before


@pytest.mark.parametrize("option", ["--rank-documents", "--top 3 --html", "--document 2 --png"])
def test_a_file_of_the_users_is_not_written_over_an_earlier_output_is(
    ask, tmp_path, sentencepiece_model, option
):
    identity = load_tokenizer(sentencepiece_model).identity.model_dump()
    dataset = write_tokens(tmp_path / "some", [[300] * 5, [300] * 3, [300] * 9], **identity)
    write_two_sidecars(dataset, [[NAN] * 5, [NAN] * 3, [NAN, *[1.0] * 8]])
    path = tmp_path / "output"
    for text in ("of mine", '{"document": 1}\n', "[1]\n", "<html>about LCTW-Megatron</html>"):
        path.write_text(text)
        line = ask(dataset.prefix, *option.split(), path).error_line()
        name = option.split()[-1]
        kind = {"--html": "page of ours", "--png": "picture of ours"}.get(name, "ranking")
        assert line == (
            f"{name} {path}: is there and no earlier {kind}, and would be replaced; name another "
            "file, or remove it"
        )
        assert path.read_text() == text
    path.write_text("")  # as mktemp makes it
    for _ in range(2):
        assert ask(dataset.prefix, *option.split(), path).status == 0
        assert path.stat().st_size


def test_a_missing_prefix_and_half_of_a_request_are_refused(ask, tmp_path):
    assert "nothing.bin: no such file" in ask(tmp_path / "nothing").error_line()
    for wrong, message in {
        ("--document", 1, "--sequence", 1): "not both",
        ("--document", 1, "--rank-documents", "x"): "a view of its own",
        ("--statistics", "--verify"): "without a view",
        ("--set", "interpolation=0"): "--set is for",
        ("--statistics", "--sample", 0): "positive integer",
        ("--step", 1, "--top", 3): "--step is a view of its own",
        ("--rank-documents", "x", "--sequence-length", 8): "--sequence-length: of no use",
        ("--near", 8, "--short", "other"): "--near, --short: of no use",
        ("--document", 1, "--sample", 3): "--sample: of no use",
        ("--document", 1, "--checkpoint", "x", "--long", "other"): "--long: of no use",
        ("--document", 1, "--checkpoint", "x", "--stride", 8): "--stride needs --window",
        ("--statistics", "--packing", "pack"): "--packing: of no use",
        ("--tokenizer", "x"): "--tokenizer: of no use",
        ("--rank-documents", "x", "--tokenizer", "y"): "--tokenizer: of no use",
        ("--top", 3, "--tails", "drop"): "--tails: of no use",
        ("--document", 1, "--index-cache", "x"): "--index-cache: of no use",
    }.items():
        answer = ask(tmp_path / "nothing", *wrong)
        assert answer.status == 2 and message in answer.err, wrong
    answer = ask(tmp_path / "nothing", "--write-manifest")
    assert answer.status == 2 and "--write-manifest needs --tokenizer" in answer.err
