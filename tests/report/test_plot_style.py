"""Lines of many groups can be told apart, and the legend shows them as they are drawn."""

import pytest

from lctw_megatron.report.curve_plots import loss_curves
from lctw_megatron.report.groups import Group, group_runs
from lctw_megatron.report.plot_style import COLOURS
from lctw_megatron.report.recall_plots import recall_by_length
from lctw_megatron.report.runs import read_runs
from lctw_megatron.report.weight_plots import weight_histogram
from tests.report.written_runs import write_recall, write_run


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> list[Group]:
    """One more than there are colours."""
    root = tmp_path_factory.mktemp("runs")
    folders = [
        write_recall(write_run(root / f"run{number:02}", weighted=True))
        for number in range(len(COLOURS) + 1)
    ]
    return group_runs(*read_runs(folders))


def test_the_second_round_of_colours_has_dashed_lines(groups) -> None:
    figure = loss_curves(groups)
    handles = figure.legends[0].legend_handles
    assert [line.get_linestyle() for line in handles] == ["-"] * len(COLOURS) + ["--"]
    drawn = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    assert drawn == {(line.get_color(), line.get_linestyle()) for line in handles}
    assert len(drawn) == len(groups)


def test_steps_and_bars_of_weights_are_told_apart_too(groups) -> None:
    axes = weight_histogram([group.example for group in groups]).axes[0]
    steps = [patch for patch in axes.patches if type(patch).__name__ == "StepPatch"]
    bars = [bar for container in axes.containers for bar in container]
    for drawn in (steps, bars):
        looks = {(patch.get_edgecolor(), patch.get_linestyle()) for patch in drawn}
        assert len(drawn) == len(looks) == len(groups)
    assert [bar.get_facecolor()[3] for bar in bars] == [1.0] * len(COLOURS) + [0.0]


def test_a_short_context_stays_dotted(groups) -> None:
    panel = recall_by_length(groups).axes[0]
    styles = [container.lines[0].get_linestyle() for container in panel.containers]
    assert sorted(styles) == sorted(["-"] * len(COLOURS) + ["--", ":"])
