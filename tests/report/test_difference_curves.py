"""Groups with other seeds than the first are drawn beside it with the seeds that both have."""

from pathlib import Path

import numpy as np
import pytest

from lctw_megatron.config.load import dump_yaml
from lctw_megatron.report.curve_plots import difference_curves, difference_lines
from lctw_megatron.report.groups import Group, group_runs
from lctw_megatron.report.report import TRAINING, _drawn
from lctw_megatron.report.runs import read_runs
from tests.evaluation.tiny_run import make_run
from tests.report.written_runs import write_run


@pytest.fixture
def groups(tmp_path: Path) -> list[Group]:
    """Far targets of a seed are predicted better by a tenth of it, of a scheme by its part."""
    folders = []
    for scheme, part, seeds in (
        ("uniform", 0.0, (1, 2, 3)),
        ("dense", 0.5, (2, 4)),
        ("sparse", 1.0, (1, 2, 3)),
        ("tf_idf", 2.0, (5,)),
    ):
        for seed in seeds:
            folder = write_run(tmp_path / f"{scheme}-seed{seed}", better=part + seed / 10)
            config = make_run(
                tmp_path, "data/train", "data/held_out", weighting={"scheme": scheme}, seed=seed
            )
            (folder / "run.yaml").write_text(dump_yaml(config))
            folders.append(folder)
    return group_runs(*read_runs(folders))


def far(groups: list[Group]) -> list[np.ndarray]:
    figure = difference_curves(groups)
    (axes,) = [axes for axes in figure.get_axes() if "far" in axes.get_title("left")]
    lines = [line.get_ydata() for line in axes.get_lines()]
    return [np.unique(np.round(line, 6)) for line in lines if len(line) == 60]


def test_seeds_that_both_have_are_paired(groups) -> None:
    assert [line.tolist() for line in far(groups)] == [[-0.5], [-1.0]]
    assert difference_lines(groups) == [
        "Of the seeds that uniform has too: dense.",
        "Not drawn, since trained on other batches than uniform or with none of its seeds: "
        "tf_idf-seed5.",
    ]
    assert difference_lines([groups[0], groups[2]]) == []


def test_a_seed_without_metrics_is_no_pair_and_the_lines_stand_below_the_figure(
    groups, tmp_path
) -> None:
    (tmp_path / "uniform-seed3" / "metrics.jsonl").unlink()
    found = group_runs(*read_runs([run.folder for group in groups for run in group.runs]))
    assert [line.tolist() for line in far(found)] == [[-0.5], [-1.0]]
    figures = tuple(figure for figure in TRAINING if figure[0] == "difference_curves")
    (section,) = _drawn(figures, found, tmp_path)
    assert section.lines[0] == "Of the seeds that uniform has too: dense, sparse."
    assert section.png
    (section,) = _drawn(figures, [found[0], found[3]], tmp_path)
    assert section.png is None and section.lines[0].startswith("Not drawn, since ")
