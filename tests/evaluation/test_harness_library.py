"""The real lm-evaluation-harness on a tiny model, without network.

Skipped, with the reason, where it is not installed: it takes 320 MB and 45 seconds with what it
needs, too much for every checkout.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lctw_megatron.conversion.hf_export import export_hf
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation import harness
from lctw_megatron.evaluation.harness_folder import ModelFolder
from lctw_megatron.evaluation.harness_library import HarnessSettings, Library
from lctw_megatron.evaluation.harness_tasks import MARGIN, RULER_MADE, Call
from tests.conversion.hf_models import make_model
from tests.tokenizer_files import real_text

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason='lm-evaluation-harness is not installed (pip install -e ".[harness]")',
)

LENGTH, VOCABULARY = 1024, 8000
CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer that takes about 1.5 tokens for a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    root = tmp_path_factory.mktemp("harness") / "hf"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    wonderwords = pytest.importorskip("wonderwords").RandomWord()
    words = [word for words in wonderwords._categories.values() for word in words]
    tokenizer.train_from_iterator([real_text(), *(f" {word}" for word in words)], trainer)
    make_model("llama", root, vocab_size=VOCABULARY, max_position_embeddings=4096)
    tokenizer.save(str(root / "tokenizer.json"))
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (root / "tokenizer_config.json").write_text(json.dumps(config))
    return root


def samples(library: Library, call: Call) -> list[dict[str, Any]]:
    (task,) = library.load(call)
    return list(task.test_docs())


def test_samples_depend_on_no_task_or_length_before(folder):
    library = Library(ModelFolder(folder), HarnessSettings(["x"], [LENGTH], offline=True))
    call = Call("ruler_cwe", LENGTH)
    alone = samples(library, call)
    samples(library, Call("ruler_vt", 2 * LENGTH))
    samples(library, Call("ruler_cwe", 2 * LENGTH))
    assert samples(library, call) == alone and len(alone) == 500
    other = HarnessSettings(["x"], [LENGTH], offline=True, seed=1)
    assert samples(Library(ModelFolder(folder), other), call) != alone


def test_no_prompt_of_ruler_loses_its_first_tokens_but_at_its_own_length_they_would(folder):
    model = ModelFolder(folder)
    library = Library(model, HarnessSettings(["x"], [LENGTH], offline=True))
    cut = {}
    for task in RULER_MADE:
        (loaded,) = library.load(Call(task, LENGTH))
        room = LENGTH - loaded.config.generation_kwargs["max_gen_toks"]
        texts = [f"{doc['input']} {doc['gen_prefix']}" for doc in loaded.test_docs()]
        tokens = [len(ids) + 1 for ids in model.tokenizer.encode_batch(texts)]
        cut[task] = sum(count > room for count in tokens)
        assert max(tokens) <= room + MARGIN, task
    assert cut["ruler_fwe"] > 100


def test_six_tasks_of_ruler_and_one_over_a_jsonl_file_run_offline_and_equal_after_an_export(
    folder, tmp_path, monkeypatch
):
    lines = [{"question": f"The capital of {k} is", "answer": f" {v}"} for k, v in CAPITALS.items()]
    (tmp_path / "capitals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "capitals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "capitals.jsonl")}},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    }
    (tmp_path / "capitals.yaml").write_text(json.dumps(task))  # JSON is YAML
    import_hf(folder, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "exported")
    settings = HarnessSettings(
        ["ruler", str(tmp_path / "capitals.yaml")],
        [LENGTH],
        limit=2,
        offline=True,
        log_samples=True,
    )
    found = []
    for name, model in (("first", folder), ("second", tmp_path / "exported")):
        result = harness.harness_to_file(model, tmp_path / f"{name}.json", settings)
        for record in result["results"]:
            del record["seconds"], record["file"]
        found.append(result["results"])
        assert result["ruler"][str(LENGTH)]["tasks"] == list(RULER_MADE)
        answers = (tmp_path / name / "ruler_vt-1024.samples.jsonl").read_text().splitlines()
        assert len(answers) == 2 and json.loads(answers[0])["resps"]
    assert found[0] == found[1]
    (capitals,) = [record for record in found[0] if record["task"] == "capitals"]
    assert capitals["samples"] == 2 and capitals["metrics"]["perplexity"][0] > 1


def test_what_cannot_be_had_is_one_line(folder):
    library = Library(ModelFolder(folder), HarnessSettings(["x"], [LENGTH], offline=True))
    with pytest.raises(InputError, match="task niah_single_2: its data can't be had .* without"):
        library.load(Call("niah_single_2", LENGTH))


def test_a_word_that_is_no_task_and_a_folder_that_cannot_be_loaded_are_one_line(folder, tmp_path):
    library = Library(ModelFolder(folder), HarnessSettings(["x"], offline=True))
    with pytest.raises(InputError, match="--tasks arc_eazy: neither a task of"):
        library.load(Call("arc_eazy"))
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    library = Library(ModelFolder(broken), HarnessSettings(["x"], offline=True))
    with pytest.raises(InputError, match="broken: hf can't load it"):
        library._open(4096)
