"""What an earlier training has left in the folder of a run that begins anew or goes back.

Somebody has removed checkpoints: all, or the last ones to go on from one before, perhaps with other
settings. What was measured of them may be all that is left of them, and is not of this training.
"""

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from lctw_megatron.config.load import load_run
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.data.json_object import read_json_object
from lctw_megatron.data.metrics_file import last_metrics
from lctw_megatron.errors import InputError
from lctw_megatron.model.checkpoint_folder import step_name

_HARNESS = "harness.json"
_RESULTS = ("evaluation.json", "recall.json", _HARNESS)
"""Where tools/report.py looks for what was measured of a run."""


def set_aside(run: RunConfig, first_step: int) -> None:
    """Give what is not of this training, which goes on after ``first_step`` steps, another name.
    To be called before the settings in the folder become this training's."""
    folder = Path(run.run_dir)
    if first_step == 0 and _has_been_saved(run, folder):
        # And a run of its own at the trackers.
        for name in ("metrics.jsonl", "trackers.json"):
            _rename(folder / name, "of a run whose checkpoints are gone, which begins anew")
    for name in _RESULTS:
        path = folder / name
        step = _measured_step(path)
        if step is None and first_step == 0:
            _rename(path, "measured before the run begins")
        elif step is not None and step > first_step:
            _rename(path, f"of step {step}, but the run goes on from step {first_step}")


def _has_been_saved(run: RunConfig, folder: Path) -> bool:
    """Whether the training whose metrics are there came beyond its first save. One that was killed
    in it has as many steps as that, or leaves it half-written; its metrics come again, unless the
    settings are others now."""
    if not (lines := last_metrics(folder / "metrics.jsonl")):
        return False
    before = run
    with suppress(InputError, OSError):
        before = load_run(folder / "run.yaml")
    first_save = before.training.save_interval or before.training.steps
    done = lines[-1]["step"] + 1
    if list(folder.glob(f"checkpoints/.{step_name(first_save)}.*.tmp")):
        return False
    return done > first_save or (done == first_save and before != run)


def _measured_step(path: Path) -> int | None:
    """The step of the checkpoint that a result is of; None if it does not say one."""
    with suppress(InputError, OSError):
        settings = read_json_object(path).get("settings")
        place = settings.get("checkpoint") if isinstance(settings, dict) else None
        if found := re.search(r"step_(\d{1,18})/*$", str(place)):
            return int(found.group(1))
    return None


def _rename(path: Path, what: str) -> None:
    if not path.is_file():
        return
    aside = path.with_name(f"{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    os.replace(path, aside)
    own = path.with_suffix("")
    if path.name == _HARNESS and own.is_dir():  # what the harness itself returned
        os.replace(own, aside.with_suffix(""))
    print(f"{path}: {what}; is now {aside}", flush=True)
