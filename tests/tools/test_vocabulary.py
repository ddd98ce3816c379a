"""One rule for all commands: a model must know every token of the data, and is asked for nothing
before that is sure. Tokens of the tokenizer that are in no text do no harm."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lctw_megatron.data.token_dataset import TokenWriter
from tests.scoring.scene import checkpoint
from tests.scoring.scorers import VOCAB_SIZE, tokenizer
from tests.tools.command import Answer, call
from tools import evaluate_model, inspect_data, score, train

__all__ = ["checkpoint"]  # a fixture: a scorer of VOCAB_SIZE tokens

LENGTH = 64


def write(prefix: Path, last: int, **changes: Any) -> str:
    """Five documents, of a tokenizer with two tokens more than the model; the last one ends with
    ``last``. ``changes`` to the tokenizer's identity."""
    draw = np.random.default_rng(1)
    documents = [draw.integers(3, VOCAB_SIZE, 2 * LENGTH) for _ in range(5)]
    documents[-1][-1] = last
    with TokenWriter(prefix, tokenizer(vocab_size=VOCAB_SIZE + 2, **changes)) as writer:
        for document in documents:
            writer.add(document)
    return str(prefix)


class Commands:
    """All that give tokens to a model."""

    def __init__(self, folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.checkpoint, self.capsys = folder, checkpoint, capsys
        self.good = write(folder / "good", VOCAB_SIZE - 1)

    def ask(self, name: str, data: str) -> Answer:
        recipe, model = self.folder / "recipe.yaml", ["--checkpoint", self.checkpoint]
        output = ["--output", self.folder / "evaluation.json", "--sequence-length", LENGTH]
        windows = ["--window", 16, "--stride", 8]
        values = {
            "name": "test", "output_dir": str(self.folder), "start": str(self.checkpoint),
            "data": {"train": {"train": [data], "blend": [self.good, data]}.get(name, [self.good]),
                     "validation": data if name == "validation" else self.good,
                     "sequence_length": LENGTH},
            "training": {"steps": 1, "global_batch_size": 1, "eval_interval": 1,
                         "tensorboard": False},
        }  # fmt: skip
        recipe.write_text(json.dumps(values))
        main, arguments = {
            "score": (score.main, ["--data", data, *model, *windows]),
            "evaluate": (evaluate_model.main, ["losses", "--data", data, *model, *output]),
            "inspect": (inspect_data.main, [data, "--document", 4, *model, *output[2:]]),
        }.get(name, (train.main, [recipe]))
        return call(main, self.capsys, *arguments)


@pytest.fixture
def commands(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(tmp_path, checkpoint, capsys)


NAMES = ["score", "evaluate", "inspect", "train", "blend", "validation"]


@pytest.mark.parametrize("name", NAMES)
def test_a_token_beyond_the_vocabulary_is_refused_before_the_model_is_loaded(
    commands: Commands, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "beyond", VOCAB_SIZE)
    for module in ("training.loop", "scoring.scorer", "model.gpt"):  # who imports it first
        monkeypatch.setattr(f"lctw_megatron.{module}.build_model", None)
    line = commands.ask(name, data).error_line()
    assert line.startswith(f"{data}: holds token id 90, but ")
    assert (
        "has a vocabulary of 90 (ids 0 to 89); take the model of the tokenizer a/tokenizer" in line
    )
    run_dir = tmp_path / "main"
    assert not run_dir.exists() or not list(run_dir.iterdir())


@pytest.mark.parametrize("name", ["score", "evaluate", "train"])
def test_tokens_that_are_in_no_text_are_no_reason_to_refuse(commands: Commands, name: str) -> None:
    answer = commands.ask(name, commands.good)
    assert answer.status == 0, answer.err


def test_validation_data_of_another_tokenizer_are_refused_at_the_start(
    commands: Commands, tmp_path: Path
) -> None:
    data = write(tmp_path / "other", 3, digest="7" * 32)
    line = commands.ask("validation", data).error_line()
    assert line.startswith(f"{data} was tokenised with a/tokenizer (digest 777")
    assert not (tmp_path / "main" / "metrics.jsonl").exists()
