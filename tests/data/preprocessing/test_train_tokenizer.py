import pytest

from lctw_megatron.data.preprocessing import train_tokenizer
from lctw_megatron.data.preprocessing.corpus import find_files, plan_shards
from lctw_megatron.data.preprocessing.token_shard import ShardSettings
from lctw_megatron.data.preprocessing.train_tokenizer import train_sentencepiece
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError
from tests.data.corpus_files import write_corpus
from tests.tokenizer_files import real_text

SETTINGS = ShardSettings("text", skip_bad=False, max_bytes=None)


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "in").mkdir()
    write_corpus(tmp_path / "in" / "a.jsonl", [real_text(), "", real_text()[::-1]])
    write_corpus(tmp_path / "in" / "b.txt", ["x" * 10_000])  # a line the trainer would leave out
    return plan_shards(find_files([str(tmp_path / "in")], "/o"))


def test_the_model_decodes_every_text_and_is_the_same_every_time(shards, tmp_path):
    first = train_sentencepiece(shards, 600, SETTINGS, str(tmp_path))
    assert train_sentencepiece(shards, 600, SETTINGS, str(tmp_path)) == first
    path = tmp_path / "trained.model"
    path.write_bytes(first)
    tokenizer = load_tokenizer(path)
    known = tokenizer.identity
    assert (known.vocab_size, known.bos_id, known.eos_id) == (600, 1, 2)
    for text in ("  def f(): \n\n\treturn 2024 ", "ﬁ Ä ｆ 世界 🙂 \0 \r\n", real_text()):
        (ids,) = tokenizer.encode_batch([text])
        assert tokenizer.decode(ids) == text
    (ids,) = tokenizer.encode_batch(["x" * 64])
    assert len(ids) < 12  # the long line was learnt from
    (ids,) = tokenizer.encode_batch(["if x:\n                return"])
    assert any(
        tokenizer.token_text(id).isspace() and len(tokenizer.token_text(id)) > 3 for id in ids
    )


def test_the_sample_is_bounded_and_spread_over_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr("lctw_megatron.data.preprocessing.corpus._SMALLEST_SHARD", 1000)
    monkeypatch.setattr(train_tokenizer, "_SMALLEST_SAMPLE", 5000)
    for number in range(100):
        write_corpus(tmp_path / "in" / f"{number:02}.txt", [f"{number:02} " * 300])
    shards = plan_shards(find_files([str(tmp_path / "in")], "/o"))
    assert len(shards) > 50
    lines = list(train_tokenizer._sample(shards, 1, SETTINGS, str(tmp_path)))
    assert 4000 < sum(map(len, lines)) <= 5000
    assert len({line[:2] for line in lines}) >= 50
    assert lines[0].startswith("00") and lines[-1] >= "95"


def test_a_broken_document_is_named_as_everywhere(shards, tmp_path):
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "good"}\n{"broken\n')
    shards = plan_shards(find_files([str(tmp_path / "in")], "/o"))
    with pytest.raises(InputError, match=r"^[^ ]*/in/a\.jsonl line 2: not valid JSON"):
        train_sentencepiece(shards, 300, SETTINGS, str(tmp_path))


@pytest.mark.parametrize("vocab_size", [100, 100_000])
def test_an_impossible_vocabulary_says_why(shards, tmp_path, vocab_size):
    with pytest.raises(InputError, match=f"--train-sentencepiece {vocab_size}: .*ocabulary size"):
        train_sentencepiece(shards, vocab_size, SETTINGS, str(tmp_path))
