"""The study's recipe compares like with like, and its corpus is the same each time."""

import importlib.util
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from lctw_megatron.config.load import load_recipe, resolve_run
from lctw_megatron.launch.stage_graph import build_stage_graph
from lctw_megatron.report.comparisons import overview_table
from lctw_megatron.report.groups import group_runs
from lctw_megatron.report.runs import read_run, read_runs
from lctw_megatron.report.shared_recall import with_shared_depths
from lctw_megatron.report.table import to_markdown

FOLDER = Path(__file__).parents[2] / "recipes" / "study_135m_32k"
RECIPE = str(FOLDER / "recipe.yaml")
RESULTS = FOLDER / "results"
MODEL = resolve_run(load_recipe(RECIPE, ["model=smollm2_135m"]), "uniform-seed1").model


def script(name: str):
    specification = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus():
    return script("corpus")


def test_every_scheme_has_the_same_orders_of_the_data_and_differs_in_nothing_else():
    runs = build_stage_graph(RECIPE, (), lambda _: MODEL).runs
    plain = {run.seed: run for run in runs if run.name.startswith("uniform-")}
    assert sorted(plain) == [1, 2, 3]
    for run in runs:
        scheme = run.name.rpartition("-seed")[0]
        own = {"name": None, "run_dir": None, "weighting": None}
        if scheme.endswith("_more") or "_lr" in scheme:
            own["training"] = None
        like = plain[run.seed]
        assert run.model_copy(update=own) == like.model_copy(update=own), run.name
    assert all(len([r for r in runs if r.seed == seed]) == len(runs) / 3 for seed in plain)


def test_all_runs_are_measured_and_none_exported():
    graph = build_stage_graph(RECIPE, (), lambda _: MODEL)
    kinds = {stage.kind for stage in graph.stages}
    assert kinds == {"prepare", "score", "train", "evaluate", "recall", "report"}
    for kind in ("train", "evaluate", "recall"):
        assert sum(stage.kind == kind for stage in graph.stages) == len(graph.runs)


def tarball(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    return path


def test_the_sources_of_a_directory_are_one_document(corpus, tmp_path):
    source = "int f(void) { return 0; }\n" * 4000
    table = "#define REGISTER 0x1234\n" * 9000
    sources = {
        "k/a/two.c": source, "k/a/one.h": source, "k/b/short.c": "int x;", "k/a/t.h": table,
        "k/a/notes.txt": source * 9, "k/c/t.h": table,
    }  # fmt: skip
    path = tarball(tmp_path / "kernel.tar.xz", sources)
    output = tmp_path / "new" / "code.jsonl"
    assert corpus.main(["code", str(path), "--output", str(output)]) == 0
    (line,) = output.read_text().splitlines()
    expected = f"// k/a/one.h\n{source}\n// k/a/two.c\n{source}"
    assert json.loads(line) == {"source": "k/a", "text": expected}


def test_texts_are_joined_in_their_order_until_they_are_long(corpus, tmp_path):
    folder = tmp_path / "book"
    folder.mkdir()
    for number in range(1, 12):
        (folder / f"chapter_{number}.txt").write_text(f"{number}. " + "word " * 6000)
    (folder / "chapter_12.html").write_text("<head><title>no</title></head><p>The <b>end</b></p>")
    # The tags of the head may be left out.
    (folder / "chapter_13.html").write_text("<head><title>no</title><body><p>Post</p>")
    (folder / "chapter_14.html").write_text("<title>Scriptum</title></head><p>um</p>")
    documents = corpus.prose(folder)
    assert [name for name, _ in documents] == ["book-0", "book-1"]
    starts = [int(line.partition(".")[0]) for line in documents[0][1].splitlines() if line]
    assert starts == [1, 2, 3, 4]
    assert "The end\n\nPost\n\n" in documents[1][1] and "no" not in documents[1][1]
    assert documents[1][1].endswith("um\n\n")


def test_a_part_of_the_documents_is_spread_over_all(corpus):
    documents = [(str(number), "x" * 100) for number in range(10)]
    assert [name for name, _ in corpus.evenly(documents, 300)] == ["0", "3", "6"]
    assert corpus.evenly(documents, None) == corpus.evenly(documents, 10**9) == documents


def test_nothing_long_enough_is_one_line_and_leaves_nothing(corpus, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("short")
    output = tmp_path / "prose.jsonl"
    assert corpus.main(["prose", str(tmp_path), "--output", str(output)]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not output.exists()
    assert corpus.main(["code", str(tmp_path / "no.tar"), "--output", str(output)]) == 1
    assert "no.tar" in capsys.readouterr().err


def test_the_table_of_the_readme_is_that_of_the_results_beside_it():
    runs, first = read_runs(sorted(RESULTS.glob("*/")), RESULTS / "uniform-seed1")
    groups, _ = with_shared_depths(group_runs(runs, first))
    table = to_markdown(overview_table(groups))
    assert table in (FOLDER / "README.md").read_text()


def test_finished_runs_are_kept_without_texts_and_others_are_named(tmp_path, capsys):
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    for name in ("uniform-seed1", "dense75-seed1"):
        shutil.copytree(RESULTS / name, runs / name)
    (runs / "before").mkdir()
    (runs / "uniform-seed1" / "recall.json").rename(runs / "before" / "recall.json")
    evaluation = runs / "dense75-seed1" / "evaluation.json"
    measured = json.loads(evaluation.read_text())
    evaluation.write_text(json.dumps(measured | {"weights": measured["weights"] | {"page": "a"}}))
    assert script("keep").main([str(runs), "--output", str(kept)]) == 0
    assert f"{runs / 'uniform-seed1'}: not finished, left out" in capsys.readouterr().out
    assert sorted(folder.name for folder in kept.iterdir()) == ["before", "dense75-seed1"]
    assert [file.name for file in (kept / "before").iterdir()] == ["recall.json"]
    assert read_run(kept / "before").recall
    for file in (RESULTS / "dense75-seed1").iterdir():
        assert (kept / "dense75-seed1" / file.name).read_bytes() == file.read_bytes()
