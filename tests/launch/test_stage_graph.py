"""Stages come in an order in which they can run, and are done only as long as nothing changed."""

import shlex
from pathlib import Path

import pytest

from lctw_megatron.atomic import write_json
from lctw_megatron.errors import InputError
from lctw_megatron.launch.slurm import stage_jobs
from lctw_megatron.launch.stages import Stage
from lctw_megatron.model.checkpoint_folder import MANIFEST, step_name
from tests.launch.conftest import RECIPE


def stage(plan, name: str) -> Stage:
    return next(s for s in plan.stages if s.name == name)


def mark_done(plan, *names: str) -> None:
    for name in names:
        output = Path(stage(plan, name).output)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
        plan.set_done(stage(plan, name))


def done(plan) -> list[str]:
    return [s.name for s in plan.stages if plan.is_done(s)]


def test_stages_come_after_what_they_need(plan):
    made = plan()
    needs = {s.name: set(s.needs) for s in made.stages}
    assert needs == {
        "prepare": set(),
        "train-base": {"prepare"},
        "score": {"prepare", "train-base"},
        "train-uniform": {"prepare", "train-base"},
        "train-dense": {"prepare", "score", "train-base"},
        "export-uniform": {"train-uniform"},
        "export-dense": {"train-dense"},
        "evaluate-uniform": {"prepare", "train-uniform"},
        "evaluate-dense": {"prepare", "train-dense", "train-uniform"},
        "report": {"evaluate-uniform", "evaluate-dense"},
    }
    before: set[str] = set()
    for s in made.stages:
        assert before.issuperset(s.needs)
        before.add(s.name)


def test_a_path_to_what_a_stage_makes_is_a_need_like_its_name(plan, tmp_path):
    expected = {s.name: s.needs for s in plan().stages}
    for override in (
        "data.train=./data/books",
        f"data.train={tmp_path}/data/books",
        "evaluation.data=data//books-validation",
        "runs.dense.start=out/base/checkpoints",
        "runs.uniform.start=./out/base/checkpoints/step_00000050",
        "scoring.scorer=out/../out/base",
        f"evaluation.key_checkpoint={tmp_path}/out/uniform/checkpoints",
    ):
        assert {s.name: s.needs for s in plan(RECIPE, override).stages} == expected, override
    elsewhere = plan(RECIPE, "runs.dense.start=out/base2/checkpoints")
    assert "train-base" not in stage(elsewhere, "train-dense").needs
    with pytest.raises(InputError, match="wait for each other: train-dense needs .*train-dense"):
        plan(RECIPE, "runs.dense.start=out/dense/checkpoints")


def test_commands_are_those_of_the_tools(plan):
    commands = {s.name: shlex.join(s.arguments) for s in plan(RECIPE, "training.lr=1e-4").stages}
    assert commands["prepare"] == (
        "tools/preprocess.py --input 'corpus/*.jsonl.gz' 'more texts' --output-prefix data/books "
        "--train-sentencepiece 4096 --validation-documents 8 --workers 4 --window 256"
    )
    assert commands["train-dense"] == (
        "tools/train.py recipe.yaml --run dense --set training.lr=1e-4"
    )
    assert commands["score"] == (
        "tools/score.py --data data/books --checkpoint out/base/checkpoints --window 256 "
        "--stride 192"
    )
    assert commands["export-dense"] == (
        "tools/convert.py export --checkpoint out/dense/checkpoints --output out/dense/hf"
    )
    assert commands["evaluate-dense"] == (
        "tools/evaluate_model.py losses --checkpoint out/dense/checkpoints "
        "--data data/books-validation --output out/dense/evaluation.json --sequence-length 1024 "
        "--max-sequences 32 --window 256 --tensor 2 --key-checkpoint out/uniform/checkpoints"
    )
    assert commands["report"] == (
        "tools/report.py out/uniform out/dense --output out/report "
        "'--note=A run this small proves the road, not the method.'"
    )


def test_the_report_compares_with_the_runs_of_another_recipe(plan):
    made = plan(RECIPE, "evaluation.compare_with=[runs/first/a-seed1, runs/first/a-seed2]")
    report = stage(made, "report")
    assert shlex.join(report.arguments).startswith(
        "tools/report.py out/uniform out/dense runs/first/a-seed1 runs/first/a-seed2 "
        "--baseline runs/first/a-seed1 --output out/report "
    )
    assert set(report.needs) == set(stage(plan(), "report").needs)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["window=1024"], "run uniform: evaluation.window 1024 is not shorter than the sequence"),
        (
            ["recall={lengths: [1022], window: 64}"],
            r"1022 of evaluation.recall.lengths .*layout.context .8.$",
        ),
        (
            ["recall={lengths: [1024], window: 66}"],
            r"evaluation.recall.window .66. .*layout.context .8.$",
        ),
    ],
)
def test_probes_that_no_trained_run_could_take_are_refused_before_it_is_trained(
    plan, overrides, message
):
    layout = ["layout.context=4"]
    start = ["evaluation.sequence_length=null", "evaluation.key_checkpoint=null"]
    plan(RECIPE, *layout, *start, "evaluation.recall={lengths: [1024], window: 64}")
    with pytest.raises(InputError, match=message):
        plan(RECIPE, *layout, *start, *(f"evaluation.{override}" for override in overrides))


