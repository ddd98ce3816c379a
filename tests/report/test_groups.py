"""Which runs are one line of a comparison, and what it is called."""

from pathlib import Path

import pytest

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.report.groups import group_name, group_runs
from lctw_megatron.report.runs import RunRecord
from tests.evaluation.tiny_run import make_run


def record(name: str, seed: int = 1, metrics: list | None = None, **changes) -> RunRecord:
    config = make_run(Path("runs"), "data/train", "data/held_out", seed=seed, **changes)
    config = RunConfig.model_validate({**config.model_dump(), "name": name, "run_dir": name})
    return RunRecord(name, Path(name), config, metrics or [], None)


def test_runs_that_differ_only_in_their_seed_are_one_group_the_baselines_first():
    uniform = {"weighting": {"scheme": "uniform"}}
    runs = [
        record("dense-seed1", 1),
        record("dense-seed2", 2),
        record("uniform-seed1", 1, **uniform),
        record("dense-seed2-again", 2),
        record("uniform-seed2", 2, **uniform),
        record("longer-seed1", 1, data={"train": "data/train", "sequence_length": 128}),
        RunRecord("imported", Path("imported"), None, [], None),
    ]
    groups = group_runs(runs, baseline=runs[4])
    assert {group.name: [run.name for run in group.runs] for group in groups} == {
        "uniform": ["uniform-seed2", "uniform-seed1"],
        "dense": ["dense-seed1", "dense-seed2"],
        "dense-seed2-again": ["dense-seed2-again"],  # the same seed twice is no second draw
        "longer-seed1": ["longer-seed1"],
        "imported": ["imported"],
    }


def test_what_a_machine_takes_and_how_a_run_saves_do_not_part_its_seeds():
    training = record("x").config.training.model_dump()
    changes = [
        {"micro_batch_size": 2, "save_interval": 7, "hang_minutes": None},
        {"keep_last": 1, "tensorboard": False},
        {"lr": 0.5},
    ]
    runs = [
        record(f"x-seed{seed}", seed, training=training | change)
        for seed, change in enumerate(changes)
    ]
    assert [len(group.runs) for group in group_runs(runs, runs[0])] == [2, 1]


@pytest.mark.parametrize(
    "names, shared",
    [
        (["dense-seed1"], "dense-seed1"),
        (["dense-seed1", "dense-seed2"], "dense"),
        (["dense75_lr1e-4-seed1", "dense75_lr1e-4-seed2"], "dense75_lr1e-4"),
        (["seed1/dense", "seed2/dense"], "dense"),
        (["dense1", "dense2"], "dense"),
        (["dense", "dense-seed2"], "dense"),
        (["a", "b"], "a"),
        (["1", "2"], "1"),
    ],
)
def test_a_group_is_called_what_its_runs_share(names, shared):
    assert group_name(names) == shared


def test_two_groups_of_one_name_keep_their_first_runs_names():
    runs = [record("x1", 1), record("x2", 2)]
    runs += [record(f"x{n}", n, weighting={"scheme": "uniform"}) for n in (3, 4)]
    assert [group.name for group in group_runs(runs, runs[0])] == ["x1", "x3"]


def test_curves_are_the_mean_over_the_seeds_at_the_steps_that_all_have():
    first = [{"step": 0, "loss": 2.0, "speed/machine": "x"}, {"step": 1, "loss": 1.0}]
    second = [{"step": 0, "loss": 4.0}]
    runs = [record("a-1", 1, first), record("a-2", 2, second)]
    (group,) = group_runs(runs, runs[0])
    assert group.merged.metrics == [{"step": 0, "loss": 3.0}]
    assert group.seeds == [1, 2]
