import os

from hypothesis import given
from hypothesis import strategies as st

from lctw_megatron.data.preprocessing.merge_shards import Run, divide, publish


@st.composite
def runs_and_chosen(draw):
    """Runs of several shards, with gaps between those of one."""
    runs = []
    for shard in range(draw(st.integers(1, 6))):
        at = 0
        for gap, count in draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6)))):
            runs.append(Run(shard, at + gap, at + gap + count))
            at += gap + count + 1
    total = sum(run.end - run.begin for run in runs)
    return runs, sorted(draw(st.sets(st.integers(0, max(total - 1, 0)), max_size=total)))


@given(runs_and_chosen())
def test_every_document_is_in_one_part(case):
    runs, chosen = case

    def documents(runs):
        return [(run.shard, at) for run in runs for at in range(run.begin, run.end)]

    others, ours = divide(runs, chosen)
    whole = documents(runs)
    assert documents(ours) == [whole[number] for number in chosen]
    left = [document for number, document in enumerate(whole) if number not in chosen]
    assert documents(others) == left


def test_runs_are_as_long_as_can_be():
    others, ours = divide([Run(0, 0, 5), Run(2, 0, 3)], [2, 7])
    assert others == [Run(0, 0, 2), Run(0, 3, 5), Run(2, 0, 2)]
    assert ours == [Run(0, 2, 3), Run(2, 2, 3)]


def test_publishing_removes_what_an_earlier_run_held_out(tmp_path):
    (tmp_path / "work").mkdir()
    for name in ("a.bin", "a.idx", "a.json", "a-validation.bin", "a-validation.json", "a.txt"):
        (tmp_path / name).write_text("old")
    for name in ("merged.bin", "merged.idx", "merged.json"):
        (tmp_path / "work" / name).write_text("new")
    publish(str(tmp_path / "work" / "merged"), str(tmp_path / "a"))
    assert os.listdir(tmp_path / "work") == []
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert found == {"a.bin": "new", "a.idx": "new", "a.json": "new", "a.txt": "old"}


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    endings = (".bin", ".idx", ".json")
    for name in ("merged", "merged-validation"):
        for ending in (*endings, ".jsonl"):
            (tmp_path / "work" / f"{name}{ending}").write_text("new")
    (tmp_path / "a.json").write_text("old")
    moved = []
    replace = os.replace

    def watch(source, target):
        if not moved:
            assert not (tmp_path / "a.json").exists()  # the old one went before anything came
        moved.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    publish(str(tmp_path / "work" / "merged"), str(tmp_path / "a"))
    assert moved[-3:] == ["a.bin", "a.idx", "a.json"]
    assert moved.index("a-validation.json") == 3
