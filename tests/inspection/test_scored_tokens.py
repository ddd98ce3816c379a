"""Weights from two sidecars are those of training; statistics and rankings, by plain loops."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lctw_megatron.config.schema import DataConfig
from lctw_megatron.data.sequence_source import SequenceSource
from lctw_megatron.data.sidecar import Sidecar
from lctw_megatron.data.token_dataset import TokenDataset, TokenWriter
from lctw_megatron.errors import InputError
from lctw_megatron.inspection import rank_documents as ranking
from lctw_megatron.inspection.inspect_tokens import Inspection, View, write_page
from lctw_megatron.inspection.rank_documents import describe_ranking, rank_documents
from lctw_megatron.inspection.scored_tokens import (
    ScoredTargets,
    ScoredTokens,
    SequenceSettings,
    read_weighting,
)
from lctw_megatron.inspection.token_statistics import TokenStatistics, TopTargets
from lctw_megatron.weighting import compute_weights, parse_weighting
from lctw_megatron.weighting.selection import normalise
from tests.data.small_data import write_tokens
from tests.evaluation.tiny_run import SEQUENCE, WINDOW, make_data, write_sidecar
from tests.report.test_report import Page, png_size

BRACKETS = str.maketrans("", "", "\u27e6\u27e7")
DENSE = parse_weighting({"scheme": "dense", "interpolation": 0.25})


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return make_data(tmp_path_factory.mktemp("data"))[0]


def all_targets(scored: ScoredTokens) -> list[ScoredTargets]:
    return list(scored.read(scored.all_sequences()))


@pytest.mark.parametrize("packing", ["chunk", "pack"])
def test_weights_are_those_of_the_sequences_that_training_reads(prefix, packing):
    dataset = TokenDataset(prefix)
    scored = ScoredTokens(dataset, DENSE, SequenceSettings(SEQUENCE, packing))
    data = DataConfig(train=[], sequence_length=SEQUENCE, packing=packing)
    source = SequenceSource(prefix, data, scores="short_loss")
    assert len(scored) == len(source)
    long = Sidecar(dataset, "long_loss")
    for number, targets in enumerate(all_targets(scored)):
        sample = source.read(number)
        pieces = source.index.pieces(number)
        long_loss = np.concatenate([long.get(d, o + 1, n) for d, o, n in pieces])
        live = len(long_loss)
        weights = compute_weights(
            DENSE,
            torch.from_numpy(long_loss)[None],
            torch.from_numpy(sample.short_loss)[None, :live],
        )
        np.testing.assert_array_equal(targets.weight, weights[0].numpy())
        np.testing.assert_array_equal(targets.short_loss, sample.short_loss[:live])
        np.testing.assert_array_equal(targets.id, sample.labels[:live])
        for document, token, id in zip(targets.document, targets.token, targets.id, strict=True):
            assert dataset[document][token] == id


def of_the_mask(long_loss, short_loss, mask):
    """|short - long| with mean 1 over the mask."""
    return normalise((short_loss - long_loss).abs() + 1.0, mask)


def test_a_custom_score_is_the_weight_where_unscored_targets_are_left_out(prefix):
    weighting = parse_weighting(
        {"scheme": "custom", "function": f"{__name__}:of_the_mask", "unscored": "one"}
    )
    scored = ScoredTokens(TokenDataset(prefix), weighting, SequenceSettings(SEQUENCE))
    partly = 0
    for targets in all_targets(scored):
        known = ~np.isnan(targets.score)
        partly += known.any() and not known.all()
        np.testing.assert_array_equal(targets.score[known], targets.weight[known])
    assert partly


def test_a_document_is_one_sequence_or_its_chunks(prefix):
    dataset = TokenDataset(prefix)
    whole = ScoredTokens(dataset, DENSE, SequenceSettings(None))
    (targets,) = whole.read(iter(whole.document(2)))
    assert targets.token.tolist() == list(range(1, int(dataset.lengths[2])))
    assert np.isnan(targets.short_loss[: WINDOW - 1]).all()
    chunked = ScoredTokens(dataset, DENSE, SequenceSettings(SEQUENCE))
    chunks = list(chunked.read(iter(chunked.document(2))))
    assert sum(len(chunk) for chunk in chunks) == len(targets)
    # In the middle of the document, too, the first targets of a chunk have no longer context.
    assert np.isnan(chunks[1].short_loss[: WINDOW - 1]).all()
    assert not np.isnan(chunks[1].short_loss[WINDOW - 1 :]).any()
    assert chunks[1].weight.mean() == pytest.approx(1, rel=1e-5)


def test_schemes_without_short_losses_need_no_sidecar(tmp_path):
    dataset = write_tokens(tmp_path / "t", [[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    position = parse_weighting({"scheme": "position", "window": 4})
    (targets,) = all_targets(ScoredTokens(dataset, position, SequenceSettings(None)))
    assert (targets.weight[:4] == 0).all() and targets.weight.mean() == pytest.approx(1)
    eslm = parse_weighting({"scheme": "eslm", "keep_fraction": 0.5})
    for needs_long_losses in (DENSE, eslm):
        with pytest.raises(InputError, match=r"long_loss\.idx: no such file"):
            ScoredTokens(dataset, needs_long_losses, SequenceSettings(None))
    for asked, missing in (
        ({"by": "long_loss"}, "long_loss"),
        ({"by": "short_loss"}, "short_loss"),
        ({"by": "difference"}, "long_loss"),
        ({"long_name": "mine"}, "mine"),
        ({"short_name": "mine"}, "mine"),
    ):
        with pytest.raises(InputError, match=rf"{missing}\.idx: no such file"):
            ScoredTokens(dataset, position, SequenceSettings(None), **asked)


@pytest.mark.parametrize("name", ["long_loss", "short_loss"])
def test_both_sidecars_are_of_the_sequences_that_are_weighed(tmp_path, name):
    dataset = write_tokens(tmp_path / "t", [list(range(3, 200))])
    for each in ("long_loss", "short_loss"):
        write_sidecar(dataset, each, 2.0, sequence_length=64 if each == name else None)
    ScoredTokens(dataset, DENSE, SequenceSettings(64))
    for settings, message in (
        (
            SequenceSettings(32),
            "sequences of 32 tokens are asked for; .* --sequence-length. 64",
        ),
        (SequenceSettings(64, "pack"), "not pack; .* --packing. chunk"),
    ):
        with pytest.raises(InputError, match=rf"t\.{name}: scored with .*{message}"):
            ScoredTokens(dataset, DENSE, settings)


def test_what_does_not_exist_is_refused(prefix):
    scored = ScoredTokens(TokenDataset(prefix), DENSE, SequenceSettings(None))
    for wrong in (lambda: scored.document(99), lambda: scored.sequence(99)):
        with pytest.raises(InputError, match="only 0 to 15"):
            wrong()
    packed = ScoredTokens(TokenDataset(prefix), DENSE, SequenceSettings(SEQUENCE, "pack"))
    with pytest.raises(InputError, match="--sequence N"):
        packed.document(0)
    with pytest.raises(InputError, match="no fragment dens"):
        read_weighting("dens")
    assert read_weighting("sparse", ["keep_fraction=0.5"]).config.keep_fraction == 0.5


def test_statistics_and_top_targets_equal_plain_loops(prefix):
    scored = ScoredTokens(TokenDataset(prefix), DENSE, SequenceSettings(SEQUENCE))
    statistics = TokenStatistics(near=10, vocabulary=100)
    top = TopTargets(7, "difference")
    everything = all_targets(scored)
    for targets in everything:
        statistics.add(targets)
        top.add(targets)
    weight = np.concatenate([t.weight for t in everything])
    ids = np.concatenate([t.id for t in everything])
    difference = np.concatenate([t.difference for t in everything])
    distance = np.concatenate([t.distance for t in everything])
    known = ~np.isnan(difference)
    assert statistics.targets == len(weight) and statistics.scored == known.sum()
    assert statistics.magnitude_sum == pytest.approx(np.abs(difference[known]).sum(), rel=1e-6)
    assert statistics.differences.sum() == known.sum()
    assert statistics.weight_sums.sum() == pytest.approx(weight.sum(), rel=1e-6)
    far = distance > 10
    assert statistics.class_targets[1] == far.sum()
    assert statistics.class_weights[1] == pytest.approx(weight[far].sum(), rel=1e-6)
    summary = statistics.weights.summary()
    assert summary["max"] == weight.max()
    assert summary["n_eff"] == pytest.approx(weight.sum() ** 2 / (weight**2).sum(), rel=1e-6)
    heavy, light = statistics.types(3, least=20)
    means = {id: weight[ids == id].mean() for id in np.unique(ids) if (ids == id).sum() >= 20}
    assert heavy[0].id == max(means, key=means.get) and light[0].id == min(means, key=means.get)
    expected = np.sort(np.abs(difference[known]))[::-1][:7]
    np.testing.assert_allclose([t.size for t in top.sorted()], expected)


@pytest.mark.parametrize("by", ["score", "difference", "long_loss", "weight"])
def test_only_differences_are_ranked_by_magnitude(prefix, by):
    top, values = TopTargets(5, by), []
    for targets in all_targets(ScoredTokens(TokenDataset(prefix), DENSE, SequenceSettings(None))):
        # So that those furthest below 0 are further from it than any above.
        targets = replace(targets, score=targets.score - 9, short_loss=targets.short_loss - 9)
        top.add(targets)
        values.append(targets.values(by))
    known = np.concatenate(values)
    known = known[~np.isnan(known)]
    sizes = np.abs(known) if by == "difference" else known
    np.testing.assert_array_equal([t.size for t in top.sorted()], np.sort(sizes)[::-1][:5])


def test_the_views_name_what_they_show(prefix, tmp_path):
    inspection = Inspection(ScoredTokens(TokenDataset(prefix), DENSE, SequenceSettings(SEQUENCE)))
    picture = str(tmp_path / "page.png")
    view = View(document=1, tokens=50, by="difference", top=4, png=picture)
    text, sections = inspection.show(view, False)
    assert png_size(Path(picture))[0] > 800
    assert "document 1, by difference" in text and "targets 0 to 50 of" in text
    assert text.count("1:") >= 4  # the top targets are of this document
    colours, _ = inspection.show(View(sequence=0, tokens=20, offset=5), True)
    assert "\x1b[48;2;" in colours
    write_page(tmp_path / "page.html", "title", sections)
    page = Page()
    page.feed((tmp_path / "page.html").read_text())
    assert page.open == [] and page.sources == []
    document = TokenDataset(prefix)[1][1:51]
    assert inspection.texts._tokenizer.decode(document).split()[0] in page.text
    whole, _ = inspection.show(View(statistics=True, top=3, sample=10), False)
    for part in ("with both losses", "first seen", "heaviest", "weight from", "nats from"):
        assert part in whole


def test_a_part_of_a_document_is_that_part_of_the_whole(prefix):
    scored = ScoredTokens(TokenDataset(prefix), DENSE, SequenceSettings(SEQUENCE))
    inspection = Inspection(scored)
    document = TokenDataset(prefix)[3]
    for offset in (0, 63, 64, 65, 130):
        for count in (1, 64, 70):
            text, _ = inspection.show(View(document=3, offset=offset, tokens=count), False)
            shown = "".join(inspection.texts(document[offset + 1 : offset + 1 + count]))
            assert text.split("\n\n", 1)[1].strip().translate(BRACKETS) == shown.strip()
            assert f"beginning with token {offset + 1} of document 3" in text
    read = []
    scored.read, original = (
        lambda sequences: read.append(list(sequences)) or original(iter(read[-1])),
        scored.read,
    )
    inspection.show(View(document=3, offset=70, tokens=50), False)
    assert [piece.offset for pieces in read[0] for piece in pieces] == [64]
    inspection.show(View(document=3, offset=70, tokens=50, top=1), False)
    assert len(read[1]) == len(scored.document(3))
    with pytest.raises(InputError, match="there are 776 targets"):
        inspection.show(View(document=3, offset=10**6), False)


def test_a_sequence_without_targets_is_refused_as_its_document_is(tmp_path, prefix):
    tokenizer = TokenDataset(prefix).manifest.tokenizer
    with TokenWriter(tmp_path / "t", tokenizer) as writer:
        for length in (5, 0, 1):
            writer.add(np.full(length, 3))
    uniform = parse_weighting({"scheme": "uniform"})
    scored = ScoredTokens(TokenDataset(tmp_path / "t"), uniform, SequenceSettings(None))
    for number, tokens in ((1, 0), (2, 1)):
        for view in (View(sequence=number), View(document=number)):
            with pytest.raises(
                InputError, match=f"t: document {number} has {tokens} tokens and so no target"
            ):
                Inspection(scored).show(view, False)


def test_ranking_equals_a_loop_over_the_documents_however_it_is_read(tmp_path, monkeypatch):
    lengths = [9, 1, 40, 2, 0, 25, 3, 60]
    dataset = write_tokens(tmp_path / "t", [list(range(3, 3 + n)) for n in lengths])
    for name, scale in (("short_loss", 3.0), ("long_loss", 2.0)):
        write_sidecar(dataset, name, scale)
    long, short = Sidecar(dataset, "long_loss"), Sidecar(dataset, "short_loss")
    expected = {}
    for document in range(len(lengths)):
        gain = short[document] - long[document]
        if (~np.isnan(gain)).any():
            expected[document] = float(np.nanmean(gain.astype(np.float64)))
    assert sorted(expected) == [2, 5, 7]
    found = []
    for block in (4, 28, 44, 1 << 20):
        monkeypatch.setattr(ranking, "BLOCK_BYTES", block)
        result = rank_documents(dataset, long, short, tmp_path / "rank.jsonl")
        rows = [json.loads(line) for line in (tmp_path / "rank.jsonl").read_text().splitlines()]
        assert [row["document"] for row in rows] == sorted(expected, key=expected.get)[::-1]
        for row in rows:
            assert row["gain"] == pytest.approx(expected[row["document"]], rel=1e-5)
            assert row["tokens"] == lengths[row["document"]]
            assert row["scored"] == lengths[row["document"]] - WINDOW
        found.append(rows)
        assert result.left_out == 5
    assert "5 documents have no scored target" in describe_ranking(result)


def test_a_ranking_of_nothing_is_refused_and_leaves_no_file(tmp_path):
    dataset = write_tokens(tmp_path / "t", [[3, 4, 5]])
    for name in ("short_loss", "long_loss"):
        write_sidecar(dataset, name, 1.0)
    sidecars = Sidecar(dataset, "long_loss"), Sidecar(dataset, "short_loss")
    with pytest.raises(InputError, match="no target has both losses"):
        rank_documents(dataset, *sidecars, tmp_path / "rank.jsonl")
    assert not Path(tmp_path / "rank.jsonl").exists()
