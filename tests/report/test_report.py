"""The report of written runs: files, one page that needs nothing else, and the table."""

import json
import os
import re
import shutil
import struct
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lctw_megatron.commands.report import main
from lctw_megatron.config.load import dump_yaml
from lctw_megatron.errors import InputError
from lctw_megatron.report.comparisons import judge, verdict_lines
from lctw_megatron.report.curve_plots import difference_curves, same_batches
from lctw_megatron.report.groups import Group
from lctw_megatron.report.probe_plots import gain_by_distance, loss_by_position
from lctw_megatron.report.report import write_report
from lctw_megatron.report.result_tables import explain, loss_table, run_table
from lctw_megatron.report.runs import read_run, read_runs
from lctw_megatron.report.table import to_text
from lctw_megatron.report.weight_plots import lay_out
from tests.evaluation.tiny_run import make_run
from tests.report.written_runs import groups_of, write_recall, write_run

NOTE = "A run this small proves the road, <b>not</b> the method."
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Checks that tags close in order; collects what a browser would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), f"{name}={value}"
            if name in ("src", "href", "srcset", "data", "action"):
                self.sources.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "uniform")
    write_run(folder / "dense", better=0.25, weighted=True)
    return folder, write_report([str(folder / "uniform"), str(folder / "dense")], None, NOTE)


def test_every_figure_is_written_beside_the_runs(report):
    names = {path.name for path in (report[0] / "report").iterdir()}
    assert names == {
        "report.html",
        "loss_curves.png",
        "loss_by_position.png",
        "loss_by_distance.png",
        "gain_by_distance.png",
        "weight_histogram.png",
        "weight_curves.png",
        "text_dense.png",
    }
    for name in names - {"report.html"}:
        width, height = png_size(report[0] / "report" / name)
        assert width >= 800 and height >= 100, name


def test_a_picture_of_an_earlier_report_does_not_stay_beside_one_that_lacks_it(tmp_path):
    run = write_recall(write_run(tmp_path / "dense", weighted=True))
    (other := tmp_path / "report" / "mine.png").parent.mkdir()
    other.write_bytes(b"somebody's")
    write_report([str(run)], None, None)
    before = {path.name for path in other.parent.iterdir()}
    (run / "recall.json").unlink()
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(evaluation | {"weights": None}))
    write_report([str(run)], None, None)
    assert before - {path.name for path in other.parent.iterdir()} == {
        "recall_by_length.png", "recall_by_depth.png", "weight_histogram.png", "text_dense.png",
    }  # fmt: skip


def test_the_page_is_whole_and_needs_no_network(report):
    text = (report[0] / "report" / "report.html").read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.sources and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]+", "", text))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert NOTE in page.text  # escaped in the source, read back as it was given
    assert "<script>" in page.text and "\x1b" not in text


def test_the_table_tells_near_far_and_first_seen_apart_and_ends_with_note_and_path(report):
    folder, text = report
    lines = text.splitlines()
    assert lines[0] == "## Results" and lines[2].startswith("dense: better in loss after")
    assert lines[4].startswith("difference to uniform")
    assert any(
        re.fullmatch("held-out loss, nats a target +all +near +far +first seen", line)
        for line in lines
    )
    run = read_run(folder / "dense")
    row = next(line for line in lines if line.startswith("dense - uniform"))
    numbers = re.findall(r"[+-]\d\.\d{4}", row)
    assert numbers[2] == "-0.2500" and numbers[1] == numbers[3] == "+0.0000"
    counts = run.evaluation["classes"]["targets"]
    share = counts[1] / sum(counts)
    assert float(numbers[0]) == pytest.approx(-0.25 * share, abs=6e-5)
    assert NOTE in lines and lines[-1] == f"report: {folder / 'report' / 'report.html'}"


def test_gains_on_other_windows_or_other_data_are_not_drawn_beside_the_first(tmp_path):
    settings = {"a": {}, "b": {}, "c": {"window": 32}, "d": {"tokens_fingerprint": "g"}}
    folders = [write_run(tmp_path / name, **changed) for name, changed in settings.items()]
    figure = gain_by_distance(groups_of(*folders))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert len(figure.axes[0].containers) == 2 * 2  # numbers and first seen


