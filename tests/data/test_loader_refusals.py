"""What the loader refuses, in one line that says what to do."""

import json
import math
import re

import numpy as np
import pytest

from lctw_megatron.config.schema import Corpus, DataConfig
from lctw_megatron.data.manifest import MADE_ELSEWHERE
from lctw_megatron.data.sequence_source import _advice
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import InputError
from tests.data.small_data import VOCAB_SIZE, count_up, write_sidecar, write_tokens
from tests.data.small_loader import NAN, config, loader, losses


def refused(match: str):
    return pytest.raises(InputError, match=match)


def test_batch_sizes_that_do_not_fit(folder) -> None:
    with refused("global_batch_size=4 is no multiple of .*micro_batch_size=3 times 1 data"):
        loader(config(folder), micro_batch_size=3)
    with refused("global_batch_size=4 is no multiple of .*micro_batch_size=1 times 3 data"):
        loader(config(folder), dp_size=3)


def test_a_sequence_that_cannot_be_cut(folder) -> None:
    with refused("8 tokens cannot be cut for layout.context=3"):
        loader(config(folder), cp_size=3)


def test_no_corpus(folder) -> None:
    with refused("data.train is empty"):
        loader(config(folder, ""))


def test_no_sequence(folder) -> None:
    with refused("a: no sequence of data.sequence_length=64 .*tails=drop.* longest .* 30 tokens"):
        loader(config(folder, sequence_length=64, tails="drop"))


def test_the_advice_is_not_what_is_set_already() -> None:
    drops = DataConfig(train="x", tails="drop")
    assert "set data.tails=keep" in _advice(drops)
    for other in (DataConfig(train="x"), DataConfig(train="x", packing="pack", tails="drop")):
        assert _advice(other) == "preprocess documents of two tokens or more"


def test_steps_before_the_first(folder) -> None:
    with refused("no step -1"):
        loader(config(folder)).documents(-1)


def test_corpora_of_two_tokenizers(folder, tmp_path) -> None:
    write_tokens(tmp_path / "c", count_up([17]), digest="f" * 32, path="another/tokenizer")
    corpora = [Corpus(prefix=str(folder / "a")), Corpus(prefix=str(tmp_path / "c"))]
    with refused(r"c was tokenised with another/tokenizer \(digest f+\), but .*a with a/tokenizer"):
        loader(DataConfig(train=corpora, sequence_length=8))


def test_corpora_of_one_tokenizer_with_and_without_bos(folder, tmp_path) -> None:
    write_tokens(tmp_path / "c", count_up([17]), bos_id=1000, add_bos=True, path="bare.model")
    corpora = [Corpus(prefix=str(folder / "a")), Corpus(prefix=str(tmp_path / "c"))]
    with refused(
        r"the documents of \S+/c begin with BOS \(tokenizer bare\.model\), but those of \S+/a "
        r"without BOS \(tokenizer a/tokenizer\); preprocess both"
    ):
        loader(DataConfig(train=corpora, sequence_length=8))
    found = tmp_path / "c.json"  # what other tools made is taken as it is
    manifest = json.loads(found.read_text())
    found.write_text(json.dumps(manifest | {"source": {"inputs": MADE_ELSEWHERE}}))
    loader(DataConfig(train=corpora, sequence_length=8))


def test_a_token_beyond_the_vocabulary(folder) -> None:
    with refused(r"b: holds token id 50\d+, but the model has a vocabulary of 500000"):
        loader(config(folder), vocab_size=500_000)
    list(loader(config(folder), vocab_size=VOCAB_SIZE).step(0))


def test_scores_that_are_not_there(tmp_path) -> None:
    write_tokens(tmp_path / "c", count_up([17]))
    with refused(r"c.short_loss.*score"):
        loader(config(tmp_path, "c"), scores=True)


@pytest.mark.parametrize(
    ("fields", "options", "named"),
    [
        ({}, {"window": 4}, "c.short_loss: scored with window 3, but window 4"),
        ({}, {"stride": 1}, "c.short_loss: scored with stride 2, but stride 1"),
        ({"sequence_length": 16}, {}, "sequence-length 8, but sequences of 16 tokens"),
        ({"packing": "pack"}, {}, "sequence.length 8, .*chunk, not pack"),
    ],
)
def test_scores_that_do_not_fit(tmp_path, fields, options, named) -> None:
    dataset = write_tokens(tmp_path / "c", count_up([40]))
    write_sidecar(dataset, losses([40]), sequence_length=8)
    loader(config(tmp_path, "c"), scores=True, window=3, stride=2)
    with refused(named):
        loader(config(tmp_path, "c", **fields), scores=True, **options)


