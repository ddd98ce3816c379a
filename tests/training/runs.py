"""Running the trainer in this process, stopping it on the way, and reading what it logged."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from lctw_megatron.config.schema import RunConfig


def logged(run_dir: str | Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what no two runs share: speed and memory."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [
        {
            name: value
            for name, value in json.loads(line).items()
            if not name.startswith(("speed/", "memory/"))
        }
        for line in lines
    ]


def checkpoints(run_dir: str | Path) -> list[int]:
    """The steps of a run's checkpoint folders."""
    names = [path.name for path in (Path(run_dir) / "checkpoints").glob("step_*")]
    return sorted(int(name.removeprefix("step_")) for name in names)


@contextmanager
def sigterm_after(steps: int) -> Iterator[None]:
    """A signal reaches this process while it works on the step that makes ``steps`` of them."""
    from lctw_megatron.training.step import Stepper

    real = Stepper.step

    def step(self: Stepper, number: int, batches: Any) -> dict[str, float]:
        if number + 1 == steps:
            signal.raise_signal(signal.SIGTERM)
        return real(self, number, batches)

    handler = signal.getsignal(signal.SIGTERM)
    try:
        with mock.patch.object(Stepper, "step", step):
            yield
    finally:  # a run that leaves ignores signals until its process has ended
        signal.signal(signal.SIGTERM, handler)


def write_recipe(path: Path, run: RunConfig) -> Path:
    """A recipe file whose one run, `main`, is ``run`` with OUTPUT_DIR beside the file."""
    values = run.model_dump(mode="json", exclude={"name", "run_dir"}, exclude_none=True)
    path.write_text(yaml.safe_dump({"name": "test", "output_dir": str(path.parent), **values}))
    return path