def test_with_another_near_only_near_and_far_targets_are_not_compared(tmp_path):
    folders = [str(write_run(tmp_path / name, near=near)) for name, near in (("a", 16), ("b", 8))]
    row = loss_table(groups_of(*folders))[-1]
    assert row == ["b - a", "+0.0000 ±0.0000", "-", "-", "+0.0000 ±0.0000"]
    assert any(
        line.startswith("--near was 16 for a; 8 for b: losses of near and of far targets are")
        for line in explain(read_runs(folders)[0])
    )


def test_differences_have_no_error_where_runs_agree_or_differ_by_a_constant(report):
    rows = loss_table(groups_of(report[0] / "uniform", report[0] / "dense"))
    assert rows[-1][2:] == ["+0.0000 ±0.0000", "-0.2500 ±0.0000 ✓", "+0.0000 ±0.0000"]


def test_runs_measured_on_other_sequences_are_not_compared(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", tokens_fingerprint="other")]
    rows = loss_table(groups_of(*folders))
    assert "not compared" in to_text(rows) and "±" not in to_text(rows)
    for name in ("a", "b"):  # the same tokens, but one other sequence
        evaluation = json.loads((tmp_path / name / "evaluation.json").read_text())
        evaluation["settings"]["tokens_fingerprint"] = "f"
        evaluation["sequences"][0] = [ord(name), 64]
        (tmp_path / name / "evaluation.json").write_text(json.dumps(evaluation))
    assert "not compared" in to_text(loss_table(groups_of(*folders)))


def test_longppl_is_compared_on_the_same_key_tokens_only(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a", "b", "c")]
    for folder, loss, keys in zip(folders, (6.0, 3.0, 3.0), ("k", "k", "other"), strict=True):
        path = folder / "evaluation.json"
        evaluation = json.loads(path.read_text())
        sums = {"sequence_loss": [loss] * 6, "sequence_targets": [3] * 6, "keys": keys}
        path.write_text(json.dumps(evaluation | {"longppl": evaluation["longppl"] | sums}))
    groups = groups_of(*folders)
    rows = loss_table(groups)
    assert rows[0][-1] == "key tokens"
    assert [row[-1] for row in rows[1:]] == [
        "2.0000", "1.0000", "1.0000", "-1.0000 ±0.0000 ✓", "-"
    ]  # fmt: skip
    assert "b: better in loss on key tokens (of " in " ".join(
        verdict_lines(groups[0], judge(groups))
    )
    assert len(rows[0]) == len(rows[-1])


def test_a_run_that_is_still_training_is_drawn_without_evaluation(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "evaluation.json").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 60, "loss/pl')  # torn by a kill
    text = write_report([str(folder)], tmp_path / "out", None)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.html",
        "loss_curves.png",
    }
    assert "tools/evaluate_model.py" in text
    assert len(read_run(folder).metrics) == 60


def test_two_runs_of_one_name_get_their_parents_name_too(tmp_path):
    folders = [write_run(tmp_path / "a" / "main"), write_run(tmp_path / "b" / "main")]
    assert [run.name for run in read_runs([str(f) for f in folders])[0]] == ["a/main", "b/main"]
    write_report([str(folder) for folder in folders], tmp_path / "out", None)
    with pytest.raises(InputError, match="given twice"):
        read_runs([folders[0], tmp_path / "a" / "." / "main"])


def test_why_there_are_no_weights_is_told(tmp_path):
    folder = write_run(tmp_path / "run")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["weights"] = "data/train.bin: no such file"
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    assert "run: no weights shown: data/train.bin: no such file" in write_report(
        [str(folder)], None, None
    )


def test_the_table_of_runs_leaves_out_what_no_run_has(report):
    runs, _ = read_runs([str(report[0] / "uniform"), str(report[0] / "dense")])
    table = run_table(runs)
    assert "peak GiB" not in table[0] and "LongPPL" in table[0]
    assert table[1][table[0].index("tokens/s")] == "7,030"
    assert table[1][table[0].index("steps")] == "60"
    assert any("On 9 key tokens it says nothing" in line for line in explain(runs))
    assert any("near: the target's token last stood at most 16" in line for line in explain(runs))
    # Two runs may have picked key tokens each for itself.
    longppl = runs[1].evaluation["longppl"] | {"evaluator": "itself"}
    other = replace(runs[1], evaluation=runs[1].evaluation | {"longppl": longppl})
    assert (
        "uniform: short context 16 tokens, key tokens picked by runs/base; dense: short context 16 "
        "tokens, key tokens picked by itself. On 9 key tokens"
    ) in explain([runs[0], other])[-1]


def test_a_folder_may_be_called_anything(tmp_path):
    names = ["we ird", "ünï 世界", r"lr$\frac$", "_under", "a|<b>*`", "new\nline", "esc\x1b[31m"]
    folders = [str(write_recall(tmp_path / name)) for name in names]
    folders += [os.fsdecode(os.fsencode(tmp_path) + b"/not\xfftext")]
    shutil.copytree(folders[0], folders[-1])
    text = write_report(folders, tmp_path / "out", None, markdown=True)
    runs, _ = read_runs(folders)
    assert [run.name for run in runs][5:] == ["new\ufffdline", "esc\ufffd[31m", "not\ufffdtext"]
    assert all(line.isprintable() for line in text.split("\n"))
    tables = [line for line in text.split("\n") if line.startswith("|")]
    assert r"| a\|\<b>\*\` |" in "\n".join(tables)


def test_the_legend_has_every_name_as_it_is(tmp_path):
    names = [r"a$\frac$", "_under", "plain"]
    groups = groups_of(*(write_run(tmp_path / name) for name in names))
    figure = loss_by_position(groups)
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names


def test_many_long_names_stay_inside_the_figure(tmp_path):
    names = [f"a_scheme_of_a_long_name_lr1e-{number}" for number in range(12)]
    groups = groups_of(*(write_run(tmp_path / name) for name in names))
    figure = loss_by_position(groups)
    figure.draw_without_rendering()
    (made,) = figure.legends
    assert [text.get_text() for text in made.get_texts()] == names
    assert made.get_window_extent().width <= figure.bbox.width


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", "[1]\n", "neither steps in metrics.jsonl nor"),
        ("evaluation.json", "{", "not valid JSON"),
        ("evaluation.json", '{"format": "another"}', "not a file of the format"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        write_report([str(tmp_path)], tmp_path / "out", None)
    assert name in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match="no such run folder"):
        read_run(tmp_path / "missing")
    with pytest.raises(InputError, match="is this a run folder"):
        read_run(tmp_path)


def test_training_is_compared_step_by_step_where_the_batches_are_the_same(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", better=0.25)]
    for folder in folders:
        config = make_run(tmp_path, "data/train", "data/held_out")
        (folder / "run.yaml").write_text(dump_yaml(config))
    runs, first = read_runs(folders)
    assert same_batches(runs[1], runs[0])
    # Two runs of one configuration, seen as two groups.
    figure = difference_curves([Group("a", (first,)), Group("b", (runs[1],))])
    lines = {axes.get_title("left"): axes.get_lines()[-1].get_ydata() for axes in figure.get_axes()}
    assert list(lines) == ["training, far targets"]  # the others are equal
    assert lines["training, far targets"] == pytest.approx(np.full(60, -0.25))
    config = make_run(tmp_path, "data/train", "data/held_out", seed=7)
    (folders[1] / "run.yaml").write_text(dump_yaml(config))
    runs, first = read_runs(folders)
    assert difference_curves([Group("a", (first,)), Group("b", (runs[1],))]) is None


def test_text_is_laid_out_in_lines_of_cells():
    lines = lay_out(["ab", "\n", "", "cde", "\t"], columns=4)
    assert lines == [
        [("a", 0), ("b", 0), ("\u21b5", 1)],
        [("c", 3), ("d", 3), ("e", 3), (" ", 4)],
        [(" ", 4), (" ", 4), (" ", 4)],
    ]


def test_the_tool_writes_where_it_is_told(report, tmp_path, capsys):
    assert main([str(report[0] / "dense"), "--output", str(tmp_path), "--note", "a note"]) == 0
    shown = capsys.readouterr().out
    assert "a note" in shown and str(tmp_path / "report.html") in shown


@pytest.mark.parametrize("name", ["report.html", "loss_curves.png", "text_dense.png"])
def test_a_file_of_somebody_else_is_not_replaced(report, tmp_path, name):
    """As in a folder of a paper's figures."""
    (tmp_path / name).write_text("mine")
    run = str(report[0] / "dense")
    with pytest.raises(InputError, match=f"{name}: is there and no earlier .*report"):
        write_report([run], tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).unlink()
    for _ in range(2):  # its own it replaces
        write_report([run], tmp_path, None)
    assert (tmp_path / name).read_bytes()[:4] != b"mine"
