"""What is asked of lm-evaluation-harness and made of its answers; the library itself is a stand-in.

tests/evaluation/test_harness_library.py runs the real one.
"""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lctw_megatron.commands import evaluate_model
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation import harness, harness_library
from lctw_megatron.evaluation.harness_folder import ModelFolder
from lctw_megatron.evaluation.harness_library import HarnessSettings, model_arguments
from lctw_megatron.evaluation.harness_result import read_harness, ruler_means, to_record
from lctw_megatron.evaluation.harness_tasks import (
    RULER,
    RULER_MADE,
    SHORT,
    Call,
    calls_for,
    downloads,
)
from tests.conversion.hf_models import make_model
from tests.tokenizer_files import VOCAB_SIZE
from tests.tools.command import call

POSITIONS = 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hf_folder) -> Path:
    """A model that says it reads 4,096 tokens."""
    model = make_model(
        "llama",
        tmp_path_factory.mktemp("harness") / "hf",
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=POSITIONS,
    )
    for path in Path(hf_folder).iterdir():
        shutil.copyfile(path, model / path.name)
    return model


def returned(call: Call, **values: float) -> dict[str, Any]:
    """What `simple_evaluate` of lm_eval 0.4.13 returns, as far as it is used."""
    name = Path(call.task).stem
    metrics: dict[str, Any] = {"alias": name, "sample_len": 4}
    for metric, value in values.items():
        metrics |= {f"{metric},none": value, f"{metric}_stderr,none": "N/A"}
    samples = [{"doc_id": number, "resps": [["text"]]} for number in range(4)]
    if call.length:
        metrics |= {f"{call.length},none": 0.5, "4096,none": -1, "4096_stderr,none": "N/A"}
        for sample, score in zip(samples, (1.0, 0.5, 0.5, 0.0), strict=True):
            sample |= {str(call.length): score, "4096": -1.0 if call.length != 4096 else score}
    return {
        "results": {name: metrics},
        "n-samples": {name: {"original": 500, "effective": 4}},
        "n-shot": {name: call.fewshot or 0},
        "versions": {name: 1.0},
        "samples": {name: samples},
    }


@pytest.fixture
def library(monkeypatch) -> list[Call]:
    """A library that answers every call; the calls it was asked."""
    asked: list[Call] = []

    class Answers(harness_library.Library):
        def evaluate(self, call: Call) -> dict[str, Any]:
            asked.append(call)
            return returned(call, **({} if call.length else {"acc": 0.25}))

    monkeypatch.setattr(harness, "Library", Answers)
    monkeypatch.setattr(harness, "require_harness", lambda backend: "0.4.13")
    monkeypatch.setattr(harness, "check_words", lambda model: None)  # 500 tokens are few
    return asked


def test_sets_are_their_tasks_and_ruler_has_a_call_for_each_length():
    calls = calls_for(["ruler", "niah_single_1", "capitals.yaml"], [1024, 2048], offline=False)
    assert [c for c in calls if c.length is None] == [Call("capitals.yaml")]
    for length in (1024, 2048):
        assert sorted(c.task for c in calls if c.length == length) == sorted(RULER)
    offline = calls_for(["ruler"], [4096], offline=True)
    assert [c.task for c in offline] == list(RULER_MADE)
    short = calls_for(["short", "longbench"], [], offline=False)
    assert [c.task for c in short] == [*SHORT, "longbench"]
    assert {c.task: c.fewshot for c in short}["mmlu"] == 5


def test_what_must_be_downloaded_is_said_and_what_runs_without_network():
    lines = downloads(calls_for(["ruler", "mmlu"], [1024], offline=False), offline=False)
    assert len(lines) == 3 and "paul_graham_essays" in lines[0] and "mmlu" in lines[1]
    assert all(task in lines[2] for task in RULER_MADE)
    (line,) = downloads(calls_for(["ruler"], [1024], offline=True), offline=True)
    assert line.startswith("without network run niah_single_1, niah_multikey_2, ")
    assert downloads([Call("niah_single_1", 1024)], offline=False) == []


