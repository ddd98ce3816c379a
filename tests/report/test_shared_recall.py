"""Runs asked for their recall at other depths, of other tasks, or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest

from lctw_megatron.config.load import dump_yaml
from lctw_megatron.evaluation.recall_result import select
from lctw_megatron.report import measures
from lctw_megatron.report.comparisons import overview_table
from lctw_megatron.report.estimate import difference
from lctw_megatron.report.left_out import left_out
from lctw_megatron.report.recall_table import recall_lines
from lctw_megatron.report.report import write_report
from lctw_megatron.report.result_tables import unfinished
from lctw_megatron.report.runs import read_runs
from lctw_megatron.report.shared_recall import with_shared_depths
from lctw_megatron.report.shared_samples import with_shared_samples
from tests.evaluation.tiny_run import make_run
from tests.report.written_runs import DEPTHS, LENGTHS, TASKS, groups_of, write_recall, write_run

FIVE, THREE = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.5, 1.0)


@pytest.fixture
def write(tmp_path: Path):
    """Writes a run of a scheme and order and what recall it was asked for."""

    def one(scheme: str, order: int, **recall) -> str:
        folder = write_recall(write_run(tmp_path / f"{scheme}-seed{order}"), **recall)
        config = make_run(
            tmp_path, "data/train", "data/held_out", weighting={"scheme": scheme}, seed=order
        )
        (folder / "run.yaml").write_text(dump_yaml(config))
        return str(folder)

    return one


def test_seeds_and_schemes_are_compared_at_the_depths_that_all_have(write) -> None:
    folders = [
        write("uniform", 1, depths=FIVE),
        write("uniform", 2, depths=THREE, better=0.2),
        write("dense", 1, depths=FIVE, better=0.5),
        write("dense", 2, depths=FIVE, better=0.7),
    ]
    groups, lines = with_shared_depths(groups_of(*folders))
    assert lines == [
        "Recall is compared at the depths that all have: without 0.25, 0.75, at which "
        "uniform-seed2 was not asked."
    ]
    uniform, dense = (measures.recall(group, ["json"], LENGTHS[1], "nats") for group in groups)
    assert uniform.seeds == dense.seeds == (1, 2)
    cells = [select(groups[0].first.recall, "json", LENGTHS[1], depth)[0] for depth in THREE]
    by_hand = np.sum([c["nats"] for c in cells]) / np.sum([c["tokens"] for c in cells])
    assert uniform.by_seed == pytest.approx([by_hand, by_hand - 0.2])
    assert difference(dense, uniform).mean == pytest.approx(-0.5)
    assert left_out(groups) == []


def test_a_depth_that_one_cell_lacks_is_said_with_its_task_and_length(write) -> None:
    folders = [write("uniform", 1), write("dense", 1)]
    path = Path(folders[1]) / "recall.json"
    content = json.loads(path.read_text())
    content["cells"].remove(select(content, "json", LENGTHS[1], DEPTHS[0])[0])
    path.write_text(json.dumps(content))
    _, lines = with_shared_depths(groups_of(*folders))
    assert lines == [
        "Recall is compared at the depths that all have: without 0.0 of json at 4k, at which "
        "dense-seed1 was not asked."
    ]
    content["cells"] = [cell for cell in content["cells"] if cell["depth"] != DEPTHS[0]]
    path.write_text(json.dumps(content))
    _, lines = with_shared_depths(groups_of(*folders))
    assert lines == [
        "Recall is compared at the depths that all have: without 0.0, at which dense-seed1 was "
        "not asked."
    ]


def test_a_task_that_a_seed_lacks_is_not_in_the_means_and_is_named(write) -> None:
    folders = [write("uniform", 1), write("uniform", 2, tasks=TASKS[:2]), write("dense", 1)]
    groups, lines = with_shared_depths(groups_of(*folders))
    assert lines == [
        "Recall in the mean of tasks is without frequent_words, which uniform-seed2 lacks."
    ]
    assert measures.recall(groups[0], measures.shared_tasks(groups), 1024, "right").seeds == (1, 2)
    assert left_out(groups) == [
        "uniform: recall: uniform-seed2 was not, or not in all, measured; what it lacks is the "
        "mean of the others."
    ]


def test_a_run_of_other_samples_narrows_nothing(write) -> None:
    folders = [write("uniform", 1, depths=FIVE), write("dense", 1, depths=(0.5,), seed=3)]
    groups, lines = with_shared_depths(groups_of(*folders))
    assert lines == [] and len(select(groups[0].first.recall, "json", 1024)) == 5
    heading, _, dense = overview_table(groups)
    assert dense[heading.index("recall at 1k")] == "other samples"
    # No depth in common is no sample in common.
    folders = [folders[0], write("dense", 2, depths=(0.1, 0.9))]
    groups, lines = with_shared_depths(groups_of(*folders))
    assert lines == [] and overview_table(groups)[2][2] == "other samples"


def test_another_short_context_than_the_others_is_said(write) -> None:
    folders = [write("uniform", 1), write("dense", 1), write("dense", 2)]
    assert "with the last 1,024 tokens" in recall_lines(groups_of(*folders))[0]
    path = Path(folders[2]) / "recall.json"
    content = json.loads(path.read_text())
    content["settings"]["window"] = 8192
    path.write_text(json.dumps(content))
    (line,) = recall_lines(groups_of(*folders))
    assert "with the last 1,024 (uniform-seed1, dense) or 8,192 (dense) tokens" in line


def test_a_seed_without_evaluation_is_named(write) -> None:
    folders = [write("uniform", 1), write("uniform", 2), write("dense", 1)]
    (Path(folders[1]) / "evaluation.json").unlink()
    (line,) = left_out(groups_of(*folders))
    assert line.startswith("uniform: held-out losses: uniform-seed2 was not")


def test_a_folder_with_recall_only_is_a_baseline_and_what_it_lacks_is_said(
    write, tmp_path: Path
) -> None:
    before = write_recall(tmp_path / "before", better=-1.0)
    run = write("uniform", 1, depths=(*DEPTHS, 0.5))
    text = write_report([run], None, None, baseline=str(before))
    assert "before: only recall.json, nothing of its training or held-out losses." in text
    assert "at the depths that all have: without 0.5, at which before was not asked." in text
    assert "uniform-seed1: better in recall nats at 1k, 4k" in text


def test_runs_asked_more_samples_are_compared_on_those_that_all_have(write) -> None:
    folders = [
        write("uniform", 1, samples=7),
        write("uniform", 2, samples=4, better=0.2),
        write("dense", 1, samples=9, better=0.5),
        write("dense", 2, samples=9, seed=5),
    ]
    groups, lines = with_shared_samples(groups_of(*folders))
    assert lines == [
        "Recall is compared on the first 4 samples of each task, length and depth, which all have; "
        "more were asked of uniform-seed1, dense-seed1."
    ]
    uniform, dense = (measures.recall(group, ["json"], LENGTHS[1], "nats") for group in groups)
    assert uniform.seeds == (1, 2) and dense.seeds == (1,)  # the other has samples of its own
    assert uniform.by_seed[0] - uniform.by_seed[1] == pytest.approx(0.2)
    assert difference(dense, uniform).mean == pytest.approx(-0.5 + 0.1)
    cells = select(json.loads((Path(folders[0]) / "recall.json").read_text()), "json", LENGTHS[1])
    by_hand = sum(sum(c["nats"][:4]) for c in cells) / sum(sum(c["tokens"][:4]) for c in cells)
    assert uniform.by_seed[0] == pytest.approx(by_hand)
    assert recall_lines(groups)[0].startswith("Recall: 4 (uniform, dense) or 9 (dense) samples")
    assert len(groups[1].runs[1].recall["cells"][0]["nats"]) == 9


def test_all_depths_of_a_run_keep_equally_many_samples_and_so_do_those_compared_with_it(
    write,
) -> None:
    folders = [
        write("uniform", 1, depths=(0.1,), samples=9),
        write("uniform", 2, depths=(0.0, 1.0), samples=7),
        write("dense", 1, depths=(0.0, 0.5, 1.0), samples=5),
        write("dense", 2, depths=(0.5,), samples=3),
    ]
    groups, _ = with_shared_samples(groups_of(*folders))
    sizes = [
        {len(cell["nats"]) for cell in select(run.recall, "json", LENGTHS[0])}
        for group in groups
        for run in group.runs
    ]
    assert sizes == [{9}, {3}, {3}, {3}]
    assert overview_table(with_shared_depths(groups)[0])


def test_the_overview_shows_the_lengths_that_can_be_compared(write) -> None:
    folders = [write("uniform", 1), write("dense", 1, better=0.5)]
    path = Path(folders[1]) / "recall.json"
    content = json.loads(path.read_text())
    content["settings"]["lengths"] = [LENGTHS[0], 9000]
    for cell in content["cells"]:
        cell["length"] = cell["length"] if cell["length"] == LENGTHS[0] else 9000
    path.write_text(json.dumps(content))
    heading, _, dense = overview_table(groups_of(*folders))
    assert heading[2:4] == ["recall at 1k", "recall nats at 1k"]
    assert dense[3] == "-0.500 ±0.000 ✓"
    content["settings"]["lengths"] = [9000]
    content["cells"] = [cell for cell in content["cells"] if cell["length"] == 9000]
    path.write_text(json.dumps(content))
    assert "recall at 9000" in overview_table(groups_of(*folders))[0]


def test_a_file_of_before_is_what_another_is_cut_to_but_not_cut(write) -> None:
    few, many = write("uniform", 1), write("dense", 1, samples=9, better=0.5)
    for old, compared in ((few, True), (many, False)):
        path = Path(old) / "recall.json"
        kept, content = path.read_text(), json.loads(path.read_text())
        for cell in content["cells"]:
            del cell["digests"]
        path.write_text(json.dumps(content))
        groups, lines = with_shared_samples(groups_of(few, many))
        assert bool(lines) is compared
        assert ("other samples" not in overview_table(groups)[2]) is compared
        path.write_text(kept)


def test_a_run_that_is_not_finished_or_was_measured_before_its_end_is_said(write) -> None:
    done, half = write("uniform", 1), write("dense", 1, checkpoint="runs/checkpoints/step_00000040")
    config = (Path(half) / "run.yaml").read_text()
    assert "steps: 4\n" in config  # of 60 in the metrics
    (Path(half) / "run.yaml").write_text(config.replace("steps: 4\n", "steps: 500\n"))
    assert unfinished(read_runs([done, half])[0]) == [
        "dense-seed1: not finished, at step 60 of 500.",
        "dense-seed1: recall.json is of step 40, but the run is at step 60; measure it again.",
    ]
