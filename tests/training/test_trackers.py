"""Trackers take every step, a resumed run goes on in theirs, and what fails there harms nobody.

With the libraries themselves where they are installed, and offline: a local store of each.
"""

import importlib.util
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lctw_megatron.errors import InputError
from lctw_megatron.training import trackers
from lctw_megatron.training.trackers import Identities, Sender, check_trackers
from tests.training.layouts import make_data, make_run
from tests.training.runs import logged, sigterm_after


class Memory:
    """A tracker that keeps what it gets, after so many failures."""

    def __init__(self, failures: int = 0) -> None:
        self.failures, self.kept, self.closed = failures, [], False
        self.thread: threading.Thread | None = None

    def log(self, step: int, values: dict[str, float]) -> None:
        self.thread = threading.current_thread()
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route\nto host")
        self.kept.append((step, values))

    def close(self) -> None:
        self.closed = True


def test_a_failure_is_said_once_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "_RETRY_SECONDS", 0.01)
    memory, reached = Memory(failures=3), threading.Event()
    memory_log = memory.log

    def log(step: int, values: dict[str, float]) -> None:
        memory_log(step, values)
        if step == 2:
            reached.set()

    memory.log = log  # type: ignore[method-assign]
    sender = Sender("wandb", lambda: memory)
    for step in range(3):
        sender.log(step, {"loss/plain": 1.0})
    assert reached.wait(30)
    sender.end()
    sender.close()
    assert [step for step, _ in memory.kept] == [0, 1, 2] and memory.closed
    assert memory.thread is not threading.main_thread()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("wandb: ConnectionError: no route to host; tried again every")


def test_one_that_cannot_be_opened_or_reached_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> Any:
        raise KeyboardInterrupt("no key")  # as wandb does

    sender = Sender("wandb", refuse)
    sender.log(0, {})
    sender.end()
    sender.close()
    assert "wandb: KeyboardInterrupt: no key; this start" in capsys.readouterr().out
    unreachable = Memory(failures=10**9)
    sender = Sender("mlflow", lambda: unreachable)  # tried again in a minute
    sender.log(0, {})
    sender.end()
    sender.close()
    assert unreachable.closed and "mlflow: ConnectionError" in capsys.readouterr().out
    monkeypatch.setattr(trackers, "_CLOSING_SECONDS", 0.05)
    never = threading.Event()
    sender = Sender("mlflow", lambda: never.wait() and Memory())  # type: ignore[arg-type, return-value]
    sender.end()
    sender.close()
    assert "did not take everything" in capsys.readouterr().out
    never.set()


def test_identities_are_kept_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "trackers.json"
    assert Identities(path).get("wandb") is None
    Identities(path).set("wandb", "a")
    Identities(path).set("mlflow", "b")
    assert (Identities(path).get("wandb"), Identities(path).get("mlflow")) == ("a", "b")
    path.write_text('{"wandb": 3}')
    with pytest.raises(InputError, match="wandb is no text; remove the file"):
        Identities(path).get("wandb")


def test_a_missing_library_is_refused_a_folder_of_its_name_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lctw_no_library").mkdir()  # as wandb's own, in the folder where one trains
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("lctw_no_library") is not None
    with pytest.raises(InputError, match=r"lctw_no_library is not installed here; pip install"):
        check_trackers(["lctw_no_library"])
    check_trackers(["json"])


def run_in_two_starts(folder: Path, name: str) -> list[dict[str, float]]:
    from lctw_megatron.training.loop import train

    run = make_run(
        make_data(folder), str(folder / "recipe" / "main"), {}, "chunk", "uniform", "frozen",
        training={"steps": 5, "trackers": [name]},
    )  # fmt: skip
    with sigterm_after(3):
        assert train(run) == 75
    identities = (folder / "recipe/main/trackers.json").read_text()
    assert train(run) == 0
    assert (folder / "recipe/main/trackers.json").read_text() == identities
    return logged(folder / "recipe/main")


def needs(name: str) -> pytest.MarkDecorator:
    reason = f"{name} is not installed (pip install lctw-megatron[{name}])"
    return pytest.mark.skipif(not trackers._is_installed(name), reason=reason)


@needs("mlflow")
@pytest.mark.parametrize("store", ["sqlite:///{}/store.db", "file://{}/store"])
def test_mlflow_has_a_resumed_run_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.format(tmp_path))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # it prefers a database by now
    lines = run_in_two_starts(tmp_path, "mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("lctw-megatron")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "recipe/main" and found.info.status == "FINISHED"
    assert found.data.params["weighting.scheme"] == "uniform"
    history = client.get_metric_history(found.info.run_id, "loss/plain")
    assert {each.step: each.value for each in history} == {
        line["step"]: line["loss/plain"] for line in lines
    }
    # Another store knows no such run: a new one begins.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    run = make_run("", str(tmp_path / "recipe/main"), {}, "chunk", "uniform", "frozen")
    other = trackers.MlflowRun(run, Identities(tmp_path / "recipe/main/trackers.json"))
    other.log(2, {"loss/plain": 1.0})
    other.close()
    kept = json.loads((tmp_path / "recipe/main/trackers.json").read_text())["mlflow"]
    assert kept != found.info.run_id
    assert mlflow.MlflowClient().get_run(kept).info.status == "FINISHED"


@needs("wandb")
def test_wandb_has_a_resumed_run_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    lines = run_in_two_starts(tmp_path, "wandb")
    identity = json.loads((tmp_path / "recipe/main/trackers.json").read_text())["wandb"]
    # `wandb sync` puts folders of one identity together.
    starts = sorted((tmp_path / "recipe/main/wandb").glob("offline-run-*"))
    assert [path.name.rpartition("-")[2] for path in starts] == [identity] * 2
    expected = {line["step"]: line["loss/plain"] for line in lines}
    found, deadline = {}, time.monotonic() + 30
    while found != expected and time.monotonic() < deadline:
        time.sleep(0.1)  # its service may write a moment after its `finish`
        for path in starts:
            found |= history(path / f"run-{identity}.wandb")
    assert found == expected


def history(path: Path) -> dict[int, float]:
    """Step to loss of what wandb has written to send later."""
    from wandb.proto import wandb_internal_pb2

    found = {}
    for data in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            found[values["step"]] = values["loss/plain"]
    return found


def log_records(data: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format, in blocks of 32 KiB, the first of which begins with 7 bytes of
    wandb's: chunks of checksum, length, kind (1 whole, 2 first, 3 middle, 4 last) and content."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""
