"""What an earlier training has left is not taken for this one's, and not lost."""

import json
from pathlib import Path

import pytest

from lctw_megatron.config.load import dump_yaml
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.training.earlier_run import set_aside
from tests.training.layouts import make_run


def make(folder: Path, **training: object) -> RunConfig:
    run = make_run("tokens", str(folder), {}, "chunk", "uniform", "frozen")  # of 3 steps
    return run.model_copy(update={"training": run.training.model_copy(update=training)})


def write_result(path: Path, checkpoint: str | None) -> None:
    settings = {} if checkpoint is None else {"checkpoint": checkpoint}
    path.write_text(json.dumps({"format": "any", "settings": settings}))


def test_metrics_of_removed_checkpoints_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, saved = make(tmp_path), make(tmp_path, save_interval=1)
    path = tmp_path / "metrics.jsonl"
    set_aside(run, 0)
    path.write_text('{"step": 0}\n')
    set_aside(saved, 0)  # killed in its first save
    path.write_text('{"step": 0}\n{"step": 1}\n')
    set_aside(run, 0)  # and before it
    set_aside(saved, 1)
    half = tmp_path / "checkpoints" / ".step_00000001.0a1b2c3d.tmp"
    half.mkdir(parents=True)
    set_aside(saved, 0)  # in its first save, beside which it trained on
    half.rmdir()
    assert set(tmp_path.iterdir()) == {path, half.parent} and not capsys.readouterr().out
    # What a later save has left saves nothing.
    half.with_name(".step_00000002.0a1b2c3d.tmp").mkdir()
    set_aside(saved, 0)
    (aside,) = tmp_path.glob("metrics.*")
    assert aside != path and len(aside.read_text().splitlines()) == 2
    assert f"begins anew; is now {aside}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "now"),
    [({}, {"steps": 5}), ({"save_interval": 1}, {}), ({}, {"lr": 0.5})],
)
def test_metrics_of_removed_checkpoints_are_kept_under_other_settings(
    tmp_path: Path, before: dict[str, object], now: dict[str, object]
) -> None:
    """The first save was where those who wrote the metrics had it."""
    lines = "".join(f'{{"step": {step}}}\n' for step in range(3))
    (tmp_path / "metrics.jsonl").write_text(lines)
    (tmp_path / "trackers.json").write_text('{"wandb": "0a1b2c3d"}')
    (tmp_path / "run.yaml").write_text(dump_yaml(make(tmp_path, **before)))
    set_aside(make(tmp_path, **now), 0)
    (aside,) = tmp_path.glob("metrics.*")
    assert aside.name != "metrics.jsonl" and aside.read_text() == lines
    assert not (tmp_path / "trackers.json").exists()  # another training is another run there


def test_results_of_steps_to_come_are_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path, steps=9)
    names = ["evaluation.json", "harness.json", "recall.json"]
    write_result(tmp_path / names[0], "elsewhere/checkpoints/step_00000006")
    write_result(tmp_path / names[1], None)  # as files of before have none
    write_result(tmp_path / names[2], "run/checkpoints/step_00000002")
    set_aside(run, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert not capsys.readouterr().out
    set_aside(run, 4)  # the last checkpoint was removed, to go on from the one before
    assert [name for name in names if (tmp_path / name).exists()] == names[1:]
    assert "evaluation.json: of step 6, but the run goes on from step 4; is now " in (
        capsys.readouterr().out
    )
    set_aside(run, 0)
    assert not [name for name in names if (tmp_path / name).exists()]
    assert len(list(tmp_path.iterdir())) == 3


def test_what_the_harness_returned_goes_with_its_result(tmp_path: Path) -> None:
    write_result(tmp_path / "harness.json", "run/checkpoints/step_00000006")
    write_result(tmp_path / "recall.json", "run/checkpoints/step_00000006")
    (tmp_path / "harness").mkdir()
    (tmp_path / "recall").mkdir()  # somebody's own
    set_aside(make(tmp_path, steps=9), 4)
    (file,) = tmp_path.glob("harness.*.json")
    assert file.with_suffix("").is_dir() and not (tmp_path / "harness").exists()
    assert (tmp_path / "recall").is_dir() and not (tmp_path / "recall.json").exists()
