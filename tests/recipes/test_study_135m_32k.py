"""The study's recipe compares like with like, and its corpus is the same each time."""

import gzip
import importlib.util
import io
import json
import lzma
import shutil
import tarfile
from pathlib import Path

import pytest

from lctw_megatron.config.load import load_recipe, resolve_run
from lctw_megatron.config.model_sizes import parameters
from lctw_megatron.errors import InputError
from lctw_megatron.launch.stage_graph import build_stage_graph
from lctw_megatron.report.comparisons import overview_table
from lctw_megatron.report.groups import group_runs
from lctw_megatron.report.runs import read_run, read_runs
from lctw_megatron.report.shared_recall import with_shared_depths
from lctw_megatron.report.table import to_markdown

FOLDER = Path(__file__).parents[2] / "recipes" / "study_135m_32k"
RECIPE = str(FOLDER / "recipe.yaml")
RESULTS = FOLDER / "results"
MODEL_FOLDER = "models/smollm2_135m"
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
    runs = build_stage_graph(RECIPE, (), lambda *_: MODEL).runs
    plain = {run.seed: run for run in runs if run.name.startswith("uniform-")}
    assert sorted(plain) == [1, 2, 3]
    for run in runs:
        scheme = run.name.rpartition("-seed")[0]
        own = {"name": None, "run_dir": None, "weighting": None}
        if "_more" in scheme or "_lr" in scheme:
            own["training"] = None
        like = plain[run.seed]
        assert run.model_copy(update=own) == like.model_copy(update=own), run.name
    # The learning rates that are only looked at have one order.
    tried = {"uniform_lr1e-4-seed1", "uniform_lr3e-3-seed1", "dense75_lr3e-3-seed1"}
    names = {run.name for run in runs}
    assert tried <= names
    schemes = {name.rpartition("-seed")[0] for name in names - tried}
    assert names - tried == {f"{scheme}-seed{seed}" for scheme in schemes for seed in plain}


def test_all_runs_are_measured_and_none_exported():
    graph = build_stage_graph(RECIPE, (), lambda *_: MODEL)
    kinds = {stage.kind for stage in graph.stages}
    assert kinds == {"prepare", "score", "train", "evaluate", "recall", "report"}
    for kind in ("train", "evaluate", "recall"):
        assert sum(stage.kind == kind for stage in graph.stages) == len(graph.runs)


FURTHER = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "recipe.yaml")
OWN = {
    "scorer": {"weighting", "data"},
    "windows": {"weighting", "data"},
    "code": {"weighting", "data"},
    "prose": {"weighting", "data"},
    "longer": {"weighting", "training"},
    "selection": {"weighting", "data"},
}
"""What the runs of each further recipe may have of their own beside name and folder."""


@pytest.mark.parametrize("path", FURTHER, ids=lambda path: path.stem)
def test_a_further_recipe_runs_and_differs_from_uniform_in_its_question_alone(path):
    first = build_stage_graph(RECIPE, (), lambda *_: MODEL)
    plain = {run.seed: run for run in first.runs if run.name.startswith("uniform_lr1e-3-")}
    graph = build_stage_graph(str(path), (), lambda *_: MODEL)
    scorers = {run.name for run in graph.runs if run.start != MODEL_FOLDER}
    assert scorers == ({"small"} if path.stem == "scorer" else set())
    compared = [run for run in graph.runs if run.name not in scorers]
    own = {"name", "run_dir"} | OWN[path.stem]
    waits = {stage.name for stage in graph.stages if "score" in stage.needs}
    weighted = {f"train-{run.name}" for run in compared if run.weighting.scheme != "uniform"}
    assert waits == (weighted if path.stem != "selection" else set())
    for run in compared:
        like = plain[run.seed].model_dump(exclude=own)
        assert run.model_dump(exclude=own) == like, run.name
        assert run.data.sequence_length == 32768 and run.data.packing == "chunk"
    names = {run.name for run in compared}
    assert not names & {run.name for run in first.runs}
    for kind in ("evaluate", "recall"):
        assert sum(stage.kind == kind for stage in graph.stages) == len(names)
    ours, theirs = graph.recipe.evaluation, first.recipe.evaluation
    free = {"note": None, "compare_with": []}
    assert ours.model_copy(update=free) == theirs.model_copy(update=free)
    assert set(ours.compare_with) <= {run.run_dir for run in first.runs}


