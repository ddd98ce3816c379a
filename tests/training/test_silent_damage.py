"""A bit that has changed in any file of a checkpoint is found before anything is done with it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lctw_megatron.conversion.checkpoint_reader import open_checked
from lctw_megatron.errors import InputError
from lctw_megatron.model.checkpoint import load_weights, read_manifest, write_manifest
from lctw_megatron.model.checkpoint_folder import MANIFEST
from lctw_megatron.model.checksums import folder_names
from lctw_megatron.training.checkpoint import newest_checkpoint
from lctw_megatron.training.loop import Trainer
from lctw_megatron.training.shared_writing import collect_sums
from tests.distributed import run_distributed
from tests.training.layouts import make_data, make_run


def open_trainer(data: str, folder: str, asynchronous: bool = False) -> Trainer:
    run = make_run(data, folder, {}, "chunk", "uniform", "frozen", model={"num_layers": 1},
                   training={"async_save": asynchronous})  # fmt: skip
    return Trainer(run)


def write(data: str, folder: str, asynchronous: bool) -> None:
    """A checkpoint with tokenizer files, of as many ranks as there are."""
    trainer = open_trainer(data, folder, asynchronous)
    tokenizer = Path(folder) / "some_tokenizer"
    if trainer.world.is_first:
        tokenizer.mkdir()
        (tokenizer / "tokenizer.json").write_text("{}")
        trainer.writer.tokenizer_files = tokenizer
    trainer.save(1)
    trainer.writer.finish()
    trainer.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("silent_damage"))


@pytest.fixture(scope="module", params=[False, True], ids=["waiting", "in the background"])
def saved(request: Any, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    write(data, str(folder), request.param)
    return folder / "checkpoints" / "step_00000001"


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_named(data: str, saved: Path, tmp_path: Path) -> None:
    sums = read_manifest(saved).checksums
    assert sums is not None and sums.keys() == set(folder_names(saved)) - {MANIFEST}
    assert {".metadata", "__0_0.distcp", "tokenizer/tokenizer.json"} < sums.keys()
    trainer = open_trainer(data, str(tmp_path / "run"))
    for number, name in enumerate(sorted(sums)):
        copy = Path(shutil.copytree(saved, tmp_path / str(number)))
        load_weights(trainer.chunks, copy)
        flip(copy / name)
        for read in (lambda c: load_weights(trainer.chunks, c), open_checked):
            with pytest.raises(InputError, match="damaged") as error:
                read(copy)
            assert str(error.value).startswith(f"{copy / name}: ") and "\n" not in str(error.value)
        (copy / name).unlink()
        with pytest.raises(InputError, match=": missing; "):
            load_weights(trainer.chunks, copy)
    trainer.close()


def test_resuming_passes_over_a_flipped_bit_and_older_checkpoints_have_no_sums(
    saved: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    for step in (1, 2):
        copy = Path(shutil.copytree(saved, tmp_path / f"step_0000000{step}"))
        write_manifest(copy, read_manifest(saved).model_copy(update={"step": step}))
    flip(copy / "__0_0.distcp")
    found = newest_checkpoint(tmp_path, lines.append)
    assert found is not None and found[1].step == 1
    assert len(lines) == 1 and str(copy / "__0_0.distcp") in lines[0]
    values = json.loads((copy / MANIFEST).read_text())
    del values["checksums"]  # as before there were any
    (copy / MANIFEST).write_text(json.dumps(values))
    found = newest_checkpoint(tmp_path, lines.append)
    assert found is not None and found[1].step == 2 and len(lines) == 1


def test_training_does_not_begin_anew_where_every_checkpoint_is_damaged(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert newest_checkpoint(tmp_path, print) is None
    copy = Path(shutil.copytree(saved, tmp_path / "step_00000001"))
    flip(copy / "tokenizer" / "tokenizer.json")
    lines: list[str] = []
    with pytest.raises(InputError, match=r"none of its checkpoints \(1\) can be read"):
        newest_checkpoint(tmp_path, lines.append)
    assert len(lines) == 1 and "LCTW_SKIP_CHECKSUMS=1" in lines[0]
    monkeypatch.setenv("LCTW_SKIP_CHECKSUMS", "1")
    assert newest_checkpoint(tmp_path, lines.append) is not None


def test_a_checksum_for_which_there_was_no_room_is_made_again(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lctw_megatron.training import checkpoint

    def collect(folder: Path) -> dict[str, str]:
        (folder / "__0_0.distcp.crc32").write_text("")  # cut
        return collect_sums(folder)

    monkeypatch.setattr(checkpoint, "collect_sums", collect)
    write(data, str(tmp_path), False)
    found = newest_checkpoint(tmp_path / "checkpoints", print)
    assert found is not None and found[1].checksums is not None
    assert "__0_0.distcp" in found[1].checksums
    assert not list(found[0].glob("*.crc32"))


def refusals(data: str, folder: str) -> list[str]:
    """Two ranks write, and each file is damaged in turn: what this rank says."""
    import torch.distributed as dist

    write(data, folder, False)
    trainer = open_trainer(data, f"{folder}/other")
    checkpoint = Path(folder) / "checkpoints" / "step_00000001"
    found = []
    for name in sorted(read_manifest(checkpoint).checksums or {}):
        for _ in range(2):  # and back
            dist.barrier()
            if dist.get_rank() == 0:
                flip(checkpoint / name)
            dist.barrier()
            try:
                load_weights(trainer.chunks, checkpoint)
                found.append("loaded")
            except InputError as error:
                found.append(str(error))
    trainer.close()
    return found


def test_ranks_share_the_files_and_agree(data: str, tmp_path: Path) -> None:
    one, other = run_distributed(refusals, 2, data, str(tmp_path))
    names = read_manifest(tmp_path / "checkpoints" / "step_00000001").checksums
    assert names is not None and {"__0_0.distcp", "__1_0.distcp"} < names.keys()
    for number, name in enumerate(sorted(names)):
        assert one[2 * number].startswith(f"{tmp_path}/checkpoints/step_00000001/{name}: damaged")
        assert one[2 * number + 1] == "loaded"
    assert one == other
