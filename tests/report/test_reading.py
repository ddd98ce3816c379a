"""What is said below the overview: which seeds stand behind ±, and which key tokens."""

from dataclasses import replace
from pathlib import Path

import pytest

from lctw_megatron.config.load import dump_yaml
from lctw_megatron.report.comparisons import judge, reading_lines
from lctw_megatron.report.groups import Group, group_runs
from lctw_megatron.report.left_out import left_out
from lctw_megatron.report.runs import RunRecord, read_runs
from tests.evaluation.tiny_run import make_run
from tests.report.written_runs import write_recall, write_run


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> list[Group]:
    """Three schemes of three seeds each."""
    root: Path = tmp_path_factory.mktemp("runs")
    folders = []
    for scheme in ("uniform", "dense", "sparse"):
        for seed in (1, 2, 3):
            folder = write_recall(write_run(root / f"{scheme}-seed{seed}"), seed * 0.1)
            config = make_run(
                root, "data/train", "data/held_out", weighting={"scheme": scheme}, seed=seed
            )
            (folder / "run.yaml").write_text(dump_yaml(config))
            folders.append(folder)
    return group_runs(*read_runs(folders))


def some(group: Group, *seeds: int) -> Group:
    return replace(group, runs=tuple(run for run in group.runs if run.config.seed in seeds))


def about_seeds(*groups: Group) -> list[str]:
    return [
        line
        for line in reading_lines(groups, judge(groups))
        if "seeds than" in line or "one seed" in line
    ]


def with_keys(group: Group, *keys: str) -> Group:
    """Its runs with the key tokens that each was evaluated on."""

    def one(run: RunRecord, key: str) -> RunRecord:
        sums = {"sequence_loss": [6.0] * 6, "sequence_targets": [3] * 6, "keys": key}
        longppl = run.evaluation["longppl"] | sums
        return replace(run, evaluation=run.evaluation | {"longppl": longppl})

    return replace(group, runs=tuple(map(one, group.runs, keys)))


def test_what_another_order_would_give_is_unknown_only_where_both_have_one_seed(groups) -> None:
    uniform, dense, sparse = groups
    assert about_seeds(*groups) == []
    one = [some(group, 1) for group in groups]
    assert about_seeds(*one) == [
        "All have one seed: what another order of the data would have given is not in ±."
    ]
    assert about_seeds(uniform, some(dense, 1), sparse) == [
        "dense: fewer or other seeds than uniform: compared with the mean of its 3, and the "
        "spread over seeds in ± is taken from these."
    ]
    assert about_seeds(uniform, some(dense, 1), some(sparse, 2, 3)) == [
        "dense, sparse: fewer or other seeds than uniform: compared with the mean of its 3, and "
        "the spread over seeds in ± is taken from both groups together."
    ]
    assert about_seeds(some(uniform, 1), some(dense, 2), sparse) == [
        "dense: only one seed, as uniform: what another order of the data would have given is not "
        "in ±.",
        "sparse: fewer or other seeds than uniform: compared with its one, and the spread over "
        "seeds in ± is taken from both groups together.",
    ]


def test_key_tokens_that_each_run_picked_itself_are_said_once_and_are_no_part(groups) -> None:
    uniform, dense, sparse = groups
    own = [
        with_keys(uniform, "a", "b", "c"), with_keys(dense, "d", "e", "f"),
        with_keys(sparse, "g", "h", "i"),
    ]  # fmt: skip
    assert about_seeds(*own) == []
    assert left_out(own) == [
        "Key tokens of LongPPL: no other group has those of uniform, so the loss on them is not "
        "compared, and shown on those of each group's first run; evaluate all with the same "
        "--key-checkpoint."
    ]
    shared = [own[0], with_keys(dense, "a", "a", "a"), own[2]]
    assert [line.split(",")[0] for line in left_out(shared)] == [
        "uniform: key tokens of LongPPL: uniform-seed2",
        "sparse: key tokens of LongPPL: sparse-seed2",
    ]
    assert left_out([with_keys(group, "a", "a", "a") for group in groups]) == []
    assert about_seeds(*shared)[0].startswith("dense (in part): fewer or other seeds than uniform")
