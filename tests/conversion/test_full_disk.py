"""A disk that is full at any moment of a conversion: the error names what the user asked for."""

import errno
from pathlib import Path

import pytest
import torch

from lctw_megatron.atomic import atomic_directory
from lctw_megatron.config.schema import ModelConfig
from lctw_megatron.conversion.checkpoint_writer import CheckpointFiles
from lctw_megatron.conversion.placement import stored_tensors

FULL = Path("/dev/full")
MODEL = ModelConfig(
    num_layers=1, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, vocab_size=512
)


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full, a file that takes nothing")
@pytest.mark.parametrize("name", ["__0_0.distcp", "common.pt"])
def test_a_checkpoint_that_finds_no_room_ends_as_the_system_says(tmp_path: Path, name: str) -> None:
    """torch.save makes a RuntimeError of it."""
    tensors = list(stored_tensors(MODEL))
    with (
        pytest.raises(OSError, match="No space left") as error,
        atomic_directory(tmp_path / "out") as folder,
    ):
        (folder / name).symlink_to(FULL)
        with CheckpointFiles(folder) as files:
            for stored in tensors:
                files.add(stored, torch.zeros(stored.shape))
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
