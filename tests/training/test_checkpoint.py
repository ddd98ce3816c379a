"""A run that was stopped goes on as if it had not been, and only from what is whole.

Longer than 350 lines: all of it begins with the one stopped run that is trained here.
"""

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from multiprocessing.process import current_process
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.data.manifest import TokenizerIdentity
from lctw_megatron.data.token_dataset import TokenDataset, TokenWriter
from lctw_megatron.errors import InputError
from lctw_megatron.model.checkpoint import check_files, find_checkpoint, read_manifest
from lctw_megatron.model.checkpoint_folder import step_name
from lctw_megatron.ownership import owned
from lctw_megatron.training.heartbeat import read_beat
from tests.distributed import run_distributed
from tests.training.layouts import SCHEMES, STRIDE, WINDOW, make_data, make_run
from tests.training.runs import checkpoints, logged, sigterm_after

STEPS, STOP = 6, 4
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}  # random numbers must resume, too
TRAINING = dict(steps=STEPS, save_interval=2, schedule="cosine", warmup_steps=2, clip_grad=1.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("checkpoint"))


def dense_run(prefix: str, run_dir: Path, **changes: Any) -> RunConfig:
    changes["training"] = TRAINING | changes.get("training", {})
    changes["model"] = DROPOUT | changes.get("model", {})
    return make_run(prefix, str(run_dir), {}, "chunk", "dense", "frozen", **changes)


def train(run: RunConfig, allow_changes: bool = False) -> int:
    from lctw_megatron.training.loop import train

    return train(run, allow_changes)


