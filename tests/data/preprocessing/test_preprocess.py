"""preprocess() as a whole. Worker processes are real; the corpora are small and cut small.

Longer than 350 lines: every promise of one function, on one set of corpora.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path

import pytest

from lctw_megatron.config.schema import PrepareConfig
from lctw_megatron.data import TokenDataset
from lctw_megatron.data.preprocessing import corpus, shard_pool
from lctw_megatron.data.preprocessing import preprocess as module
from lctw_megatron.data.preprocessing.preprocess import preprocess
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError
from lctw_megatron.work_folder import MARK, make_work_folder
from tests.data.corpus_files import texts, write_corpus

TEXTS = texts(60)
RESULT = (".bin", ".idx", ".json")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(corpus, "_SMALLEST_SHARD", 1000)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow where many tests share a disk


@pytest.fixture
def in_process(monkeypatch):
    """The executor runs here, so that a test can look into it; everything else is as always."""

    class Executor:
        def __init__(self, workers, context, start, arguments):
            start(*arguments)

        def submit(self, work, *arguments):
            future = Future()
            try:
                future.set_result(work(*arguments))
            except BaseException as error:
                future.set_exception(error)
            return future

        def shutdown(self, **how):
            pass

    monkeypatch.setattr(shard_pool, "ProcessPoolExecutor", Executor)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def config(tmp_path, sentencepiece_model):
    path = write_corpus(tmp_path / "in" / "a.jsonl", TEXTS)
    return PrepareConfig(
        inputs=[str(path)],
        output_prefix=str(tmp_path / "out" / "corpus"),
        tokenizer=str(sentencepiece_model),
    )


def changed(config, **fields):
    return config.model_copy(update=fields)


def result_bytes(prefix, part=""):
    contents = []
    for ending in RESULT:
        with open(prefix + part + ending, "rb") as file:
            contents.append(file.read())
    return contents


def stored_texts(config, part=""):
    dataset = TokenDataset(config.output_prefix + part)
    dataset.verify()
    tokenizer = load_tokenizer(dataset.manifest.tokenizer.path)
    return [tokenizer.decode(ids) for ids in dataset]


@pytest.mark.parametrize("tokenizer", ["sentencepiece_model", "hf_folder"])
def test_two_processes_store_every_document_in_order(config, request, tokenizer, capsys):
    path = str(request.getfixturevalue(tokenizer))
    config = changed(config, tokenizer=path)
    manifest = preprocess(config)
    assert stored_texts(config) == TEXTS
    dataset = TokenDataset(config.output_prefix)
    assert manifest == dataset.manifest
    expected = load_tokenizer(path).encode_documents(TEXTS)
    assert [ids.tolist() for ids in dataset] == [ids.tolist() for ids in expected]
    assert manifest.tokenizer == load_tokenizer(path).identity
    assert manifest.source["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert sorted(os.listdir(os.path.dirname(config.output_prefix))) == [
        "corpus.bin",
        "corpus.idx",
        "corpus.json",
    ]
    assert "60 documents" in capsys.readouterr().out


@pytest.mark.parametrize("shard", [200, 1000, 10**6])
def test_bytes_depend_neither_on_workers_nor_on_shards(
    config, tmp_path, in_process, monkeypatch, shard
):
    config = changed(config, validation_documents=7, max_bytes=5000)
    preprocess(config)
    monkeypatch.setattr(corpus, "_SMALLEST_SHARD", shard)
    other = changed(config, output_prefix=str(tmp_path / "other"), workers=5)
    preprocess(other)
    for part in ("", "-validation"):
        assert result_bytes(other.output_prefix, part) == result_bytes(config.output_prefix, part)


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_every_format_gives_the_same_tokens(config, tmp_path, in_process, ending):
    path = write_corpus(tmp_path / "in" / f"b.{ending}", TEXTS, "body")
    fingerprint = preprocess(config).fingerprint
    config = changed(config, inputs=[str(path)], text_field="body")
    assert preprocess(config).fingerprint == fingerprint


def test_text_files_and_folders_are_documents_in_order_of_their_names(config, tmp_path, in_process):
    for number, text in enumerate(TEXTS):
        write_corpus(tmp_path / "many" / f"{number:03}.txt", [text])
    config = changed(config, inputs=[str(tmp_path / "many")])
    preprocess(config)
    assert stored_texts(config) == TEXTS


def test_held_out_text_needs_no_room_in_the_temporary_folder(
    config, tmp_path, in_process, monkeypatch
):
    path = write_corpus(tmp_path / "in" / "b.parquet.zst", TEXTS)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    config = changed(config, inputs=[str(path)], validation_documents=5)
    preprocess(config)
    assert len(stored_texts(config, "-validation")) == 5


@pytest.mark.parametrize("count", [1, 2, 7, 59])
def test_held_out_documents_are_evenly_spaced_and_in_no_other_file(config, in_process, count):
    config = changed(config, validation_documents=count)
    preprocess(config)
    train, held_out = stored_texts(config), stored_texts(config, "-validation")
    assert len(held_out) == count
    assert sorted(train + held_out) == sorted(TEXTS)
    numbers = [TEXTS.index(text) for text in held_out]
    gaps = [b - a for a, b in zip([-numbers[0] - 1, *numbers], numbers, strict=False)]
    assert max(gaps) - min(gaps) <= 2
    with open(config.output_prefix + "-validation.jsonl") as file:
        lines = [json.loads(line) for line in file]
    assert [line["text"] for line in lines] == held_out
    assert [line["document"] for line in lines] == numbers


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("limit", [300, 2000, 5000, 10**9])
def test_max_bytes_takes_whole_documents_from_the_beginning(
    config, tmp_path, in_process, ending, limit
):
    path = write_corpus(tmp_path / "in" / f"c.{ending}", TEXTS)
    config = changed(config, inputs=[str(path)], max_bytes=limit)
    preprocess(config)
    stored = stored_texts(config)
    assert stored == TEXTS[: len(stored)]
    sizes = [len(text.encode()) for text in TEXTS]
    assert sum(sizes[: len(stored)]) <= limit
    assert stored == TEXTS or sum(sizes[: len(stored) + 1]) > limit


def test_max_bytes_does_not_tokenise_the_whole_corpus(config, in_process, monkeypatch):
    made = []
    tokenise = shard_pool.tokenise_shard

    def count(shard, *arguments):
        made.append(shard)
        return tokenise(shard, *arguments)

    monkeypatch.setattr(shard_pool, "tokenise_shard", count)
    preprocess(changed(config, max_bytes=1500, workers=8))
    assert len(made) <= 3
    assert len(corpus.plan_shards(corpus.find_files(config.inputs, "/o"))) > 6


@pytest.mark.parametrize("workers", [1, 8])
def test_a_broken_document_behind_max_bytes_does_no_harm(config, tmp_path, in_process, workers):
    """Of a compressed file nobody knows how much text it holds, so several are read ahead."""
    text = " ".join(str(number * number) for number in range(1000))  # a shard of its own
    for number in range(6):
        broken = [text, "\ud800"] if number == 3 else [text]
        write_corpus(tmp_path / "many" / f"{number}.jsonl.gz", broken)
    asked = {"inputs": [str(tmp_path / "many")], "max_bytes": 2 * len(text), "workers": workers}
    config = changed(config, **asked)
    preprocess(config)
    assert len(stored_texts(config)) == 2
    with pytest.raises(InputError, match=r"3\.jsonl\.gz line 2: .*surrogates"):
        preprocess(changed(config, max_bytes=4 * len(text)))


def test_training_a_tokenizer_saves_it_beside_the_result(config, tmp_path, in_process):
    config = changed(config, tokenizer=None, train_sentencepiece=300)
    manifest = preprocess(config)
    assert manifest.tokenizer.path == config.output_prefix + ".tokenizer.model"
    known = load_tokenizer(manifest.tokenizer.path).identity
    assert known == manifest.tokenizer
    assert known.vocab_size == 300
    assert stored_texts(config) == TEXTS


def test_running_again_does_nothing(config, in_process, monkeypatch, capsys):
    for fields in ({"validation_documents": 3}, {"tokenizer": None, "train_sentencepiece": 300}):
        asked = changed(config, **fields)
        first = preprocess(asked)
        times = {path: os.stat(config.output_prefix + path).st_mtime_ns for path in RESULT}
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(module, "tokenise_shards", None)
            assert preprocess(changed(asked, workers=7)) == first
        assert (
            "already there, from the same corpus with the same settings" in capsys.readouterr().out
        )
        assert times == {path: os.stat(config.output_prefix + path).st_mtime_ns for path in RESULT}


def test_a_corpus_without_a_document_longer_than_the_window_is_said(config, in_process, capsys):
    preprocess(config)
    longest = int(TokenDataset(config.output_prefix).lengths.max())
    said = f"than a window and its last target ({longest} tokens, the longest has {longest})"
    assert "and its last target" not in capsys.readouterr().out
    preprocess(config, longest - 2)
    assert "and its last target" not in capsys.readouterr().out
    preprocess(config, longest - 1)
    assert said in capsys.readouterr().out
    preprocess(changed(config, validation_documents=1), longest - 1)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "lost", [".bin", ".idx", ".json", "-validation.json", "-validation.bin", "-validation.jsonl"]
)
@pytest.mark.parametrize("how", ["lost", "cut"])
def test_a_result_with_a_missing_or_cut_part_is_made_again(config, in_process, lost, how):
    config = changed(config, validation_documents=3)
    preprocess(config)
    before = result_bytes(config.output_prefix)
    spoil(Path(config.output_prefix + lost), how)
    preprocess(config)
    assert result_bytes(config.output_prefix) == before
    assert len(stored_texts(config, "-validation")) == 3


def spoil(path, how):
    content = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(content[:-2])


@pytest.mark.parametrize("how", ["lost", "cut"])
def test_a_lost_or_cut_tokenizer_is_trained_again(config, in_process, how):
    asked = changed(config, tokenizer=None, train_sentencepiece=300)
    preprocess(asked)
    model = Path(f"{config.output_prefix}.tokenizer.model")
    before = model.read_bytes()
    spoil(model, how)
    preprocess(asked)
    assert model.read_bytes() == before


def test_a_dataset_of_other_tools_is_not_replaced(config, in_process):
    preprocess(config)
    os.unlink(f"{config.output_prefix}.json")  # as Megatron's own preprocessing leaves it
    with pytest.raises(InputError, match=r"\.bin: was not made by an earlier run .* replaced"):
        preprocess(config)
    assert not os.path.exists(f"{config.output_prefix}.json")


@pytest.mark.parametrize(
    "ending", [".json", ".idx", "-validation.jsonl", "-validation.bin", ".tokenizer.model"]
)
def test_a_file_of_the_users_is_neither_replaced_nor_removed(config, in_process, ending):
    if ending == ".tokenizer.model":
        config = changed(config, tokenizer=None, train_sentencepiece=300)
    mine = Path(config.output_prefix + ending)
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text('{"text": "mine"}')
    with pytest.raises(InputError, match=re.escape(str(mine)) + ": was not made by an earlier"):
        preprocess(config)
    assert mine.read_text() == '{"text": "mine"}'
    assert [path for path in RESULT if Path(config.output_prefix + path) != mine
            and os.path.exists(config.output_prefix + path)] == []  # fmt: skip


def test_a_validation_dataset_made_by_itself_stays(config, in_process):
    preprocess(config)
    own = changed(config, output_prefix=f"{config.output_prefix}-validation")
    preprocess(own)
    before = Path(f"{own.output_prefix}.bin").read_bytes()
    with pytest.raises(InputError, match=r"-validation\.bin: was not made by an earlier run"):
        preprocess(changed(config, max_bytes=3000))
    assert Path(f"{own.output_prefix}.bin").read_bytes() == before


def test_a_file_system_without_locks_is_no_hindrance(config, in_process, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    preprocess(config)
    assert stored_texts(config) == TEXTS


def test_other_settings_or_a_changed_corpus_replace_the_result_and_say_so(
    config, in_process, capsys
):
    said = f"{config.output_prefix}: was made of other text or with other settings, will be repla"
    preprocess(changed(config, validation_documents=3))
    os.unlink(f"{config.output_prefix}.idx")
    preprocess(changed(config, validation_documents=3))  # made again, the same
    assert said not in capsys.readouterr().out
    preprocess(changed(config, max_bytes=1000))
    assert said in capsys.readouterr().out
    assert 0 < len(stored_texts(config)) < 60
    assert not os.path.exists(config.output_prefix + "-validation.json")
    write_corpus(Path(config.inputs[0]), TEXTS[::-1])
    preprocess(config)
    assert stored_texts(config) == TEXTS[::-1]


@pytest.mark.parametrize("option", ["--output-prefix", "--tokenizer"])
def test_a_folder_that_no_manifest_can_name_is_refused_at_once(
    config, tmp_path, in_process, monkeypatch, option
):
    here = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    here.mkdir()
    shutil.copy(config.tokenizer or "", here / "own.model")
    monkeypatch.chdir(here)
    relative = {
        "--output-prefix": {"output_prefix": "out"},
        "--tokenizer": {"tokenizer": "own.model"},
    }
    with pytest.raises(InputError, match=rf"{option} \w+.*caf\\udce9.* not UTF-8"):
        preprocess(changed(config, **relative[option]))
    assert not (tmp_path / "out").exists() and os.listdir(here) == ["own.model"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "café").mkdir()
    monkeypatch.chdir(tmp_path / "café")
    preprocess(changed(config, output_prefix="out"))
    assert TokenDataset("out").manifest.documents == len(TEXTS)


@pytest.fixture
def stripping(tmp_path, hf_folder):
    """A tokenizer that makes nothing of white space, and adds nothing to it."""
    folder = tmp_path / "stripping"
    folder.mkdir()
    values = json.loads((hf_folder / "tokenizer.json").read_text())
    values["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    values["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(values))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return str(folder)


def test_documents_without_any_token_are_left_out_and_counted(
    config, tmp_path, in_process, stripping, capsys
):
    mixed = ["  \n", *TEXTS[:30], " ", "\n\n", "", *TEXTS[30:], "  "]
    path = write_corpus(tmp_path / "in" / "mixed.jsonl", mixed)
    config = changed(config, inputs=[str(path)], tokenizer=stripping, validation_documents=7)
    manifest = preprocess(config)
    assert manifest.source["empty"] == 5 and ", 5 empty, in" in capsys.readouterr().out
    assert min(TokenDataset(config.output_prefix).lengths) > 0
    with open(config.output_prefix + "-validation.jsonl") as file:
        lines = [json.loads(line) for line in file]
    held_out = stored_texts(config, "-validation")
    assert held_out == [line["text"].strip() for line in lines]
    assert held_out == [TEXTS[line["document"]].strip() for line in lines]
    rest = [text.strip() for text in TEXTS if text.strip() not in held_out]
    assert stored_texts(config) == rest and len(held_out) == 7
    assert manifest.source["bytes"] == sum(
        len(text.encode()) for text in TEXTS if text.strip() in rest
    )


def test_a_tokenizer_that_makes_nothing_of_the_corpus_is_named(
    config, tmp_path, in_process, stripping
):
    path = write_corpus(tmp_path / "in" / "white.jsonl", [" ", "\n", ""])
    config = changed(config, inputs=[str(path)], tokenizer=stripping)
    with pytest.raises(InputError, match="stripping: makes no token of any of the 2 documents wi"):
        preprocess(config)
    assert not os.path.exists(config.output_prefix + ".json")


CHANGES = {
    "grows": lambda path: write_corpus(path, [*TEXTS, "one more"]),
    "is cut": lambda path: write_corpus(path, TEXTS[:10]),
    "is cut inside a line": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "is another": lambda path: write_corpus(path, TEXTS[::-1]),
    "goes": lambda path: path.unlink(),
}


@pytest.mark.parametrize("when", ["plan_shards", "tokenise_shards"])
@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_file_that_changes_while_it_is_read_is_named(
    config, in_process, monkeypatch, change, when
):
    path = Path(config.inputs[0])
    config = changed(config, validation_documents=3)
    monkeypatch.setattr(module, "_WORTH_KEEPING_SECONDS", 0)
    with monkeypatch.context() as patch:
        before = getattr(module, when)

        def and_then(*arguments):
            result = before(*arguments)
            CHANGES[change](path)
            return result

        patch.setattr(module, when, and_then)
        verb = "was removed" if change == "goes" else "changed"
        with pytest.raises(InputError, match=re.escape(str(path)) + f": {verb} while it was read"):
            preprocess(config)
    assert not any(name.startswith("corpus.") and not name.endswith(".shards")
                   for name in os.listdir(path.parents[1] / "out"))  # fmt: skip
    write_corpus(path, [text + "!" for text in TEXTS])
    preprocess(config)  # nothing of the old file is taken
    found = stored_texts(config) + stored_texts(config, "-validation")
    assert sorted(found) == sorted(text + "!" for text in TEXTS)


def test_a_package_that_changes_is_noticed(config, tmp_path, in_process, monkeypatch):
    (tmp_path / "lib" / "small").mkdir(parents=True)
    (tmp_path / "lib" / "small" / "a.py").write_text("a = 1\n")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    config = changed(config, inputs=["stdlib"])
    before = module.merge_shards

    def and_then(*arguments):
        before(*arguments)
        (tmp_path / "lib" / "small" / "b.py").write_text("b = 1\n")

    with monkeypatch.context() as patch:
        patch.setattr(module, "merge_shards", and_then)
        with pytest.raises(InputError, match="lib/small: changed while it was read"):
            preprocess(config)
    preprocess(config)
    assert stored_texts(config) == ["a = 1\n\nb = 1\n"]


def test_two_runs_to_one_prefix_do_not_meet(config, in_process):
    work = config.output_prefix + ".shards"
    make_work_folder(Path(work))
    with open(os.path.join(work, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is being written by"):
            preprocess(config)
        assert sorted(os.listdir(work)) == sorted([MARK, "lock"])


def test_a_folder_of_the_users_with_the_name_of_ours_stays(config, in_process):
    theirs = Path(config.output_prefix + ".shards")
    theirs.mkdir(parents=True)
    (theirs / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="was not made by this command"):
        preprocess(config)
    assert [path.name for path in theirs.iterdir()] == ["thesis.tex"]


def test_a_worker_that_dies_is_reported(config, monkeypatch, tmp_path):
    monkeypatch.setattr(
        shard_pool._Pool, "submit", lambda pool, *job: pool._executor.submit(os.abort)
    )
    with pytest.raises(InputError, match="a worker process died while tokenising"):
        preprocess(config)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"tokenizer": None}, "tokenizer and train_sentencepiece: neither given"),
        ({"train_sentencepiece": 300}, "tokenizer and train_sentencepiece: both given"),
        ({"inputs": []}, "inputs: none given"),
        ({"output_prefix": "/tmp/"}, "--output-prefix /tmp/: is a folder"),
        ({"output_prefix": "/tmp"}, "--output-prefix /tmp: is a folder"),
        ({"validation_documents": 60}, "the corpus has 60 documents, so none would be left"),
        ({"max_bytes": 3}, "--max-bytes 3: the first document alone is larger"),
        ({"text_field": "body"}, "line 1: no field 'body' .fields: id, text"),
    ],
)
def test_contradictory_settings_are_refused(config, in_process, tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        preprocess(changed(config, **fields))
    assert not os.path.exists(tmp_path / "out") or os.listdir(tmp_path / "out") == []


def test_a_corpus_without_any_text_is_refused(config, in_process, tmp_path):
    (tmp_path / "in" / "a.jsonl").write_text('{"text": ""}\n\n{\n')
    with pytest.raises(InputError, match="no text: 1 documents are broken and 1 empty"):
        preprocess(changed(config, skip_bad=True))
    assert os.listdir(tmp_path / "out") == []
