import dataclasses
import os
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lctw_megatron.config.schema import PrepareConfig
from lctw_megatron.data import TokenDataset
from lctw_megatron.data.preprocessing.corpus import (
    CorpusFile,
    PassedOver,
    find_files,
    plan_shards,
)
from lctw_megatron.data.preprocessing.preprocess import preprocess
from lctw_megatron.data.sequence_cache import cached_index
from lctw_megatron.errors import InputError
from lctw_megatron.work_folder import make_work_folder
from tests.data.corpus_files import texts, write_corpus

MB = 1 << 20


@pytest.fixture
def folder(tmp_path):
    """A corpus with everything in it, and files that are none of it."""
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.txt", "sub/deep/d.parquet", "sub/e.txt.zst"):
        write_corpus(tmp_path / "in" / name, texts(1))
    for name in ("README.md", ".hidden.jsonl", ".cache/f.jsonl", "model.bin"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    return tmp_path / "in"


def names(inputs, prefix="/nowhere/out"):
    return [
        os.path.basename(file.path) for file in find_files([str(each) for each in inputs], prefix)
    ]


def test_folders_are_searched_in_order(folder):
    expected = ["a.jsonl.gz", "b.jsonl", "c.txt", "e.txt.zst", "d.parquet"]
    assert names([folder]) == expected
    described = find_files([str(folder)], "/nowhere/out")
    assert [(file.kind, file.compression) for file in described] == [
        ("jsonl", "gz"),
        ("jsonl", ""),
        ("txt", ""),
        ("txt", "zst"),
        ("parquet", ""),
    ]


def test_globs_and_inputs_keep_their_order_and_name_a_file_once(folder):
    assert names([folder / "*.jsonl*"]) == ["a.jsonl.gz", "b.jsonl"]
    assert names([folder / "**/*.txt"]) == ["c.txt"]
    assert names([folder / "b.jsonl", folder]) == names([folder / "b.jsonl"]) + [
        name for name in names([folder]) if name != "b.jsonl"
    ]


def test_a_file_beside_its_compressed_form_is_not_read_twice(folder):
    """As `gzip -k` and zstd leave it."""
    write_corpus(folder / "a.jsonl", ["a"])
    write_corpus(folder / "sub" / "b.jsonl.gz", ["another text, in another folder"])
    message = r"a\.jsonl and a\.jsonl\.gz: .* would come twice; remove one of them"
    with pytest.raises(InputError, match=message):
        names([folder])
    with pytest.raises(InputError, match=r"a\.jsonl and a\.jsonl\.gz: "):
        names([folder / "a.jsonl", folder / "a.jsonl.gz"])
    assert names([folder / "*.jsonl"]) == ["a.jsonl", "b.jsonl"]
    write_corpus(folder / "c.jsonl.gz", ["c"])
    write_corpus(folder / "c.jsonl.zst", ["c"])
    with pytest.raises(InputError, match=r"c\.jsonl\.gz and c\.jsonl\.zst: "):
        names([folder / "c*"])


def test_what_an_earlier_run_wrote_beside_the_corpus_is_no_corpus(folder):
    prefix = folder / "out"
    for name in ("out.json", "out.short_loss.json", "out-validation.jsonl", "out-validation.json"):
        (folder / name).write_text("{}")
    (folder / "out-validation.short_loss.json").write_text("{}")
    for inside in ("out.shards", "out.short_loss.shards", "index_cache/out-chunk-keep-128-0"):
        (folder / inside).mkdir(parents=True)
        (folder / inside / "index.json").write_text("{}")
    (folder / "output.jsonl").write_text("{}")
    assert names([folder], str(prefix)) == [
        "a.jsonl.gz", "b.jsonl", "output.jsonl", "c.txt", "e.txt.zst", "d.parquet"
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"input .*out\.json: would be overwritten"):
        names([folder / "out.json"], str(prefix))


def test_what_earlier_runs_wrote_under_another_name_of_the_folder_is_no_corpus(tmp_path):
    write_corpus(tmp_path / "disk" / "a.jsonl", ["a"])
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    for name in ("out.json", "out-validation.jsonl", "index_cache/x/index.json"):
        (tmp_path / "disk" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "disk" / name).write_text("{}")
    assert names([tmp_path / "disk"], str(tmp_path / "data" / "out")) == ["a.jsonl"]
    assert names([tmp_path / "data"], str(tmp_path / "disk" / "out")) == ["a.jsonl"]
    with pytest.raises(InputError, match=r"input .*out\.json: would be overwritten"):
        names([tmp_path / "disk" / "out.json"], str(tmp_path / "data" / "out"))


def test_what_earlier_runs_wrote_for_other_prefixes_is_no_corpus(tmp_path, sentencepiece_model):
    """Its held-out documents would be trained on."""
    inside = tmp_path / "in"
    write_corpus(inside / "a.jsonl", ["one", "two", "three"])
    write_corpus(inside / "own-validation.jsonl", ["four"])
    for text, prefix, held_out in (("a", "llama", 1), ("own-validation", "own-validation", 0)):
        preprocess(
            PrepareConfig(
                inputs=[str(inside / f"{text}.jsonl")],
                output_prefix=str(inside / prefix),
                tokenizer=str(sentencepiece_model),
                validation_documents=held_out,
            )
        )
    cached_index(TokenDataset(inside / "llama"), 4, "chunk", "keep")
    make_work_folder(inside / "other.shards")
    write_corpus(inside / "other.shards" / "merged-validation.jsonl", ["x"])
    found, passed_over = read_and_passed_over(inside)
    assert found == ["a.jsonl", "own-validation.jsonl"]
    assert "5 written for another prefix (llama-validation.json, llama" in passed_over
    assert "1 work in progress (other.shards)" in passed_over
    named = inside / "llama-validation.jsonl"
    assert names([named]) == ["llama-validation.jsonl"]  # the user's will


def test_the_standard_library_is_about_a_hundred_documents_without_site_packages():
    files = find_files(["stdlib"], "/nowhere/out")
    assert 60 < len(files) < 200
    assert {file.kind for file in files} == {"package"}
    assert not any("site-packages" in file.path for file in files)
    assert sysconfig.get_path("stdlib") in {file.path for file in files}
    assert [file.size for file in files] == sorted(file.size for file in files)
    assert sum(file.size for file in files) > 5_000_000
    assert files == find_files(["stdlib"], "/nowhere/out")


def test_a_folder_called_like_the_standard_library_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(Path("stdlib/a.jsonl"), ["a"])
    with pytest.raises(
        InputError, match="means Python's standard library, but .* name it ./stdlib"
    ):
        find_files(["stdlib"], "/nowhere/out")
    (file,) = find_files(["./stdlib"], "/nowhere/out")
    assert file.path == str(tmp_path / "stdlib" / "a.jsonl")


@pytest.mark.parametrize(
    "content, name, message",
    [
        (None, "gone.jsonl", "no such file or folder, and no glob"),
        (None, "*.jsonl", "no glob that matches any"),
        ("", "empty.jsonl", "an empty file; there is no text"),
        ("x", "file.csv", r"unknown ending; expected \.jsonl, .*\.txt, \.parquet"),
        ("x", "file.csv.gz", "unknown ending"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, name, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        names([tmp_path / name])
    assert name in str(error.value)


def test_folders_without_corpus_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no files ending in"):
        names([tmp_path])
    (tmp_path / "data.arrow").touch()
    with pytest.raises(InputError, match=r"found 1 \.arrow \(data\.arrow\)"):
        names([tmp_path])
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="2 files, all empty"):
        names([tmp_path])


def test_an_empty_file_among_others_is_passed_over(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").write_text("x")
    assert names([tmp_path]) == ["b.txt"]


def read_and_passed_over(folder):
    passed_over = PassedOver()
    files = find_files([str(folder)], "/nowhere/out", passed_over)
    return [os.path.relpath(file.path, folder) for file in files], str(passed_over)


def test_what_is_passed_over_is_counted_and_named(folder):
    for name in ("x.csv", "y.csv", "sub/z.csv", "s.jsonl.xz", "LICENSE", "t.csv.gz"):
        (folder / name).write_text("x")
    (folder / "empty.txt").touch()
    passed_over = PassedOver()
    find_files([str(folder)], "/nowhere/out", passed_over)
    assert str(passed_over) == (
        "3 .csv (x.csv, y.csv, z.csv), 2 hidden (.cache, .hidden.jsonl), 1 without an ending "
        "(LICENSE), 1 .md (README.md), 1 .bin (model.bin), 1 .jsonl.xz (s.jsonl.xz), 1 .gz "
        "(t.csv.gz), 1 empty (empty.txt)"
    )


def test_a_glob_says_what_it_leaves_out_too(folder):
    passed_over = PassedOver()
    find_files([str(folder / "*")], "/nowhere/out", passed_over)
    assert str(passed_over) == "1 .md (README.md), 1 .bin (model.bin)"


def test_metadata_of_a_dataset_snapshot_is_no_text(tmp_path):
    write_corpus(tmp_path / "data" / "train.parquet", texts(2))
    write_corpus(tmp_path / "more.json.gz", ["x"])
    for name in ("dataset_infos.json", "data/dataset_info.json", "data/state.json"):
        (tmp_path / name).write_text('{"text": "x"}')
    found, passed_over = read_and_passed_over(tmp_path)
    assert found == ["more.json.gz", "data/train.parquet"]
    assert passed_over.startswith("3 metadata of a dataset (dataset_infos.json, dataset_info.json")
    assert names([tmp_path / "data" / "state.json"]) == ["state.json"]  # named: the user's will


def test_linked_folders_and_files_are_read_once(tmp_path):
    write_corpus(tmp_path / "elsewhere" / "a.txt", ["a"])
    write_corpus(tmp_path / "in" / "real" / "b.txt", ["b"])
    inside = tmp_path / "in"
    (inside / "linked").symlink_to(tmp_path / "elsewhere")
    (inside / "again").symlink_to(tmp_path / "elsewhere")
    (inside / "real" / "up").symlink_to(inside)
    (inside / "real" / "self").symlink_to(inside / "real")
    (inside / "c.txt").symlink_to(inside / "real" / "b.txt")
    found, passed_over = read_and_passed_over(inside)
    assert found == ["c.txt", "again/a.txt"]
    assert passed_over == "1 linked to what is read already (b.txt)"
    assert len(find_files([str(inside / "**" / "*.txt")], "/o")) == 2


def test_a_file_of_two_hard_links_is_read_once(tmp_path):
    first = write_corpus(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jsonl").hardlink_to(first)
    write_corpus(tmp_path / "sub" / "c.jsonl", ["a"])  # equal, and another file
    found, passed_over = read_and_passed_over(tmp_path)
    assert found == ["a.jsonl", "sub/c.jsonl"]
    assert passed_over == "1 linked to what is read already (b.jsonl)"
    assert names([tmp_path / "sub" / "b.jsonl", first]) == ["b.jsonl"]


def test_a_file_is_found_beside_its_compressed_form_through_a_link_too(tmp_path):
    plain = write_corpus(tmp_path / "real" / "a.jsonl", ["a"])
    write_corpus(tmp_path / "real" / "a.jsonl.gz", ["a"])
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "file.jsonl").symlink_to(plain)
    for name in ("folder/a.jsonl", "file.jsonl"):
        with pytest.raises(InputError, match=r"\.jsonl and a\.jsonl\.gz: .* would come twice"):
            names([tmp_path / name, tmp_path / "real" / "a.jsonl.gz"])


@pytest.mark.parametrize("target", ["gone", "a.jsonl"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, target):
    (tmp_path / "b.txt").write_text("x")
    (tmp_path / "a.jsonl").symlink_to(tmp_path / target)
    with pytest.raises(InputError, match=r"a\.jsonl: cannot be read"):
        names([tmp_path])


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for given_input in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(InputError, match=r"a\.jsonl: not a regular file"):
            names([given_input])


def test_a_folder_that_cannot_be_read_is_an_error(folder, monkeypatch):
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError):
        names([folder])


@given(
    st.lists(
        st.tuples(st.sampled_from(["jsonl", "txt", "package"]), st.integers(1, 40 * MB)),
        min_size=1,
        max_size=30,
    )
)
def test_shards_cover_all_files_once_and_in_order(described):
    files = [
        CorpusFile(f"/{number}", kind, "", size, 0) for number, (kind, size) in enumerate(described)
    ]
    shards = plan_shards(files)
    parts = [part for shard in shards for part in shard]
    assert all(shards)
    covered = {file.path: 0 for file in files}
    order = []
    for part in parts:
        assert part.begin == covered[part.file.path]
        covered[part.file.path] = part.end
        order.append(int(part.file.path[1:]))
    assert order == sorted(order)
    assert all(covered[file.path] == file.size for file in files)
    total = sum(file.size for file in files)
    target = min(max(total // 64, MB // 4), 64 * MB)
    for shard in shards:
        assert sum(part.weight for part in shard) <= target or len(shard) == 1


def test_one_large_jsonl_file_has_many_shards():
    shards = plan_shards([CorpusFile("/large", "jsonl", "", 100 * MB, 0)])
    assert 64 <= len(shards) <= 128
    shards = plan_shards([CorpusFile("/large", "jsonl", "gz", 100 * MB, 0)])
    assert len(shards) == 1  # a compressed stream cannot be entered in the middle


def test_a_line_that_is_mended_leaves_the_shards_of_other_files_as_they_are():
    files = [CorpusFile(f"/{n}", "jsonl", "", (30 + n) * MB + n, 0) for n in range(4)]
    mended = dataclasses.replace(files[1], size=files[1].size + 100, mtime_ns=1)
    before, after = plan_shards(files), plan_shards([files[0], mended, *files[2:]])
    of_others = {shard for shard in before if all(part.file != files[1] for part in shard)}
    assert of_others <= set(after)
    assert len(of_others) > len(before) / 2


def test_parquet_is_cut_at_row_groups(tmp_path):
    path = write_corpus(tmp_path / "a.parquet", texts(10))
    parts = [part for shard in plan_shards(find_files([str(path)], "/o")) for part in shard]
    assert [(part.begin, part.end) for part in parts] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"a\.parquet: not a parquet file, or damaged"):
        plan_shards(find_files([str(path)], "/o"))