RECALL = "evaluation.recall={lengths: [512, 1024], tasks: [one_key], haystack: data/books}"


def test_recall_is_measured_of_every_final_run_and_before_the_report(plan):
    made = plan(RECIPE, RECALL)
    recall = stage(made, "recall-dense")
    assert shlex.join(recall.arguments) == (
        "tools/evaluate_model.py recall --checkpoint out/dense/checkpoints --output "
        "out/dense/recall.json --lengths 512 1024 --tasks one_key --depths 5 --samples 20 "
        "--haystack data/books --tensor 2"
    )
    assert set(recall.needs) == {"prepare", "train-dense"}
    kinds = ("evaluate", "recall")
    expected = {f"{kind}-{run}" for kind in kinds for run in ("uniform", "dense")}
    assert set(stage(made, "report").needs) == expected


def test_nothing_is_exported_where_nobody_wants_it(plan):
    made = plan(RECIPE, "export=false")
    assert not [s.name for s in made.stages if s.kind == "export"]
    with pytest.raises(InputError, match="verify_exports is on, but export is off"):
        plan(RECIPE, "export=false", "evaluation.verify_exports=true")


def test_the_tools_accept_the_commands(plan, monkeypatch):
    """Every option that a stage uses exists: argparse of each tool reads its command."""
    import argparse
    import importlib.util

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    project = Path(__file__).parents[2]
    everything = [
        "scoring.sequence_length=1024", "scoring.name=other", "scoring.score_first_window=true",
        "scoring.tensor=2", "scoring.pipeline=2", "data.scores=other", "layout.pipeline=2",
        "layout.context=2", "evaluation.stride=64", "evaluation.near=32", "prepare.max_bytes=9",
        "prepare.skip_bad=true", "runs.base.layout.sequence=false",
        "runs.base.layout.tensor=1", "evaluation.recall.lengths=[64, 128]",
        "evaluation.recall.haystack=a.txt", "evaluation.recall.window=32",
        "evaluation.compare_with=[a, b]", "evaluation.note=-hello", "prepare.text_field=-x",
        "scoring.tokens_per_forward=512",
    ]  # fmt: skip
    for s in (*plan().stages, *plan(RECIPE, *everything).stages):
        tool, *arguments = s.arguments
        spec = importlib.util.spec_from_file_location("tool_under_test", project / tool)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for more in [[]] if s.shards == 1 else [["--shard", "3/4"], ["--merge"]]:
            with pytest.raises(Parsed):
                module.main([*arguments, *more])


def test_uniform_and_self_scoring_runs_do_not_wait_for_scores(plan):
    own = "{scheme: dense, mode: self, window: 256, stride: 192}"
    made = plan(RECIPE.replace("weighting: dense}", f"weighting: {own}}}"))
    assert "score" not in {s.name for s in made.stages}
    other = plan(RECIPE, "runs.dense.data.scores=made_elsewhere")
    assert "score" not in {s.name for s in other.stages}


@pytest.mark.parametrize(
    "other", ["c-parts", "c-parts-0", "c.0-of-4", "c.best-of-two"]
)  # names that the parts of c have for their jobs, logs and marks
def test_datasets_named_like_the_parts_of_another_are_numbered(plan, other):
    for names in (["data/c", f"data/{other}"], [f"data/{other}", "data/c"]):
        made = plan(RECIPE, f"data.train={names}".replace("'", ""))
        scores = [s for s in made.stages if s.kind == "score"]
        assert [s.name for s in scores] == ["score-0", "score-1"]
        assert [s.arguments[2] for s in scores] == names
        found = [job.name for s in scores for job in stage_jobs(made, s, made.recipe.cluster)]
        assert found == ["score-0-parts", "score-0", "score-1-parts", "score-1"]
    made = plan(RECIPE, "data.train=[data/c, data/c.v2, data/c-part]")
    scores = [s.name for s in made.stages if s.kind == "score"]
    assert scores == ["score-c", "score-c.v2", "score-c-part"]


def test_several_datasets_are_scored_one_by_one(plan):
    train = "{train: [data/books, data/code], validation: data/books-validation,"
    made = plan(RECIPE.replace("{train: data/books, validation: data/books-validation,", train))
    assert set(stage(made, "train-dense").needs) >= {"score-books", "score-code"}
    assert stage(made, "score-code").needs == ("train-base",)


def test_a_recipe_of_one_run_is_exported_and_reported_on(plan):
    text = RECIPE.split("runs:")[0].replace("scorer: base", "scorer: some/checkpoint")
    names = [s.name for s in plan(text, "evaluation.key_checkpoint=null").stages]
    assert names == ["prepare", "train-main", "export-main", "evaluate-main", "report"]
    text = text.replace("prepare:", "evaluation_:").split("evaluation_:")[0] + (
        "model: tiny_llama\ndata: {train: data/books}\ntraining: {steps: 1}\n"
    )
    assert [s.name for s in plan(text).stages] == ["train-main", "export-main", "report"]


