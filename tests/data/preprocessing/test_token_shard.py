import os

import numpy as np
import pytest

from lctw_megatron.data.preprocessing.corpus import find_files, plan_shards
from lctw_megatron.data.preprocessing.token_shard import (
    ShardSettings,
    document_sizes,
    finished_shard,
    open_tokens,
    shard_key,
    tokenise_shard,
)
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError
from tests.data.corpus_files import texts, write_corpus

SETTINGS = ShardSettings(text_field="text", skip_bad=False, max_bytes=None)


def make(tmp_path, tokenizer, content=None, settings=SETTINGS, report=lambda *counts: None):
    content = texts(10) if content is None else content
    path = write_corpus(tmp_path / "a.jsonl", content)
    (shard,) = plan_shards(find_files([str(path)], "/o"))
    result = tokenise_shard(shard, settings, tokenizer, tmp_path / "shard", report)
    return shard, result


@pytest.fixture
def tokenizer(sentencepiece_model):
    return load_tokenizer(sentencepiece_model)


def test_a_shard_holds_documents_sizes_and_counts(tmp_path, tokenizer):
    content = [*texts(10), "", "last"]
    shard, result = make(tmp_path, tokenizer, content)
    kept = [text for text in content if text]
    assert document_sizes(tmp_path / "shard").tolist() == [len(text.encode()) for text in kept]
    stored = [ids.tolist() for ids in open_tokens(tmp_path / "shard")]
    assert stored == [ids.tolist() for ids in tokenizer.encode_documents(kept)]
    assert (result.documents, result.empty, result.skipped) == (11, 1, 0)
    assert result.tokens == sum(map(len, stored))
    assert result.size == sum(len(text.encode()) for text in kept)
    assert finished_shard(tmp_path / "shard", skip_bad=False) == result


@pytest.mark.parametrize("batch", [1, 100, 1 << 20])
def test_the_batch_size_changes_nothing_and_reports_add_up(tmp_path, tokenizer, monkeypatch, batch):
    monkeypatch.setattr("lctw_megatron.data.preprocessing.token_shard._BATCH_BYTES", batch)
    reports = []
    shard, result = make(tmp_path, tokenizer, report=lambda *counts: reports.append(counts))
    stored = [ids.tolist() for ids in open_tokens(tmp_path / "shard")]
    assert stored == [ids.tolist() for ids in tokenizer.encode_documents(texts(10))]
    weight = sum(part.weight for part in shard)
    assert [sum(counts) for counts in zip(*reports, strict=True)] == [weight, 10, result.tokens]


def test_max_bytes_ends_before_the_document_that_is_too_much(tmp_path, tokenizer):
    sizes = np.cumsum([len(text.encode()) for text in texts(10)])
    settings = ShardSettings("text", False, int(sizes[4]))
    _, result = make(tmp_path, tokenizer, settings=settings)
    assert (result.documents, result.full) == (5, True)
    settings = ShardSettings("text", False, int(sizes[4]) - 1)
    _, result = make(tmp_path, tokenizer, settings=settings)
    assert (result.documents, result.full) == (4, True)
    settings = ShardSettings("text", False, int(sizes[-1]))
    _, result = make(tmp_path, tokenizer, settings=settings)
    assert (result.documents, result.full) == (10, False)


def test_the_key_covers_all_that_decides_the_content(tmp_path, tokenizer, hf_folder):
    path = write_corpus(tmp_path / "a.jsonl", texts(10))

    def key(settings=SETTINGS, by=tokenizer):
        (shard,) = plan_shards(find_files([str(path)], "/o"))
        return shard_key(shard, settings, by.identity)

    known = key()
    assert key() == known
    assert key(ShardSettings("text", True, None)) == known  # skip_bad is checked with the result
    others = [
        key(ShardSettings("body", False, None)),
        key(ShardSettings("text", False, 100)),
        key(by=load_tokenizer(hf_folder)),
    ]
    os.utime(path, ns=(1, 1))
    others.append(key())
    write_corpus(path, texts(11))
    others.append(key())
    assert len({known, *others}) == 6


def test_a_shard_with_skipped_documents_serves_only_who_skips(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{\n')
    (shard,) = plan_shards(find_files([str(tmp_path / "a.jsonl")], "/o"))
    settings = ShardSettings("text", True, None)
    tokenise_shard(shard, settings, tokenizer, tmp_path / "shard", lambda *counts: None)
    assert finished_shard(tmp_path / "shard", skip_bad=True).skipped == 1
    assert finished_shard(tmp_path / "shard", skip_bad=False) is None


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx", "sizes.bin", "shard.json"])
@pytest.mark.parametrize("damage", ["remove", "truncate"])
def test_a_damaged_shard_is_made_again(tmp_path, tokenizer, name, damage):
    shard, result = make(tmp_path, tokenizer)
    path = tmp_path / "shard" / name
    if damage == "remove":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 9)
    assert finished_shard(tmp_path / "shard", skip_bad=False) is None
    tokenise_shard(shard, SETTINGS, tokenizer, tmp_path / "shard", lambda *counts: None)
    assert finished_shard(tmp_path / "shard", skip_bad=False) == result


def test_an_error_leaves_no_folder(tmp_path, tokenizer):
    class Stop(Exception):
        pass

    def stop(*counts):
        raise Stop

    with pytest.raises(Stop):
        make(tmp_path, tokenizer, report=stop)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path, tokenizer):
    tokenizer.identity = tokenizer.identity.model_copy(update={"vocab_size": 300})
    with pytest.raises(InputError, match=r"small\.model: gave token id \d+, beyond its vocabulary"):
        make(tmp_path, tokenizer)
    assert os.listdir(tmp_path) == ["a.jsonl"]
