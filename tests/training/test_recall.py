"""Recall measured during training: it says something and changes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lctw_megatron.config.load import load_recipe, resolve_run
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.data.token_dataset import TokenDataset, TokenWriter
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.evaluate_recall import RecallSettings, recall_to_file
from lctw_megatron.evaluation.recall_result import select
from lctw_megatron.training.recall import TrainingRecall
from tests.distributed import run_distributed
from tests.tokenizer_files import real_text
from tests.training.runs import logged

RECALL = {"lengths": [256], "tasks": ["one_key", "frequent_words"], "samples": 3, "every": 2}
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "PP2+VPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "TP2+SP": {"tensor": 2, "sequence": True},
    "CP2": {"context": 2},
}


@pytest.fixture(scope="module")
def data(hf_folder, tmp_path_factory) -> str:
    tokenizer = load_tokenizer(hf_folder)
    prefix = str(tmp_path_factory.mktemp("data") / "tokens")
    with TokenWriter(prefix, tokenizer.identity) as writer:
        for document in tokenizer.encode_documents([real_text()]):
            writer.add(document)
    return prefix


def make_run(
    data: str, folder: Path, recall: Any, layout: dict[str, Any] | None = None, **model: Any
) -> RunConfig:
    sizes = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 2}
    training = {
        "steps": 4, "global_batch_size": 2, "warmup_steps": 1, "tensorboard": False,
        "log_interval": 3, "lr": 1e-3, "recall": recall,
    }  # fmt: skip
    return RunConfig.model_validate(
        {
            "name": "run",
            "run_dir": str(folder),
            "data": {"train": data, "sequence_length": 64},
            "model": {**sizes, **model},
            "layout": layout or {},
            "training": training,
        }
    )


def train(run: RunConfig) -> list[dict[str, float]]:
    from lctw_megatron.training.loop import train as train_run

    assert train_run(run) == 0
    return logged(run.run_dir)


def train_all(data: str, folder: str) -> list[list[dict[str, float]]]:
    return [
        train(make_run(data, Path(folder) / name, RECALL, layout))
        for name, layout in LAYOUTS.items()
    ]


def recall_of(lines: list[dict[str, float]]) -> dict[int, dict[str, float]]:
    found = {
        int(line["step"]): {k: v for k, v in line.items() if k.startswith("recall/")}
        for line in lines
    }
    return {step: values for step, values in found.items() if values}


def test_a_run_is_the_same_bit_for_bit_with_recall_and_without(data, tmp_path):
    plain = train(make_run(data, tmp_path / "plain", None, **DROPOUT))
    probed = train(make_run(data, tmp_path / "probed", RECALL, **DROPOUT))
    assert list(recall_of(probed)) == [1, 3]  # also between the steps that log_interval writes
    assert set(recall_of(probed)[1]) == {
        f"recall/{task}/256/{value}" for task in RECALL["tasks"] for value in ("nats", "right")
    }
    without = [{k: v for k, v in line.items() if "recall" not in k} for line in probed]
    assert [line for line in without if line["step"] != 1] == plain


def test_what_is_named_twice_is_measured_once(data, tmp_path):
    twice = {name: RECALL[name] * 2 for name in ("lengths", "tasks")}
    run = make_run(data, tmp_path, RECALL | twice, vocab_size=512)
    recall = TrainingRecall(run, TokenDataset(data).manifest.tokenizer, None)
    assert (recall.lengths, recall.tasks) == (RECALL["lengths"], RECALL["tasks"])


def test_what_is_logged_is_what_the_command_measures_afterwards(data, tmp_path):
    from lctw_megatron.config.schema import LayoutConfig

    folder = tmp_path / "run"
    last = recall_of(train(make_run(data, folder, RECALL, **DROPOUT)))[3]
    settings = RecallSettings(["frequent_words"], [256], samples=3)
    words = recall_to_file(folder, tmp_path / "words.json", settings, LayoutConfig(), 4096)
    (cell,) = select(words, "frequent_words")
    expected = sum(cell["nats"]) / sum(cell["tokens"])
    assert last["recall/frequent_words/256/nats"] == pytest.approx(expected, rel=1e-5)


def test_every_layout_logs_the_same(data, tmp_path):
    alone = recall_of(train(make_run(data, tmp_path / "alone", RECALL)))
    for lines in run_distributed(train_all, 2, data, str(tmp_path))[0]:
        found = recall_of(lines)
        for step in (1, 3):
            assert found[step].keys() == alone[step].keys()
            for name, value in alone[step].items():
                assert np.isclose(found[step][name], value, atol=1e-4), (step, name)


RECIPE = """
name: r
output_dir: out
data: {train: p, sequence_length: 64}
model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 2}
layout: {context: 2}
training:
  steps: 4
"""


@pytest.mark.parametrize(
    ("recall", "message"),
    [
        ("{lengths: [66], every: 1}", "66 of training.recall.lengths .66. must be divisible by 2"),
        ("{lengths: [64]}", "training.recall.every"),
        ("{lengths: [], every: 1}", "training.recall.lengths"),
        ("{lengths: [64], every: 1, tasks: [two_keys]}", "training.recall.tasks.*two_keys"),
        ("{lengths: [64], every: 1, depth: 3}", "training.recall.depth"),
    ],
)
def test_what_cannot_be_is_refused_at_load(recall, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{RECIPE}  recall: {recall}\n")
    with pytest.raises(InputError, match=message):
        resolve_run(load_recipe(path, []), None, lambda folder: None)


def test_samples_that_do_not_fit_are_refused_before_the_first_step(data, tmp_path):
    from lctw_megatron.training.loop import train as train_run

    run = make_run(data, tmp_path / "run", {**RECALL, "lengths": [16]})
    with pytest.raises(InputError, match="training.recall: a length of 16 tokens: a sample of"):
        train_run(run)
    assert logged(tmp_path / "run") == []