def test_prompts_of_ruler_have_room_beyond_its_length_and_others_the_model_s_own(folder):
    settings = HarnessSettings(["ruler"], [1024, 2048])
    model = ModelFolder(folder)
    library = harness_library.Library(model, settings)
    assert {library.max_length(Call("ruler_fwe", n)) for n in (1024, 2048)} == {2048 + 256}
    assert library.max_length(Call("longbench")) == POSITIONS
    arguments = model_arguments(model, settings, 2304)
    assert arguments == {
        "pretrained": str(folder),
        "dtype": "float32",
        "max_length": 2304,
        "trust_remote_code": False,
    }


def test_a_backend_gets_the_bos_that_the_tokenizer_puts(folder):
    # transformers puts it by itself; vLLM only where it is told to.
    model = ModelFolder(folder)
    assert model.tokenizer.identity.add_bos
    vllm = HarnessSettings(["x"], backend="vllm", model_args=["tensor_parallel_size=4", "seed=1"])
    arguments = model_arguments(model, vllm, 4096)
    assert arguments["add_bos_token"] is True
    assert arguments["tensor_parallel_size"] == 4
    assert "add_bos_token" not in model_arguments(model, HarnessSettings(["x"]), 4096)


def test_a_score_of_ruler_is_that_of_its_length_with_its_error_over_samples():
    at_1024 = Call("niah_single_1", 1024)
    record = to_record(at_1024, returned(at_1024), seconds=1.0)
    # By hand: 1, 0.5, 0.5, 0 have the variance 1/6.
    assert record["metrics"] == {"score": [0.5, pytest.approx(math.sqrt(1 / 6 / 4))]}
    assert record["samples"] == 4 and record["main"] == "score"
    one = returned(at_1024)
    one["samples"]["niah_single_1"] = one["samples"]["niah_single_1"][:1]
    assert to_record(at_1024, one, 1.0)["metrics"]["score"] == [1.0, None]


def test_the_mean_over_ruler_is_taken_at_every_length():
    records = [
        {"task": task, "length": length, "metrics": {"score": [value, 0.3]}}
        for length in (1024, 8192)
        for task, value in (("niah_single_1", 1.0), ("ruler_vt", 0.5))
    ]
    means = ruler_means([*records, {"task": "mmlu", "length": None}])
    assert list(means) == ["1024", "8192"]
    # By hand: two errors of 0.3 give 0.3 / sqrt 2.
    assert means["8192"]["mean"] == 0.75 and means["8192"]["error"] == pytest.approx(0.3 / 2**0.5)
    assert means["1024"]["tasks"] == ["niah_single_1", "ruler_vt"]
    records[0]["metrics"]["score"][1] = None
    assert ruler_means(records)["1024"]["error"] is None


def test_of_a_group_its_own_metrics_count_and_those_of_its_tasks_are_kept():
    group = returned(Call("mmlu", fewshot=5), acc=0.4)
    group["results"]["mmlu"]["acc_stderr,none"] = 0.01
    group["results"]["mmlu_anatomy"] = {"acc,none": 0.3, "acc_stderr,none": 0.02}
    record = to_record(Call("mmlu", fewshot=5), group, 1.0)
    assert record["metrics"] == {"acc": [0.4, 0.01]}
    assert record["parts"] == {"mmlu_anatomy": {"acc": [0.3, 0.02]}} and record["fewshot"] == 5
    of_file = {**group, "groups": {"mmlu_part": {}, "mmlu": {}}}
    assert to_record(Call("sets/mine.yaml"), of_file, 1.0)["task"] == "mmlu"
    group["results"]["mmlu"] = {"alias": "mmlu"}  # a group that has no metric of its own
    assert to_record(Call("mmlu", fewshot=5), group, 1.0)["metrics"] == {"acc": [0.3, None]}
    tag = returned(Call("a"), acc=0.4, f1=0.1)
    tag["results"]["b"] = {"acc,none": 0.2, "acc_norm,get": 0.9}
    record = to_record(Call("some_tag"), tag, 1.0)
    assert record["task"] == "some_tag" and record["metrics"] == {"acc": [pytest.approx(0.3), None]}
    assert record["parts"]["b"] == {"acc": [0.2, None], "acc_norm,get": [0.9, None]}
    # Its tasks say which way it is better.
    assert record["lower_is_better"] is False
    tag["results"] = {name: {"word_perplexity,none": 9.0} for name in "ab"}
    tag["higher_is_better"] = {name: {"word_perplexity": False} for name in "ab"}
    assert to_record(Call("some_tag"), tag, 1.0)["lower_is_better"] is True


