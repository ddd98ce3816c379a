"""Three schemes of two seeds each: one line each, marks only where sure, costs, and the page."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lctw_megatron.config.load import dump_yaml
from lctw_megatron.errors import InputError
from lctw_megatron.report.benchmarks import benchmark_table
from lctw_megatron.report.comparisons import judge, overview_table, reading_lines, verdict_lines
from lctw_megatron.report.cost import cost_table, cost_words, training_cost
from lctw_megatron.report.groups import Group
from lctw_megatron.report.left_out import left_out
from lctw_megatron.report.report import write_report
from lctw_megatron.report.result_tables import weight_table
from lctw_megatron.report.runs import read_run, read_runs
from lctw_megatron.training.flops import step_flops
from tests.evaluation.tiny_run import make_run
from tests.report.written_runs import groups_of, write_recall, write_run

SCHEMES = {"uniform": 0.0, "dense": 0.5, "rho": 0.0}
RANKS, SECONDS = 4, 0.5


def write_harness(folder: Path, score: float, error: float = 0.02) -> None:
    records = [
        {"task": "arc_easy", "length": None, "main": "acc", "metrics": {"acc": [score, error]}},
        {"task": "ruler_vt", "length": 4096, "main": "score", "metrics": {"score": [0.5, None]}},
    ]
    content = {"format": "lctw-megatron harness 1", "settings": {}, "results": records}
    content["ruler"] = {"4096": {"mean": 0.5, "error": 0.1, "tasks": ["ruler_vt", "ruler_cwe"]}}
    (folder / "harness.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("study")
    for scheme, better in SCHEMES.items():
        for seed in (1, 2):
            folder = root / f"{scheme}-seed{seed}"
            write_recall(write_run(folder, better=better, weighted=scheme != "uniform"), better)
            write_harness(folder, 0.5 + 0.2 * (scheme == "rho") + 0.01 * seed)
            values = {"scheme": scheme} | ({"keep_fraction": 0.5} if scheme == "rho" else {})
            config = make_run(root, "data/train", "data/held_out", weighting=values, seed=seed)
            (folder / "run.yaml").write_text(dump_yaml(config))
            work = step_flops(config)
            lines = [
                json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
            ]
            for line in lines:
                line["speed/seconds"] = SECONDS
                line["speed/tokens_per_second"] = 4 * 64 / SECONDS
                line["speed/tflops_per_rank"] = work / SECONDS / RANKS / 1e12
            text = "\n".join(json.dumps(line) for line in lines[::10] + lines[-1:])
            (folder / "metrics.jsonl").write_text(text + "\n")
    return [str(root / f"{scheme}-seed{seed}") for scheme in SCHEMES for seed in (1, 2)]


@pytest.fixture(scope="module")
def groups(folders):
    return groups_of(*folders)


def test_the_overview_has_a_line_a_group_and_marks_what_is_sure(groups):
    heading, baseline, dense, rho = overview_table(groups)
    assert heading[:3] == ["difference to uniform", "seeds", "recall at 1k"]
    assert heading[3:8] == [
        "recall at 4k", "recall nats at 4k", "loss after 32", "loss before 16",
        "loss on far targets",
    ]  # fmt: skip
    assert baseline[:2] == ["uniform itself", "2"] and dense[:2] == ["dense", "2"]
    assert dense[4] == "-0.500 ±0.000 ✓" and dense[7] == "-0.500 ±0.000 ✓"
    assert rho[4] == rho[7] == "+0.000 ±0.000"
    assert not any("✓" in cell or "✗" in cell for cell in rho + baseline)


def test_the_sentences_name_where_and_of_how_many(groups):
    dense, rho = verdict_lines(groups[0], judge(groups))
    reading, few = reading_lines(groups, judge(groups))
    assert "more than 2 standard errors" in reading and "Of 22 comparisons about 1" in reading
    assert few == (
        "From 4 samples of a task, length and depth and from 6 sequences ± is itself a guess: "
        "measure more of them."
    )
    assert dense.startswith("dense: better in recall nats at 1k, 4k; loss ")
    assert "on far targets" in dense and "worse" not in dense and "benchmark" not in dense
    cost = "for 1.00 × the CPU rank hours and 1.00 × the FLOPs of a run."
    assert rho == f"rho: better in benchmark arc_easy (of 11 comparisons), {cost}"


def test_what_a_run_cost_is_said_beside_the_baseline(groups):
    twice = {"speed/seconds": 2 * SECONDS, "speed/tokens_per_second": 4 * 64 / (2 * SECONDS)}
    double = [line | twice for line in groups[1].first.metrics]
    assert "for 1.00 × the CPU rank hours" in cost_words(groups[1], groups[0])
    run = replace(groups[1].first, metrics=double[:-1])
    assert "× the CPU rank hours and 0.8" in cost_words(Group("dense", (run,)), groups[0])
    unknown = replace(run, metrics=[*double[:-1], {**double[-1], "speed/seconds": math.nan}])
    assert cost_words(Group("dense", (unknown,)), groups[0]) == ", for 1.00 × the FLOPs of a run"
    assert cost_words(Group("no", (replace(run, config=None),)), groups[0]) == ""


def test_one_seed_is_said(groups):
    found = groups_of(*(group.first.folder for group in groups))
    assert any("All have one seed" in line for line in reading_lines(found, judge(found)))


def test_a_seed_that_is_left_out_is_not_counted(groups):
    def other_sequences(run):
        return replace(run, evaluation=run.evaluation | {"sequences": [[9, 9]]}, recall=None)

    ours, dense, rho = groups
    left = Group("dense", (dense.first, other_sequences(dense.runs[1])))
    part = Group("rho", (rho.first, replace(rho.runs[1], recall=None)))
    found = [ours, left, part]
    assert [row[1] for row in overview_table(found)[1:]] == ["2", "1", "1 to 2"]
    lines = reading_lines(found, judge(found))
    # Of the benchmarks both seeds of dense count.
    assert any(
        line.startswith("dense (in part), rho (in part): fewer or other seeds than uniform")
        for line in lines
    )
    alone = [ours, Group("dense", tuple(replace(run, harness=None) for run in left.runs))]
    lines = reading_lines(alone, judge(alone))
    assert any(line.startswith("dense: fewer or other seeds than uniform") for line in lines)


def test_hours_count_every_step_and_rank_also_those_that_were_not_logged(groups):
    run = groups[0].first
    cost = training_cost(run)
    assert len(run.metrics) == 7 and cost.steps == 60
    assert cost.tokens == 60 * 4 * 64
    assert cost.hours == pytest.approx(60 * SECONDS * RANKS / 3600)
    assert cost.flops == 60 * step_flops(run.config)
    heading, row = cost_table(groups)[:2]
    assert heading[4] == "CPU rank hours" and row[:4] == ["uniform", "2", "60", "15,360"]
    assert float(row[5]) == pytest.approx(2 * float(row[4]), rel=0.01)


def test_benchmarks_are_a_row_each_and_marked(groups):
    rows = benchmark_table(groups)
    assert rows[0] == ["benchmark", "uniform", "dense", "rho"]
    # 0.51 and 0.52: s² / 2 = 0.005², and 0.02 of the samples.
    assert rows[1] == ["arc_easy", "0.515 ±0.021", "0.515 ±0.021", "0.715 ±0.021 ✓"]
    assert rows[2][0] == "ruler_vt at 4k" and rows[3][0] == "ruler, 2 of 13 tasks at 4k"


def with_harness(folder: Path, results: list[dict[str, Any]], ruler: dict[str, Any]) -> Path:
    write_run(folder)
    content = {"format": "lctw-megatron harness 1", "results": results, "ruler": ruler}
    (folder / "harness.json").write_text(json.dumps(content))
    return folder


def test_means_over_other_tasks_of_ruler_or_other_samples_are_not_compared(tmp_path):
    def mean(name: str, tasks: list[str], score: float, samples: int) -> str:
        results = [
            {"task": task, "length": 4096, "main": "score", "metrics": {"score": [score, 0.01]},
             "samples": samples}
            for task in tasks
        ]  # fmt: skip
        ruler = {"4096": {"mean": score, "error": 0.01, "tasks": tasks}}
        return str(with_harness(tmp_path / name, results, ruler))

    folders = [
        mean("plain", ["ruler_cwe", "ruler_fwe"], 0.2, 100),
        mean("other_tasks", ["niah_single_1", "ruler_fwe"], 0.9, 100),
        mean("fewer_samples", ["ruler_cwe", "ruler_fwe"], 0.9, 50),
        mean("like_plain", ["ruler_fwe", "ruler_cwe"], 0.9, 100),
    ]
    table = benchmark_table(groups_of(*folders))
    (row,) = [row for row in table if row[0] == "ruler, 2 of 13 tasks at 4k"]
    assert [cell.endswith("✓") for cell in row[1:]] == [False, False, False, True]


def test_each_number_of_shots_is_a_row(tmp_path):
    def shots(name: str, order: list[tuple[int | None, float]]) -> str:
        results = [
            {"task": "mmlu", "main": "acc", "metrics": {"acc": [value, 0.001]}, "fewshot": n or 0,
             "call": {"task": "mmlu", "length": None, "fewshot": n}}
            for n, value in order
        ]  # fmt: skip
        return str(with_harness(tmp_path / name, results, {}))

    plain, dense = (
        shots("plain", [(5, 0.40), (None, 0.33)]),
        shots("dense", [(None, 0.25), (5, 0.41)]),
    )
    rows = benchmark_table(groups_of(plain, dense))
    assert [row[0] for row in rows[1:]] == ["mmlu, 5 shots", "mmlu"]
    assert rows[1][2] == "0.410 ±0.001 ✓" and rows[2][2] == "0.250 ±0.001 ✗"


def test_of_a_perplexity_less_is_better(folders, tmp_path):
    made = []
    for name, value in (("one", 9.0), ("two", 5.0)):
        made.append(write_run(tmp_path / name))
        record = {"task": "wikitext", "length": None, "main": "word_perplexity"}
        record |= {"metrics": {"word_perplexity": [value, 0.1]}, "lower_is_better": True}
        content = {"format": "lctw-megatron harness 1", "results": [record], "ruler": {}}
        (made[-1] / "harness.json").write_text(json.dumps(content))
    found = groups_of(*made)
    assert benchmark_table(found)[1] == ["wikitext", "9.000 ±0.100", "5.000 ±0.100 ✓"]
    assert any(
        "better in benchmark wikitext" in line for line in verdict_lines(found[0], judge(found))
    )


def test_hours_of_a_run_that_went_on_on_other_ranks_are_those_of_its_lines(groups):
    run = groups[0].first
    work, metrics = step_flops(run.config), [dict(line) for line in run.metrics]
    metrics[-1]["speed/tflops_per_rank"] = work / SECONDS / (2 * RANKS) / 1e12
    steps = metrics[-1]["step"] - metrics[-2]["step"]
    hours = training_cost(replace(run, metrics=metrics)).hours
    assert hours == pytest.approx((60 + steps) * SECONDS * RANKS / 3600)


def test_what_a_run_cost_that_went_on_with_another_batch_size_is_what_its_lines_say(groups):
    run = groups[0].first
    metrics = [dict(line) for line in run.metrics]
    steps = metrics[-1]["step"] - metrics[-2]["step"]
    # The last steps took half of the sequences in half of the time; run.yaml has what they had.
    training = run.config.training.model_copy(update={"global_batch_size": 2})
    config = run.config.model_copy(update={"training": training})
    metrics[-1]["speed/seconds"] /= 2
    cost = training_cost(replace(run, metrics=metrics, config=config))
    assert cost.tokens == (60 * 4 - steps * 2) * 64
    assert cost.flops == pytest.approx((60 - steps / 2) * step_flops(run.config))
    assert cost.hours == pytest.approx((60 - steps / 2) * SECONDS * RANKS / 3600)


def test_a_task_that_one_group_alone_has_leaves_the_others_compared(groups):
    run = groups[1].first
    settings = run.recall["settings"] | {"tasks": [*run.recall["settings"]["tasks"], "code"]}
    more = replace(run, recall=run.recall | {"settings": settings})
    assert overview_table([groups[0], Group("dense", (more,))])[0][2] == "recall at 1k"
    assert overview_table([groups[0], Group("dense", (more,))])[2][2] != "-"


def test_weights_are_shown_of_who_has_any(groups):
    rows = weight_table(groups)
    assert [row[0] for row in rows[1:]] == ["uniform", "dense", "rho"]
    assert rows[2][1] == "0.4" and weight_table(groups[:1]) == rows[:1]


def test_what_was_measured_on_other_samples_than_its_group_is_said(folders, groups, tmp_path):
    other = write_recall(tmp_path / "uniform-seed3", seed=1)
    config = groups[0].first.config.model_copy(update={"seed": 3})
    (other / "run.yaml").write_text(dump_yaml(config))
    found = groups_of(*folders, other)
    assert len(found[0].runs) == 3
    lines = [line for line in left_out(found) if ": recall: " in line]
    assert lines == [
        "uniform: recall: uniform-seed3 left out, measured on other samples than uniform-seed1."
    ]
    assert overview_table(found)[1:3] == overview_table(groups)[1:3]


def test_the_page_says_results_first_and_training_last(folders, tmp_path):
    text = write_report(folders, tmp_path, None, markdown=True, baseline=folders[3])
    page = (tmp_path / "report.html").read_text()
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert "<h1>uniform, rho against dense</h1>" in page
    # The first thing that one reads, before table and explanation.
    places = [page.index(text) for text in ("<h2>", "uniform: worse in", "<table>", "by chance")]
    assert places == sorted(places)
    assert text.index("uniform: worse in") < text.index("| difference to dense")
    assert titles[0] == "Results" and titles[-1] == "The weights during training"
    for title in ("Benchmarks", "Held-out loss", "What training took", "The runs"):
        assert title in titles and f"## {title}" in text
    assert 'class="better"' in page and 'class="worse"' in page
    assert page.count("<details>") == page.count("</details>") == 2  # the text of two schemes
    assert "| difference to dense | seeds |" in text


def test_the_baseline_may_be_given_beside_the_runs(folders):
    runs, first = read_runs(folders[2:4], baseline=folders[0])
    assert [run.name for run in runs] == ["uniform-seed1", "dense-seed1", "dense-seed2"]
    assert first is runs[0]
    runs, first = read_runs(folders[:4], baseline=folders[2])
    assert len(runs) == 4 and first.name == "dense-seed1"


def test_runs_evaluated_at_another_length_are_shown_but_not_compared(folders, tmp_path):
    short = write_run(tmp_path / "short", sequence_length=32)
    evaluation = json.loads((short / "evaluation.json").read_text())
    for key in ("loss", "targets", "bins", "gain"):
        evaluation["position"][key] = evaluation["position"][key][:9]
    for key in ("sequence_loss", "sequence_targets"):
        evaluation["position"][key] = [row[:9] for row in evaluation["position"][key]]
    (short / "evaluation.json").write_text(json.dumps(evaluation))
    assert overview_table(groups_of(folders[0], short))[2][5:8] == [
        "-",
        "other samples",
        "other samples",
    ]
    assert "short" in write_report([folders[0], str(short)], tmp_path / "out", None)
    # Seeds of one group, too.
    config = dump_yaml(read_run(folders[0]).config.model_copy(update={"seed": 9}))
    (short / "run.yaml").write_text(config)
    assert "left out" in write_report([folders[0], str(short)], tmp_path / "seeds", None)


@pytest.mark.parametrize("content", ["[]", "{", '"results": [1]', '"results": [{"task": "a"}]'])
def test_a_damaged_harness_file_is_one_line(tmp_path, content):
    if content.startswith('"'):
        content = f'{{"format": "lctw-megatron harness 1", {content}}}'
    (tmp_path / "harness.json").write_text(content)
    with pytest.raises(InputError, match="harness.json") as error:
        read_run(tmp_path)
    assert "\n" not in str(error.value)


def test_a_run_with_benchmarks_only_can_be_reported(tmp_path):
    write_harness(tmp_path, 0.5)
    assert read_run(tmp_path).harness
    assert "arc_easy" in write_report([str(tmp_path)], tmp_path / "out", None)
