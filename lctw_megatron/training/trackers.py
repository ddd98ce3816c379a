"""Weights & Biases and MLflow, by their own libraries, for `training.trackers`.

Where they send to is theirs to know, by their own variables: WANDB_MODE, WANDB_PROJECT, WANDB_DIR,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and so on. The identity that a run has there is kept in
RUN_DIR/trackers.json, so that a resumed run goes on in it; steps that are done again appear again.
One that begins anew, its checkpoints having been removed, is another there (earlier_run.py).

A thread of each talks to the library, so that no network keeps the training waiting, and what fails
there is one line in the log.
"""

import importlib.util
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from lctw_megatron.atomic import write_json
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.data.json_object import read_json_object
from lctw_megatron.errors import InputError

PROJECT = "lctw-megatron"
"""Project or experiment, unless the library's variable names one."""
_RETRY_SECONDS = 60.0
_CLOSING_SECONDS = 20.0
"""For what has not been sent when the run ends. Less than SLURM's KillWait of 30: after a signal
the ranks that have left make srun end this one."""


def check_trackers(names: Sequence[str]) -> None:
    """InputError if the library of one is missing."""
    for name in names:
        if not _is_installed(name):
            raise InputError(
                f"training.trackers: {name} is not installed here; pip install "
                f'"lctw-megatron[{name}]", or leave it out'
            )


def _is_installed(name: str) -> bool:
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None  # a mere folder, as wandb makes, has none


class Tracker(Protocol):
    """A run of a library."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Sender:
    """Hands what is logged to a tracker in a thread. Raises nothing and never waits, but for
    _CLOSING_SECONDS at the end."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name, self._make = name, make
        self._waiting: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()
        self._closing = threading.Event()
        self._complained = False
        self._thread = threading.Thread(target=self._send, name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        self._waiting.put((step, values))

    def end(self) -> None:
        """Nothing more is logged; ``close`` follows."""
        self._waiting.put(None)
        self._closing.set()
        self._deadline = time.monotonic() + _CLOSING_SECONDS

    def close(self) -> None:
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._thread.is_alive():
            self._complain(f"did not take everything within {_CLOSING_SECONDS:g} s of the end")

    def _send(self) -> None:
        try:
            tracker = self._make()
        except BaseException as error:  # a library may raise KeyboardInterrupt as its own
            self._complain(f"{_one_line(error)}; this start of the run goes on without it")
            return
        while (item := self._waiting.get()) is not None and self._log(tracker, *item):
            pass
        try:
            tracker.close()
        except Exception as error:
            self._complain(_one_line(error))

    def _log(self, tracker: Tracker, step: int, values: dict[str, float]) -> bool:
        """Whether it went through, perhaps after a while; False if the run ended before."""
        while True:
            try:
                tracker.log(step, values)
                return True
            except Exception as error:
                self._complain(f"{_one_line(error)}; tried again every {_RETRY_SECONDS:g} s")
            if self._closing.wait(_RETRY_SECONDS):
                return False

    def _complain(self, text: str) -> None:
        if not self._complained:
            print(f"{self._name}: {text} (metrics.jsonl has everything)", flush=True)
        self._complained = True


def open_trackers(run: RunConfig) -> list[Sender]:
    """The trackers of ``run``, in a new run there or in that of the starts before. First rank
    only."""
    makers = {"wandb": WandbRun, "mlflow": MlflowRun}
    identities = Identities(Path(run.run_dir) / "trackers.json")
    return [
        Sender(name, lambda make=makers[name]: make(run, identities))  # type: ignore[misc]
        for name in dict.fromkeys(run.training.trackers)
    ]


class Identities:
    """The file that keeps them, for threads of one process."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()

    def get(self, name: str) -> str | None:
        found = read_json_object(self._path).get(name) if self._path.exists() else None
        if found is not None and not isinstance(found, str):
            raise InputError(f"{self._path}: {name} is no text; remove the file to begin a new run")
        return found

    def set(self, name: str, identity: str) -> None:
        with self._lock:
            known = read_json_object(self._path) if self._path.exists() else {}
            write_json(self._path, known | {name: identity})


class WandbRun:
    """A run of Weights & Biases. Its files lie in RUN_DIR/wandb."""

    def __init__(self, run: RunConfig, identities: Identities) -> None:
        import wandb

        identity = identities.get("wandb")
        if identity is None:
            identity = secrets.token_hex(4)
            identities.set("wandb", identity)
        with _without_terminal():  # or it asks there for a key that it lacks
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=_title(run),
                id=identity,
                resume="allow",
                dir=os.environ.get("WANDB_DIR", run.run_dir),
                config=run.model_dump(mode="json"),
                settings=wandb.Settings(console="off"),  # or it takes standard output over
            )
        # Steps of ours, as its own may only grow.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class MlflowRun:
    """A run of MLflow, by its client, which keeps no state of the process."""

    def __init__(self, run: RunConfig, identities: Identities) -> None:
        import mlflow

        self._client, self._last_step = mlflow.MlflowClient(), run.training.steps - 1
        self._status = "KILLED"
        identity = identities.get("mlflow")
        if identity is None or not self._goes_on(identity):
            identity = self._begin(run)
            identities.set("mlflow", identity)
        self._id = identity

    def _goes_on(self, identity: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(identity, status="RUNNING")
            return True
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            print(f"mlflow: no run {identity} in this store, a new one begins", flush=True)
            return False

    def _begin(self, run: RunConfig) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        identity = self._client.create_run(experiment, run_name=_title(run)).info.run_id
        settings = [Param(*pair) for pair in _flat(run.model_dump(mode="json"))]
        for first in range(0, len(settings), 100):  # as many as it takes at once
            self._client.log_batch(identity, params=settings[first : first + 100])
        return str(identity)

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(k, v, now, step) for k, v in values.items()])
        if step == self._last_step:
            self._status = "FINISHED"

    def close(self) -> None:
        self._client.set_terminated(self._id, self._status)


@contextmanager
def _without_terminal() -> Iterator[None]:
    before = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before


def _title(run: RunConfig) -> str:
    """The last two folders: usually the recipe's and the run's."""
    return "/".join(Path(os.path.abspath(run.run_dir)).parts[-2:])


def _flat(values: dict[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Each field with the names of its sections, and its value as text of no more than MLflow's
    500 characters of old stores."""
    pairs = []
    for name, value in values.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{above}{name}.")
        elif value is not None:
            pairs.append((f"{above}{name}", str(value)[:500]))
    return pairs


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
