"""What megatron-core and torch raise while they load becomes one line; what the machine is at fault
for does not, as the batch script then tries again."""

import errno
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lctw_megatron.errors import InputError
from lctw_megatron.model import checkpoint as module
from lctw_megatron.model.checkpoint import load_weights, model_state, read_manifest
from lctw_megatron.training.loop import Trainer
from tests.distributed import run_distributed
from tests.training.layouts import make_data, make_run


def garble(folder: Path) -> None:
    """Other bytes in the archives of the tensors, everywhere; sizes and index stay."""
    for path in folder.glob("*.distcp"):
        size = path.stat().st_size
        with open(path, "r+b") as file:
            for place in range(0, size, 997):
                file.seek(place)
                file.write(b"\xff" * min(64, size - place))


MODELS: dict[str, dict[str, Any]] = {
    "wider": {"ffn_hidden_size": 64},
    "more layers": {"num_layers": 8},
    "a head of its own": {"tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("load_errors")
    data = make_data(folder)
    tied = MODELS["a head of its own"]
    run = make_run(data, str(folder / "run"), {}, "chunk", "uniform", "frozen", model=tied)
    trainer = Trainer(run)
    trainer.save(1)
    trainer.close()
    return data, folder / "run" / "checkpoints" / "step_00000001"


def message(data: str, folder: str, model: dict[str, Any], checkpoint: Path) -> str:
    """What loading the weights says on this rank."""
    trainer = Trainer(make_run(data, folder, {}, "chunk", "uniform", "frozen", model=model))
    try:
        load_weights(trainer.chunks, checkpoint)
    except InputError as error:
        return str(error)
    finally:
        trainer.close()
    return "loaded"


def shorten(folder: Path) -> None:
    """Take the last box of a stacked tensor out of the index, as if its layer were not there."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    entry = index.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"]
    box = entry.chunks.pop()
    index.storage_data = {
        place: info
        for place, info in index.storage_data.items()
        if (place.fqn, place.offset) != ("decoder.layers.mlp.linear_fc1.weight", box.offsets)
    }
    (folder / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("name", [*MODELS, "garbled", "a layer too few in the index"])
def test_what_does_not_fit_or_is_damaged_is_one_line(
    name: str, saved: tuple[str, Path], tmp_path: Path
) -> None:
    data, checkpoint = saved
    copy = tmp_path / "step_00000001"
    shutil.copytree(checkpoint, copy)
    model = MODELS["a head of its own"] | MODELS.get(name, {})
    if name == "a head of its own":
        model = {}
    if name == "garbled":
        garble(copy)
    if name == "a layer too few in the index":
        shorten(copy)
    found = message(data, str(tmp_path / "run"), model, copy)
    assert found.startswith(f"{copy}") and "\n" not in found and len(found) < 600, found
    assert "weights_only" not in found, found  # torch's advice to trust the file


def test_weights_alone_are_no_checkpoint_to_go_on_from(
    saved: tuple[str, Path], tmp_path: Path
) -> None:
    data, checkpoint = saved
    run = make_run(data, str(tmp_path), {}, "chunk", "uniform", "frozen",
                   model=MODELS["a head of its own"])  # fmt: skip
    trainer = Trainer(run)
    manifest = read_manifest(checkpoint).model_copy(update={"optimizer": False})
    trainer.writer.save(model_state(trainer.chunks), manifest)
    trainer.close()
    with pytest.raises(InputError, match=f"{tmp_path}/checkpoints/step_00000001: .*optimizer"):
        Trainer(run)


def test_all_ranks_get_the_line(saved: tuple[str, Path], tmp_path: Path) -> None:
    data, checkpoint = saved
    model = MODELS["a head of its own"] | MODELS["wider"]
    found = run_distributed(message, 2, data, str(tmp_path / "run"), model, checkpoint)
    assert all(line.startswith(f"{checkpoint}: cannot be loaded") for line in found), found


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:525] Connection closed by peer"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (OSError(errno.EIO, os.strerror(errno.EIO)), True),
        (RuntimeError("PytorchStreamReader failed reading zip archive"), False),
        (KeyError("decoder.layers"), False),
        (FileNotFoundError(errno.ENOENT, "gone"), False),
    ],
)
def test_a_broken_machine_is_not_taken_for_a_broken_checkpoint(
    error: Exception, again: bool, saved: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import dist_checkpointing

    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(dist_checkpointing, "load", load)
    expected: type[Exception] = type(error) if again else InputError
    with pytest.raises(expected):
        module.load_shards([], saved[1], module.check_files(saved[1]))