def test_the_command_exports_first_and_does_not_measure_again(folder, tmp_path, library, capsys):
    checkpoint = tmp_path / "checkpoint"
    import_hf(folder, checkpoint)
    tasks = ["--tasks", "niah_single_1", "ruler_vt", "arc_easy", "--lengths", 2048, 1024]
    arguments = ["harness", "--checkpoint", checkpoint, *tasks, "--limit", 4, "--log-samples"]
    answer = call(evaluate_model.main, capsys, *arguments)
    assert answer.status == 0, answer.err
    assert library == [
        Call("arc_easy"),
        *(Call(task, n) for n in (1024, 2048) for task in ("niah_single_1", "ruler_vt")),
    ]
    assert json.loads((checkpoint / "hf" / "config.json").read_text())["vocab_size"] == VOCAB_SIZE
    result = read_harness(checkpoint / "harness.json")
    assert result is not None and result["ruler"]["2048"]["mean"] == 0.5
    assert result["settings"]["folder"] == str(checkpoint / "hf")
    assert result["settings"]["checkpoint"] == str(checkpoint)  # and so its step
    assert re.search(r"ruler, 2 of 13 tasks +1,024 +score +0.5000 ±0.1443", answer.out)
    assert re.search(r"arc_easy +- +acc +0.2500 +4", answer.out)
    own = checkpoint / "harness"
    assert {path.name for path in own.iterdir()} == {
        f"{name}.{end}"
        for name in ("arc_easy", "niah_single_1-1024", "niah_single_1-2048", "ruler_vt-1024",
                     "ruler_vt-2048")
        for end in ("json", "samples.jsonl")
    }  # fmt: skip
    assert result["results"][0]["file"] == "harness/arc_easy.json"
    assert "samples" not in json.loads((own / "arc_easy.json").read_text())

    library.clear()
    assert call(evaluate_model.main, capsys, *arguments, "piqa").status == 2  # after --log-samples
    arguments.insert(5, "piqa")
    assert call(evaluate_model.main, capsys, *arguments).status == 0
    assert library == [Call("piqa")]
    assert len(read_harness(checkpoint / "harness.json")["results"]) == 6
    library.clear()
    answer = call(evaluate_model.main, capsys, *arguments, "--limit", 2)
    assert len(library) == 6 and "was measured with another limit, is replaced" in answer.out


def test_samples_are_logged_when_asked_for_and_are_of_what_is_shown(folder, tmp_path, library):
    output, samples = tmp_path / "harness.json", tmp_path / "harness" / "arc_easy.samples.jsonl"

    def measure(**settings):
        library.clear()
        harness.harness_to_file(folder, output, HarnessSettings(["arc_easy"], **settings))
        return len(library), samples.exists()

    assert measure() == (1, False)
    assert measure(log_samples=True) == (1, True)  # measured before, but not logged
    assert measure(log_samples=True) == measure() == (0, True)
    (tmp_path / "the same folder").symlink_to(folder)
    folder = tmp_path / "the same folder"
    assert measure() == (0, True)
    assert measure(limit=2) == (1, False)  # those were another measurement's