@pytest.fixture(scope="module")
def uninterrupted(data: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert train(dense_run(data, folder)) == 0
    lines = logged(folder)
    assert [line["step"] for line in lines] == list(range(STEPS))
    return lines


@pytest.fixture(scope="module")
def stopped(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was asked to stop after STOP steps, with checkpoints 2 and STOP."""
    folder = tmp_path_factory.mktemp("stopped")
    with sigterm_after(STOP):
        assert train(dense_run(data, folder)) == 75
    assert checkpoints(folder) == [2, STOP]
    return folder


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stopped_run_goes_on_bit_for_bit(
    data: str,
    tmp_path: Path,
    uninterrupted: list[Any],
    asynchronous: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Between two checkpoints of the interval: it must save at once.
    run = dense_run(data, tmp_path, training={"async_save": asynchronous})
    with sigterm_after(3):
        assert train(run) == 75
    assert checkpoints(tmp_path) == [2, 3]
    assert logged(tmp_path) == uninterrupted[:3]
    assert train(run) == 0
    assert logged(tmp_path) == uninterrupted
    assert checkpoints(tmp_path) == [4, 6]
    # Nothing is left to do, and the heartbeat does not say that nothing is done.
    assert train(run) == 0
    assert logged(tmp_path) == uninterrupted
    assert (beat := read_beat(tmp_path)) and beat.step == 6
    capsys.readouterr()
    shorter = dense_run(data, tmp_path, training={"steps": 2})
    assert "training.steps is 2, was 6" in refusal(shorter)
    assert train(shorter, allow_changes=True) == 0
    assert "already past training.steps 2: at step 6" in capsys.readouterr().out
    assert logged(tmp_path) == uninterrupted
    assert checkpoints(tmp_path) == [4, 6]


def test_a_save_needs_no_short_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a socket has at most 108 bytes, that of a job's TMPDIR often more."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from lctw_megatron.training.checkpoint import _start_results_queue

    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setitem(current_process()._config, "tempdir", str(folder))
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    _start_results_queue()
    queue = filesystem_async._results_queue
    queue.put("written")
    assert queue.get() == "written"


def test_a_run_has_said_what_it_is_at(stopped: Path) -> None:
    beat = read_beat(stopped)
    assert beat is not None and (beat.stage, beat.step) == ("saving", STOP)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_newest_and_every_nth_checkpoint_are_kept(
    data: str, tmp_path: Path, asynchronous: bool
) -> None:
    keep = dict(save_interval=1, keep_last=2, keep_every=3, async_save=asynchronous)
    assert train(dense_run(data, tmp_path, training=keep)) == 0
    assert checkpoints(tmp_path) == [3, 5, 6]
    assert not list((tmp_path / "checkpoints").glob(".*"))


# What may befall a checkpoint folder, and the word that the complaint must have.
class _Calls:
    """Unpickles to the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _evil(folder: Path) -> _Calls:
    return _Calls(os.system, f"touch {folder}/executed")


def _truncate(folder: Path) -> None:
    path = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)


def _remove_data(folder: Path) -> None:
    next(iter(folder.glob("*.distcp"))).unlink()


def _evil_index(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(_evil(folder)))


def _evil_index_behind_a_known_module(folder: Path) -> None:
    """torch.distributed.checkpoint.filesystem imports os: a dotted name reaches through it."""

    def text(value: str) -> bytes:
        return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()

    function = text("torch.distributed.checkpoint.filesystem") + text("os.system")
    call = pickle.STACK_GLOBAL + text(f"touch {folder}/executed") + pickle.TUPLE1 + pickle.REDUCE
    (folder / ".metadata").write_bytes(pickle.PROTO + b"\x04" + function + call + pickle.STOP)


def _evil_common(folder: Path) -> None:
    torch.save(_evil(folder), folder / "common.pt")


def _evil_item(folder: Path) -> None:
    """Code in place of the smallest pickled item that the data files hold."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    items = {
        place.fqn: info for place, info in index.storage_data.items() if "_extra_" in place.fqn
    }
    info = min(items.values(), key=lambda info: info.length)
    path = folder / info.relative_path
    kept = path.read_bytes()
    torch.save(_evil(folder), folder / "item")
    item = (folder / "item").read_bytes()
    info.offset, info.length = len(kept), len(item)
    path.write_bytes(kept + item)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated data": (_truncate, "bytes, expected"),
    "missing data": (_remove_data, "missing, expected"),
    "missing index": (lambda folder: (folder / ".metadata").unlink(), ".metadata: missing"),
    "garbled index": (lambda folder: (folder / ".metadata").write_bytes(b"abc"), "damaged"),
    "missing common": (lambda folder: (folder / "common.pt").unlink(), "common.pt: missing"),
    "truncated common": (
        lambda folder: os.truncate(folder / "common.pt", 100),
        "common.pt: damaged",
    ),
    "index with code": (_evil_index, "posix.system"),
    "index with code behind a known module": (_evil_index_behind_a_known_module, "os.system"),
    "common with code": (_evil_common, "common.pt: damaged"),
    "item with code": (_evil_item, "damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_nothing_in_it_is_run(copy: Path, name: str) -> None:
    damage, complaint = DAMAGE[name]
    newest = copy / "checkpoints" / step_name(STOP)
    check_files(newest)
    if name in ("missing common", "truncated common") and not (newest / "common.pt").exists():
        pytest.skip("this megatron-core keeps no common.pt but an item among the others")
    damage(newest)
    with pytest.raises(InputError, match=complaint) as error:
        check_files(newest)
    assert str(newest) in str(error.value) and "\n" not in str(error.value)
    assert not (newest / "executed").exists()


def test_half_written_and_damaged_checkpoints_are_skipped_with_a_line(
    data: str, copy: Path, uninterrupted: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy / "checkpoints"
    _truncate(folder / step_name(STOP))
    half = folder / ".step_00000006.tmp"
    shutil.copytree(folder / step_name(2), half)
    capsys.readouterr()
    assert train(dense_run(data, copy)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(f"{half}: half-written, not used" in line for line in lines)
    assert any(f"{folder / step_name(STOP)} is skipped: " in line for line in lines)
    assert any("steps 2..6" in line for line in lines)
    assert logged(copy) == uninterrupted
    assert checkpoints(copy) == [4, 6]


def test_a_damaged_newer_checkpoint_does_not_push_out_the_one_just_saved(
    data: str, copy: Path, uninterrupted: list[Any]
) -> None:
    """Stopped again before the damaged step is reached, and with one checkpoint to be kept."""
    folder = copy / "checkpoints"
    shutil.copytree(folder / step_name(STOP), folder / step_name(6))
    for step in (STOP, 6):
        _truncate(folder / step_name(step))
    run = dense_run(data, copy, training={"keep_last": 1, "save_interval": 100})
    with sigterm_after(3):
        assert train(run) == 75
    assert 3 in checkpoints(copy) and 2 not in checkpoints(copy)
    assert train(run) == 0
    assert logged(copy) == uninterrupted
    assert checkpoints(copy) == [6]


def test_retention_that_a_kill_cut_short_is_applied_at_the_next_start(
    data: str, copy: Path
) -> None:
    folder = copy / "checkpoints"
    (folder / f".{step_name(1)}.0123abcd.tmp").mkdir()  # half removed
    run = dense_run(data, copy, training={"steps": STOP, "keep_last": 1})
    assert train(run, allow_changes=True) == 0  # no step is left to do, so none is saved
    assert [path.name for path in folder.iterdir()] == [step_name(STOP)]


def test_of_a_link_to_an_archived_checkpoint_only_the_link_is_removed(
    data: str, copy: Path, tmp_path: Path
) -> None:
    archive, old = tmp_path / "archive", copy / "checkpoints" / step_name(2)
    old.rename(archive)
    old.symlink_to(archive)
    before = sorted(archive.rglob("*"))
    assert train(dense_run(data, copy, training={"keep_last": 1})) == 0
    assert not old.is_symlink() and checkpoints(copy) == [STEPS]
    assert sorted(archive.rglob("*")) == before
    check_files(archive)


def test_a_folder_of_the_users_with_the_name_of_a_checkpoint_moves_aside(
    data: str, copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs = copy / "checkpoints" / step_name(STEPS)
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("x")
    assert train(dense_run(data, copy)) == 0
    (aside,) = (copy / "checkpoints").glob("*.no_checkpoint")
    assert (aside / "thesis.tex").read_text() == "x"
    assert str(aside) in capfd.readouterr().out


def test_a_second_run_in_the_folder_is_refused_before_it_touches_anything(
    data: str, copy: Path
) -> None:
    def state() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in copy.rglob("*")}

    with owned(copy / ".lock", "the first"):
        before = state()
        assert f"{copy}: is being written by process {os.getpid()}" in refusal(
            dense_run(data, copy)
        )
        assert state() == before
    assert train(dense_run(data, copy)) == 0
    assert not (copy / ".lock").exists()


def test_a_folder_that_cannot_be_made_is_one_line_on_all_ranks(tmp_path: Path) -> None:
    from lctw_megatron.config.schema import LayoutConfig
    from lctw_megatron.model.checkpoint import CheckpointManifest
    from lctw_megatron.platform.world import initialize
    from lctw_megatron.training.checkpoint import CheckpointWriter

    initialize(LayoutConfig(), seed=0)
    (tmp_path / "file").touch()
    run = make_run("none", "none", {}, "chunk", "uniform", "frozen")
    manifest = CheckpointManifest(step=1, model=run.model, dtype="fp32", optimizer=True)
    with pytest.raises(InputError, match="step_00000001: could not be written .*cannot be reached"):
        CheckpointWriter(tmp_path / "file" / "checkpoints", 1).save({}, manifest)


def test_a_run_without_a_whole_checkpoint_begins_anew_only_where_there_is_none(
    data: str, copy: Path, uninterrupted: list[Any]
) -> None:
    for path in (copy / "checkpoints").glob("step_*"):
        _evil_index(path)
    assert "can be read, for the reasons above; put a whole one" in refusal(dense_run(data, copy))
    shutil.rmtree(copy / "checkpoints")
    assert train(dense_run(data, copy)) == 0
    assert logged(copy) == uninterrupted
    assert not list(copy.rglob("executed"))


def retokenised(data: str, folder: Path, **identity: Any) -> str:
    """A copy of the dataset whose first document is reversed, its tokenizer changed."""
    old = TokenDataset(data)
    tokenizer = TokenizerIdentity(**{**old.manifest.tokenizer.model_dump(), **identity})
    with TokenWriter(str(folder / "other"), tokenizer) as writer:
        for number in range(len(old)):
            writer.add(old[number][::-1] if number == 0 else old[number])
    return str(folder / "other")


def refusal(run: RunConfig) -> str:
    with pytest.raises(InputError) as error:
        train(run)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_weighting_is_refused_unless_allowed(data: str, copy: Path) -> None:
    weighting = SCHEMES["sparse"] | {"window": WINDOW, "stride": STRIDE}
    run = dense_run(data, copy, weighting=weighting)
    message = refusal(run)
    assert "weighting.scheme" in message and "sparse" in message and "dense" in message
    weighting = SCHEMES["dense"] | {"interpolation": 0.5, "window": WINDOW, "stride": STRIDE}
    message = refusal(dense_run(data, copy, weighting=weighting))
    assert "weighting.interpolation" in message and "0.5" in message and "0.25" in message
    assert train(run, allow_changes=True) == 0
    assert [line["step"] for line in logged(copy)] == list(range(STEPS))


def test_another_precision_or_start_is_refused_but_one_that_moved_along_is_not(
    data: str, stopped: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "before" / "base")
    changes = {"training": {"steps": 2, "save_interval": None}}

    def run(folder: str, start: str | None, **training: Any) -> RunConfig:
        changed = {"training": changes["training"] | training}
        place = tmp_path / folder / "next"
        return dense_run(data, place, start=start and str(tmp_path / start), **changed)

    assert train(run("before", "before/base")) == 0
    message = refusal(run("before", "before/base", precision="bf16"))
    assert "training.precision is bf16, was fp32" in message
    message = refusal(run("before", None))
    assert "start is None" in message and "before/base" in message
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    assert train(run("after", "after/base")) == 0
    message = refusal(run("after", "after/next"))
    assert "start is" in message and "after/next" in message and "before/base" in message
    assert train(run("after", None, steps=3, precision="bf16"), allow_changes=True) == 0


def test_a_finished_run_is_not_called_trained_with_other_settings(
    data: str, tmp_path: Path
) -> None:
    assert train(dense_run(data, tmp_path, training={"steps": 2, "lr": 1e-3})) == 0
    was = (tmp_path / "run.yaml").read_text()
    other = dense_run(data, tmp_path, training={"steps": 2, "lr": 5e-3, "keep_last": 1})
    message = refusal(other)
    assert "training.lr is 0.005, was 0.001" in message and "keep_last" not in message
    assert train(other, allow_changes=True) == 0  # there is no step left
    assert (tmp_path / "run.yaml").read_text() == was
    # What decides no weight may change, and a run with steps left may go on with another rate.
    assert train(dense_run(data, tmp_path, training={"steps": 2, "lr": 1e-3, "keep_last": 1})) == 0
    assert train(dense_run(data, tmp_path, training={"steps": 3, "lr": 5e-3})) == 0
    assert "lr: 0.005" in (tmp_path / "run.yaml").read_text()


def test_a_start_that_was_trained_on_is_another_start(
    data: str, stopped: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(stopped, tmp_path / "base"))
    training = {"steps": 2, "save_interval": None}
    run = dense_run(data, tmp_path / "next", start=str(base), training=training)
    assert train(run) == 0
    assert train(run) == 0
    assert train(dense_run(data, base)) == 0
    message = refusal(run)
    assert f"start is step {STEPS}, " in message and f"was step {STOP}, " in message
    # By whatever path: the checkpoint that it began with is no other start.
    began = stopped / "checkpoints" / step_name(STOP)
    assert train(dense_run(data, tmp_path / "next", start=str(began), training=training)) == 0
    assert train(run, allow_changes=True) == 0


def test_checkpoints_that_cannot_be_reached_are_no_run_that_begins(data: str, copy: Path) -> None:
    away = copy.parent / "scratch"
    (copy / "checkpoints").rename(away)
    (copy / "checkpoints").symlink_to(copy.parent / "not mounted")
    logged_before = logged(copy)
    assert "whose target is missing" in refusal(dense_run(data, copy))
    assert logged(copy) == logged_before
    (copy / "checkpoints").unlink()
    (copy / "checkpoints").symlink_to(away)
    assert train(dense_run(data, copy)) == 0


def test_another_sequence_length_is_refused_by_its_name(data: str, copy: Path) -> None:
    longer = {"train": [{"prefix": data}], "sequence_length": 128, "packing": "pack"}
    message = refusal(dense_run(data, copy, data=longer, weighting={"scheme": "uniform"}))
    assert "sequence_length was 64, is 128" in message


def test_other_data_or_another_tokenizer_is_refused(data: str, copy: Path) -> None:
    folder = copy.parent
    uniform = {"weighting": {"scheme": "uniform"}}
    # The stopped run is a uniform one for this purpose: the sidecar would be refused first.
    run = dense_run(data, folder / "uniform", **uniform)
    with sigterm_after(2):
        assert train(run) == 75
    other = retokenised(data, folder)
    fingerprints = [TokenDataset(prefix).fingerprint for prefix in (data, other)]
    message = refusal(dense_run(other, folder / "uniform", **uniform))
    assert all(fingerprint in message for fingerprint in fingerprints), message
    (folder / "second").mkdir()
    other = retokenised(data, folder / "second", digest="another")
    message = refusal(dense_run(other, folder / "uniform", **uniform))
    assert "tokenizer was 0, is another" in message, message
    # Beginning from its weights: other data are fine, another tokenizer is not.
    message = refusal(dense_run(other, folder / "new", start=str(copy), **uniform))
    assert "another" in message and "with 0;" in message and str(copy) in message, message
    assert not checkpoints(folder / "new")


def test_a_start_takes_the_weights_to_a_new_length_and_theta(
    data: str, stopped: Path, tmp_path: Path
) -> None:
    from lctw_megatron.training.loop import Trainer

    source = find_checkpoint(stopped)
    assert source.name == step_name(STOP)
    changes: dict[str, Any] = {
        "start": str(stopped),
        "data": {"train": [{"prefix": data}], "sequence_length": 128, "packing": "pack"},
        "model": {"rope_theta": 500000.0},
        "weighting": {"scheme": "uniform"},
        "training": {"steps": 2, "save_interval": None},
    }
    resumed = Trainer(dense_run(data, stopped))
    expected = {name: value.clone() for name, value in resumed.chunks[0].named_parameters()}
    resumed.close()
    trainer = Trainer(dense_run(data, tmp_path, **changes))
    try:
        assert trainer.first_step == 0
        for name, value in trainer.chunks[0].named_parameters():
            assert value.equal(expected[name]), name
        # theta^(-2i/d), d = 8 channels of a head
        frequencies = 500000.0 ** (-torch.arange(0, 8, 2) / 8)
        torch.testing.assert_close(trainer.chunks[0].rotary_pos_emb.inv_freq, frequencies)
        assert trainer.run_to_end() == 0
    finally:
        trainer.close()
    assert [line["step"] for line in logged(tmp_path)] == [0, 1]
    manifest = read_manifest(find_checkpoint(tmp_path))
    assert (manifest.step, manifest.model.rope_theta) == (2, 500000.0)
    assert manifest.model.max_position_embeddings == 128
    assert read_manifest(source).model.max_position_embeddings == 64


def test_a_start_refuses_another_shape(data: str, stopped: Path, tmp_path: Path) -> None:
    run = dense_run(data, tmp_path, start=str(stopped), model={"num_query_groups": 4})
    message = refusal(run)
    assert "model.num_query_groups is 4" in message and "has 2" in message


# Saved under one layout, gone on with under others.
def layout_run(data: str, folder: Path, layout: dict[str, Any]) -> RunConfig:
    model = {"tie_word_embeddings": True}
    return make_run(
        data, str(folder), layout, "pack", "dense", "self", training=TRAINING, model=model
    )


def save_and_go_on(data: str, folder: str) -> list[int]:
    """Exit statuses of a run under TP2+SP x PP2 x VPP2, stopped by a signal to one rank, and of a
    copy that goes on under CP2 x DP2; another copy is left for one process."""
    statuses = []
    with sigterm_after(3 if dist.get_rank() == 2 else -1):
        split = {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2}
        run = layout_run(data, Path(folder) / "saved", split)
        statuses.append(train(run))
    dist.barrier()
    if dist.get_rank() == 0:
        for name in ("CP2xDP2", "alone"):
            shutil.copytree(Path(folder) / "saved", Path(folder) / name)
    dist.barrier()
    statuses.append(train(layout_run(data, Path(folder) / "CP2xDP2", {"context": 2})))
    return statuses


@pytest.fixture
def saved_by_four_ranks(data: str, tmp_path: Path) -> Iterator[Path]:
    assert run_distributed(save_and_go_on, 4, data, str(tmp_path)) == [[75, 0]] * 4
    yield tmp_path


def test_a_checkpoint_of_one_layout_goes_on_under_others(
    data: str, saved_by_four_ranks: Path
) -> None:
    folder = saved_by_four_ranks
    assert checkpoints(folder / "saved") == [2, 3]
    assert train(layout_run(data, folder / "alone", {})) == 0
    assert train(layout_run(data, folder / "never stopped", {})) == 0
    expected = logged(folder / "never stopped")
    for name in ("CP2xDP2", "alone"):
        lines = logged(folder / name)
        assert len(lines) == STEPS
        for found, right in zip(lines, expected, strict=True):
            assert found.keys() == right.keys()
            for key in ("loss/weighted", "loss/plain", "grad_norm", "learning_rate"):
                assert found[key] == pytest.approx(right[key], rel=1e-5), (name, key)
