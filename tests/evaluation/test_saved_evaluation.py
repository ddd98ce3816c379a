"""An evaluation that is there is kept as long as it holds, and what it lacked is added."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lctw_megatron.evaluation import model_losses
from lctw_megatron.evaluation.evaluate import EvaluationSettings, evaluate, evaluate_to_file
from lctw_megatron.evaluation.result_file import read_evaluation
from lctw_megatron.training.loop import train
from tests.evaluation.tiny_run import STRIDE, WINDOW, make_data, make_run

SETTINGS = EvaluationSettings(max_sequences=3, window=WINDOW, stride=STRIDE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run and the prefix of its held-out data."""
    folder = tmp_path_factory.mktemp("run")
    corpus, validation = make_data(folder)
    assert train(make_run(folder, corpus, validation)) == 0
    return folder, validation


def test_the_same_under_another_name_is_not_measured_again(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    folder, validation = trained
    (tmp_path / "linked").symlink_to(folder)
    monkeypatch.chdir(folder)
    path, run = tmp_path / "evaluation.json", folder / "run"
    for checkpoint, data in (
        (run, validation),
        ("run", "validation"),
        ("./run/checkpoints", "../" + folder.name + "/validation"),
        (tmp_path / "linked/run", tmp_path / "linked/validation"),
    ):
        same = replace(SETTINGS, key_checkpoint=str(checkpoint))
        line = evaluate_to_file(checkpoint, str(data), path, same)
        assert line and line.startswith(f"{path}: loss")
    assert "was measured" not in capsys.readouterr().out
    evaluate_to_file(run, validation, path, SETTINGS)
    assert "was measured with another key_weights, is replaced" in capsys.readouterr().out


def test_weights_that_were_missing_are_shown_once_their_reason_is_gone(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: Any
) -> None:
    folder, validation = trained
    path, moved = tmp_path / "evaluation.json", tmp_path / "train.idx"
    loaded = []
    load = model_losses.load_weights
    monkeypatch.setattr(model_losses, "load_weights", lambda *a: loaded.append(load(*a)))

    def measured() -> Any:
        evaluate_to_file(folder / "run", validation, path, SETTINGS)
        return read_evaluation(path)

    shutil.move(folder / "train.idx", moved)
    try:
        without = measured()
        assert "train.idx" in without["weights"] and len(loaded) == 1
        written = path.stat().st_mtime_ns
        assert measured() == without and path.stat().st_mtime_ns == written
        path.write_text(json.dumps(without | {"weights": "of another day"}))
        assert measured() == without  # today's reason, for which no model is loaded
    finally:
        shutil.move(moved, folder / "train.idx")
    assert len(loaded) == 1
    found = measured()
    assert len(loaded) == 2
    assert found == json.loads(json.dumps(evaluate(folder / "run", validation, SETTINGS)))
    assert found["weights"]["page"]["text"]
    shutil.move(folder / "train.idx", moved)
    try:
        assert measured() == found  # what was measured stays
    finally:
        shutil.move(moved, folder / "train.idx")
