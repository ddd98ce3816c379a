"""Recall in the report: tables, figures, and where they stand."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lctw_megatron.errors import InputError
from lctw_megatron.report.recall_plots import (
    recall_by_depth,
    recall_by_length,
    recall_difference,
)
from lctw_megatron.report.recall_table import recall_tables
from lctw_megatron.report.report import write_report
from lctw_megatron.report.runs import read_run
from tests.report.written_runs import (
    DEPTHS,
    LENGTHS,
    TASKS,
    groups_of,
    write_metrics,
    write_recall,
    write_run,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "uniform")
    write_recall(root / "uniform")
    write_recall(write_run(root / "dense", better=0.25), better=0.5)
    write_recall(root / "other", seed=1)
    return [str(root / name) for name in ("uniform", "dense", "other")]


def test_means_are_over_samples_and_differences_over_the_same_samples(folders):
    groups = groups_of(*folders)
    right, nats = recall_tables(groups)
    assert right[0] == ["recall, share of answers right", "1,024", "4,096"]
    rows = {row[0]: row[1:] for row in nats}
    assert list(rows)[1:6] == [
        "one_key: uniform",
        "one_key: dense",
        "one_key: other",
        "one_key: dense - uniform",
        "one_key: other - uniform",
    ]
    assert rows["one_key: dense - uniform"] == ["-0.500 ±0.000 ✓"] * 2
    assert rows["one_key: other - uniform"] == ["other samples"] * 2
    # Better by 0.5 in every task, and so in their mean.
    assert rows["mean of 3: dense - uniform"] == ["-0.500 ±0.000 ✓"] * 2
    assert rows["mean of 3: other - uniform"] == ["other samples"] * 2
    # By hand: a sample's depths are one story, so four samples, not eight.
    cells = [
        c
        for c in groups[0].first.recall["cells"]
        if (c["task"], c["length"]) == ("one_key", LENGTHS[1])
    ]
    assert len(cells) == len(DEPTHS)
    loss = np.sum([c["nats"] for c in cells], axis=0)
    tokens = np.sum([c["tokens"] for c in cells], axis=0)
    mean = loss.sum() / tokens.sum()
    error = np.sqrt(4 / 3 * ((loss - mean * tokens) ** 2).sum()) / tokens.sum()
    assert rows["one_key: uniform"][1] == f"{mean:.3f} ±{error:.3f}"


def test_figures_show_every_task_the_short_context_and_every_depth(folders):
    groups = groups_of(*folders[:2])
    lines = recall_by_length(groups)
    assert [axes.get_title("left") for axes in lines.axes[:3]] == list(TASKS)
    share = lines.axes[0]
    shown = [container.lines[0].get_ydata() for container in share.containers]
    assert len(shown) == 4  # two runs, the whole context and the short one
    assert np.isnan(shown[1][0]) and shown[1][1] == 0  # at 1,024 nothing is shorter
    maps = recall_by_depth(groups)
    titles = [title for axes in maps.axes if (title := axes.get_title("left"))]
    assert titles == ["one_key", "json"]  # frequent words have no depth
    (cell,) = (
        c for c in groups[1].first.recall["cells"]
        if (c["task"], c["length"], c["depth"]) == ("json", LENGTHS[1], DEPTHS[1])
    )  # fmt: skip
    image = maps.axes[3].get_images()[0].get_array()
    assert image[1, 1] == np.mean(cell["right"])


def test_a_model_that_was_not_trained_leaves_the_panels_to_those_that_were(folders, tmp_path):
    write_recall(tmp_path / "before", better=-50)
    with_base = groups_of(*folders[:2], tmp_path / "before")
    for plot in (recall_by_length, recall_difference):
        nats = [plot(groups).axes[-1] for groups in (with_base[:2], with_base)]
        assert nats[0].get_ylim() == nats[1].get_ylim()
        lines = [container.lines[0].get_ydata() for container in nats[1].containers]
        assert max(np.nanmax(line) for line in lines) > 40
        assert "all but before" in plot(with_base)._supxlabel.get_text()


def test_results_come_first_and_training_last(folders, tmp_path):
    text = write_report(folders, tmp_path, None)
    page = (tmp_path / "report.html").read_text()
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles[:2] == ["Results", "Recall: what differs"]
    assert titles[2:4] == ["Recall by length", "Recall by depth"]
    assert titles[-1] == "Losses during training"
    assert (tmp_path / "recall_by_depth.png").exists()
    assert text.startswith("## Results\n\ndense: better in recall nats at 1k")
    assert re.search("\n\ndifference to uniform +seeds +recall at 1k", text)
    assert "4 samples of each task, length and depth in sentences" in text


def test_recall_during_training_has_curves(tmp_path):
    folder = write_run(tmp_path / "run")
    write_metrics(folder / "metrics.jsonl", 0.0, False)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines = [json.dumps({**json.loads(x), "recall/one_key/64/right": 0.5}) for x in lines]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_report([str(folder)], tmp_path / "report", None)
    assert (tmp_path / "report" / "recall_curves.png").exists()
    assert not (tmp_path / "report" / "recall_by_length.png").exists()


def test_tables_as_markdown(folders, tmp_path):
    lines = write_report(folders[:2], tmp_path, None, markdown=True).splitlines()
    place = lines.index("| recall, share of answers right | 1,024 | 4,096 |")
    assert lines[place + 1] == "| :-- | --: | --: |"
    assert all(line.count("|") == 4 for line in lines[place : place + 10])


def test_a_damaged_recall_file_is_one_line(tmp_path):
    for content in ("{", "[]", '{"format": "else"}'):
        (tmp_path / "recall.json").write_text(content)
        with pytest.raises(InputError, match="recall.json") as error:
            read_run(Path(tmp_path))
        assert "\n" not in str(error.value)
    content = json.loads(Path(write_recall(tmp_path) / "recall.json").read_text())
    for changed in (
        content | {"settings": {k: v for k, v in content["settings"].items() if k != "samples"}},
        content
        | {
            "cells": [
                c | {k: [] for k in ("nats", "tokens", "right", "short_nats", "short_right")}
                for c in content["cells"]
            ]
        },
    ):
        (tmp_path / "recall.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match="recall.json"):
            read_run(tmp_path)
