"""The index cache: right whatever happened to its files, and shared without harm."""

import errno
import fcntl
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from lctw_megatron import atomic
from lctw_megatron.data import sequence_cache
from lctw_megatron.data.sequence_cache import cached_index
from lctw_megatron.data.sequences import build_index
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import InputError
from lctw_megatron.work_folder import make_work_folder, temporary_name
from tests.data.small_data import count_up, write_tokens


def is_right(found, lengths: list[int], *settings) -> bool:
    expected = build_index(np.array(lengths), *settings)
    return all(
        np.array_equal(array, getattr(found, name)) and array.dtype == getattr(found, name).dtype
        for name, array in vars(expected).items()
    )


def entries(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name != ".lock")


@pytest.mark.parametrize(
    "settings", [(5, "chunk", "keep"), (5, "chunk", "drop"), (5, "pack", "keep")]
)
def test_the_second_look_reads_what_the_first_wrote(tmp_path, settings, monkeypatch) -> None:
    dataset = write_tokens(tmp_path / "books", count_up([9, 1, 17, 4]))
    first, first_price = cached_index(dataset, *settings)
    monkeypatch.setattr(sequence_cache, "build_index", None)
    second, second_price = cached_index(dataset, *settings)
    assert is_right(first, [9, 1, 17, 4], *settings)
    assert is_right(second, [9, 1, 17, 4], *settings)
    assert first_price == second_price
    assert not second.piece_offset.flags.writeable  # a memory map, not a copy
    assert len(entries(tmp_path / "index_cache")) == 1


def test_an_empty_index_is_cached_too(tmp_path, monkeypatch) -> None:
    dataset = write_tokens(tmp_path / "books", count_up([3, 1]))
    cached_index(dataset, 5, "chunk", "drop")
    monkeypatch.setattr(sequence_cache, "build_index", None)
    assert len(cached_index(dataset, 5, "chunk", "drop")[0]) == 0


def test_settings_have_their_own_entries(tmp_path) -> None:
    dataset = write_tokens(tmp_path / "books", count_up([9, 17]))
    for settings in [(5, "chunk", "keep"), (5, "chunk", "drop"), (6, "chunk", "keep")]:
        assert is_right(cached_index(dataset, *settings, tmp_path / "c")[0], [9, 17], *settings)
    for tails in ("keep", "drop"):  # which means nothing to pack
        cached_index(dataset, 5, "pack", tails, tmp_path / "c")
    assert len(entries(tmp_path / "c")) == 4


def test_a_rewritten_dataset_gets_a_new_entry(tmp_path) -> None:
    settings = (5, "chunk", "keep")
    cached_index(write_tokens(tmp_path / "books", count_up([9, 17])), *settings)
    again = write_tokens(tmp_path / "books", count_up([17, 9]))  # same sizes, other content
    assert is_right(cached_index(again, *settings)[0], [17, 9], *settings)
    assert len(entries(tmp_path / "index_cache")) == 2


@pytest.mark.parametrize(
    "name", ["piece_document", "piece_offset", "piece_length", "sequence_start"]
)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_a_damaged_entry_is_rebuilt(tmp_path, name: str, damage: str) -> None:
    lengths = list(range(2, 200))
    settings = (64, "pack", "keep")
    dataset = write_tokens(tmp_path / "books", count_up(lengths))
    cached_index(dataset, *settings)
    (entry,) = entries(tmp_path / "index_cache")
    path = tmp_path / "index_cache" / entry / f"{name}.npy"
    content = bytearray(path.read_bytes())
    content[len(content) - 1] ^= 1
    changed = {"truncated": content[:-8], "flipped": content, "empty": b""}.get(damage)
    path.unlink() if changed is None else path.write_bytes(changed)
    assert is_right(cached_index(dataset, *settings)[0], lengths, *settings)
    assert is_right(sequence_cache._read(path.parent)[0], lengths, *settings)  # and mended


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"checksums": 1, "price": 2}'])
def test_a_damaged_description_is_rebuilt(tmp_path, text: str) -> None:
    dataset = write_tokens(tmp_path / "books", count_up([9, 17]))
    cached_index(dataset, 5, "pack", "keep")
    (entry,) = entries(tmp_path / "index_cache")
    (tmp_path / "index_cache" / entry / "index.json").write_text(text)
    found, _ = cached_index(dataset, 5, "pack", "keep")
    assert is_right(found, [9, 17], 5, "pack", "keep")