def test_no_two_recipes_write_into_one_run_or_one_sidecar():
    graphs = [build_stage_graph(str(path), (), lambda *_: MODEL) for path in [RECIPE, *FURTHER]]
    folders = [run.run_dir for graph in graphs for run in graph.runs]
    assert len(set(folders)) == len(folders)
    names = [run.name for graph in graphs for run in graph.runs]
    assert len(set(names)) == len(names)  # keep.py puts them side by side
    scores = {
        (stage.output, stage.arguments)
        for graph in graphs
        for stage in graph.stages
        if stage.kind == "score"
    }
    assert len({output for output, _ in scores}) == len(scores)


def test_the_small_scorer_has_the_size_and_the_window_that_are_said():
    recipe = load_recipe(str(FOLDER / "scorer.yaml"))
    small = resolve_run(recipe, "small")
    assert round(parameters(small.model) / 1e6, 1) == 12.6
    assert small.model.vocab_size == MODEL.vocab_size and recipe.scoring.scorer == small.name
    assert small.data.sequence_length == recipe.scoring.window


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


def test_what_was_held_out_is_trained_on_in_no_part_of_the_corpus(corpus, tmp_path, capsys):
    lines = [json.dumps({"source": str(n), "text": f"text {n}\u2028"}) + "\n" for n in range(5)]
    (tmp_path / "code.jsonl").write_text("".join(lines))
    held_out = tmp_path / "held.jsonl"
    held_out.write_text(json.dumps({"text": "text 3\u2028", "document": 3}, ensure_ascii=False))
    output = tmp_path / "code-trained.jsonl"
    arguments = ["trained", str(tmp_path / "code.jsonl"), "--output", str(output)]
    assert corpus.main([*arguments, "--held-out", str(held_out)]) == 0
    assert output.read_text() == "".join(lines[:3] + lines[4:])
    output.unlink()
    held_out.write_text(json.dumps({"text": "another"}))
    with pytest.raises(InputError, match="no document of the inputs is held out"):
        corpus.main([*arguments, "--held-out", str(held_out)])
    held_out.write_text("".join(lines))
    with pytest.raises(InputError, match="none is left to train on"):
        corpus.main([*arguments, "--held-out", str(held_out)])
    for damaged in ('{"text": 1}', "{"):
        held_out.write_text(lines[0] + damaged)
        with pytest.raises(InputError, match=r'held.jsonl: line 2 is no JSON object with a "text"'):
            corpus.main([*arguments, "--held-out", str(held_out)])
    assert not output.exists()
    with pytest.raises(SystemExit):  # which would do nothing
        corpus.main([*arguments, "--held-out", str(held_out), "--characters", "9"])
    assert "--characters goes with code and prose" in capsys.readouterr().err


def test_a_part_of_the_documents_is_spread_over_all(corpus):
    documents = [(str(number), "x" * 100) for number in range(10)]
    assert [name for name, _ in corpus.evenly(documents, 300)] == ["0", "3", "6"]
    assert corpus.evenly(documents, None) == corpus.evenly(documents, 10**9) == documents


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("prose", "a.txt", b"short", "no document of 110,000 to 1,500,000 characters"),
        ("prose", "a.txt.gz", gzip.compress(b"word " * 99)[:-9], "a.txt.gz: is no complete gzip"),
        ("prose", "a.txt.gz", b"plain", "a.txt.gz: is no complete gzip file"),
        ("code", "no.tar", b"plain", "no.tar: is no complete tar file"),
        ("code", "no.tar.xz", lzma.compress(b"0" * 9999)[:-40], "no.tar.xz: is no complete tar"),
        ("code", None, None, "nowhere: No such file"),
        ("prose", None, None, "nowhere: is no folder"),
    ],
    ids=lambda value: "content" if isinstance(value, bytes) else None,
)
def test_what_cannot_be_read_is_named_and_leaves_nothing(
    corpus, tmp_path, kind, name, content, message
):
    output, place = tmp_path / "out.jsonl", tmp_path / "nowhere"
    if name:
        place = tmp_path / "in"
        place.mkdir()
        (place / name).write_bytes(content)
    given = place / name if name and kind == "code" else place
    with pytest.raises(InputError, match=message):
        corpus.main([kind, str(given), "--output", str(output)])
    assert not output.exists()


