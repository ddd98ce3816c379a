"""A shard file is whole or an error."""

from pathlib import Path

import numpy as np
import pytest

from lctw_megatron.errors import InputError
from lctw_megatron.scoring.sidecar_shard import ShardReader, shard_files, write_shard
from lctw_megatron.work_folder import MARK

SETTINGS = {"window": 64, "scorer_digest": "1" * 32}
LOSSES = [np.arange(5, dtype=np.float32), np.full(3, 0.5, dtype=np.float32)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_shard(tmp_path, 2, 11, SETTINGS, iter(LOSSES))


def test_what_was_written_is_read(path: Path) -> None:
    reader = ShardReader(path)
    assert reader.settings == SETTINGS
    assert reader.values == 8
    np.testing.assert_array_equal(np.concatenate(list(reader.blocks())), np.concatenate(LOSSES))
    assert shard_files(path.parent) == {path: (2, 11)}


def test_a_shard_without_targets_is_a_shard(tmp_path: Path) -> None:
    reader = ShardReader(write_shard(tmp_path, 0, 1, SETTINGS, iter([])))
    assert reader.values == 0
    assert list(reader.blocks()) == []


def test_a_shard_that_fails_midway_leaves_no_file(tmp_path: Path) -> None:
    def losses():
        yield LOSSES[0]
        raise InputError("a loss that is not finite")

    with pytest.raises(InputError):
        write_shard(tmp_path, 0, 1, SETTINGS, losses())
    assert [path.name for path in tmp_path.iterdir()] == [MARK]


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match="damaged"):
            ShardReader(path)
    path.write_bytes(data[4:])
    with pytest.raises(InputError, match="damaged"):
        ShardReader(path)


def test_a_changed_loss_is_refused_when_it_is_read(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[6] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"00002-of-00011\.losses.*delete it"):
        list(ShardReader(path).blocks())
