"""Every JSON file is read by one reader, and damage is one line: seeded, with the case printed."""

import random
from contextlib import suppress
from pathlib import Path

import pytest

import lctw_megatron
from lctw_megatron.conversion.hf_config import read_config
from lctw_megatron.data.json_object import parse_json, read_json_object
from lctw_megatron.data.manifest import SidecarManifest, TokenManifest, read_manifest
from lctw_megatron.data.metrics_file import read_metrics
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.result_file import read_evaluation
from lctw_megatron.launch.launch_request import read_request
from lctw_megatron.model.checkpoint import read_manifest as read_checkpoint
from tests.damage import damaged_json

HOSTILE = {
    "empty": b"",
    "cut": b'{"a": [1, 2',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "60 levels": b"[" * 60 + b"]" * 60,
    "5,000 digits": b'{"a": ' + b"7" * 5000 + b"}",
    "half a pair": b'{"a": "\\ud800"}',
    "half a pair as a name": b'{"\\uDFFF": 1}',
    "not UTF-8": b'{"a": "\xff"}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_json_is_one_line_that_names_the_file(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json: not valid JSON") as error:
        read_json_object(tmp_path / "a.json")
    assert len(str(error.value)) < 500


def test_pairs_nan_and_plain_nesting_are_read():
    assert parse_json(b'{"a": "\\ud83d\\ude42"}') == {"a": "\U0001f642"}
    assert str(parse_json("NaN")) == "nan"
    assert parse_json("[" * 40 + "]" * 40)
    assert parse_json('{"a": 1, "a": 2}', len) == 2


def test_no_module_reads_json_or_yaml_in_a_way_of_its_own():
    # documents.py: lines of a corpus, each of which may be broken without an end of the work.
    readers = {"data/json_object.py", "data/preprocessing/documents.py"}
    package = Path(lctw_megatron.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        text = path.read_text()
        words = ("json.load", "JSONDecoder", "yaml.load", "validate_json", "yaml.safe_")
        if any(word in text for word in words):
            found.add(path.relative_to(package).as_posix())
    assert found == readers | {"config/yaml_text.py"}


TOKENIZER = {
    "kind": "sentencepiece", "path": "x", "digest": "0", "vocab_size": 9, "bos_id": 1,
    "eos_id": 2, "add_bos": True, "add_eos": True,
}  # fmt: skip
TOKENS = {
    "fingerprint": "0", "sample_digest": "0", "documents": 1, "tokens": 5, "dtype": "uint16",
    "tokenizer": TOKENIZER, "source": {"files": 1},
    "format": "lctw-megatron tokens 1",
}  # fmt: skip
HF = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu",
    "max_position_embeddings": 256, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
MODEL = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2}
CHECKPOINT = {"step": 1, "model": MODEL, "dtype": "fp32", "tokenizer": TOKENIZER}
ORDER = {"recipe": "r.yaml", "overrides": [], "cluster": "slurm", "stages": []}
EVALUATION = {"format": "lctw-megatron evaluation 1", "loss": 1.0, "sequences": [[0, 0]]}
METRICS = {"step": 1, "loss/weighted": 2.5, "targets/all": 8}

AREAS = {
    "token manifest": ("x.json", TOKENS, lambda p: read_manifest(str(p / "x"), TokenManifest)),
    "sidecar manifest": ("x.json", TOKENS, lambda p: read_manifest(str(p / "x"), SidecarManifest)),
    "checkpoint": ("checkpoint.json", CHECKPOINT, read_checkpoint),
    "config.json": ("config.json", HF, read_config),
    "order.json": ("launch/order.json", ORDER, read_request),
    "evaluation": ("e.json", EVALUATION, lambda p: read_evaluation(p / "e.json")),
    "metrics": ("m.jsonl", METRICS, lambda p: read_metrics(p / "m.jsonl")),
}


@pytest.mark.parametrize("area", AREAS)
def test_damage_is_an_input_error_or_harmless(tmp_path, area):
    name, value, read = AREAS[area]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for seed in range(400):
        content = damaged_json(value, random.Random(f"{area} {seed}"))
        print(f"{area}, seed {seed}: {content[:400]!r}")  # pytest shows it of what fails
        path.write_bytes(content)
        with suppress(InputError):
            read(tmp_path)