def build_at_once(prefix: str) -> bool:
    lengths = list(range(2, 300))
    found, _ = cached_index(TokenDataset(prefix), 64, "pack", "keep")
    return is_right(found, lengths, 64, "pack", "keep")


def build_at_once_without_locks(prefix: str) -> bool:
    def refuse(file, operation) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    fcntl.flock = refuse
    return build_at_once(prefix)


@pytest.mark.parametrize("function", [build_at_once, build_at_once_without_locks])
def test_many_ranks_may_build_at_once(tmp_path, function) -> None:
    write_tokens(tmp_path / "books", count_up(range(2, 300)))
    with ProcessPoolExecutor(4, get_context("fork")) as ranks:
        assert all(ranks.map(function, [str(tmp_path / "books")] * 24))
    assert len(entries(tmp_path / "index_cache")) == 1


@pytest.mark.parametrize("reason", ["ENOTEMPTY", "EEXIST", "ENOENT"])
def test_losing_the_race_to_write_an_entry_is_no_harm(tmp_path, reason, monkeypatch) -> None:
    def too_late(*_) -> None:
        raise OSError(getattr(errno, reason), "another rank was faster")

    dataset = write_tokens(tmp_path / "books", count_up([9, 17]))
    monkeypatch.setattr(sequence_cache, "atomic_directory", too_late)
    assert is_right(cached_index(dataset, 5, "chunk", "keep")[0], [9, 17], 5, "chunk", "keep")


def test_without_locks_what_another_rank_builds_stays(tmp_path, monkeypatch) -> None:
    def refuse(*_, **__) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    dataset = write_tokens(tmp_path / "books", count_up([9, 17]))
    cached_index(dataset, 5, "chunk", "keep")
    (entry,) = (tmp_path / "index_cache").glob("books-*")
    other = temporary_name(entry)
    make_work_folder(other)
    shutil.rmtree(entry)
    monkeypatch.setattr(atomic, "lock_descriptor", refuse)
    cached_index(dataset, 5, "chunk", "keep")
    assert other.is_dir() and entry.is_dir()


@pytest.mark.parametrize("finished", [True, False])
def test_what_a_killed_rank_has_left_goes(tmp_path, finished) -> None:
    dataset = write_tokens(tmp_path / "books", count_up([9, 17]))
    cached_index(dataset, 5, "chunk", "keep")
    (entry,) = (tmp_path / "index_cache").glob("books-*")
    if not finished:
        shutil.rmtree(entry)
    make_work_folder(temporary_name(entry))
    cached_index(dataset, 5, "chunk", "keep")
    assert entries(tmp_path / "index_cache") == [entry.name]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch) -> None:
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    dataset = write_tokens(tmp_path / "books", count_up([9, 17]))
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(
        InputError, match=r"data.index_cache: .*/index_cache cannot be written \(No"
    ):
        cached_index(dataset, 5, "chunk", "keep")
    with pytest.raises(InputError, match=r"^--index-cache: \S+ cannot be written .*name a folder"):
        cached_index(dataset, 5, "chunk", "keep", tmp_path / "other", "--index-cache")
    # Held-out data may lie where nobody may write: its index is built each time.
    index, _ = cached_index(dataset, 5, "chunk", "keep", setting=None)
    assert len(index) == len(build_index(dataset.lengths, 5, "chunk", "keep")) > 0
    assert entries(tmp_path / "index_cache") == []
