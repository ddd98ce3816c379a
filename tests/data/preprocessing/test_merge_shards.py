import os

from hypothesis import given
from hypothesis import strategies as st

from lctw_megatron.data.preprocessing.merge_shards import Run, divide, publish


@st.composite
def kept_and_chosen(draw):
    kept = draw(st.lists(st.integers(0, 6), min_size=1, max_size=8))
    return kept, sorted(draw(st.sets(st.integers(0, max(sum(kept) - 1, 0)), max_size=sum(kept))))


@given(kept_and_chosen())
def test_every_document_is_in_one_part(case):
    kept, chosen = case
    numbers = iter(range(sum(kept)))
    number_of = {(shard, at): next(numbers) for shard, n in enumerate(kept) for at in range(n)}

    def documents(runs):
        return [number_of[run.shard, at] for run in runs for at in range(run.begin, run.end)]

    others, ours = divide(kept, chosen)
    assert documents(ours) == chosen
    assert documents(others) == [n for n in range(sum(kept)) if n not in chosen]


def test_runs_are_as_long_as_can_be():
    others, ours = divide([5, 0, 3], [2, 7])
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