def test_the_output_of_the_corpus_is_a_file(corpus, tmp_path):
    with pytest.raises(InputError, match="is a folder; name a file for --output"):
        corpus.main(["prose", str(tmp_path), "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        corpus.main(["prose", str(tmp_path), "--output", "a.jsonl", "--characters", "0"])


def test_the_tables_of_the_readme_are_those_of_the_results_beside_it():
    text = (FOLDER / "README.md").read_text()
    blocks = [block for block in text.split("```")[1::2] if "--markdown" in block]
    commands = "".join(blocks).replace("\\\n", "").split("python tools/report.py ")[1:]
    assert len(commands) == 8
    shown = set()
    for command in commands:
        words = command.split()
        globs = words[: words.index("--markdown")]
        folders = sorted({path for glob in globs for path in FOLDER.parents[1].glob(glob)})
        shown |= set(folders)
        baseline = FOLDER.parents[1] / words[words.index("--baseline") + 1]
        runs, first = read_runs(folders, baseline)
        groups, _ = with_shared_depths(group_runs(runs, first))
        # A line that follows at once would be a row.
        assert f"{to_markdown(overview_table(groups)).rstrip()}\n\n" in text
    assert shown == set(RESULTS.glob("*/"))


def test_finished_runs_are_kept_without_texts_and_others_are_named(tmp_path, capsys):
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    for name in ("uniform-seed1", "dense75-seed1"):
        shutil.copytree(RESULTS / name, runs / name)
    (runs / "before").mkdir()
    (runs / "uniform-seed1" / "recall.json").rename(runs / "before" / "recall.json")
    evaluation = runs / "dense75-seed1" / "evaluation.json"
    measured = json.loads(evaluation.read_text())
    page = {"data": "d", "document": 0, "first_target": 1, "text": ["theirs"], "weight": [1.0]}
    page |= {"long_loss": [2.0], "short_loss": [None]}
    evaluation.write_text(json.dumps(measured | {"weights": measured["weights"] | {"page": page}}))
    assert script("keep").main([str(runs), "--output", str(kept)]) == 0
    assert f"{runs / 'uniform-seed1'}: not measured, left out" in capsys.readouterr().out
    assert sorted(folder.name for folder in kept.iterdir()) == ["before", "dense75-seed1"]
    assert [file.name for file in (kept / "before").iterdir()] == ["recall.json"]
    assert read_run(kept / "before").recall
    for file in (RESULTS / "dense75-seed1").iterdir():
        assert (kept / "dense75-seed1" / file.name).read_bytes() == file.read_bytes()


def test_nothing_to_keep_is_an_error_and_a_run_half_way_is_left_out(tmp_path, capsys):
    keep, runs, kept = script("keep"), tmp_path / "runs", tmp_path / "kept"
    with pytest.raises(InputError, match="nowhere: holds no run; name the recipe's output_dir"):
        keep.main([str(tmp_path / "nowhere"), "--output", str(kept)])
    for name in ("dense75-seed1", "uniform-seed1"):
        shutil.copytree(RESULTS / name, runs / name)
    with pytest.raises(InputError, match="other/dense75-seed1: a second run of this name"):
        shutil.copytree(RESULTS / "dense75-seed1", runs / "other" / "dense75-seed1")
        keep.main([str(runs), "--output", str(kept)])
    shutil.rmtree(runs / "other")
    metrics = runs / "dense75-seed1" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(True)[:-5]))
    (runs / "uniform-seed1" / "run.yaml").unlink()
    assert keep.main([str(runs), "--output", str(kept)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "dense75-seed1: not finished, at step 51 of 56. Left out.",
        f"{runs / 'uniform-seed1'}: has no run.yaml. Left out.",
    ]
    assert not kept.exists()