def test_a_model_that_cannot_be_exported_is_refused_before_it_is_trained(plan):
    for field, line in [
        ("model.num_moe_experts=4", "num_moe_experts is 4, .* llama has none; use .* mixtral"),
        ("model.qkv_bias=true", "qkv_bias is True, .* use architecture qwen2.*"),
    ]:
        with pytest.raises(InputError, match=f"run uniform: model.{line}, or set export: false"):
            plan(RECIPE, field)
        plan(RECIPE, field, "export=false")


def test_stages_that_wait_for_each_other_are_refused(plan):
    with pytest.raises(InputError, match="recipe.yaml: stages wait for each other: .*train-dense"):
        plan(RECIPE, "scoring.scorer=dense")


def test_a_mark_counts_only_while_nothing_before_it_changed(plan):
    made = plan()
    mark_done(made, "prepare", "train-base", "score", "train-uniform")
    assert done(made) == ["prepare", "train-base", "score", "train-uniform"]
    assert done(plan()) == done(made)
    assert done(plan(RECIPE, "runs.dense.training.lr=1e-4")) == done(made)
    assert done(plan(RECIPE, "training.lr=1e-4")) == ["prepare"]
    changed = RECIPE.replace("dense: {start: base,", "dense: {start: base, seed: 5,")
    assert done(plan(changed)) == done(made)
    changed = RECIPE.replace("uniform: {start: base,", "uniform: {start: base, seed: 5,")
    assert done(plan(changed)) == ["prepare", "train-base", "score"]
    assert done(plan(RECIPE.replace("layout: single", "layout: single, seed: 5"))) == ["prepare"]
    assert done(plan(RECIPE.replace("4096", "2048"))) == []
    for changes_no_result in (
        "prepare.workers=3", "scoring.tokens_per_forward=512", "data.index_cache=elsewhere",
        "training.save_interval=10", "training.async_save=true", "training.keep_last=1",
        "training.tensorboard=false", "training.trackers=[wandb]", "training.hang_minutes=90",
        "training.distributed_timeout_minutes=90",
    ):  # fmt: skip
        assert done(plan(RECIPE, changes_no_result)) == done(made), changes_no_result
    assert done(plan(RECIPE.replace("[corpus/*.jsonl.gz, more", "[corpus/*.jsonl.gz more"))) == []
    Path(stage(made, "score").output).unlink()
    assert done(made) == ["prepare", "train-base", "train-uniform"]


def test_what_comes_after_a_stage_that_runs_again_loses_its_mark(plan):
    made = plan()
    mark_done(made, *(s.name for s in made.stages))
    score = stage(made, "score")
    for part in range(4):
        made.mark(score, part).write_text(made.fingerprints["score"])
    assert made.outdated(made.stages) == set()
    made.mark(stage(made, "train-uniform")).unlink()
    again = ["export-uniform", "evaluate-uniform", "evaluate-dense", "report"]
    assert made.outdated(made.stages) == set(again)
    made.forget_undone(made.select(["score", "export"]))
    assert len(done(made)) == 9
    Path(stage(made, "train-base").output).unlink()
    made.forget_undone(made.select(["train-base"]))
    assert done(made) == ["prepare"]
    assert not any(made.is_done(score, part) for part in range(4))


def test_a_training_whose_last_checkpoint_was_removed_is_not_done(plan):
    made = plan()
    train = stage(made, "train-base")
    folder = Path(train.output)
    for step in (50, 100):
        write_json(folder / step_name(step) / MANIFEST, {})
    (folder.parent / "run.yaml").touch()
    made.set_done(train)
    assert made.is_done(train)
    (folder / step_name(100)).rename(folder / step_name(150))  # it went on beyond
    assert made.is_done(train)
    (folder / step_name(150)).rename(folder / "elsewhere")
    assert not made.is_done(train)
    (folder / step_name(50)).rename(folder / "elsewhere too")
    assert not made.is_done(train)


def test_a_damaged_mark_is_none(plan):
    made = plan()
    mark_done(made, "prepare")
    made.mark(stage(made, "prepare")).write_bytes(b"\xff\xfe")
    assert done(made) == []


def test_stages_are_chosen_by_name_or_kind(plan):
    made = plan()
    assert [s.name for s in made.select(["train-dense", "export"])] == [
        "train-dense",
        "export-uniform",
        "export-dense",
    ]
    assert made.select([]) == list(made.stages)
    with pytest.raises(InputError, match="no stage train-dens; did you mean train-dense?"):
        made.select(["train-dens"])


def test_ranks_must_suit_layout_and_batch(plan):
    made = plan()
    made.check_ranks(stage(made, "train-dense"), 16)
    with pytest.raises(InputError, match="train-dense on 3 ranks: number of ranks"):
        made.check_ranks(stage(made, "train-dense"), 3)
    with pytest.raises(InputError, match="train-dense on 6 ranks: training.global_batch_size"):
        made.check_ranks(stage(made, "train-dense"), 6)
    with pytest.raises(InputError, match="evaluate-dense on 3 ranks"):
        made.check_ranks(stage(made, "evaluate-dense"), 3)