def test_a_task_of_a_file_is_measured_again_for_the_file_may_have_changed(
    folder, tmp_path, library, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("task: mine")
    for name in ("mine.yaml", tmp_path / "mine.yaml"):  # the same, so in the place of the other
        tasks = [str(name), "arc_easy"]
        harness.harness_to_file(folder, "harness.json", HarnessSettings(tasks))
    assert [c.task for c in library] == ["mine.yaml", "arc_easy", "mine.yaml"]
    assert len(read_harness("harness.json")["results"]) == 2


def test_what_the_harness_returned_is_never_written_over_that_of_another_task(
    folder, tmp_path, library, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "theirs"):
        Path(name).mkdir()
        Path(name, "task.yaml").write_text("task: some")
    both = HarnessSettings(["mine/task.yaml", "theirs/task.yaml"])
    message = "theirs/task.yaml: what it returns would be written over harness/task.json"
    with pytest.raises(InputError, match=message):
        harness.harness_to_file(folder, "harness.json", both)
    assert not library
    harness.harness_to_file(folder, "harness.json", HarnessSettings(["mine/task.yaml"]))
    with pytest.raises(InputError, match=message):
        harness.harness_to_file(folder, "harness.json", HarnessSettings(["theirs/task.yaml"]))
    found = harness.harness_to_file(folder, "short.json", HarnessSettings(["short", "arc_easy"]))
    files = [record["file"] for record in found["results"] if record["task"] == "arc_easy"]
    assert files == ["short/arc_easy-25shot.json", "short/arc_easy.json"]


def test_bad_inputs_are_one_line(folder, tmp_path, library, capsys, monkeypatch):
    def refused(message: str, *changes: Any) -> None:
        arguments = ["harness", "--hf", folder, "--output", tmp_path / "harness.json", *changes]
        assert message in call(evaluate_model.main, capsys, *arguments).error_line()

    def edited(name: str, **changes: Any) -> Path:
        copy = tmp_path / f"copy{len(os.listdir(tmp_path))}"
        shutil.copytree(folder, copy)
        values = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(values | changes))
        return copy

    ruler = ("--tasks", "ruler", "--lengths", 4096)
    # An export that is wrong about its length would only give a low score.
    short = edited("config.json", max_position_embeddings=2048)
    refused("config.json: max_position_embeddings is 2048, less than --lengths 4096", *ruler,
            "--hf", short)  # fmt: skip
    unknown = edited("config.json", max_position_embeddings=None)
    refused("max_position_embeddings is None, expected a positive", *ruler, "--hf", unknown)
    code = edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]})
    refused("tokenizer_config.json: names code of its own", *ruler, "--hf", code)
    refused("--tasks ruler: RULER makes samples of any length; give --lengths", "--tasks", "ruler")
    refused("--lengths 2048: of RULER's tasks only", "--tasks", "mmlu", "--lengths", 2048)
    refused("--lengths 512: RULER's smallest samples do not fit", *ruler[:3], 512)
    refused("--model-args max_length=9: is set from the folder", *ruler, "--model-args",
            "max_length=9")  # fmt: skip
    refused("--seed -1: expected a number from 0", *ruler, "--seed", -1)
    refused("--batch-size many: expected a number or auto", *ruler, "--batch-size", "many")
    refused("--model-args tp: is not NAME=VALUE", *ruler, "--model-args", "tp")
    refused("config.json: missing; give a Hugging Face folder", *ruler, "--hf", tmp_path)
    (tmp_path / "bare").mkdir()
    shutil.copyfile(folder / "config.json", tmp_path / "bare" / "config.json")
    refused("bare: has no tokenizer.json", *ruler, "--hf", tmp_path / "bare")
    (tmp_path / "other.json").write_text("{}")
    refused("not a file of the format", *ruler, "--output", tmp_path / "other.json")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        refused("the harness runs in one process, without torchrun", *ruler)
    answer = call(evaluate_model.main, capsys, "harness", "--hf", folder, *ruler)
    assert "--hf: needs --output" in answer.error_line()
    assert not library and not (tmp_path / "harness.json").exists()


def test_a_tokenizer_for_which_ruler_never_ends_is_refused(folder, monkeypatch):
    from lctw_megatron.errors import InputError
    from lctw_megatron.evaluation.harness_folder import check_words

    model = ModelFolder(folder)
    with pytest.raises(InputError, match="takes 3.0 tokens for an English word"):
        check_words(model)
    encode = type(model.tokenizer).encode_batch
    half = lambda self, texts: [np.array(ids[::2]) for ids in encode(self, texts)]  # noqa: E731
    monkeypatch.setattr(type(model.tokenizer), "encode_batch", half)
    check_words(model)


def test_without_the_library_one_line_says_how_to_install_it(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(harness_library.importlib.util, "find_spec", lambda name: None)
    arguments = ["harness", "--hf", folder, "--output", tmp_path / "o.json", "--tasks", "mmlu"]
    line = call(evaluate_model.main, capsys, *arguments).error_line()
    assert line.endswith('is not installed: pip install "lctw-megatron[harness]"')
