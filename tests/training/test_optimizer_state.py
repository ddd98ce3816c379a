"""Of weights and optimizer every rank stores and reads its own part, and any layout finds its own.

One group of eight ranks, data 4 x context 2, does all of it on a tiny model; a long test measures
memory on a larger one.
"""

import ctypes
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.distributed import run_distributed
from tests.training.layouts import make_data, make_run, three_steps

LAYOUT = {"context": 2}
MODEL = {"num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 48}


@given(st.data())
def test_boxes_hold_a_run_of_elements_in_its_order(data: Any) -> None:
    from lctw_megatron.training.optimizer_state import boxes

    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    numbers = torch.arange(math.prod(shape)).view(shape)
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, numbers.numel())] * 2)))
    found, count = [], 0
    for offsets, sizes in boxes(shape, start, end):
        slices = (slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))
        found += numbers[tuple(slices)].flatten().tolist()
        count += 1
    assert found == list(range(start, end))
    assert count <= 2 * len(shape) - 1


def trainer(data: str, folder: str, **changes: Any) -> Any:
    from lctw_megatron.training.loop import Trainer

    changes = {"model": MODEL, "training": {"steps": 2}} | changes
    return Trainer(make_run(data, folder, LAYOUT, "chunk", "uniform", "frozen", **changes))


def state(owner: Any) -> list[torch.Tensor]:
    """This rank's weights, master weights, moments and counts."""
    tensors = [p.detach().clone() for chunk in owner.chunks for p in chunk.parameters()]
    for part in owner.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                values = part.optimizer.state[parameter]
                tensors += [
                    parameter.detach().clone(),
                    *(values[k].clone() for k in sorted(values)),
                ]
    return tensors


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def save_gathered(owner: Any, folder: Path) -> None:
    """As checkpoints were written before: whole tensors, and no checksums."""
    from megatron.core import dist_checkpointing

    from lctw_megatron.model.checkpoint import CheckpointManifest, model_state
    from lctw_megatron.model.checkpoint_folder import MANIFEST
    from lctw_megatron.model.initialize import sharding

    folder = folder / "checkpoints" / "step_00000001"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    whole = model_state(owner.chunks)
    weights = dict(whole["model"])
    whole["optimizer"] = owner.optimizer.sharded_state_dict(weights, metadata=sharding())
    dist_checkpointing.save(whole, str(folder))
    if dist.get_rank() == 0:
        run = owner.config
        manifest = CheckpointManifest(
            step=1, model=run.model, dtype="fp32", run=run, optimizer=True,
            loader=owner.loader.state_dict(),
        )  # fmt: skip
        (folder / MANIFEST).write_text(json.dumps(manifest.model_dump(mode="json")))
    dist.barrier()


def save_and_load(data: str, folder: str) -> dict[str, Any]:
    """Save after a step, in today's form and in the one of before, and resume from both."""
    root = Path(folder)
    first = trainer(data, f"{folder}/today")
    first.stepper.step(0, list(first.loader.step(0)))
    first.save(1)
    saved = state(first)
    save_gathered(first, root / "before")
    first.close()
    found = {}
    for name in ("today", "before"):
        resumed = trainer(data, f"{folder}/{name}")
        found[name] = (resumed.first_step, equal(state(resumed), saved))
        resumed.close()
    other = trainer(data, f"{folder}/before")  # the one of before, stored as today
    other.save(1)
    other.close()
    resumed = trainer(data, f"{folder}/before")
    found["stored anew"] = (resumed.first_step, equal(state(resumed), saved))
    resumed.close()
    return found


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("eight")
    data = make_data(folder)
    return data, folder, run_distributed(save_and_load, 8, data, str(folder))


def test_what_was_saved_comes_back_bit_for_bit_also_from_checkpoints_of_before(eight: Any) -> None:
    for found in eight[2]:
        assert found == {name: (1, True) for name in ("today", "before", "stored anew")}


def test_every_rank_writes_its_part_and_no_byte_is_written_twice(eight: Any) -> None:
    from lctw_megatron.model.checkpoint import check_files, read_manifest
    from lctw_megatron.training.save_estimate import estimate_save

    folder = eight[1] / "today" / "checkpoints" / "step_00000001"
    index = check_files(folder)
    elements = dict.fromkeys(range(8), 0)
    for place, info in index.storage_data.items():
        entry = index.state_dict_metadata[place.fqn]
        if hasattr(entry, "chunks"):
            (box,) = (box for box in entry.chunks if box.offsets == place.offset)
            elements[int(info.relative_path.split("_")[2])] += math.prod(box.sizes)
    total = sum(
        math.prod(entry.size)
        for entry in index.state_dict_metadata.values()
        if hasattr(entry, "chunks")
    )
    assert sum(elements.values()) == total
    assert max(elements.values()) < 1.2 * total / 8, elements
    manifest = read_manifest(folder)
    assert estimate_save(manifest.run, 8).total_bytes == 4 * total
    names = {path.name for path in folder.glob("*.distcp")}
    assert names < set(manifest.checksums)


@pytest.mark.parametrize("form", ["today", "before"])
def test_eight_ranks_checkpoint_goes_on_alone_as_if_it_had_never_been_split(
    form: str, eight: Any, tmp_path: Path
) -> None:
    data, folder, _ = eight
    shutil.copytree(folder / form, tmp_path / "run")

    def run(name: str) -> Any:
        return make_run(data, str(tmp_path / name), {}, "chunk", "uniform", "frozen",
                        model=MODEL, training={"steps": 2})  # fmt: skip

    from lctw_megatron.training.loop import Trainer

    expected = three_steps(run("alone"))["metrics"][1]
    resumed = Trainer(run("run"))
    assert resumed.first_step == 1
    found = resumed.stepper.step(1, list(resumed.loader.step(1)))
    resumed.close()
    for name in ("loss/plain", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


def peak(action: Any) -> int:
    """Bytes that ``action`` adds to this process's memory at its peak."""

    def status(name: str) -> int:
        (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if name in x)
        return int(line.split()[1]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would be used without being seen
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    action()
    return status("VmHWM") - before


def memory(data: str, folder: str) -> dict[str, float]:
    """What saving and loading add, and what the rank holds and stores."""
    from lctw_megatron.training.checkpoint import newest_checkpoint, resume

    wide = {"num_layers": 20, "hidden_size": 512, "ffn_hidden_size": 1536, "vocab_size": 2048}
    owner = trainer(data, folder, model=wide)
    owner.save(0)  # imports, buffers, the process of the queue
    owner.stepper.step(0, list(owner.loader.step(0)))
    parameters = sum(p.numel() for chunk in owner.chunks for p in chunk.parameters())
    added = {"saving": peak(lambda: owner.save(1))}
    path, manifest = newest_checkpoint(Path(folder) / "checkpoints", print)
    files = path.glob(f"__{dist.get_rank()}_*.distcp")
    added["stores"] = sum(file.stat().st_size for file in files)
    added["loading"] = peak(lambda: resume(path, manifest, owner.chunks, owner.optimizer))
    owner.close()
    # float32 weights and gradients, and an eighth of two moments.
    return added | {"holds": parameters * (4 + 4 + 8 / 8)}


@pytest.mark.long
def test_saving_and_loading_take_no_more_memory_than_a_ranks_own_part(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    for found in run_distributed(memory, 8, data, str(tmp_path / "run"), timeout=900):
        print({name: f"{value / 1e6:.0f} MB" for name, value in found.items()})
        assert found["saving"] < 1.3 * found["stores"], found
        assert found["loading"] < 0.3 * found["holds"], found