@pytest.mark.parametrize(
    ("scored", "said"),
    [
        (0, "0 % of the targets have a short loss, as no document is longer than a window and"),
        (3, r"7.69 % of the .* \(mean weight about 13 each\); set weighting.unscored=one"),
        (30, "74.4 % of the targets have a short loss$"),  # the first two of each piece of 8 go
    ],
)
def test_how_many_targets_have_scores_is_said(tmp_path, scored, said) -> None:
    dataset = write_tokens(tmp_path / "c", count_up([40]))
    values = np.full(40, np.nan, np.float32)
    values[40 - scored :] = 1.0
    write_sidecar(dataset, [values], sequence_length=None)
    opened = loader(config(tmp_path, "c"), scores=True, window=3, stride=2)
    (line,) = opened.scores_lines()
    assert re.search(said, line)
    assert loader(config(tmp_path, "c")).scores_lines() == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({}, None),
        ({"scorer": {"checkpoint": "moved/scorer", "digest": "1" * 32}}, None),
        (
            {"window": 4},
            "c.short_loss window 3, .*d.short_loss window 4, .* scorer a/scorer; score",
        ),
        ({"scorer": {"checkpoint": "other", "digest": "2" * 32}}, "scorer a/.* scorer other; "),
    ],
)
def test_a_blend_whose_corpora_were_not_scored_alike_is_told(tmp_path, other, said) -> None:
    corpora = []
    for name, details in (("c", {}), ("d", other)):
        write_sidecar(write_tokens(tmp_path / name, count_up([40])), losses([40]), **details)
        corpora.append(Corpus(prefix=str(tmp_path / name)))
    data = DataConfig(train=corpora, sequence_length=8)
    first, second, *unlike = loader(data, scores=True).scores_lines()
    assert "c: " in first and "d: " in second and len(unlike) == (said is not None)
    assert said is None or re.search(said, unlike[0])


def test_of_sequences_shorter_than_documents_only_what_is_used_counts_as_scored(tmp_path) -> None:
    dataset = write_tokens(tmp_path / "c", count_up([2000]))
    values = np.full(2000, 1.0, np.float32)
    values[:28] = np.nan
    write_sidecar(dataset, [values], sequence_length=None, window=28)
    opened = loader(config(tmp_path, "c", sequence_length=32), scores=True, window=28, stride=2)
    (line,) = opened.scores_lines()
    batch = next(iter(opened.step(0)))
    share = float(batch["short_loss"].isfinite().float().mean())
    assert share == 5 / 32  # of every sequence but the tail
    assert "15.5 % of the targets" in line and "set weighting.unscored=one" in line


def test_a_run_that_scores_itself_says_if_no_document_is_longer_than_its_window(tmp_path) -> None:
    write_tokens(tmp_path / "c", count_up([5, 40, 7]))
    assert loader(config(tmp_path, "c"), window=38).scores_lines() == []
    # Its one window would be the document's first, which has no short losses.
    (line,) = loader(config(tmp_path, "c"), window=39).scores_lines()
    assert "its last target (40 tokens, the longest has 40): it trains as" in line


def test_a_window_as_long_as_a_sequence(folder) -> None:
    with refused("short_loss: scored with window 3, but data.sequence_length is 3"):
        loader(config(folder, sequence_length=3), scores=True)


def test_an_infinite_short_loss(tmp_path) -> None:
    dataset = write_tokens(tmp_path / "c", count_up([9, 9]))
    write_sidecar(dataset, [[NAN] * 9] * 2)
    # The sample digest covers so small a file; a large one may be damaged where it does not look.
    values = np.memmap(tmp_path / "c.short_loss.bin", "<f4", "r+")
    values[9 + 5] = -math.inf
    values.flush()
    manifest = json.loads((tmp_path / "c.short_loss.json").read_text())
    from lctw_megatron.data.fingerprint import sample_digest

    manifest["sample_digest"] = sample_digest(str(tmp_path / "c.short_loss"))
    (tmp_path / "c.short_loss.json").write_text(json.dumps(manifest))
    with refused("c.short_loss: the short loss of token 5 of document 1 is -inf"):
        list(loader(config(tmp_path, "c"), scores=True).step(0))


def test_a_dataset_without_manifest(tmp_path) -> None:
    write_tokens(tmp_path / "c", count_up([17]))
    (tmp_path / "c.json").unlink()
    assert TokenDataset(str(tmp_path / "c"))
    with refused("c.json: no such file"):
        loader(config(tmp_path, "c"))
